"""Compiled kernels against their plain PyTorch twins: forward and backward, in the same process, on the same data.

    python benchmarks/kernels.py --threads 2

Prints a Markdown table and writes it to benchmarks/RESULTS-kernels.md. Times are the best of several alternating runs,
so that other work on the machine disturbs both sides alike; the ratio is what to look at. `--build` also compiles all
kernels from nothing, into a temporary folder, and says how long that takes.
"""

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

POINTS, RAYS = 1 << 18, 4096
FOLDERS = ("freqencoder", "gridencoder", "shencoder", "raymarching", "rasterizer")


@contextmanager
def kernels(mode: str) -> Iterator[None]:
    """SOMNIUM_KERNELS = mode inside the block."""
    before = os.environ.get("SOMNIUM_KERNELS")
    os.environ["SOMNIUM_KERNELS"] = mode
    try:
        yield
    finally:
        os.environ.pop("SOMNIUM_KERNELS")
        if before is not None:
            os.environ["SOMNIUM_KERNELS"] = before


def points_along_rays(device: str) -> torch.Tensor:
    """2^18 points, 64 along each of 4096 lines through the unit ball: neighbours in memory are neighbours in space."""
    generator = torch.Generator().manual_seed(0)
    start, end = torch.nn.functional.normalize(torch.randn(2, RAYS, 1, 3, generator=generator), dim=-1) * 0.9
    steps = torch.linspace(0, 1, POINTS // RAYS)[:, None]
    return (start + (end - start) * steps).reshape(-1, 3).to(device)


def encoder_case(encoder: torch.nn.Module, x: torch.Tensor, normals: bool = False) -> Callable[[], object]:
    """One training step's worth: encode, a loss, gradients of x (if the encoder has no parameters) or of the table.

    `normals`: the gradient in x first, as a loss on analytic normals has it, and then through both.
    """
    table = list(encoder.parameters())
    x = x.clone().requires_grad_(normals or not table)
    weight = torch.randn(len(x), encoder.output_dim, generator=torch.Generator().manual_seed(1)).to(x.device)
    direction = torch.randn(len(x), 3, generator=torch.Generator().manual_seed(2)).to(x.device)

    def step() -> None:
        out = encoder(x)
        if normals:
            (normal,) = torch.autograd.grad(out, x, weight, create_graph=True)
            torch.autograd.grad((out, normal), table, (weight, direction))
        else:
            torch.autograd.grad(out, table or x, weight)

    return step


def ray_cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """Marching through a ball of occupied cells, and compositing what was found there."""
    import raymarching

    generator = torch.Generator().manual_seed(0)
    origin = torch.nn.functional.normalize(torch.randn(RAYS, 3, generator=generator), dim=-1) * 3
    target = (torch.rand(RAYS, 3, generator=generator) - 0.5) * 1.2
    direction = torch.nn.functional.normalize(target - origin, dim=-1).to(device)
    origin, noise = origin.to(device), torch.rand(RAYS, generator=generator).to(device)
    size = 128
    centre = (raymarching.morton3D_invert(torch.arange(size**3, dtype=torch.int32, device=device)) + 0.5) / size * 2 - 1
    bits = raymarching.packbits((centre.norm(dim=1) < 0.6).float()[None], 0.5)
    box = torch.tensor([-1.0, -1, -1, 1, 1, 1], device=device)
    near, far = raymarching.near_far_from_aabb(origin, direction, box, 0.1)

    def march() -> raymarching.Samples:
        return raymarching.march_rays_train(origin, direction, 1.0, bits, 1, size, near, far, noise, max_steps=512)

    samples = march()
    count = len(samples.t)
    sigma = (torch.rand(count, generator=generator) * 5).to(device).requires_grad_()
    rgb = torch.rand(count, 3, generator=generator).to(device).requires_grad_()

    def composite() -> None:
        weights, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, samples.t, samples.rays)
        loss = weights.square().sum() + alpha.sum() + depth.sum() + image.square().sum()
        torch.autograd.grad(loss, (sigma, rgb))

    yield f"march {RAYS} rays to {count} samples (forward)", march
    yield f"composite {count} samples", composite


def cases(device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, one run of it): forward and backward unless it says otherwise."""
    from freqencoder import FreqEncoder
    from gridencoder import GridEncoder

    x = points_along_rays(device)
    small = GridEncoder(num_levels=12, log2_hashmap_size=15, desired_resolution=512).to(device)
    yield "frequency encoding, degree 6", encoder_case(FreqEncoder(), x)
    try:
        from shencoder import SHEncoder

        yield "spherical harmonics, degree 4", encoder_case(SHEncoder(), torch.nn.functional.normalize(x, dim=-1))
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)
    yield "grid, 12 levels of 2^15 rows", encoder_case(small, x)
    yield "the same with normals (second derivatives)", encoder_case(small, x, normals=True)
    yield "grid, 16 levels of 2^19 rows", encoder_case(GridEncoder().to(device), x)
    try:
        yield from ray_cases(device)
    except ImportError as error:
        print(f"left out: {error}", file=sys.stderr)


def best_of(step: Callable[[], object], repeats: int, device: str) -> tuple[float, float]:
    """Best times in ms: (compiled, twin), run in turns."""
    times: dict[str, list[float]] = {"auto": [], "reference": []}
    for number in range(repeats + 1):
        for mode, list_ in times.items():
            with kernels(mode):
                if device == "cuda":
                    torch.cuda.synchronize()
                started = time.perf_counter()
                step()
                if device == "cuda":
                    torch.cuda.synchronize()
                if number:  # the first one warms up
                    list_.append((time.perf_counter() - started) * 1e3)
    return min(times["auto"]), min(times["reference"])


def build_time(folder: str, cache: str) -> tuple[float, float]:
    """Seconds for a cold build of one folder, without the import of torch: (passed, of CPU time)."""
    code = f"""
import time, os, pathlib, extension
started = time.perf_counter()
assert extension.load(pathlib.Path("{folder}"), "{folder}"), "no compiler"
used = os.times()
print(time.perf_counter() - started, used.children_user + used.children_system)"""
    environment = {**os.environ, "SOMNIUM_CACHE": cache, "SOMNIUM_KERNELS": "auto", "CCACHE_DISABLE": "1"}
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    passed, used = map(float, run.stdout.split())
    return passed, used


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=5, help="runs of which the best counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--build", action="store_true", help="also measure a cold build of every folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULTS-kernels.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} CPU threads"
    lines = [
        "# Compiled kernels against their PyTorch twins",
        "",
        f"{POINTS} points along rays, forward and backward, best of {arguments.repeats}; {where}, "
        f"{platform.machine()}, torch {torch.__version__}. Written by `benchmarks/kernels.py`.",
        "",
        "| what | compiled, ms | twin, ms | ratio |",
        "|---|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for name, step in cases(arguments.device):
        if arguments.only not in name:
            continue
        ours, twin = best_of(step, arguments.repeats, arguments.device)
        lines.append(f"| {name} | {ours:.1f} | {twin:.1f} | {twin / ours:.1f} |")
        print(lines[-1], flush=True)
    if arguments.build:
        with tempfile.TemporaryDirectory() as cache:
            seconds = {folder: build_time(folder, cache) for folder in FOLDERS if (ROOT / folder / "src").exists()}
        spelled = ", ".join(
            f"{folder} {passed:.1f} s ({used:.1f} s of CPU time)" for folder, (passed, used) in seconds.items()
        )
        passed, used = map(sum, zip(*seconds.values(), strict=True))
        lines += ["", f"Cold build: {spelled}; together {passed:.1f} s ({used:.1f} s)."]
        print("\n".join(lines[-2:]))
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
