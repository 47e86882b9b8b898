"""Every system in short form, through the embedded models: each stage starts from the one before, trains, goes on, is shown and exported."""

import json
import math

import pytest
import torch
from PIL import Image
from systems import ALSO, NAMES, STAGES, shown

import main as program
from errors import MISTAKE
from options import parse
from toybox.mesh import object_mesh
from toybox.objects import OBJECTS
from toybox.render import compose, orbit_cameras, trace

QUICK = """--sd_version embedded --w 8 --h 8 --size_scale 1 --W 24 --H 24 --max_steps 32 --num_steps 16 --upsample_steps 8 --num_levels 4
    --log2_hashmap_size 10 --desired_resolution 32 --hidden_dim 16 --grid_size 16 --mcubes_resolution 24 --decimate_target 200 --voxel_size 12
    --dataset_size_valid 2 --dataset_size_test 2 --eval_interval 0 --tet_grid_size 16 --dmtet_reso_scale 2 --inversion_steps 2 --device cpu
    --texture_size 32 --mesh_format glb""".split()


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    from mesh.export import write_ply

    return write_ply(object_mesh(OBJECTS["mushroom"], 16, 200), tmp_path_factory.mktemp("guide") / "mushroom.ply")


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A mushroom from its front, where the embedded models expect it, and from its left: photo_0_rgba.png and transforms.json."""
    folder = tmp_path_factory.mktemp("photos")
    thing, c2w = OBJECTS["mushroom"], orbit_cameras(torch.tensor([80.0, 80.0]), torch.tensor([0.0, 90.0]), 3.2)
    layers = trace(thing, c2w, 30.0, 64, c2w[:, :3, 2], torch.ones(2))
    rgb = compose(layers, torch.tensor(thing.default), torch.ones(3))
    z_up = torch.tensor([[1.0, 0, 0], [0, 0, -1], [0, 1, 0]])
    frames = []
    for i, picture in enumerate(torch.cat([rgb, layers.alpha[..., None]], -1)):
        Image.fromarray((255 * picture).byte().numpy()).save(folder / f"photo_{i}_rgba.png")
        matrix = torch.eye(4)
        matrix[:3, :4] = z_up @ c2w[i, :3, :4]
        frames.append({"file_path": f"photo_{i}_rgba.png", "transform_matrix": matrix.tolist()})
    content = {"camera_angle_x": math.radians(30), "frames": frames}
    (folder / "transforms.json").write_text(json.dumps(content))
    return folder


CHAINS = [*STAGES.values(), *ALSO.values()]
CHAINS += [[name] for name in NAMES if not any(name in stages for stages in CHAINS)]


@pytest.mark.slow
@pytest.mark.parametrize("stages", CHAINS, ids=lambda stages: stages[0])
def test_a_system_runs_through_all_its_stages(stages, tmp_path, guide, photos):
    before = None
    for stage in stages:
        workspace = tmp_path / stage
        typed = ["--workspace", workspace, "--config", f"configs/systems/{stage}.yaml", *QUICK]
        typed += shown(stage, "a mushroom", guide, photos / "photo_0_rgba.png", photos)
        typed += ["--init_with", before] if before else []
        for iters in (2, 3):  # the second call goes on where the first ended
            opt = parse([*map(str, typed), "--iters", str(iters)])
            assert opt.sd_version == "embedded" and opt.hf_key is None and opt.zero123 is None
            torch.manual_seed(0)
            program.run(opt)
            assert (workspace / "checkpoints" / f"step_{iters:07d}_final.pt").exists()
        evaluate = ["--test", "--save_mesh", "--mesh_format", "glb", "--texture_size", "32"]
        program.run(parse(["--workspace", str(workspace), *evaluate]))
        assert (workspace / "results" / "step_0000003_rgb.mp4").exists()
        log = (workspace / "log.txt").read_text()
        assert "no mesh" in log or (workspace / "mesh" / "mesh.glb").exists()
        before = workspace


# ---- what cannot work: one line each --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def surface(tmp_path_factory):
    """The workspace of a run that trained a surface."""
    workspace = tmp_path_factory.mktemp("surface")
    program.run(parse(["--text", "a mushroom", "--workspace", str(workspace), "--dmtet", *QUICK, "--iters", "1"]))
    return workspace


WRONG = {  # what is typed -> what is said
    "zero123 --image {no}": "{no}: ",
    "zero123 --image {text}": "{text}: ",
    "image --image_config {no}": "{no}: ",
    "co3d --text a --photos {no}": "{no}: ",
    "zero123": "zero123.yaml: this system starts from photographs; give --image",
    "image-text --text a": "image-text.yaml: this system starts from photographs; give --image",
    "co3d --photos {photos}": "co3d.yaml: this system wants a prompt beside the photographs; give --text",
    "zero123 --image {photo} --init_with {surface}": "that run trained a surface; add --dmtet",
    "image-dreamfusion --image {photo} --text a --init_with {surface}": "that run trained a surface; add --dmtet",
    "zero123-geometry --image {photo} --init_with {no}": "no such folder or file",
    "zero123-geometry --image {photo} --init_with {photo}": "--init_with {photo}: ",
    "zero123-geometry --image {photo} --init_with {photos}": "--init_with {photos}: ",
    "magic123-refine --image {photo} --init_with {surface}": "this system wants a prompt beside the photographs; give --text",
}


@pytest.mark.parametrize("typed", WRONG)
def test_a_wrong_picture_or_start_is_one_line(typed, tmp_path, photos, surface, capsys):
    (tmp_path / "words.txt").write_text("no picture")
    places = {"no": tmp_path / "nowhere", "text": tmp_path / "words.txt", "photos": photos, "surface": surface}
    places["photo"] = photos / "photo_0_rgba.png"
    name, *words = (word.format(**places) for word in typed.split())
    workspace = tmp_path / "workspace"
    config = ["--config", f"configs/systems/{name}.yaml", "--workspace", str(workspace), *QUICK, "--iters", "1"]
    assert program.main([*config, *words]) == MISTAKE
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    assert WRONG[typed].format(**places) in line and not list(workspace.rglob("*.pt"))
