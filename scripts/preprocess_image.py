#!/usr/bin/env python3
"""Photographs for --image: the object cut out, centred and scaled, with its depth and its normals.

    python scripts/preprocess_image.py photo.jpg
    python scripts/preprocess_image.py *.jpg --out prepared --no_depth
    python scripts/preprocess_image.py cup.jpg --box 0.1 0 0.8 1

writes photo_rgba.png, photo_depth.png (16 bits, larger is farther) and photo_normal.png (x right, y up, z towards the viewer, as (n + 1) / 2),
which `main.py --image photo_rgba.png` finds. An alpha channel is used; without one the object is cut out by rembg where it is installed, else
by GrabCut, which --box helps where the object is not clear or not whole. Depths come from a network (--depth_model), normals from it or from
the depths. Nothing is overwritten without --force.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from errors import UserError, say, status_of  # noqa: E402
from files import atomic, make_folder  # noqa: E402
from guidance.depth import DEPTH_MODEL, NORMAL_MODEL, DepthModel, NormalModel  # noqa: E402
from nerf.cutout import BORDER, SIZE, box_of, centred, cut_out  # noqa: E402
from nerf.media import pixels, save_png  # noqa: E402
from nerf.photo_files import SUFFIX, read_picture, resized, square  # noqa: E402
from nerf.progress import Bar  # noqa: E402
from nerf.relief import normals_of, within  # noqa: E402
from options import Parser  # noqa: E402

Models = tuple[DepthModel | None, NormalModel | None]


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed; UserError for what makes no sense."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="pictures of one object each")
    parser.add_argument("--out", type=Path, help="the folder for the results (default: beside each picture)")
    parser.add_argument("--size", type=int, default=SIZE, help=f"edge of the results in pixels (default {SIZE})")
    parser.add_argument(
        "--border_ratio", type=float, default=BORDER, help=f"share of the edge that stays free (default {BORDER})"
    )
    parser.add_argument(
        "--box",
        nargs=4,
        type=float,
        metavar=("LEFT", "TOP", "RIGHT", "BOTTOM"),
        help="where the object is, as shares of width and height (0 to 1), for pictures without an alpha channel",
    )
    parser.add_argument("--dont_recenter", action="store_true", help="leave the object where it is in the picture")
    parser.add_argument("--force", action="store_true", help="overwrite results that are there")
    parser.add_argument("--no_depth", action="store_true", help="no depth, and no normals but --normal_model's")
    parser.add_argument("--no_normal", action="store_true", help="no normals")
    parser.add_argument(
        "--depth_model",
        default=DEPTH_MODEL,
        help=f"a transformers depth model, hub id or folder (default {DEPTH_MODEL})",
    )
    parser.add_argument(
        "--larger",
        choices=("auto", "nearer", "farther"),
        default="auto",
        help="what that model's larger numbers mean (default auto: by its kind)",
    )
    parser.add_argument(
        "--normal_model",
        help=f"a Marigold model of normals, hub id or folder, such as {NORMAL_MODEL}; else from the depth",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="where the models compute")
    args = parser.parse_args(argv)
    if not 16 <= args.size <= 4096:
        raise UserError(f"--size {args.size}: must be from 16 to 4096")
    if args.box and not (0 <= args.box[0] < args.box[2] <= 1 and 0 <= args.box[1] < args.box[3] <= 1):
        raise UserError(f"--box {' '.join(f'{x:g}' for x in args.box)}: must be LEFT TOP RIGHT BOTTOM, from 0 to 1")
    if not 0 <= args.border_ratio < 0.9:
        raise UserError(f"--border_ratio {args.border_ratio:g}: must be from 0 to 0.9")
    return args


def results_of(image: Path, args: argparse.Namespace) -> dict[str, Path]:
    """The files that a picture becomes, by kind: rgba, depth, normal."""
    kinds = ["rgba"] + ["depth"] * (not args.no_depth)
    kinds += ["normal"] * (not args.no_normal and (not args.no_depth or args.normal_model is not None))
    folder = args.out or image.parent
    return {kind: folder / f"{image.stem.removesuffix(SUFFIX)}_{kind}.png" for kind in kinds}


def check_places(args: argparse.Namespace) -> None:
    """Before anything slow: nobody's file is overwritten, and no two pictures write the same one."""
    taken: dict[Path, Path] = {}
    for image in args.images:
        if not image.is_file():
            raise UserError(f"{image}: no such file; check the path")
        for place in results_of(image, args).values():
            if (other := taken.setdefault(place.absolute(), image)) != image:
                raise UserError(
                    f"{image} and {other} would both become {place}; prepare one of them with another --out"
                )
            if place.exists() and not args.force:
                raise UserError(f"{place}: is there already; --force overwrites it, --out chooses another folder")
    for folder in {args.out} if args.out else {image.parent for image in args.images}:
        make_folder(folder)


def load_models(args: argparse.Namespace) -> Models:
    """The networks that are wanted; UserError if one cannot be had."""
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: there is no GPU; leave the flag out")
    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    depth = None if args.no_depth else DepthModel(args.depth_model, device, args.larger)
    normal = NormalModel(args.normal_model, device) if args.normal_model and not args.no_normal else None
    return depth, normal


def prepare(image: Path, args: argparse.Namespace, models: Models) -> dict[str, Path]:
    """Write the results of one picture; says what became of it. The networks see the whole photograph, not the cut out object."""
    label = str(image)
    rgb, alpha = read_picture(image, label)
    if args.box and alpha is not None:
        say(f"{label}: has an alpha channel, which says what the object is; --box is not looked at")
    mask = cut_out(rgb, label, args.box) if alpha is None else alpha
    top, bottom, left, right = box_of(mask)
    height, width = mask.shape[:2]
    touching = [
        side
        for side, out in {
            "top": top == 0,
            "bottom": bottom == height,
            "left": left == 0,
            "right": right == width,
        }.items()
        if out
    ]
    if touching:
        say(f"{label}: the object touches the picture's {' and '.join(touching)}: what is cut off stays so")
    whole = torch.ones_like(mask) if alpha is None else mask
    shown = rgb * whole + (1 - whole)  # what is transparent may hold any colour
    depth = models[0](shown) if models[0] else None
    normal = models[1](shown) if models[1] else None
    layers = [mask, rgb * mask, *(x for x in (depth, normal) if x is not None)]
    if args.dont_recenter:
        layers = [resized(square(layer)[None], args.size)[0] for layer in layers]
    else:
        layers = list(centred(mask, *layers, size=args.size, border=args.border_ratio))
    mask, premultiplied, *others = layers
    rgb = torch.where(mask > 1e-3, premultiplied / mask.clamp(min=1e-3), 0.0)
    if depth is not None:
        depth = within(others.pop(0), mask)
    if normal is not None:
        normal = torch.nn.functional.normalize(others.pop(0), dim=-1)
    elif depth is not None:
        normal = normals_of(depth, mask)
    return _write(results_of(image, args), rgb, mask, depth, normal)


def _write(
    places: dict[str, Path],
    rgb: Float[Tensor, "S S 3"],
    mask: Float[Tensor, "S S 1"],
    depth: Float[Tensor, "S S 1"] | None,
    normal: Float[Tensor, "S S 3"] | None,
) -> dict[str, Path]:
    from PIL import Image

    save_png(places["rgba"], pixels(torch.cat([rgb, mask], -1)))
    if "depth" in places and depth is not None:
        with atomic(places["depth"]) as beside:
            Image.fromarray((depth[..., 0].clamp(0, 1) * 65535).round().numpy().astype(np.uint16)).save(beside)
    if "normal" in places and normal is not None:
        save_png(places["normal"], pixels(torch.where(mask > 0.5, (normal + 1) / 2, 0.5)))
    return places


def prepare_all(argv: Sequence[str] | None) -> None:
    """All the pictures that were named."""
    args = read_arguments(argv)
    check_places(args)
    models = load_models(args)
    with Bar("pictures", len(args.images)) as bar:
        for number, image in enumerate(args.images, 1):
            places = prepare(image, args, models)
            say(f"{image}: {', '.join(str(place) for place in places.values())}")
            bar.update(number)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare all pictures; returns the exit status."""
    return status_of(lambda: prepare_all(argv))


if __name__ == "__main__":
    sys.exit(main())
