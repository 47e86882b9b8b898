"""What both viewers drive, without a window: looking, training meanwhile, jobs, prompts, closing, errors."""

import time
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from standins import BallGuidance, FormulaScene, VoxelScene, lopsided

import nerf.control
from errors import UserError
from nerf import build_scene, checkpoint
from nerf.control import Control
from nerf.look import MODES
from nerf.trainer import Trainer


class Guidance(BallGuidance):
    """Knows every prompt but one."""

    def follow(self, opt):
        if opt.text == "gibberish":
            raise UserError("--text gibberish: unknown")
        self.text, self.scale = opt.text, opt.guidance_scale(0)


def until(true, seconds=60):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "this takes too long"
        time.sleep(0.01)


def settled(control):
    """When all jobs are done: the message that is left."""
    until(lambda: not control._jobs)
    return control.message


@pytest.fixture
def control(options):
    """`control("--iters", 9)`: of a soft ball, not started."""

    def make(*typed, scene=None, guidance=True):
        opt = options("--iters", 100000, "--eval_interval", 0, *typed)
        scene = VoxelScene(opt) if scene is None else scene(opt)
        return Control(Trainer(opt, scene, Guidance() if guidance else None, "cpu"))

    return make


@contextmanager
def running(control, training=False):
    """Started, paused unless `training`, and closed at the end."""
    control.training = training
    control.start()
    try:
        yield control
    except BaseException:
        control._closing = True
        raise
    control.close()


# ---- looking ----------------------------------------------------------------------------------------------------------------

CHANGES = [
    {"polar": 40.0},
    {"azimuth": 70.0},
    {"radius": 4.5},
    {"fovy": 45.0},
    {"target": (0.3, 0.0, 0.0)},
    {"mode": "albedo", "background": (0.2, 0.5, 0.9)},
    {"mode": "lambertian"},
    {"mode": "textureless"},
    {"mode": "normal"},
    {"mode": "depth"},
    {"light": (20.0, 100.0)},
    {"light": (160.0, 100.0)},
    {"light": (20.0, 100.0), "ambient": 0.9},
    {"background": (0.1, 0.2, 0.3)},
    {"box": (-0.5, -0.5, -0.5, 0.1, 0.5, 0.5)},
    {"max_steps": 16},
    {"dt_gamma": 0.045},
]


def lopsided_scene(opt):
    scene = FormulaScene(opt, lambda x: lopsided(x, 20.0))
    scene.update_occupancy(0, torch.Generator().manual_seed(0))
    return scene


def test_everything_in_a_look_changes_the_picture(control):
    control = control("--cuda_ray", scene=lopsided_scene)
    assert control.ignored == frozenset()
    look = replace(control.start_look, polar=70.0, azimuth=20.0)
    torch.manual_seed(0)
    seen = [control.picture(look)]
    for change in CHANGES:
        seen.append(control.picture(replace(look, **change)))
        assert seen[-1].shape == (24, 24, 3) and 0 <= seen[-1].min() and seen[-1].max() <= 1
        for other in seen[:-1]:
            assert (seen[-1] - other).abs().max() > 0.02, change
    assert control.picture(replace(look, height=30, width=20)).shape == (30, 20, 3)
    assert control.picture(look, 0.5).shape == (12, 12, 3)


def test_a_picture_leaves_the_scene_as_it_was(control):
    control = control("--cuda_ray")
    scene = control.trainer.scene
    before = scene.sampling
    control.picture(replace(control.start_look, max_steps=20, box=(-0.1,) * 3 + (0.1,) * 3))
    assert scene.sampling == before
    with pytest.raises(nerf.control._Abandoned):
        control.picture(control.start_look, stop=lambda: True)
    assert scene.sampling == before and scene.training


def test_without_an_occupancy_grid_the_number_of_samples_counts_all_the_same(control):
    control = control(scene=lambda opt: FormulaScene(opt, lopsided))
    assert control.ignored == {"dt_gamma"}
    look = control.start_look
    few, usual = control.picture(replace(look, max_steps=16)), control.picture(look)
    assert (few - usual).abs().max() > 0.02
    assert torch.equal(control.picture(replace(look, max_steps=24)), usual)  # 16 + 8, as the options say


def test_a_mesh_has_every_mode_and_says_what_it_ignores(control):
    control = control("--dmtet", "--tet_grid_size", 12, scene=build_scene)
    assert control.ignored == {"box", "max_steps", "dt_gamma"}
    look = replace(control.start_look, polar=60.0, light=(20.0, 100.0))
    seen = [control.picture(replace(look, mode=mode)) for mode in MODES if mode != "lambertian"]  # lit, so is `image`
    for i, picture in enumerate(seen):
        assert all((picture - other).abs().max() > 0.02 for other in seen[:i])


def test_of_several_particles_the_first_is_shown(control):
    control = control("--particles", 2, scene=build_scene)
    first, second = control.trainer.scene.scenes
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.zero_()
    control.trainer.average.restart()
    look = control.start_look
    alone = Control(Trainer(control.trainer.opt, first, Guidance(), "cpu"))
    assert torch.equal(control.picture(look), alone.picture(look))


def test_a_still_picture_becomes_full_and_smooth_and_a_moving_one_is_coarse(control):
    with running(control()) as control:
        until(lambda: control.frame and control.frame.samples == control.look_now.samples)
        still = control.frame
        assert still.scale == 1 and still.picture.dtype == np.uint8 and still.picture.shape == (24, 24, 3)
        control.move(lambda look: look.orbited(30, 0))
        frame = control.wait(still.number, 60)
        assert frame.look.azimuth == -30 and frame.scale < 1 and frame.picture.shape == (24, 24, 3)
        until(lambda: control.frame.samples == 4 and control.frame.look == control.look_now)
        assert control.wait(control.frame.number, 0.05) is None  # nothing more to do
        number = control.frame.number
        control.look(dynamic=False, azimuth=10.0)
        assert control.wait(number, 60).scale == 1
        control.look(samples=6)
        until(lambda: control.frame.samples == 6)


def test_the_mean_of_a_still_picture_is_of_pictures_that_differ_by_parts_of_a_pixel(control):
    look = control().start_look
    shifted = look.cameras(shift=(0.5, 0.0)).rays()[1] - look.cameras().rays()[1]
    step = look.cameras().rays()[1][0, 12, 13] - look.cameras().rays()[1][0, 12, 12]
    assert torch.allclose(shifted[0, 12, 12], 0.5 * step, atol=0.02 * float(step.norm()))


def test_a_long_picture_is_abandoned_for_what_is_wanted_now(control):
    calls = []

    def slow(x):
        calls.append(time.sleep(0.01))
        return lopsided(x)

    with running(control("--max_ray_batch", 64, scene=lambda opt: FormulaScene(opt, slow))) as control:
        control.look(height=96, width=96)  # 144 parts, more than a second
        until(lambda: control.frame and control.frame.look == control.look_now)
        for change in ({"azimuth": 90.0}, {"mode": "normal"}):
            time.sleep(nerf.control.REST + 0.2)  # the full one is under way
            number = control.frame.number
            control.look(**change)
            frame = control.wait(number, 60)
            assert frame.look == control.look_now and frame.scale < 1
        time.sleep(nerf.control.REST + 0.2)
        number = control.frame.number
    assert control.frame.number == number  # nor does anybody wait for it at the end


def test_a_coarse_picture_that_is_not_coarse_enough_gives_way_to_a_coarser_one(control):
    def slow(x):
        time.sleep(2e-5 * len(x))
        return lopsided(x)

    control = control("--max_ray_batch", 64, scene=lambda opt: FormulaScene(opt, slow))
    control.start_look = control.look_now = replace(control.start_look, height=240, width=240)
    with running(control) as control:  # 72 pixels along an edge would take 2 seconds
        until(lambda: control.frame)
        assert control.frame.number == 1 and control.frame.scale == nerf.control.SMALLEST
        assert len(np.unique(control.frame.picture)) > 10


def test_a_change_is_drawn_even_if_nobody_moves_any_more_when_its_turn_comes(control, monkeypatch):
    monkeypatch.setattr(nerf.control, "REST", 0.0)
    with running(control()) as control:
        until(lambda: control.frame and control.frame.samples == 4)
        control.look(azimuth=50.0)
        until(lambda: control.frame.look.azimuth == 50)


# ---- training ---------------------------------------------------------------------------------------------------------------


def test_training_advances_while_one_looks_and_stops_when_told(control):
    with running(control(), training=True) as control:
        until(lambda: control.trainer.step > 30 and control.numbers and control.frame.step > 10)
        assert control.numbers["loss/total"] > 0 and control.speed > 0
        assert control.toggle() is False
        until(lambda: control.frame.samples == 4)  # the full picture of what stands still now
        step = control.trainer.step
        time.sleep(0.1)
        assert control.trainer.step == step == control.frame.step
        assert control.toggle() is True
        until(lambda: control.trainer.step > step)


def test_closing_saves_and_the_next_one_goes_on(control):
    with running(control(), training=True) as first:
        until(lambda: first.trainer.step > 3)
    step = first.trainer.step
    assert checkpoint.newest_first(first.trainer.checkpoints)[0].name == f"step_{step:07d}.pt"
    with running(control()) as second:
        until(lambda: second.frame)
    assert second.trainer.step == step


def test_the_end_of_the_training_is_said_once_and_saved(control):
    with running(control("--iters", 5), training=True) as control:
        until(lambda: "training is done" in control.message)
        assert not control.training
        (final,) = control.trainer.checkpoints.glob("*_final.pt")
        written = final.stat().st_mtime_ns
        control.toggle()
        until(lambda: not control.training)
        until(lambda: control.frame.samples == 4)
    assert control.trainer.step == 5 and final.stat().st_mtime_ns == written


def test_results_alone_are_shown_too(control):
    with running(control("--iters", 2), training=True) as trained:
        until(lambda: "training is done" in trained.message)
    with running(control(guidance=False), training=True) as shown:
        until(lambda: shown.frame)
        assert shown.trainer.step == 2
        assert shown.toggle() is False and "--test" in shown.message
        for job in ("save", "restart"):
            shown.do(job)
            assert settled(shown).startswith(f"{job}: only results")
        shown.do("picture")
        assert "step_0000002_view_1.png" in settled(shown)
    assert len(list(shown.trainer.checkpoints.iterdir())) == 1


# ---- jobs -------------------------------------------------------------------------------------------------------------------


def test_jobs_write_their_files(control):
    from PIL import Image

    with running(control()) as control:
        control.look(background=(0.0, 0.0, 1.0))
        for job, kinds in (("save", ["pt"]), ("picture", ["png"]), ("picture", ["png"]), ("video", ["mp4"] * 3)):
            control.do(job)
            settled(control)
            assert [path.suffix[1:] for path in control.written] == kinds
            assert all(path.stat().st_size > 100 for path in control.written)
        control.do("export")
        assert "mesh.glb" in settled(control)
        assert {"mesh.glb", "mesh.obj"} <= {path.name for path in control.written}
        pictures = sorted((control.trainer.workspace / "results").glob("*view*.png"))
        assert [path.name[-10:] for path in pictures] == ["view_1.png", "view_2.png"]
        picture = np.asarray(Image.open(pictures[0])).astype(int)
        assert picture.shape == (24, 24, 3)
        assert picture[0, 0, 2] - picture[0, 0, 0] > 200 and picture[12, 12, 2] < 200
        with pytest.raises(ValueError, match="no such job"):
            control.do("dance")


def test_load_goes_back_and_restart_begins_anew(control):
    with running(control()) as control:
        control.do("save")
        settled(control)
        (path,) = control.written
        begun = {name: value.clone() for name, value in control.trainer.scene.state_dict().items()}
        control.toggle()
        until(lambda: control.trainer.step > 3)
        control.toggle()
        control.do("load", path=str(path))
        assert settled(control) == "step 0 of 100000" and control.trainer.step == 0
        assert all(torch.equal(value, begun[name]) for name, value in control.trainer.scene.state_dict().items())
        control.toggle()
        until(lambda: control.trainer.step > 3)
        control.toggle()
        control.do("save")
        control.do("restart")
        assert settled(control).startswith("step 0") and control.trainer.step == 0
        assert all(torch.equal(value, begun[name]) for name, value in control.trainer.scene.state_dict().items())
        assert list((control.trainer.checkpoints / "previous").glob("*.pt"))
        control.do("load", path="nowhere.pt")
        assert "no such checkpoint" in settled(control)
    assert control.error is None


def test_the_prompt_and_its_strength_follow_while_it_trains(control):
    with running(control(), training=True) as control:
        guidance = control.trainer.guidance
        until(lambda: control.trainer.step > 0)
        control.do("prompt", text="a chair", negative="blurry")
        assert '"a chair", not "blurry"' in settled(control)
        assert guidance.text == "a chair" and control.trainer.opt.negative == "blurry"
        control.do("strength", guidance_scale=7.5)
        assert "7.5" in settled(control) and guidance.scale == 7.5
        control.do("strength", guidance_scale="[0, 9, 5, 1]")
        assert "[0, 9, 5, 1]" in settled(control) and guidance.scale == 9
        control.do("prompt", text="gibberish", negative="")
        assert "unknown" in settled(control)
        control.do("strength", guidance_scale="much")
        assert "--guidance_scale" in settled(control)
        assert control.trainer.opt.text == "a chair" and guidance.scale == 9
        step = control.trainer.step
        until(lambda: control.trainer.step > step)
    newest = checkpoint.read(checkpoint.newest_first(control.trainer.checkpoints)[0])
    assert newest["text"] == "a chair"
    assert "text: a chair" in (control.trainer.workspace / "config.yaml").read_text()


def test_after_a_new_prompt_at_the_end_the_run_can_still_be_shown(control):
    with running(control("--iters", 3), training=True) as control:
        until(lambda: "training is done" in control.message)
        control.do("prompt", text="a chair", negative="")
        settled(control)
    assert checkpoint.read(checkpoint.newest_first(control.trainer.checkpoints)[0])["text"] == "a chair"


# ---- errors -----------------------------------------------------------------------------------------------------------------


def test_an_error_ends_the_work_and_comes_out_of_close(control):
    control = control()
    control.trainer.guidance.__class__ = type("Broken", (Guidance,), {"__call__": lambda *_, **__: 1 / 0})
    control.start()
    until(lambda: control.ended)
    assert control.wait(control.frame.number, 60) is None
    with pytest.raises(ZeroDivisionError):
        control.close()


def test_a_run_that_cannot_begin_says_why(control):
    control = control("--ckpt", "nowhere.pt")
    control.start()
    until(lambda: control.ended)
    with pytest.raises(UserError, match="no such checkpoint"):
        control.close()
