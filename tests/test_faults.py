"""What goes wrong around a run: disks that are full or read-only, numbers that are not finite, scenes that vanish, broken files, a second run.

Each through the whole program, with a guidance that knows a red ball instead of a model.
"""

import os
import resource
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import TINY
from standins import BallGuidance, VoxelScene

import guidance
import main as program
import nerf.trainer
from errors import UserError
from files import claimed, remove_halves
from nerf import begun_again, build_scene, checkpoint
from nerf.metrics import Metrics
from nerf.trainer import Trainer

FLAGS = "--eval_interval 2 --latent_iter_ratio 0 --lambda_entropy 0 --lambda_opacity 0 --dataset_size_valid 1".split()


@pytest.fixture
def run(monkeypatch, tmp_path, capfd):
    """`run("--iters", 6, spoil={2}, at={3: act})`: main.py in tmp_path/trial; its status and its lines. `at`: what to do at the guidance's call."""

    def start(*typed, workspace=tmp_path / "trial", at=None, **arguments):
        class Guidance(BallGuidance):
            def __call__(self, image, *rest, **named):
                (at or {}).get(rest[2], lambda: None)()
                return super().__call__(image, *rest, **named)

        monkeypatch.setattr(guidance, "build_guidance", lambda opt, device: Guidance(**arguments))
        capfd.readouterr()
        try:
            status = program.main(["--workspace", str(workspace), *TINY, *FLAGS, *map(str, typed)])
        except SystemExit as left:
            status = left.code
        lines = [line for line in capfd.readouterr().err.splitlines() if line and "configs/" not in line]
        assert all(line.startswith(("somnium: ", "error: ")) for line in lines), lines
        return status, lines

    return start


def _mount(folder: Path, options: str) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "none", folder], capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip(f"a file system of its own cannot be mounted here: {done.stderr.strip()}")


@pytest.fixture
def vanishing(monkeypatch):
    """Call it, and there is nothing left of the scene. Scenes are grids here, other ones for other random numbers."""
    trained = []

    def build(opt, *_, **__):
        scene = VoxelScene(opt)
        scene.grid.data += 0.1 * torch.randn(scene.grid.shape)
        return scene

    monkeypatch.setattr(nerf, "build_scene", build)

    class Watched(Trainer):
        def __init__(self, opt, scene, *rest):
            super().__init__(opt, scene, *rest)
            trained.append(scene)

    monkeypatch.setattr(nerf.trainer, "Trainer", Watched)
    return lambda: trained[-1].grid.data[:, 0].fill_(-80.0)


@pytest.fixture
def disk(tmp_path):
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    _mount(folder, "size=2m")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def _fill(disk: Path) -> None:
    """Until nothing more goes in."""
    with open(disk / "full", "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 10, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass


# ---- disks ------------------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_said_and_the_last_checkpoint_stays(run, disk):
    status, lines = run("--iters", 6, workspace=disk / "trial", at={3: lambda: _fill(disk)})
    path = disk / "trial" / "checkpoints"
    assert status == 2 and not any("error" in line for line in lines[:-1])
    assert lines[-1] == (
        f"error: {path}/step_0000004.pt: cannot be written (No space left on device): free some space or change "
        "--workspace; the same command then goes on from step_0000002.pt"
    )
    assert [p.name for p in path.iterdir()] == ["step_0000002.pt"] and checkpoint.read(path / "step_0000002.pt")
    (disk / "full").unlink()
    status, lines = run("--iters", 6, workspace=disk / "trial")
    assert status == 0 and "somnium: going on from step_0000002.pt (step 2)" in lines


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("begin", "config.yaml"),
        ("validate", "validation/step_"),
        ("test", "results/step_0000002_"),
        ("export_mesh", "mesh/mesh.obj"),
        ("report", "report.html"),
    ],
)
def test_whatever_a_full_disk_cannot_take_is_one_line(run, disk, monkeypatch, method, words):
    do = getattr(Trainer, method)
    monkeypatch.setattr(Trainer, method, lambda self: (_fill(disk), do(self))[1])
    size = ["--W", 64, "--H", 64] if method == "test" else []
    status, lines = run("--iters", 2, "--save_mesh", "--texture_size", 0, *size, workspace=disk / "trial")
    assert status == 2 and lines[-1].startswith("error: ") and words in lines[-1]
    assert "No space left on device" in lines[-1] and sum("error" in line for line in lines) == 1
    assert not list(disk.rglob("*.part*")) and (method != "test" or not list(disk.rglob("*.mp4")))


def test_a_disk_that_is_full_from_the_beginning(run, disk):
    (disk / "trial").mkdir()
    for number in range(10_000):  # no room for the name of another file either
        try:
            (disk / "trial" / str(number)).touch()
        except OSError:
            break
    _fill(disk)
    status, lines = run(workspace=disk / "trial")
    assert status == 2 and "No space left on device" in lines[-1]


def test_a_checkpoint_over_the_limit_of_a_quota(tmp_path):
    """The same as on a full disk where none can be mounted: a file may not become as large as that."""
    checkpoint.save(tmp_path, {"step": 1, "weights": torch.zeros(100)})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
    try:
        with pytest.raises(UserError, match=r"step_0000002.pt: cannot be written \(File too large\).*step_0000001.pt"):
            checkpoint.save(tmp_path, {"step": 2, "weights": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step_0000001.pt"]


def test_a_read_only_workspace(run, tmp_path):
    run("--iters", 2)
    trial = tmp_path / "trial"
    if os.geteuid() == 0:  # whom permissions do not stop
        _mount(trial, "ro")
    else:
        trial.chmod(0o555)
    try:
        for typed in ([], ["--iters", 9]):
            status, lines = run(*typed)
            assert status == 2 and lines == [
                f"error: --workspace {trial}: {trial} cannot be written; choose another --workspace"
            ]
    finally:
        subprocess.run(["umount", "-l", trial], check=True) if os.geteuid() == 0 else trial.chmod(0o755)


def test_halves_of_killed_runs_go_at_the_next_start(run, tmp_path):
    """But not what a living process writes, and nothing of the user's."""
    process = subprocess.Popen(["true"])
    process.wait()
    trial = tmp_path / "trial"
    (trial / "results" / "particle_2").mkdir(parents=True)
    (trial / "checkpoints").mkdir()
    dead = ["checkpoints/.step_0000002.{}.part.pt", ".config.{}.part.yaml", "results/particle_2/.a.{}.part.mp4"]
    dead = [trial / name.format(process.pid) for name in dead]
    others = [trial / f".mesh.{os.getppid()}.part.obj", trial / "notes.1.part.txt", trial / ".mine.part"]
    for path in dead + others:
        path.write_text("half")
    with claimed(tmp_path / "trial"):
        assert not any(path.exists() for path in dead) and all(path.exists() for path in others)
    dead[0].write_text("half")
    assert remove_halves(tmp_path / "trial") == dead[:1]
    dead[0].write_text("half")
    assert run("--iters", 2)[0] == 0 and not dead[0].exists()


# ---- numbers and scenes -------------------------------------------------------------------------------------------------------


def test_a_number_that_is_not_finite_is_skipped_and_logged(run, tmp_path):
    status, lines = run("--iters", 12, spoil={4})
    assert status == 0 and "1 skipped" in " ".join(lines)
    line = "step 4: the loss is not finite: step skipped (1 so far)"
    assert f"somnium: {line}" in lines and line in (tmp_path / "trial" / "log.txt").read_text()


def test_many_of_them_are_rolled_back_and_logged(run, tmp_path):
    status, lines = run("--iters", 12, spoil=range(5, 10))
    line = "step 9: 5 steps in a row were not finite: back to the state of step 8, learning rate x 0.5"
    assert status == 0 and f"somnium: {line}" in lines and line in (tmp_path / "trial" / "log.txt").read_text()
    final = checkpoint.read(tmp_path / "trial" / "checkpoints" / "step_0000012_final.pt")
    assert final["guard"]["skipped"] == 5 and all(torch.isfinite(v.float()).all() for v in final["scene"].values())


def test_what_is_broken_is_never_saved(options):
    """A parameter that became infinite between two looks goes back before the checkpoint is written."""
    opt = options(*FLAGS, "--eval_interval", 0, "--iters", 6)
    trainer = Trainer(opt, build_scene(opt), BallGuidance(), "cpu")
    trainer.begin()
    for _ in range(3):
        trainer.advance()
    trainer.save()
    good = {name: value.clone() for name, value in trainer.scene.state_dict().items()}
    trainer.advance()
    next(trainer.scene.parameters()).data.view(-1)[0] = float("inf")
    trainer.save()
    state, path = checkpoint.choose(trainer.checkpoints, "latest")
    assert path.name == "step_0000004.pt" and all(torch.equal(state["scene"][name], good[name]) for name in good)
    assert "back to the state of step 3" in (trainer.workspace / "log.txt").read_text()


def test_a_scene_that_stays_empty_ends_early(run, vanishing, tmp_path):
    typed = ["--iters", 500, "--eval_interval", 0]
    status, lines = run(*typed, at=dict.fromkeys(range(500), vanishing))
    said = [line for line in lines if "empty" in line]
    assert status == 1 and [line.split()[2] for line in said] == [
        "40:",
        "70:",
        "110:",
        "140:",
    ]  # the first step still saw something
    assert "begin" in said[1] and "1 of --retry 1" in said[1] and "--lr" in said[3] and "--seed" in said[3]
    assert [p.name for p in (tmp_path / "trial" / "checkpoints").iterdir()] == ["step_0000140.pt"]
    assert not (tmp_path / "trial" / "results").exists()
    status, lines = run(*typed, at=dict.fromkeys(range(500), vanishing))  # by hand it gets another chance
    assert status == 1 and any("step 270: the scene stays empty" in line for line in lines)


def test_a_scene_that_vanishes_begins_again_from_other_weights(run, vanishing, tmp_path):
    status, lines = run("--iters", 80, "--eval_interval", 40, at={0: vanishing})
    assert status == 0 and any("step 70: still empty: beginning again from other random weights" in x for x in lines)
    final = checkpoint.read(tmp_path / "trial" / "checkpoints" / "step_0000080_final.pt")
    history = final["metrics"]["history"]["alpha/largest"]
    assert history[-2][1] < 0.01 < 0.3 < history[-1][1] and final["guard"]["revived"] == 1


def test_beginnings_follow_from_the_seed_and_the_count(options):
    opt = options("--particles", 2)
    random = torch.get_rng_state()
    one, again, two = (begun_again(opt, count) for count in (1, 1, 2))
    other = begun_again(options("--particles", 2, "--seed", 9), 1)
    assert torch.equal(random, torch.get_rng_state())
    name = next(name for name, value in one.items() if value.is_floating_point() and value.numel() > 100)
    assert torch.equal(one[name], again[name])
    assert not torch.equal(one[name], two[name]) and not torch.equal(one[name], other[name])
    assert one.keys() == build_scene(opt).state_dict().keys()


# ---- checkpoints and runs -----------------------------------------------------------------------------------------------------


def test_a_truncated_checkpoint_costs_two_steps(run, tmp_path):
    run("--iters", 6, at={5: lambda: os.kill(os.getpid(), 15)})
    folder = tmp_path / "trial" / "checkpoints"
    newest = checkpoint.newest_first(folder)[0]
    assert newest.name == "step_0000006_final.pt"
    os.truncate(newest, newest.stat().st_size // 2)
    status, lines = run("--iters", 6)
    assert status == 0 and any(
        f"{newest}: broken checkpoint" in x and "going back to step_0000004.pt" in x for x in lines
    )
    assert checkpoint.read(newest)["step"] == 6


def test_going_back_by_hand_leaves_the_other_future_behind(run, tmp_path):
    run("--iters", 6)
    folder = tmp_path / "trial" / "checkpoints"
    run("--iters", 8, "--ckpt", folder / "step_0000002.pt", at={5: lambda: os.kill(os.getpid(), 15)})
    assert {p.name for p in (folder / "previous").iterdir()} >= {"step_0000004.pt", "step_0000006_final.pt"}
    status, lines = run("--iters", 8)
    assert status == 0 and "somnium: going on from step_0000006.pt (step 6)" in lines


def test_two_runs_on_one_workspace(run, tmp_path):
    with claimed(tmp_path / "trial"):
        status, (line,) = run()
    assert status == 2 and f"another run is at work there (process {os.getpid()})" in line
    assert [p.name for p in (tmp_path / "trial").iterdir()] == [".lock"]
    assert run("--iters", 2)[0] == 0


def test_curves_that_cannot_be_written_are_lost_with_a_line(tmp_path, capsys):
    metrics = Metrics(tmp_path / "run")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (400, hard))
    try:
        for step in range(50):
            metrics.record(step, {"loss": step})
        metrics.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    (line,) = capsys.readouterr().err.splitlines()
    assert "no more curves for tensorboard (File too large)" in line and len(metrics.history["loss"]) == 50


def test_curves_are_a_tensorboard_file(tmp_path):
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    metrics = Metrics(tmp_path, start=5)
    metrics.record(7, {"loss/total": 2.5})
    metrics.close()
    data, events = next(tmp_path.iterdir()).read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        events.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    assert events[0].file_version == "brain.Event:2"
    assert (events[1].step, events[1].session_log.status) == (5, SessionLog.START)
    (value,) = events[2].summary.value
    assert (events[2].step, value.tag, value.simple_value) == (7, "loss/total", 2.5)
