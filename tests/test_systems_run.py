"""Every system in short form, through the embedded models: each stage starts from the one before, trains, goes on, is shown and exported."""

import pytest
import torch
from systems import NAMES, STAGES

import main as program
from options import parse
from toybox.mesh import object_mesh
from toybox.objects import OBJECTS

QUICK = """--sd_version embedded --w 8 --h 8 --size_scale 1 --W 24 --H 24 --max_steps 32 --num_steps 16 --upsample_steps 8 --num_levels 4
    --log2_hashmap_size 10 --desired_resolution 32 --hidden_dim 16 --grid_size 16 --mcubes_resolution 24 --decimate_target 200 --voxel_size 12
    --dataset_size_valid 2 --dataset_size_test 2 --eval_interval 0 --tet_grid_size 16 --dmtet_reso_scale 2 --inversion_steps 2 --device cpu
    --texture_size 32 --mesh_format glb""".split()


@pytest.fixture(scope="module")
def guide(tmp_path_factory):
    from mesh.export import write_ply

    return write_ply(object_mesh(OBJECTS["mushroom"], 16, 200), tmp_path_factory.mktemp("guide") / "mushroom.ply")


CHAINS = [*STAGES.values(), *([name] for name in NAMES if not any(name in stages for stages in STAGES.values()))]


@pytest.mark.slow
@pytest.mark.parametrize("stages", CHAINS, ids=lambda stages: stages[0])
def test_a_system_runs_through_all_its_stages(stages, tmp_path, guide):
    before = None
    for stage in stages:
        workspace = tmp_path / stage
        typed = ["--text", "a mushroom", "--workspace", workspace, "--config", f"configs/systems/{stage}.yaml", *QUICK]
        typed += ["--init_with", before] if before else []
        typed += ["--guide_shape", guide] if stage.startswith("sketchshape") else []
        for iters in (2, 3):  # the second call goes on where the first ended
            opt = parse([*map(str, typed), "--iters", str(iters)])
            assert opt.sd_version == "embedded" and opt.hf_key is None
            torch.manual_seed(0)
            program.run(opt)
            assert (workspace / "checkpoints" / f"step_{iters:07d}_final.pt").exists()
        shown = parse(
            ["--workspace", str(workspace), "--test", "--save_mesh", "--mesh_format", "glb", "--texture_size", "32"]
        )
        program.run(shown)
        assert (workspace / "results" / "step_0000003_rgb.mp4").exists()
        log = (workspace / "log.txt").read_text()
        assert "no mesh" in log or (workspace / "mesh" / "mesh.glb").exists()
        before = workspace
