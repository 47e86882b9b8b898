"""The training pictures of the embedded models: rendered once, colored again for every batch.

A picture is kept as layers (main shade, fixed colors, coverage; 8 bits each), so that one rendering serves all main colors and backgrounds.
"""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from guidance.views import WORDS, view_weights
from toybox.captions import caption
from toybox.models import SIZE
from toybox.objects import COLORS, OBJECTS
from toybox.render import orbit_cameras, trace

KINDS = tuple(OBJECTS)
PALETTE = ("", *COLORS)  # index 0: the kind's natural color, which captions do not name
POLAR, RADIUS, FOVY = (12.0, 103.0), (3.1, 3.3), 30.0  # a little beyond what configs/embedded.yaml samples
ANGLE_OVERHEAD = 45.0  # as in configs/embedded.yaml
CACHE = Path(os.environ.get("SOMNIUM_CACHE", "~/.cache/somnium")).expanduser() / "toybox"


@dataclass(frozen=True)
class Pictures:
    """Layers of N pictures, and what they show (degrees)."""

    main: UInt8[Tensor, "N 64 64"]
    fixed: UInt8[Tensor, "N 64 64 3"]
    alpha: UInt8[Tensor, "N 64 64"]
    kind: Int[Tensor, "N"]
    polar: Float[Tensor, "N"]
    azimuth: Float[Tensor, "N"]


def make(per_kind: int, seed: int = 0) -> Pictures:
    """Render `per_kind` random views of every kind: light within about 30 degrees of the camera, three in ten unlit."""
    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(per_kind, generator=generator)

    def byte(x: Tensor) -> Tensor:
        return (x.clamp(0, 1) * 255).round().byte()

    rows = []
    for number, kind in enumerate(KINDS):
        polar, azimuth = uniform(*POLAR), uniform(-180, 180)
        c2w = orbit_cameras(polar, azimuth, uniform(*RADIUS))
        light = c2w[:, :3, 2] + 0.3 * torch.randn(per_kind, 3, generator=generator)
        ambient = torch.where(uniform(0, 1) < 0.3, 1.0, uniform(0.3, 0.9))
        layers = trace(OBJECTS[kind], c2w, FOVY, SIZE, light, ambient)
        which = torch.full((per_kind,), number)
        rows.append((byte(layers.main), byte(layers.fixed), byte(layers.alpha), which, polar, azimuth))
        print(f"{number + 1:3d}/{len(KINDS)} {kind}", flush=True)
    return Pictures(*(torch.cat(column) for column in zip(*rows, strict=True)))


def load(per_kind: int = 1000, seed: int = 0) -> Pictures:
    """The pictures of `make`, kept in the cache folder."""
    file = CACHE / f"pictures-{per_kind}-{seed}.pt"
    if not file.exists():
        pictures = make(per_kind, seed)
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        torch.save(vars(pictures), partial)
        partial.replace(file)
    return Pictures(**torch.load(file, weights_only=True))


def paint(
    pictures: Pictures, index: Int[Tensor, "B"], color: Int[Tensor, "B"], generator: torch.Generator, white: float = 0.0
) -> Float[Tensor, "B 3 64 64"]:
    """Pictures [0, 1] with a palette color each (slightly varied) on plain backgrounds: this share of them white, of the others six in ten
    colored."""
    palette = torch.tensor(list(COLORS.values()))
    natural = torch.tensor([OBJECTS[kind].default for kind in KINDS])
    count = len(index)
    main = torch.where((color > 0)[:, None], palette[(color - 1).clamp(min=0)], natural[pictures.kind[index]])
    main = (main + 0.03 * torch.randn(count, 3, generator=generator)).clamp(0, 1)
    background = torch.rand(count, 3, generator=generator)
    grey = torch.rand(count, 1, generator=generator) < 0.4
    background = torch.where(grey, background[:, :1], background)
    if white > 0:
        background = torch.where(torch.rand(count, 1, generator=generator) < white, 1.0, background)
    layer = pictures.fixed[index].permute(0, 3, 1, 2).float()
    layer += pictures.main[index].float()[:, None] * main[:, :, None, None]
    layer += (255 - pictures.alpha[index].float())[:, None] * background[:, :, None, None]
    return layer.div_(255).clamp_(0, 1)


def captions(
    pictures: Pictures, index: Int[Tensor, "B"], color: Int[Tensor, "B"], words: int
) -> tuple[list[list[str]], Float[Tensor, "B N"]]:
    """For each picture its caption with every entry of `WORDS[words]`, and how much each of them counts for its camera."""
    rows = [
        [caption(KINDS[kind], PALETTE[c] or None, view) for view in WORDS[words]]
        for kind, c in zip(pictures.kind[index].tolist(), color.tolist(), strict=True)
    ]
    weights = view_weights(pictures.polar[index], pictures.azimuth[index], words, True, ANGLE_OVERHEAD)
    return rows, weights


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Render the training pictures into the cache folder.")
    parser.add_argument("--per_kind", type=int, default=1000, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    load(arguments.per_kind, arguments.seed)
