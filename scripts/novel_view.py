#!/usr/bin/env python3
"""What a novel-view prior makes of a picture, by itself: seconds that tell whether a picture suits, before an hour of --image.

    python scripts/novel_view.py mug.png --azimuth 90
    python scripts/novel_view.py mug.png --azimuth -90 90 180 --polar -20 --zero123 models/zero123-xl --out views.png

The picture lies beside the answers on the sheet that is written. Angles are changes, in degrees: azimuth + is to the right around the object,
polar + is downwards. A picture without an alpha channel is cut out first, as --image does it.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from errors import UserError, say, status_of  # noqa: E402
from options import Parser  # noqa: E402

TILES = (128, 256)  # smallest and largest side of a picture on the sheet


def read_white(path: Path) -> Float[Tensor, "3 S S"]:
    """The object of a picture file on white, square. Raises UserError if it is no picture of an object."""
    from nerf.photo_files import read_photo

    photo = read_photo(path, str(path))
    covered = photo.mask * photo.seen
    return (photo.rgb * covered + 1 - covered).permute(2, 0, 1).float()


def draw(args: argparse.Namespace, picture: Float[Tensor, "3 S S"]) -> tuple[Tensor, Tensor]:
    """(the picture as the model sees it, its answers [N, 3, k, k])."""
    from devices import choose_device
    from guidance.prior import resize
    from guidance.zero123 import EMBEDDED_SCALE, SAMPLE_SCALE, View, ViewBank, Zero123, sample_views
    from guidance.zero123_reference import is_embedded, read_view_model, view_source
    from nerf.progress import Bar

    device = choose_device(args.device)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    source = view_source(args.zero123)
    parts = read_view_model(source, device, dtype)
    prior = Zero123.of(parts, device, source.name)
    bank = ViewBank(parts, prior, [View(picture, args.default_polar, 0.0, 0.0)])
    camera = [[args.default_polar + args.polar, azimuth, args.radius] for azimuth in args.azimuth]
    camera = torch.tensor(camera, device=device)
    told = bank.tell(torch.zeros(len(camera), dtype=torch.long, device=device), camera)
    generator = torch.Generator(device).manual_seed(args.seed)
    scale = args.scale if args.scale is not None else (EMBEDDED_SCALE if is_embedded(source) else SAMPLE_SCALE)
    with Bar("drawing", args.steps) as bar:
        answers = sample_views(prior, told, args.steps, scale, args.eta, generator, lambda done: bar.update(done))
    return resize(picture[None], prior.image_size)[0], answers


def write(path: Path, args: argparse.Namespace, picture: Tensor, answers: Tensor) -> None:
    """The sheet: the picture, then the answers in the order of the azimuths."""
    from nerf.media import pixels, save_png
    from toybox.sheet import labelled_sheet

    tiles = [pixels(one.permute(1, 2, 0)) for one in (picture, *answers)]
    names = ["picture", *(f"azimuth {azimuth:+g}" for azimuth in args.azimuth)]
    title = f"{args.image.name}: polar {args.polar:+g}, radius {args.radius:+g}"
    tile = min(max(tiles[0].shape[0], TILES[0]), TILES[1])
    save_png(path, labelled_sheet({args.image.stem[:16]: tiles}, names, title, tile))


def build_parser() -> argparse.ArgumentParser:
    """The flags; their defaults are those of the published demo."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("image", type=Path, help="the picture; best with an alpha channel and the object in its middle")
    add("--azimuth", type=float, nargs="+", default=[90.0], help="degrees to the right, one or several (default 90)")
    add("--polar", type=float, default=0.0, help="degrees downwards (default 0)")
    add("--radius", type=float, default=0.0, help="how much farther away, in the model's units (default 0)")
    add(
        "--default_polar",
        type=float,
        default=90.0,
        help="the picture's own polar angle: Stable-Zero123 asks for it (default 90: level)",
    )
    add("--zero123", default=None, metavar="KEY", help="folder or hub id of the model (default: the embedded one)")
    add("--steps", type=int, default=50, help="of DDIM (default 50)")
    add("--scale", type=float, help="of classifier-free guidance (default 3)")
    add("--eta", type=float, default=1.0, help="share of fresh noise in a step, 0 to 1 (default 1)")
    add("--seed", type=int, default=0)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--out", type=Path, default=Path("novel_view.png"), help="the sheet (PNG, default novel_view.png)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""

    def work() -> None:
        args = build_parser().parse_args(argv)
        if args.steps < 1:
            raise UserError(f"--steps {args.steps}: must be at least 1")
        if not 0 <= args.eta <= 1:
            raise UserError(f"--eta {args.eta:g}: must lie between 0 and 1")
        if args.out.suffix.lower() != ".png":
            raise UserError(f"--out {args.out}: must end in .png")
        if not args.image.is_file():
            raise UserError(f"{args.image}: no such file")
        write(args.out, args, *draw(args, read_white(args.image)))
        say(f"wrote {args.out}")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
