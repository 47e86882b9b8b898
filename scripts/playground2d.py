#!/usr/bin/env python3
"""Score distillation of one flat picture: every method with the same prior, prompt and seed, side by side on a contact sheet.

    python scripts/playground2d.py --text "a red teddy" --out sheet.png
    python scripts/playground2d.py --text "a red teddy" --methods sds csd --view back --guidance_scale 7.5 --perpneg --out sheet.png

What a method does to a picture is what it does to a view of a scene, without the scene: minutes become seconds. Flags of main.py that
concern the prior, the prompt or the distillation are understood (python main.py --help). The last row is a plain DDIM sample.
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from devices import choose_device  # noqa: E402
from errors import UserError, say, status_of  # noqa: E402
from flags import GROUPS  # noqa: E402
from guidance import Guidance, build_guidance  # noqa: E402
from guidance.distillation import Draw  # noqa: E402
from guidance.methods import METHODS  # noqa: E402
from guidance.prior import Hints, Prior, resize  # noqa: E402
from guidance.weights import kind_of, resolve  # noqa: E402
from nerf.media import pixels, save_png  # noqa: E402
from nerf.progress import Bar  # noqa: E402
from options import Options, Parser, parse  # noqa: E402
from toybox.sheet import labelled_sheet  # noqa: E402

SHOWN = (0.0, 0.1, 0.25, 0.5, 1.0)  # shares of the steps after which the picture is shown
AZIMUTH = {"front": 0.0, "side": 90.0, "back": 180.0, "overhead": 0.0}
OVERHEAD = 15.0  # polar angle, degrees
RATES = {"latents": 0.05, "pixels": 0.02}
SPREAD = {"latents": 0.5, "pixels": 0.1}  # of the noise that a picture starts from
SAMPLE_STEPS = 50
TILES = (128, 256)  # smallest and largest side of a picture on the sheet
_GROUPS = ("Prior", "Prompt", "Distillation", "Memory and speed of the prior")
_OTHERS = {"text", "negative", "iters", "seed", "device", "fp16", "default_polar"}
_SCENE = {"latent_iter_ratio", "grad_clip", "grad_clip_rgb"}  # of those groups, but without a meaning here
USABLE = {flag.name for title in _GROUPS for flag in GROUPS[title]} - _SCENE | _OTHERS

Frames = list[UInt8[np.ndarray, "B h w 3"]]  # one of each time of SHOWN


# -- what was typed ----------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, dict[str, Options]]:
    """What concerns the sheet, and the options of each method, by its name. Raises UserError for what makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="default: all of them")
    parser.add_argument("--iters", default="300", help="steps of each method (default 300)")
    parser.add_argument(
        "--space", choices=RATES, help="what is optimised: latents (default, if the prior has them) or pixels"
    )
    parser.add_argument("--view", choices=AZIMUTH, default="front", help="view words of the prompt (default front)")
    parser.add_argument("--lr", type=float, help=f"Adam's learning rate (default {RATES})")
    parser.add_argument(
        "--image", type=Path, help="what InstructPix2Pix edits, or a ControlNet looks at (canny finds the edges itself)"
    )
    parser.add_argument("--sample_scale", type=float, help="guidance of the sample (default 7.5, embedded model 3)")
    parser.add_argument("--out", type=Path, default=Path("playground.png"), help="the contact sheet (PNG)")
    args, rest = parser.parse_known_args(argv)
    if any(word.partition("=")[0] == "--distill" for word in rest):
        raise UserError("--distill: name one or several methods with --methods")
    if args.lr is not None and args.lr <= 0:
        raise UserError(f"--lr {args.lr:g}: must be > 0")
    _check_place(args.out)
    ours = ["--iters", args.iters, "--latent_iter_ratio", "0"]
    options = {name: parse([*rest, *ours, "--distill", name]) for name in dict.fromkeys(args.methods)}
    for opt in options.values():
        for name, origin in opt.origins.items():
            if origin == "typed" and name not in USABLE | {"latent_iter_ratio"}:
                raise UserError(f"--{name}: has no meaning for a flat picture; leave it out")
        resolve(opt)  # a word that the model does not know is better noticed now
    return args, options


def _check_place(out: Path) -> None:
    """Before anything slow. Nothing is written yet."""
    if out.suffix.lower() != ".png":
        raise UserError(f"--out {out}: is a PNG picture; let its name end in .png")
    existing = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    if existing.is_dir() == (existing == out.absolute()) or not os.access(existing, os.W_OK):
        raise UserError(f"--out {out}: cannot be written; choose another place")


# -- a picture to look at ----------------------------------------------------------------------------------------------


def read_picture(path: Path | None, opt: Options) -> Float[Tensor, "1 H H 3"] | None:
    """The middle square of the picture that the prior is to be shown, in [0, 1]; None if it looks at none.

    Raises UserError if the file cannot be read, if there is none but should be, and the other way round.
    """
    looks = opt.control != "none" or kind_of(resolve(opt)) == "StableDiffusionInstructPix2PixPipeline"
    if looks and path is None:
        raise UserError("--image is missing: this prior looks at a picture; name it")
    if path is None:
        return None
    if not looks:
        raise UserError(f"--image {path}: this prior looks at no picture; leave it out, or choose --control")
    from PIL import Image

    try:
        picture = np.asarray(Image.open(path).convert("RGB"))
    except (OSError, ValueError) as error:
        raise UserError(f"--image {path}: cannot be read as a picture ({error})") from None
    side = min(picture.shape[:2])
    top, left = ((length - side) // 2 for length in picture.shape[:2])
    square = picture[top : top + side, left : left + side]
    return torch.from_numpy(square.copy()).float()[None] / 255


def hints_of(picture: Float[Tensor, "1 H H 3"] | None, prior: Prior, opt: Options) -> Hints:
    """What the prior is to know besides the prompt, `--particles` rows of it."""
    if picture is None:
        return {}
    picture = picture.expand(opt.particles, -1, -1, -1).to(prior.device)
    if opt.control == "none":
        return {"original": picture}
    if opt.control == "canny":
        return {"picture": picture}
    return {"control": resize(picture.permute(0, 3, 1, 2), prior.control_size)}


# -- rows of the sheet -------------------------------------------------------------------------------------------------


def paint(
    guidance: Guidance,
    opt: Options,
    space: str,
    rate: float,
    angles: tuple[Tensor, Tensor],
    hints: Hints,
    tick: Callable[[], None],
) -> tuple[Frames, float]:
    """`opt.iters` steps of Adam on `opt.particles` pictures -> (what they look like at the times of SHOWN, seconds of the steps).

    space: "latents" or "pixels"; rate: Adam's; angles: polar and azimuth, degrees, one of each picture; tick: called after each step.
    """
    prior, count = guidance.prior, opt.particles
    size, channels = (prior.latent_size, prior.latent_channels) if space == "latents" else (prior.image_size, 3)
    noise = torch.randn(count, size, size, channels, generator=torch.Generator().manual_seed(opt.seed))
    start = torch.full_like(noise, 0.0 if space == "latents" else 0.5) + SPREAD[space] * noise
    start = start.to(prior.device)
    if "original" in hints:  # an edit begins with what is edited
        start = resize(hints["original"].permute(0, 3, 1, 2), prior.image_size)
        with torch.no_grad():
            start = (prior.encode(start) if space == "latents" else start).permute(0, 2, 3, 1).contiguous()
    canvas = torch.nn.Parameter(start)
    optimizer = torch.optim.Adam([canvas], rate)

    def look() -> UInt8[np.ndarray, "B h w 3"]:
        with torch.no_grad():
            shown = prior.decode(canvas.permute(0, 3, 1, 2)).permute(0, 2, 3, 1) if space == "latents" else canvas
            return pixels(shown)

    marks = [round(share * opt.iters) for share in SHOWN]
    frames, seconds = [look()], 0.0
    for first, end in pairwise(marks):
        began = time.perf_counter()
        for step in range(first, end):
            loss, _ = guidance(canvas, *angles, step, space == "latents", False, hints)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if space == "pixels":  # as the colors of a scene: beyond black and white there is nothing
                canvas.data.clamp_(0, 1)
            tick()
        if prior.device.type == "cuda":
            torch.cuda.synchronize()
        seconds += time.perf_counter() - began
        frames.append(look())
    return frames, seconds


@torch.no_grad()
def sample(
    guidance: Guidance,
    opt: Options,
    scale: float,
    angles: tuple[Tensor, Tensor],
    hints: Hints,
    tick: Callable[[], None],
) -> tuple[Frames, float]:
    """The same for a plain DDIM sample (Song et al. 2021, equation 12, eta = 0; for a flow model Euler's method): the noise, then what the
    prior takes the clean picture for."""
    prior, count, began = guidance.prior, opt.particles, time.perf_counter()
    shape = count, prior.latent_channels, prior.latent_size, prior.latent_size
    z = torch.randn(shape, generator=torch.Generator().manual_seed(opt.seed)).to(prior.device)
    frames = [pixels(prior.decode(z).permute(0, 2, 3, 1))]
    condition = guidance.prompts.condition(*angles, {"picture": torch.full((count, 8, 8, 3), 0.5).to(z)} | hints)
    draw = Draw(prior, condition, z, guidance.distillation.settings, 0, scale, (0, 0), None)
    draw.base = "negative"
    times = torch.linspace(prior.num_timesteps - 1, 0, SAMPLE_STEPS).round().long().tolist()
    marks = [round(share * SAMPLE_STEPS) for share in SHOWN]
    for number, t in enumerate(times, 1):
        now, then = (torch.full((count,), at, device=prior.device) for at in (t, (*times, 0)[number]))
        eps = draw.guided(draw.ask(("negative", "text"), z, now))
        clean = draw.clean(z, eps, now)
        if prior.autoencoder is None:
            clean = clean.clamp(-1, 1)
            eps = (z - draw.level(now)[0] * clean) / draw.level(now)[1]
        z = draw.noised(clean, eps, then)
        frames += [pixels(prior.decode(clean).permute(0, 2, 3, 1))] * marks[1:].count(number)
        tick()
    return frames, time.perf_counter() - began


# -- the sheet ---------------------------------------------------------------------------------------------------------


def make_sheet(args: argparse.Namespace, options: dict[str, Options]) -> Path:
    """Every method's row and the sample's, written anew after each of them: what is done can be looked at, and is not lost."""
    first = next(iter(options.values()))
    device, picture = choose_device(first.device), read_picture(args.image, first)
    polar = OVERHEAD if args.view == "overhead" else first.default_polar
    angles = tuple(torch.full((first.particles,), angle, device=device) for angle in (polar, AZIMUTH[args.view]))
    embedded = first.hf_key is None and (first.IF or first.sd_version == "embedded")
    scale = (3.0 if embedded else 7.5) if args.sample_scale is None else args.sample_scale
    rows, last = {}, {}
    with Bar("playground", len(options) * first.iters + SAMPLE_STEPS, lines=True) as bar:
        for name, opt in options.items():
            guidance = build_guidance(opt, device)
            prior = guidance.prior
            if prior.view_group > 1:
                raise UserError("a prior that sees several views at once has no use for a single flat picture")
            space = _space(args.space, prior)
            if space == "latents":
                _say_what_is_missing(name, opt)
            hints = hints_of(picture, prior, opt)

            def tick(name: str = name) -> None:
                bar.update(bar.done + 1, name)

            if not last:
                last = _tiles("sample", *sample(guidance, opt, scale, angles, hints, lambda: tick("sample")))
            rate = RATES[space] if args.lr is None else args.lr
            rows |= _tiles(name, *paint(guidance, opt, space, rate, angles, hints, tick))
            title = f'"{first.text}", {args.view} view: {first.iters} steps, seed {first.seed}, {prior.name}, {space}'
            tile = min(max(prior.image_size, TILES[0]), TILES[1])
            save_png(args.out, labelled_sheet(rows | last, [f"{share:.0%}" for share in SHOWN], title, tile))
    return args.out


def _space(asked: str | None, prior: Prior) -> str:
    if prior.autoencoder is None and asked == "latents":
        raise UserError("--space latents: this model works on pixels; leave it out")
    return "pixels" if prior.autoencoder is None else asked or "latents"


def _say_what_is_missing(name: str, opt: Options) -> None:
    for flag, weight in (("lambda_image", opt.lambda_image), ("lambda_clip", opt.lambda_clip)):
        if weight.max() > 0:
            say(f"{name}: --{flag} needs a picture: without effect on latents (--space pixels)")


def _tiles(name: str, frames: Frames, seconds: float) -> dict[str, list[np.ndarray]]:
    """One row per picture, by its label."""
    numbers = range(len(frames[0]))
    labels = [f"{name}{f' {number + 1}' if len(numbers) > 1 else ''}\n{seconds:.1f} s" for number in numbers]
    return {label: [frame[number] for frame in frames] for number, label in zip(numbers, labels, strict=True)}


def main(argv: Sequence[str] | None = None) -> int:
    """Make the sheet; returns the exit status."""

    def work() -> None:
        args, options = read_arguments(argv)
        say(f"contact sheet: {make_sheet(args, options)}")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
