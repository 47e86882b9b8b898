"""DreamBooth3D from its command line: all stages, a kill in each of them, mistakes; and the pictures that nobody took."""

import csv
import importlib.util
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_photos

import pseudo_views
from errors import UserError
from guidance.prompt import PromptBank, blend_of
from nerf.checkpoint import read
from nerf.photos import load_references
from subject_state import RECORD, STAGES, State

specification = importlib.util.spec_from_file_location("dreambooth3d", ROOT / "scripts" / "dreambooth3d.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)

VIEW = SimpleNamespace(
    theta_range=(15.0, 100.0), default_azimuth=0.0, default_radius=3.2, default_fovy=30.0, default_polar=80.0
)


def typed(folder, *more):
    """A command line for the embedded model that takes seconds a stage."""
    photos = write_photos(folder / "photos")
    words = (
        f"--instance_dir {photos} --workspace {folder / 'work'} --device cpu --num_views 3 --max_train_steps 2 --rank 2"
    )
    words += " --snapshots partial:1#full:2 --num_class_images 2 --sample_steps 3 --num_validation_images 0 --instance_views 0"
    words += " --checkpointing_steps 1 --train_batch_size 1"
    named = ["--prompt", "a sks teddy", "--class_prompt", "a teddy"]
    scene = "--iters 2 --w 16 --h 16 --W 24 --H 24 --max_steps 32 --dataset_size_valid 2 --dataset_size_test 2 --mcubes_resolution 24"
    scene += " --tet_grid_size 16 --decimate_target 200 --texture_size 0 --eval_interval 1"
    return [*(word.replace("#", " ") for word in words.split()), *named, *more, "--", *scene.split()]


def scene_of(workspace, stage):
    (path,) = (workspace / stage / "checkpoints").glob("*_final.pt")
    return read(path)["scene"]


def weights_of(workspace, name):
    return (workspace / "adapters" / name / "pytorch_lora_weights.safetensors").read_bytes()


# -- the views -----------------------------------------------------------------------------------------------------------


def test_cameras_all_around_at_several_elevations():
    cameras = pseudo_views.around(VIEW, 24, 16)
    assert len(cameras) == 24 and len(set(cameras.polar.tolist())) == 3
    assert 15 < cameras.polar.min() < 50 and 85 < cameras.polar.max() < 100
    assert (cameras.polar[0], cameras.azimuth[0]) == (80, 0)
    for polar in cameras.polar.unique():
        turns = cameras.azimuth[cameras.polar == polar].remainder(360).sort().values
        gaps = torch.diff(turns, append=turns[:1] + 360)
        assert torch.allclose(gaps, gaps.mean().expand_as(gaps), atol=1e-3)
    assert len(pseudo_views.around(VIEW, 3, 16)) == 3


def test_a_shift_that_one_picture_has_alone_goes_and_a_common_one_stays():
    generator = torch.Generator().manual_seed(0)
    rgb = 0.3 + 0.2 * torch.rand(5, 16, 16, 3, generator=generator)
    mask = torch.zeros(5, 16, 16)
    mask[:, 4:12, 4:12] = 1
    own = torch.tensor([0.1, 0.0, 0.0, 0.0, -0.1])
    drawn = rgb + 0.2 + own[:, None, None, None] * mask[..., None]
    drawn[2, 4:7, 4:12] = 0  # newly drawn: a minority
    even, found = pseudo_views.steady(drawn, rgb, mask)
    assert torch.allclose(found, own[:, None].expand(-1, 3), atol=1e-5)
    assert torch.allclose(even[[0, 4]], (rgb + 0.2)[[0, 4]], atol=1e-5)
    assert (even[2, 4:7, 4:12] == 0).all()


def test_the_outline_follows_what_was_drawn():
    alpha = torch.zeros(1, 48, 48)
    alpha[:, 12:36, 12:36] = 1
    scene = pseudo_views.Scene(pseudo_views.around(VIEW, 3, 48)[:1], torch.ones(1, 48, 48, 3), alpha)
    drawn = torch.ones(1, 48, 48, 3) * torch.tensor([0.8, 0.9, 1.0])
    drawn[:, 10:36, 14:36] = 0.2  # higher, and less wide
    drawn[:, 0:4, 0:4] = 0.2  # far from it: nothing of the object
    drawn[:, 20:28, 20:28] = torch.tensor([0.8, 0.9, 1.0])  # as bright as the background, but within
    mask, behind = pseudo_views.outlines(scene, drawn)
    assert torch.allclose(behind, torch.tensor([[0.8, 0.9, 1.0]]))
    assert mask[0, 11, 20] > 0.5 and mask[0, 20, 12] < 0.5 and mask[0, 2, 2] == 0 and mask[0, 24, 24] == 1


def test_captions_tell_the_view():
    found = pseudo_views.captions(
        "a x teddy", torch.tensor([80.0, 80.0, 30.0]), torch.tensor([0.0, 92.0, -178.0]), 8, 45.0
    )
    assert found == ["a x teddy, front view", "a x teddy, left side view", "a x teddy, overhead back view"]


# -- the command -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_all_stages_once_and_each_alone(tmp_path, capfd):
    words, work = typed(tmp_path, "--context", "a green sks teddy"), tmp_path / "work"
    at = words.index("--")
    assert script.main([*words[:at], "--stage", "nerf", *words[at:]]) == 2
    assert "needs the stage personalise first" in capfd.readouterr().err
    for stage in ("personalise", "nerf", "views"):
        assert script.main([*words[:at], "--stage", stage, *words[at:]]) == 0
    capfd.readouterr()
    assert script.main(words) == 0
    assert capfd.readouterr().err.count("finished already") == 3
    table = list(csv.DictReader((work / "pseudo" / "views.csv").open()))
    assert len(table) == 3 and all((work / "pseudo" / row["image"]).is_file() for row in table)
    opt = SimpleNamespace(image=None, image_config=str(work / "pseudo" / "views.csv"), photos=None, default_fovy=30.0)
    assert load_references(opt).rgb.shape[:2] == (3, 64)
    assert (work / "mesh" / "mesh" / "mesh.glb").is_file()
    page = (work / "report.html").read_text()
    for place in (
        "photos/0.jpg",
        "pseudo/sheet.png",
        *(f"{stage}/report.html" for stage in ("nerf", "final", "mesh", "context")),
    ):
        assert f'"{place}"' in page and (work / place).is_file()

    before, made = weights_of(work, "multiview"), (work / "nerf" / "report.html").stat().st_mtime_ns
    assert weights_of(work, "partial") != before
    assert script.main(words) == 0 and capfd.readouterr().err.count("finished already") == len(STAGES)
    assert script.main([*words[:at], "--strength", "0.9", "--stage", "views,multiview", *words[at:]]) == 0
    assert "views: other settings than before" in capfd.readouterr().err and weights_of(work, "multiview") != before
    assert (work / "nerf" / "report.html").stat().st_mtime_ns == made
    other = [*words[:at], "--prompt", "a sks snowman", "--class_prompt", "a snowman", *words[at:]]
    assert script.main(other) == 2 and "is of another subject" in capfd.readouterr().err


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert script.main(typed(folder)) == 0
    return folder / "work"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "sign"),
    [
        ("personalise", "adapters/training.pt"),
        ("nerf", "nerf/checkpoints/*.pt"),
        ("views", "pseudo/*_drawn.png"),
        ("multiview", "pseudo/views.csv"),
        ("final", "final/checkpoints/*.pt"),
        ("mesh", "mesh/config.yaml"),
    ],
)
def test_killed_in_a_stage_it_ends_the_same(stage, sign, undisturbed, tmp_path):
    words, work = typed(tmp_path), tmp_path / "work"
    command = [sys.executable, str(ROOT / "scripts" / "dreambooth3d.py"), *words]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not list(work.glob(sign)):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 60
    while script.main(words) == 2 and time.monotonic() < deadline:  # main.py still saves
        time.sleep(0.2)
    for name in ("partial", "full", "multiview"):
        assert weights_of(work, name) == weights_of(undisturbed, name)
    for name in ("final", "mesh"):
        one, other = scene_of(work, name), scene_of(undisturbed, name)
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_what_a_stage_took_is_done_again_when_that_is(tmp_path):
    state = State(tmp_path, {"prompt": "a"}, False)
    for stage in ("personalise", "nerf", "views"):
        assert state.begin(stage, f"key of {stage}")
        state.end(stage, 1.0)
    state = State(tmp_path, {"prompt": "a"}, False)
    assert all(state.complete(stage, f"key of {stage}") for stage in ("personalise", "nerf", "views"))
    assert not state.complete("nerf", "another key")
    assert state.begin("nerf", "another key") and not state.begin("nerf", "another key")
    assert state.complete("personalise", "key of personalise") and not state.complete("views", "key of views")
    with pytest.raises(UserError, match="another subject"):
        State(tmp_path, {"prompt": "b"}, False)
    assert (tmp_path / RECORD).is_file() and State(tmp_path, {"prompt": "b"}, True).inputs == {"prompt": "b"}


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--instance_dir", "absent"], "--instance_dir absent: no such folder"),
        (["--instance_dir", "empty"], "there are no pictures in it"),
        (["--instance_dir", "broken"], "cannot be read as a picture"),
        (["--prompt", ""], "--prompt is missing"),
        (["--class_prompt", "a dog"], "--class_prompt"),
        (["--stage", "nerv"], "did you mean nerf?"),
        (["--stage", "context"], "--context is missing"),
        (["--context", "a glorious sks teddy"], '"glorious"'),
        (["--strength", "0"], "--strength 0: must be in (0, 1]"),
        (["--snapshots", "full:1"], "must name partial and full"),
        (["--num_view", "3"], "did you mean --num_views?"),
    ],
)
def test_a_mistake_is_one_line(more, line, tmp_path, monkeypatch, capsys):
    words = typed(tmp_path)
    at = words.index("--")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "broken", 2)
    (tmp_path / "broken" / "1.png").write_bytes(b"half a picture")
    assert script.main([*words[:at], *more, *words[at:]]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and line in said
    assert not (tmp_path / "work").exists()


def test_flags_that_the_stages_set_are_refused(tmp_path, capsys):
    assert (
        script.main([*typed(tmp_path), "--lora", "x"]) == 2
        and "--lora: is chosen by this script" in capsys.readouterr().err
    )


# -- another guise ---------------------------------------------------------------------------------------------------------


class Letters:
    """A text encoder that answers with the text's letters."""

    def embed(self, texts):
        return torch.tensor([[[float(text.count("e")), float(text.count("s"))]] for text in texts])

    def excess(self, text):
        return 0


def test_another_prompt_is_mixed_into_every_wording():
    plain, other = (PromptBank(Letters(), text, view_words=8) for text in ("a sks teddy", "a green sks teddy"))
    mixed = PromptBank(Letters(), "a sks teddy", view_words=8, blend=("a green sks teddy", 0.25))
    for name in ("text", "plain"):
        before, after = getattr(plain, name), getattr(other, name)
        assert torch.allclose(getattr(mixed, name), 0.75 * before + 0.25 * after) and not torch.equal(before, after)
    assert torch.equal(mixed.null, plain.null) and torch.equal(mixed.negative, plain.negative)


def test_what_blend_names():
    assert blend_of(SimpleNamespace(blend="a green teddy: 0.3")) == ("a green teddy", 0.3)
    assert blend_of(SimpleNamespace(blend=None)) == (None, 0.0)
    for wrong in ("a green teddy", ":0.3", "a green teddy:2", "a green teddy:x"):
        with pytest.raises(UserError, match="PROMPT:SHARE"):
            blend_of(SimpleNamespace(blend=wrong))
