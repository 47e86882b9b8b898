"""benchmarks/guidance_step.py: what it measures, and of what."""

import sys

import pytest
import torch
from conftest import ROOT
from switches import loader, predict


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("memory"))


# -- the benchmark -----------------------------------------------------------------------------------------------------


@pytest.fixture
def benchmark(monkeypatch):
    """benchmarks/guidance_step.py, measuring in this process: `benchmark(name, *compared) -> lines`."""
    from benchmarks import guidance_step

    def run(prior, *compared, **more):
        case = guidance_step.Case(prior, batch=1, size=more.get("size"), device="cpu", threads=1, repeat=1)
        lines = []
        guidance_step.report(case, list(compared), lambda text: lines.extend(text.splitlines()))
        return lines

    monkeypatch.setattr(guidance_step, "in_own_process", guidance_step.measure)
    return run


def test_the_benchmark_tells_parts_and_ratios(benchmark):
    lines = benchmark("tiny-sd", "bf16", "offload_model")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]
    assert [row[:2] for row in table[1:5]] == [["plain", part] for part in ("encode", "predict", "backward", "step")]
    assert [row[0] for row in table[5:]] == ["bf16"] * 4
    seconds = [float(row[2]) for row in table[1:5]]
    assert min(seconds) > 0 and sum(seconds[:3]) == pytest.approx(seconds[3], rel=0.01)
    operations = [float(row[5]) for row in table[1:5]]
    assert min(operations) > 0 and sum(operations[:3]) == pytest.approx(operations[3], rel=0.01)
    assert [row[5] for row in table[5:]] == [row[5] for row in table[1:5]]  # the same work
    assert lines[-1] == "`offload_model`: --offload model: there is no GPU to relieve."


def test_the_benchmark_counts_the_fused_attention_of_a_cpu():
    from benchmarks.guidance_step import _counter

    query, key = torch.randn(2, 4, 64, 16), torch.randn(2, 4, 32, 16)
    with _counter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, key, key)
    assert counter.get_total_flops() == 2 * 2 * (2 * 4) * 64 * 32 * 16  # scores and their product with the values


def test_the_benchmark_s_architectures_are_the_published_ones(load):
    import diffusers

    from benchmarks.architectures import ARCHITECTURES, random_network

    millions = {"sd1.5": 860, "sd2.1": 866, "sdxl": 2567, "sd3": 2028, "if-m": 372, "if-l": 935, "if-xl": 4305}
    assert set(millions) == set(ARCHITECTURES)
    for name, plan in ARCHITECTURES.items():
        with torch.device("meta"):
            network = getattr(diffusers, plan.network)(**plan.denoiser)
        assert round(sum(p.numel() for p in network.parameters()) / 1e6) == millions[name]
    small = random_network(diffusers.AutoencoderTiny, {}, "cpu", torch.float32)
    assert sum(p.numel() for p in small.parameters()) == 2_445_063
    assert 0.05 < small.encode(torch.rand(1, 3, 64, 64)).latents.std() < 50
    assert 0.05 < predict(load("if")).std() < 50


@pytest.mark.slow
def test_the_benchmark_is_a_program(main):
    import subprocess

    command = [sys.executable, ROOT / "benchmarks" / "guidance_step.py", "--threads", "1", "--repeat", "1"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "| plain | step |" in done.stdout
    wrong = subprocess.run([*command, "--prior", "nowhere"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "error: --prior nowhere" in wrong.stderr and "Traceback" not in wrong.stderr
