"""The compiled rasteriser against its plain PyTorch twin, and its gradients against exact ones, in the same process.

    python benchmarks/rasterizer.py --threads 2

One view of a ball, 512 x 512. Prints Markdown tables and writes them to benchmarks/RESULTS-rasterizer.md. Times are the
best of several alternating runs; the ratio is what to look at. The accuracy table holds the antialiased area and its
gradients by scale and position against the exact ones of a ball, relative; triangles of a pixel and less are the hard ones.
"""

import argparse
import math
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import rasterizer  # noqa: E402
from benchmarks.kernels import best_of  # noqa: E402

SIZE = 512
RADIUS = 0.4  # of the ball's picture, in pictures


def ball(rings: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Vertices and faces of a unit ball: 4 (rings - 1) rings triangles between two poles."""
    polar = torch.arange(1, rings, dtype=torch.float64) * (math.pi / rings)
    azimuth = torch.arange(2 * rings, dtype=torch.float64) * (math.pi / rings)
    p, a = torch.meshgrid(polar, azimuth, indexing="ij")
    ring = torch.stack([p.sin() * a.sin(), p.cos(), p.sin() * a.cos()], -1).reshape(-1, 3)
    vertices = torch.cat([ring, torch.tensor([[0, 1, 0], [0, -1, 0]])])
    number = torch.arange(len(ring)).view(rings - 1, 2 * rings)
    following = number.roll(-1, 1)
    top, bottom = torch.full((2 * rings,), len(ring)), torch.full((2 * rings,), len(ring) + 1)
    squares = [x.flatten() for x in (number[:-1], number[1:], following[1:], following[:-1])]
    faces = [(top, number[0], following[0]), (bottom, following[-1], number[-1])]
    faces += [(squares[0], squares[1], squares[2]), (squares[0], squares[2], squares[3])]
    turned = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    return vertices @ turned.T, torch.cat([torch.stack(face, -1) for face in faces])


def clip(points: torch.Tensor) -> torch.Tensor:
    """Clip coordinates [1, V, 4] of a parallel camera along z."""
    return torch.cat([points * points.new_tensor([2 * RADIUS, 2 * RADIUS, -0.5]), torch.ones_like(points[:, :1])], 1)[
        None
    ]


def cases(rings: int, device: str) -> Iterator[tuple[str, Callable[[], object]]]:
    """(what, one run of it) for a ball of so many rings."""
    vertices, faces = ball(rings)
    faces = faces.int().to(device)
    positions = clip(vertices).float().to(device).requires_grad_()
    g = torch.Generator().manual_seed(1)
    colours = torch.rand(1, len(vertices), 3, generator=g).to(device).requires_grad_()
    gradient = torch.randn(1, SIZE, SIZE, 3, generator=g).to(device)
    topology = rasterizer.edges_of(faces)
    raster = rasterizer.rasterize(positions, faces, SIZE, SIZE).detach()
    picture = rasterizer.interpolate(colours, raster, faces).detach()
    texels, uv = torch.rand(1, 1024, 1024, 3, generator=g).to(device).requires_grad_(), picture[..., :2]
    about = torch.full((1, SIZE, SIZE, 4), 2 / SIZE, device=device)
    name = f"{len(faces) // 1000}k triangles"

    def step() -> None:
        drawn = rasterizer.rasterize(positions, faces, SIZE, SIZE)
        out = rasterizer.antialias(rasterizer.interpolate(colours, drawn, faces), drawn, positions, faces, topology)
        torch.autograd.grad(out, [positions, colours], gradient)

    def textured() -> None:
        torch.autograd.grad(rasterizer.texture(texels, uv, about), texels, gradient)

    yield f"{name}: edges of the faces", lambda: rasterizer.edges_of(faces)
    yield f"{name}: rasterize", lambda: rasterizer.rasterize(positions, faces, SIZE, SIZE)
    yield f"{name}: interpolate 3 channels", lambda: rasterizer.interpolate(colours, raster, faces)
    yield f"{name}: antialias", lambda: rasterizer.antialias(picture, raster, positions, faces, topology)
    yield f"{name}: rasterize + interpolate + antialias, forward and backward", step
    if rings > 100:
        yield "texture 1024 x 1024 with averages, forward and backward", textured


def errors(rings: int, device: str) -> list[float]:
    """Relative errors of the area and of its gradients by scale and by position (of the moments, to the right and up)."""
    vertices, faces = (x.to(device) for x in ball(rings))
    p = torch.tensor([1, 0.0031, 0.0017], dtype=torch.float64, device=device, requires_grad=True)
    positions = clip(vertices * p[0] + torch.cat([p[1:], p.new_zeros(1)]))
    raster = rasterizer.rasterize(positions, faces, SIZE, SIZE)
    covered = rasterizer.antialias((raster[..., 3:] > 0).double(), raster, positions, faces)[0, ..., 0]
    place = torch.arange(SIZE, device=device) + 0.5 - SIZE / 2
    sums = covered.sum(), (covered * place).sum(), -(covered * place[:, None]).sum()
    gradients = [torch.autograd.grad(x, p, retain_graph=True)[0][i].item() for i, x in enumerate(sums)]
    radius = RADIUS * SIZE
    area = math.pi * radius**2
    return [sums[0].item() / area - 1, gradients[0] / (2 * area) - 1, *(x / (area * radius) - 1 for x in gradients[1:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--repeats", type=int, default=7, help="runs of which the best counts")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", default="", help="only cases whose name contains this")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("RESULTS-rasterizer.md"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sizes = 17, 72, 142  # 1k, 20k and 80k triangles

    where = torch.cuda.get_device_name() if arguments.device == "cuda" else f"{arguments.threads} CPU threads"
    lines = [
        "# The rasteriser against its PyTorch twin, and against exact areas",
        "",
        f"A ball, one view of {SIZE} x {SIZE} pixels, best of {arguments.repeats}; {where}, {platform.machine()}, "
        f"torch {torch.__version__}. Written by `benchmarks/rasterizer.py`.",
        "",
        "| what | compiled, ms | twin, ms | ratio |",
        "|---|---:|---:|---:|",
    ]
    print("\n".join(lines))
    for rings in sizes:
        for name, step in cases(rings, arguments.device):
            if arguments.only in name:
                ours, twin = best_of(step, arguments.repeats, arguments.device)
                lines.append(f"| {name} | {ours:.1f} | {twin:.1f} | {twin / ours:.1f} |")
                print(lines[-1], flush=True)
    title = ["", "| triangles | area | by scale | by position, right | up |", "|---|---:|---:|---:|---:|"]
    lines += title
    print("\n".join(title))
    for rings in sizes:
        found = " | ".join(f"{100 * x:+.2f} %" for x in errors(rings, arguments.device))
        lines.append(f"| {4 * (rings - 1) * rings // 1000}k | {found} |")
        print(lines[-1], flush=True)
    arguments.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
