"""Several processes that train one scene: the same as one process with the larger batch."""

import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY

import ranks
from errors import say

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def finished(command, **environment):
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, timeout=400)
    assert run.returncode == 0, run.stderr[-3000:]
    return run


@pytest.fixture(scope="module")
def ends(tmp_path_factory):
    """The scenes after 50 steps: of two processes, and of one with twice the batch."""
    flags = [*TINY, "--iters", "50", "--cuda_ray", "--eval_interval", "30", "--optim", "adamw", "--lr", "1e-3"]
    two, one = tmp_path_factory.mktemp("two"), tmp_path_factory.mktemp("one")
    script = str(ROOT / "tests" / "ranked.py")
    finished([*TORCHRUN, script, "--workspace", str(two), "--batch_size", "2", *flags])
    finished([sys.executable, script, "--workspace", str(one), "--batch_size", "4", *flags])
    read = lambda folder, i: torch.load(folder / f"end_{i}.pt", weights_only=True)  # noqa: E731
    return read(two, 0), read(two, 1), read(one, 0), two


def test_both_processes_end_with_the_same_scene(ends):
    first, second, _, _ = ends
    assert first["processes"] == 2
    for name, value in first["scene"].items():
        assert torch.equal(value, second["scene"][name]), name


def test_two_processes_do_what_one_does_with_the_doubled_batch(ends):
    two, _, one, _ = ends
    assert one["processes"] == 1
    fresh = one["scene"]
    for name in [name for name, value in fresh.items() if value.is_floating_point() and value.numel() > 1]:
        difference = (two["scene"][name] - fresh[name]).abs()
        spread = fresh[name].float().std()
        assert difference.mean() < 2e-3 * spread, (
            name
        )  # rounding, through 50 steps of AdamW; another batch differs by half of it
        assert difference.max() < 0.1 * spread, name


def test_files_are_written_once(ends):
    folder = ends[3]
    assert len(list(folder.glob("checkpoints/*_final.pt"))) == 1
    assert len(list(folder.glob("run/events*"))) == 1
    assert (folder / "log.txt").read_text().count("training done") == 1


def test_main_under_torchrun_ends_with_results(tmp_path):
    run = finished([*TORCHRUN, "main.py", "--workspace", str(tmp_path), *TINY])
    assert run.stderr.count("training done") == 1 and run.stderr.count("report:") == 1
    assert (tmp_path / "report.html").exists() and list(tmp_path.glob("results/*_rgb.mp4"))


def test_what_cannot_be_done_together_is_refused(monkeypatch, tmp_path, capsys):
    from main import main

    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert main(["--workspace", str(tmp_path / "w"), *TINY, "--viewer"]) == 2
    assert "torchrun" in capsys.readouterr().err


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    say("hello")
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "0")
    say("hello")
    assert "hello" in capsys.readouterr().err


def test_rows_are_those_of_the_whole_batch(monkeypatch):
    def draw(rows):
        return torch.rand(rows, 2, generator=torch.Generator().manual_seed(3))

    whole = draw(6)
    assert torch.equal(ranks.mine(draw, 6), whole)
    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 3)
    for rank in range(3):
        monkeypatch.setattr(ranks.dist, "get_rank", lambda rank=rank: rank)
        assert torch.equal(ranks.mine(draw, 2), whole[2 * rank : 2 * rank + 2])
        assert torch.equal(whole[ranks.part(2)], whole[2 * rank : 2 * rank + 2])


def test_a_process_without_gradients_counts_as_zero(monkeypatch):
    """Two processes in one: what `all_reduce` adds is what the other one has."""
    mine = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    mine[0].grad, mine[1].grad = torch.tensor([2.0, 4, 6]), None
    calls = iter([torch.tensor([0.0, 1, 0]), torch.tensor([0.0, 0, 0, 8, 8, 8])])

    def reduce(tensor, how=ranks.dist.ReduceOp.SUM):
        there = next(calls)
        tensor.copy_(torch.maximum(tensor, there) if how == ranks.dist.ReduceOp.MAX else tensor + there)

    monkeypatch.setattr(ranks.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(ranks.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(ranks.dist, "all_reduce", reduce)
    ranks.average_gradients(mine)
    assert mine[0].grad.tolist() == [1, 2, 3] and mine[1].grad.tolist() == [4, 4, 4]
    assert mine[2].grad is None
