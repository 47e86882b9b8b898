"""Ask tiny-zero123 for toybox objects from all around, shown only their front: is it the object, and is it turned the right way?

python -m toybox.check_zero123 --out views.png          a sheet to look at, and figures
"""

import argparse
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.zero123 import EMBEDDED_SCALE, View, ViewBank, Zero123, sample_views
from guidance.zero123_reference import Parts, read_view_model, view_source
from toybox.check import turned_right
from toybox.evaluate import POLAR, PROMPTS, RADIUS, truth
from toybox.models import SIZE
from toybox.sheet import labelled_sheet
from toybox.training import psnr

CAP = 40.0  # dB, where two views are the same
AZIMUTHS = torch.tensor([45.0, 90.0, 135.0, 180.0, -135.0, -90.0, -45.0])


def load(folder: str | None, device: torch.device | str = "cpu") -> tuple[Parts, Zero123]:
    """The model in a folder (None: the embedded one)."""
    parts = read_view_model(view_source(folder), device)
    return parts, Zero123.of(parts, device)


def predict(
    parts: Parts,
    prior: Zero123,
    front: Float[Tensor, "3 S S"],
    azimuth: Float[Tensor, "B"],
    polar: Float[Tensor, "B"],
    steps: int,
    scale: float,
    eta: float,
    seed: int = 0,
) -> Float[Tensor, "B H W 3"]:
    """Samples of the object of a picture that shows it from azimuth 0 and the evaluation's polar angle, from other cameras (degrees)."""
    bank = ViewBank(parts, prior, [View(front, POLAR, 0.0, RADIUS)])
    told = bank.condition(polar, azimuth).text
    generator = torch.Generator(prior.device).manual_seed(seed)
    return sample_views(prior, told, steps, scale, eta, generator).permute(0, 2, 3, 1)


def outline(image: Float[Tensor, "B H W 3"], tolerance: float = 0.08) -> Tensor:
    """Where a picture is not white."""
    return (1 - image).amax(-1) > tolerance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder (default: the embedded one)")
    parser.add_argument("--out", type=Path, help="picture file: two rows per object, the truth above what was drawn")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=EMBEDDED_SCALE, help="of classifier-free guidance")
    parser.add_argument("--eta", type=float, default=0.0)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of them")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    parts, prior = load(args.model)
    count = len(AZIMUTHS)
    rows, errors, copied, right, overlap = {}, [], [], [], []
    for prompt in PROMPTS[: args.prompts]:
        true, alpha = truth(prompt, torch.cat([torch.zeros(1), AZIMUTHS]), SIZE)
        level = torch.full((count,), POLAR)
        drawn = predict(
            parts, prior, true[0].permute(2, 0, 1), AZIMUTHS, level, args.steps, args.scale, args.eta, args.seed
        )
        errors.append([psnr(a, b) for a, b in zip(drawn, true[1:], strict=True)])
        copied.append([min(psnr(true[0], b), CAP) for b in true[1:]])
        right.append(turned_right(drawn, prompt, AZIMUTHS))
        a, b = outline(drawn), outline(true[1:]) | (alpha[1:] > 0.5)
        overlap.append((a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1))
        print(
            f"{prompt:20s} PSNR {sum(errors[-1]) / count:5.1f} dB (copying the front {sum(copied[-1]) / count:5.1f}), "
            f"outline {overlap[-1].mean():.2f}, turned right {right[-1].mean():.2f}",
            flush=True,
        )
        for name, views in ((prompt, true), ("", torch.cat([true[:1], drawn]))):
            tiles = [(view.clamp(0, 1) * 255).round().byte().numpy() for view in views]
            rows[name or f"{prompt}\ndrawn"] = tiles
    errors, copied, right, overlap = (
        torch.tensor(errors),
        torch.tensor(copied),
        torch.stack(right),
        torch.stack(overlap),
    )
    for i, azimuth in enumerate(AZIMUTHS.tolist()):
        print(
            f"{azimuth:+5.0f} degrees: PSNR {errors[:, i].mean():.1f} dB (copying the front {copied[:, i].mean():.1f}), "
            f"outline {overlap[:, i].mean():.2f}, turned right {right[:, i].mean():.2f}"
        )
    print(
        f"all: PSNR {errors.mean():.2f} dB (copying the front {copied.mean():.2f}), outline {overlap.mean():.3f}, "
        f"turned right {right.mean():.3f} (chance about 0.35)"
    )
    if args.out:
        from PIL import Image

        columns = ["front", *(f"{azimuth:+.0f}" for azimuth in AZIMUTHS.tolist())]
        Image.fromarray(labelled_sheet(rows, columns, "truth, and what was drawn of the front", SIZE)).save(args.out)


if __name__ == "__main__":
    main()
