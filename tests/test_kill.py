"""Runs that are killed: whatever the moment, the same command goes on, and ends with the weights of a run that nobody disturbed."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY

import main as program
from nerf import checkpoint
from options import parse

KILLS = 30
# All that has a state: an occupancy grid, a prior's adaptation, curves, pictures in between.
FLAGS = """-O --distill vsd --iters 28 --eval_interval 2 --update_extra_interval 4 --test_interval 15 --W 8 --H 8
    --dataset_size_valid 1 --dataset_size_test 2""".split()


def differences(a, b, place="state"):
    """Where two nests of dicts, lists, numbers and tensors differ in a bit."""
    if isinstance(a, torch.Tensor):
        return [] if a.dtype == b.dtype and torch.equal(a, b) else [place]
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return [found for key in a for found in differences(a[key], b[key], f"{place}.{key}")]
    if isinstance(a, (list, tuple)) and len(a) == len(b):
        return [found for i, pair in enumerate(zip(a, b, strict=True)) for found in differences(*pair, f"{place}.{i}")]
    return [] if a == b else [place]


def final_state(workspace: Path) -> dict:
    """The last checkpoint, without how long everything took."""
    state = checkpoint.read(checkpoint.newest_first(workspace / "checkpoints")[0])
    del state["times"]
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with a run that was killed thirty times and one that was not, and what killing.py says about it."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, str(ROOT / "tests" / "killing.py"), str(folder), str(KILLS), *TINY, *FLAGS]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return folder, json.loads(done.stdout)


@pytest.mark.slow
def test_thirty_kills_lose_nothing(runs):
    folder, told = runs
    log = (folder / "killed.txt").read_text()
    assert told["kills"] == KILLS and told["failed"] == [] and told["last"] == 0, log
    assert "error" not in log and "broken checkpoint" not in log and "Traceback" not in log
    assert told["steps"] == sorted(told["steps"])  # never a checkpoint lost
    assert len(set(told["steps"])) > 4 and told["halves"] >= 3  # they came at many moments, also while one was written
    straight, killed = final_state(folder / "straight"), final_state(folder / "killed")
    assert straight["step"] == 28 and differences(straight, killed) == []
    assert not list((folder / "killed").rglob(".*.part*"))
    kept = [sorted(p.name for p in (folder / name / "checkpoints").iterdir()) for name in ("straight", "killed")]
    assert kept[0] == kept[1]


@pytest.mark.slow
def test_a_process_of_its_own_is_killed_and_goes_on(runs, tmp_path):
    """The same without a fork, once: main.py as a user starts it."""
    command = [sys.executable, str(ROOT / "main.py"), *TINY, *FLAGS, "--workspace", "trial"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("trial/checkpoints/step_*.pt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=tmp_path, text=True, capture_output=True, timeout=200)
    assert done.returncode == 0 and "going on from step_" in done.stderr
    assert differences(final_state(runs[0] / "straight"), final_state(tmp_path / "trial")) == []


# ---- the state is complete ----------------------------------------------------------------------------------------------------

KINDS = {
    "occupancy": "-O --update_extra_interval 2",
    "particles of vsd": "--distill vsd --particles 2 -O --update_extra_interval 1",
    "one noise, falling timesteps": "--distill cds --t_schedule dreamtime",
    "inversion": "--distill ism",
    "perpneg, two batches": "--perpneg --accumulate 2 --batch_size 2 --jitter_pose --uniform_sphere_rate 0.5",
    "adan, shading": "--optim adan --albedo_iter_ratio 0 --lambda_orient 0.1 --lambda_3d_normal_smooth 0.1 --bg_radius 1.4",
    "latents": "--latent --background random",
    "plain network": "--backbone vanilla --progressive_level",
    "signed distance": "--backbone sdf -O",
    "voxels": "--backbone voxel --voxel_size 12",
    "surface": "--dmtet --tet_grid_size 12",
    "image space": "--lambda_image 0.1 --save_guidance --save_guidance_interval 2",
}


@pytest.mark.parametrize("flags", KINDS.values(), ids=KINDS.keys())
def test_two_steps_and_three_are_five(tmp_path, flags):
    """Each time from a new trainer, with pictures in between."""

    def run(name, stop):
        typed = [*TINY, *flags.split(), "--iters", "5", "--eval_interval", "2", "--dataset_size_valid", "1"]
        opt = parse([*typed, "--W", "8", "--H", "8", "--workspace", str(tmp_path / name)])
        trainer = program.build(opt)
        trainer.begin()
        while trainer.step < stop:
            trainer.advance()
        trainer.save(final=stop == 5)
        return final_state(tmp_path / name)

    begun = run("parts", 2)
    torch.randn(7)  # other random numbers in between
    ended = run("parts", 5)
    assert differences(run("straight", 5), ended) == []
    assert begun["step"] == 2 and differences(begun["average"], ended["average"])
