"""The loop on a scene without a network: it learns, resumes bit for bit, survives accidents and signals, and shows its average."""

import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from standins import RED, BallGuidance, VoxelScene

from errors import UserError
from nerf import build_scene, media, results
from nerf.ema import MovingAverage
from nerf.metrics import Metrics
from nerf.provider import turntable
from nerf.trainer import Trainer
from nerf.view import draw_view

QUICK = """--iters 24 --lr 0.2 --optim adam --batch_size 2 --num_steps 12 --upsample_steps 0 --background white
    --radius_range 3.2 3.2 --fovy_range 30 30 --theta_range 60 100 --default_fovy 30 --latent_iter_ratio 0 --albedo_iter_ratio 1
    --lambda_orient 0 --lambda_entropy 0 --lambda_opacity 0 --lambda_center 0 --eval_interval 0 --ema_decay 0.9 --no_cuda_ray --bg_radius 0""".split()


@pytest.fixture
def trainer(options):
    """`trainer("--iters", 5, spoil={2})`: a trainer on a fresh voxel scene (`real`: the hash grid), in one workspace."""

    def build(*typed, guidance=True, real=False, **arguments):
        opt = options(*QUICK, *typed)
        torch.manual_seed(0)
        scene = build_scene(opt) if real else VoxelScene(opt)
        return Trainer(opt, scene, BallGuidance(**arguments) if guidance is True else guidance, "cpu")

    return build


def _equal(a, b):
    """Whether two nests of dicts, lists and tensors are the same to the last bit."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(_equal(x, y) for x, y in zip(a, b, strict=True))
    return a == b


def test_it_learns_a_red_ball_and_leaves_everything_a_run_should(trainer, capsys, monkeypatch):
    monkeypatch.setattr(results, "MESH_VIEW_SIZE", 40)
    run = trainer(
        "--iters", 40, "--eval_interval", 20, "--save_mesh", "--mcubes_resolution", 32, "--decimate_target", 2000
    )
    run.train()
    run.test()
    meshes = run.export_mesh()
    report = run.report()
    folder = run.workspace

    with run.showing("test") as scene:
        cameras = turntable(run.opt, 4, 24, 24)
        render = scene.render(cameras, background=torch.ones(3))
    _, inside = run.guidance.target(cameras.polar, cameras.azimuth, 24, 24)
    mask, truth = render.alpha > 0.5, inside > 0.5
    assert (mask & truth).sum() / (mask | truth).sum() > 0.8
    color = render.image[(truth & mask)[..., 0]].median(0).values
    assert torch.allclose(color, torch.tensor(RED), atol=0.15)

    frames = media.read_video(folder / "results" / "step_0000040_rgb.mp4", 99)
    assert len(frames) == run.opt.dataset_size_test and frames[0].shape == (24, 24, 3)
    assert {p.name for p in (folder / "results").iterdir()} == {f"step_0000040_{k}.mp4" for k in media.KINDS}
    sheets = {p.name for p in (folder / "validation").iterdir()}
    assert sheets == {f"step_00000{step}_{kind}.png" for step in (20, 40) for kind in media.KINDS}
    assert [p.name for p in meshes] == ["mesh.obj", "mesh.glb"] and report.stat().st_size > 10000
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {"step_0000020.pt", "step_0000040_final.pt"}
    assert (folder / "config.yaml").is_file() and list((folder / "run").iterdir())
    assert not list(folder.rglob("*.part*"))
    said = capsys.readouterr().err
    assert "training done: 40 of 40 steps" in said and "report.html" in said and "IoU" in said
    assert "training done" in (folder / "log.txt").read_text()


def test_resume_equals_never_having_stopped(trainer, options):
    straight = trainer("--iters", 17, "--workspace", "straight")
    straight.train()
    first = trainer("--iters", 17)
    stop_after(first, 8)
    first.train()
    assert first.step == 8
    second = trainer("--iters", 17)
    second.train()
    assert second.guidance.calls == 9
    a, b = straight.state(), second.state()
    a.pop("times"), b.pop("times")
    assert _equal(a, b)
    assert a["metrics"]["history"]["loss/guidance"][0][0] == 10 and len(a["metrics"]["rows"]) == 7


def test_resume_of_the_real_scene_is_exact_too(trainer):
    """With the occupancy grid, Adan, shading, and every regulariser."""
    flags = "-O --update_extra_interval 4 --optim adan --albedo_iter_ratio 0 --lambda_orient 0.01 --lambda_entropy 0.01"
    flags = [*flags.split(), "--lambda_tv", 1e-3, "--lambda_3d_normal_smooth", 0.01, "--iters", 12, "--jitter_pose"]
    straight = trainer(*flags, "--workspace", "straight", real=True)
    straight.train()
    first = trainer(*flags, real=True)
    stop_after(first, 6)
    first.train()
    second = trainer(*flags, real=True)
    second.train()
    a, b = straight.state(), second.state()
    a.pop("times"), b.pop("times")
    assert second.guidance.calls == 6 and _equal(a, b)
    before = trainer(*flags, "--ckpt", "scratch", real=True).scene.state_dict()
    assert not _equal(dict(before), a["scene"])  # it did learn something


def stop_after(run, steps, signals=(signal.SIGINT,)):
    """Send this process signals from inside the guidance of a step."""
    inner = run.guidance.__class__.__call__

    def call(self, *arguments, **named):
        if run.step == steps - 1:
            for number in signals:
                os.kill(os.getpid(), number)
        return inner(self, *arguments, **named)

    run.guidance.__class__ = type("Signalling", (run.guidance.__class__,), {"__call__": call})


def test_ctrl_c_once_finishes_the_step_saves_and_goes_on(trainer):
    run = trainer()
    stop_after(run, 3)
    handler = signal.getsignal(signal.SIGINT)
    run.train()
    assert run.step == 3 and signal.getsignal(signal.SIGINT) is handler
    assert [p.name for p in run.checkpoints.iterdir()] == ["step_0000003.pt"]
    assert all(path.is_file() for path in run.test())
    assert run.workspace.joinpath("results/step_0000003_rgb.mp4").is_file()


def test_ctrl_c_twice_leaves_at_once(trainer):
    run = trainer()
    stop_after(run, 3, (signal.SIGINT, signal.SIGINT))
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 130 and run.step == 2 and not run.checkpoints.exists()


def test_sigterm_saves_and_leaves(trainer):
    run = trainer()
    stop_after(run, 4, (signal.SIGTERM,))
    with pytest.raises(SystemExit) as left:
        run.train()
    assert left.value.code == 143 and [p.name for p in run.checkpoints.iterdir()] == ["step_0000004.pt"]
    assert not (run.workspace / "validation").exists()


def test_ctrl_c_while_results_are_written_leaves_without_halves(trainer):
    run = trainer()
    run.train()
    seen = []
    render = run.scene.render

    def interrupted(*arguments, **named):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return render(*arguments, **named)

    run.scene.render = interrupted
    with pytest.raises(SystemExit) as left:
        run.test()
    assert left.value.code == 130 and not list((run.workspace / "results").iterdir())


def test_a_finished_run_says_so_and_can_be_shown_without_guidance(trainer, capsys):
    trainer("--iters", 2).train()
    capsys.readouterr()
    again = trainer("--iters", 2)
    again.train()
    assert again.guidance.calls == 0 and "finished (2 steps)" in capsys.readouterr().err
    shown = trainer("--iters", 2, guidance=None)
    assert [p.name for p in shown.test()] == [f"step_0000002_{kind}.mp4" for kind in media.KINDS]
    longer = trainer("--iters", 5)
    longer.train()
    assert longer.guidance.calls == 3


def test_what_cannot_be_loaded_is_a_users_error(trainer):
    with pytest.raises(UserError, match="no checkpoint to show"):
        trainer(guidance=None).test()
    trainer("--iters", 1).train()
    with pytest.raises(UserError, match='"hamburger".*not "mug".*--workspace.*--ckpt scratch'):
        trainer("--ckpt", "workspace/checkpoints/step_0000001_final.pt", "--text", "mug").train()
    other = trainer("--text", "mug", "--ckpt", "scratch", "--iters", 1)
    other.train()
    assert other.guidance.calls == 1


@pytest.fixture(autouse=True)
def _in_the_tests_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_step_that_is_not_finite_is_skipped_and_counted(trainer, capsys):
    run = trainer("--iters", 12, spoil={4})
    run.train()
    assert run.guard.skipped == 1 and run.guard.returns == 0 and run.guard.lr_factor == 1
    assert torch.isfinite(run.scene.grid).all()
    assert "step 4: the loss is not finite: step skipped" in capsys.readouterr().err
    assert run.metrics.history["skipped"] == [[10, 0.1]]
    assert np.isfinite(run.metrics.history["loss/total"][0][1])


def test_a_skipped_step_changes_nothing(trainer):
    run = trainer("--iters", 12, spoil={1})
    run._ready()
    run._train_step()
    before, state = run.scene.grid.detach().clone(), run.optimizer.state_dict()["state"][0]["exp_avg"].clone()
    run._train_step()
    assert torch.equal(run.scene.grid, before)
    assert torch.equal(run.optimizer.state_dict()["state"][0]["exp_avg"], state)
    run._train_step()
    assert not torch.equal(run.scene.grid, before)


def test_several_bad_steps_in_a_row_go_back_and_slow_down(trainer, capsys):
    run = trainer("--iters", 30, spoil=range(12, 17))
    run.train()
    assert run.guard.returns == 1 and run.guard.lr_factor == 0.5 and run.guard.skipped == 5
    assert run.optimizer.param_groups[0]["lr"] == pytest.approx(0.1)
    assert "back to the state of step" in capsys.readouterr().err and torch.isfinite(run.scene.grid).all()


def test_a_broken_parameter_brings_back_the_last_good_state(trainer, capsys):
    run = trainer("--iters", 20)
    run._ready()
    for _ in range(10):
        run._train_step()
    run.guard.snapshot()
    good, average = run.scene.grid.detach().clone(), run.average.average[0].clone()
    run.scene.grid.data[0, 0, 0, 0, 0] = float("inf")
    run.guard.inspect(run.step, 1.0)
    assert torch.equal(run.scene.grid, good) and torch.equal(run.average.average[0], average)
    assert "a parameter is not finite" in capsys.readouterr().err


def test_an_endless_accident_ends_the_training_with_the_last_good_state(trainer, capsys):
    run = trainer("--iters", 200, spoil=range(10, 200))
    run.train()
    assert run.guard.hopeless and run.step < 80 and torch.isfinite(run.scene.grid).all()
    assert "training ends here" in capsys.readouterr().err and list(run.checkpoints.iterdir())


def test_an_empty_scene_is_noticed_and_starts_again(trainer, capsys):
    run = trainer("--iters", 80)
    run.scene.grid.data[:, 0] = -80.0  # after the guard has seen the initial blob: softplus has no slope here
    run.train()
    said = capsys.readouterr().err
    assert (
        "the scene is empty" in said
        and "beginning again from its first weights (1 of --retry 1)" in said
        and run.guard.revived == 1
    )
    assert run.metrics.history["alpha/largest"][0][1] < 0.01 < 0.5 < run.metrics.history["alpha/largest"][-1][1]


def test_results_show_the_average_and_leave_the_weights_alone(trainer):
    run = trainer("--iters", 6)
    run.train()
    weights = run.scene.grid.detach().clone()
    run.average.average[0].fill_(-30.0)  # nothing to see in the average
    blank = np.asarray(Image.open(next(p for p in run.validate() if "rgb" in p.name)))
    assert blank.min() >= 254
    assert torch.equal(run.scene.grid, weights) and run.scene.training


def test_moving_average_by_hand():
    layer = torch.nn.Linear(1, 1, bias=False)
    layer.weight.data.fill_(0.0)
    average = MovingAverage(layer, 0.3)
    layer.weight.data.fill_(1.0)
    average.update()  # decay min(0.3, 2 / 11)
    assert average.average[0].item() == pytest.approx(9 / 11)
    average.update()  # decay min(0.3, 3 / 12)
    assert average.average[0].item() == pytest.approx(1 - 0.25 * 2 / 11)
    average.update()  # decay 0.3
    layer.weight.data.fill_(5.0)
    with average.applied():
        assert layer.weight.item() == pytest.approx(1 - 0.3 * 0.25 * 2 / 11)
    assert layer.weight.item() == 5.0


def test_the_schedule_of_shadings(options):
    opt = options(
        "--iters",
        100,
        "--latent_iter_ratio",
        0.2,
        "--albedo_iter_ratio",
        0.5,
        "--background",
        "random",
        "--batch_size",
        2,
    )
    generators = {name: torch.Generator().manual_seed(5) for name in ("cameras", "shading")}
    views = [draw_view(opt, step, generators, 3, False) for step in range(100)]
    assert all(v.shading == "normal" and v.as_latent and v.background is None for v in views[:20])
    assert all(v.shading == "albedo" and not v.as_latent and (v.ambient == 1).all() for v in views[20:50])
    late = views[50:]
    assert {v.shading for v in late} == {"lambertian", "textureless"}
    assert 2 <= sum(v.shading == "textureless" for v in late) <= 20
    ambient = torch.cat([v.ambient for v in late])
    assert 0.1 <= ambient.min() < 0.2 and 0.9 < ambient.max() <= 1
    assert all(v.background.shape == (2, 3) for v in views[20:])
    other = options("--iters", 100, "--latent_iter_ratio", 0, "--batch_size", 2)  # same cameras whatever the shading
    generators = {name: torch.Generator().manual_seed(5) for name in ("cameras", "shading")}
    assert torch.equal(draw_view(other, 0, generators, 3, False).cameras.c2w, views[0].cameras.c2w)


def test_warm_up_hands_normals_and_mask_over_as_latents(trainer):
    run = trainer("--iters", 4, "--latent_iter_ratio", 0.5)
    shapes = []
    inner = run.guidance.__class__.__call__

    def call(self, image, *rest, as_latent=False, unit_range=True, hints=None):
        shapes.append((image.shape[-1], as_latent))
        return inner(self, image, *rest, as_latent=as_latent, hints=hints)

    run.guidance.__class__ = type("Listening", (run.guidance.__class__,), {"__call__": call})
    run.train()
    assert shapes == [(4, True), (4, True), (3, False), (3, False)]


def test_the_gradient_at_the_picture_and_in_the_scene_is_limited(trainer):
    run = trainer("--iters", 2, "--grad_clip_rgb", 0)
    before = run.scene.grid.detach().clone()
    run.train()
    assert torch.equal(run.scene.grid, before)  # nothing comes through
    run = trainer("--iters", 2, "--grad_clip", 0, "--ckpt", "scratch")
    run.train()
    assert torch.equal(run.scene.grid, before)


def test_metrics_average_windows_and_keep_what_is_not_full():
    metrics = Metrics(None, window=3)
    for step in range(1, 6):
        metrics.add(step, {"tensor": torch.tensor([step - 1.0, step + 1.0]), "number": 10 * step})
        if step == 5:
            metrics.add(6, {"rare": 7})
        if metrics.full:
            metrics.read()
    assert metrics.history == {"tensor": [[3, 2.0], [6, 4.5]], "number": [[3, 20.0], [6, 45.0]], "rare": [[6, 7.0]]}
    metrics.add(7, {"tensor": torch.tensor(1.0)})
    copy = Metrics(None, window=3)
    copy.load_state_dict(metrics.state_dict())
    assert copy.rows == [(7, {"tensor": 1.0})]


def test_six_views_have_names_and_transparency(trainer):
    run = trainer("--iters", 1)
    run.train()
    shown = trainer("--iters", 1, guidance=None)
    shown.opt.__dict__["six_views"] = True
    paths = shown.test()
    assert len(paths) == 18
    front = Image.open(next(p for p in paths if p.name == "step_0000001_front_rgb.png"))
    assert front.mode == "RGBA" and front.getpixel((0, 0))[3] < 20 and front.getpixel((12, 12))[3] > 200


def test_batches_that_are_added_up_are_one_larger_batch(trainer):
    """The mean of the batches' gradients is what the optimiser sees; a step is a step, whatever it is made of."""

    def first_gradient(*typed):
        run = trainer("--batch_size", 1, "--theta_range", 80, 80, "--phi_range", 30, 30, *typed)
        run._ready()
        run._train_step()
        return run, run.scene.grid.grad.flatten()

    one, alone = first_gradient()
    three, together = first_gradient("--accumulate", 3)
    assert (one.guidance.calls, three.guidance.calls) == (1, 3) and one.step == three.step == 1
    assert torch.nn.functional.cosine_similarity(alone, together, dim=0) > 0.98
    assert float(together.norm()) == pytest.approx(float(alone.norm()), rel=0.1)


def test_a_bad_batch_spoils_the_whole_step(trainer):
    run = trainer("--accumulate", 2, spoil={1})
    run.train()
    assert run.guard.skipped == 1


def test_what_a_step_looks_at(options):
    def drawn(step, *typed):
        opt = options(*QUICK, "--albedo_iter_ratio", 0, *typed)
        generators = {name: torch.Generator().manual_seed(0) for name in ("cameras", "shading")}
        return draw_view(opt, step, generators, 4 if opt.latent else 3, False)

    assert drawn(3, "--textureless_ratio", 0).shading == "lambertian"
    assert drawn(3, "--albedo_ratio", 1).shading == "albedo"
    assert drawn(3, "--train_shading", "normal").shading == "normal"
    warm = drawn(0, "--latent_iter_ratio", 0.5, "--train_shading", "normal")
    assert (warm.as_latent, warm.with_mask, warm.shading) == (True, True, "normal")
    latent = drawn(3, "--latent")
    assert (latent.as_latent, latent.with_mask, latent.shading) == (True, False, "albedo")
    sizes = [drawn(step, "--w", 16, "--h", 8, "--size_scale", "[0, 1, 1, 12, 4, 12]").cameras for step in (11, 12)]
    assert [(c.height, c.width) for c in sizes] == [(8, 16), (32, 64)]
