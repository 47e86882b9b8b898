"""Pictures from the disk: any file that can be opened becomes colour and coverage in [0, 1]; what had to be repaired is said in one line."""

import csv
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from errors import UserError, say

SMALLEST = 16  # pixels along an edge: less shows nothing
LARGEST = 2048  # more is averaged away at once
ORIENTATION = 0x0112  # EXIF
COLUMNS = ("image", "polar", "azimuth", "radius")
SUFFIX = "_rgba"


@dataclass(frozen=True)
class Photo:
    """One square picture and what is known of it, channels last.

    rgb not multiplied by the mask; mask coverage in [0, 1]; seen 0 where the photograph did not reach; depth along the optical axis up to scale
    and shift, larger is farther; normal unit, x right, y up, z towards the viewer.
    """

    rgb: Float[Tensor, "S S 3"]
    mask: Float[Tensor, "S S 1"]
    seen: Float[Tensor, "S S 1"]
    depth: Float[Tensor, "S S 1"] | None = None
    normal: Float[Tensor, "S S 3"] | None = None


@dataclass(frozen=True)
class Row:
    """One line of an `--image_config`: a file, its camera (degrees, world units; None: the default one) and its weight for the prior."""

    image: Path
    polar: float
    azimuth: float
    radius: float
    fovy: float | None
    weight: float


# -- one file ----------------------------------------------------------------------------------------------------------------


def read_picture(
    path: Path, label: str, turn: bool = True
) -> tuple[Float[Tensor, "H W 3"], Float[Tensor, "H W 1"] | None]:
    """Colours, and coverage if the file says anything about it (an alpha channel that is opaque everywhere does not).

    `label` names the flag and the file in messages. Turns as EXIF says (a calibration refers to the pixels as they lie: `turn` False),
    converts palettes, grey, 16 bits and CMYK. UserError for what is no picture, is smaller than `SMALLEST`, or has an empty alpha channel.
    """
    picture, repairs = _open(path, label, turn)
    width, height = picture.size
    if min(width, height) < SMALLEST:
        raise UserError(f"{label}: {width} x {height} pixels are too few; give at least {SMALLEST} x {SMALLEST}")
    if picture.mode.startswith("I") or picture.mode == "F":
        values = torch.from_numpy(np.asarray(picture).astype(np.float32))
        values = (values / _full_scale(values)).clamp(0, 1)[..., None].expand(-1, -1, 3)
        repairs.append(f"grey of mode {picture.mode}, brought to [0, 1]")
    else:
        transparent = "transparency" in picture.info or picture.mode in ("RGBA", "LA", "PA", "RGBa", "La")
        if picture.mode in ("1", "L", "LA", "La"):
            repairs.append("grey")
        elif picture.mode not in ("RGB", "RGBA", "P", "PA", "RGBa"):
            repairs.append(f"{picture.mode} converted to RGB")
        values = torch.from_numpy(np.asarray(picture.convert("RGBA" if transparent else "RGB")).copy()).float() / 255
    factor = -(-max(width, height) // LARGEST)
    if factor > 1:
        repairs.append(f"{width} x {height} pixels averaged over {factor} x {factor}")
        values = F.avg_pool2d(values.permute(2, 0, 1)[None], factor, ceil_mode=True)[0].permute(1, 2, 0)
    if repairs:
        say(f"{label}: {', '.join(repairs)}")
    rgb, alpha = values[..., :3].contiguous(), values[..., 3:].contiguous()
    if not alpha.numel() or alpha.amin() > 0.99:
        return rgb, None
    if alpha.amax() < 0.5:
        raise UserError(f"{label}: its alpha channel is empty: nothing of an object is left; cut it out anew")
    return rgb, alpha


def read_grey(path: Path, label: str, turn: bool = True) -> Float[Tensor, "H W 1"]:
    """One channel in [0, 1]: a mask or a depth picture, 8 or 16 bits; of a coloured file the mean."""
    picture, _ = _open(path, label, turn)
    if picture.mode in ("P", "PA", "CMYK", "1"):
        picture = picture.convert("RGB")
    values = torch.from_numpy(np.asarray(picture).astype(np.float32))
    values = values / _full_scale(values, wide=picture.mode.startswith("I"))
    if values.dim() == 3:
        values = values[..., : 1 if picture.mode == "LA" else 3].mean(-1)
    return values.clamp(0, 1)[..., None]


def _full_scale(values: Float[Tensor, "*any"], wide: bool = True) -> float:
    """What stands for 1: 1, 255 or 65535. `wide`: the file's numbers may exceed 255."""
    largest = float(values.amax())
    if not wide:
        return 255.0
    return 1.0 if largest <= 1 else 65535.0 if largest > 255 else 255.0


def _open(path: Path, label: str, turn: bool):
    from PIL import Image, ImageOps

    if not path.is_file():
        raise UserError(f"{label}: no such file; check the path")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a large picture: it is reduced
            picture = Image.open(path)
            turn = turn and picture.getexif().get(ORIENTATION, 1) not in (0, 1)
            repairs = ["turned as its EXIF data say"] if turn else []
            if getattr(picture, "n_frames", 1) > 1:
                repairs.append(f"the first of {picture.n_frames} frames")
            picture = ImageOps.exif_transpose(picture) if turn else picture
            picture.load()
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{label}: cannot be read as a picture ({reason})") from None
    return picture, repairs


# -- size --------------------------------------------------------------------------------------------------------------------


def resized(
    values: Float[Tensor, "B H W C"], size: int, within: Float[Tensor, "B H W 1"] | None = None
) -> Float[Tensor, "B s s C"]:
    """Averaged over areas where it shrinks, bilinear where it grows. With `within`, only what it covers counts."""

    def scale(x: Tensor) -> Tensor:
        mode = {"mode": "area"} if size <= x.shape[-1] else {"mode": "bilinear", "align_corners": False}
        return F.interpolate(x, (size, size), **mode)

    if values.shape[1:3] == (size, size):
        return values
    x = values.permute(0, 3, 1, 2)
    if within is None:
        return scale(x).permute(0, 2, 3, 1)
    weight = within.permute(0, 3, 1, 2)
    total = scale(weight)
    return torch.where(total > 1e-3, scale(x * weight) / total.clamp(min=1e-3), scale(x)).permute(0, 2, 3, 1)


def square(values: Float[Tensor, "H W C"]) -> Float[Tensor, "S S C"]:
    """Zeros added on both sides, so that the middle stays the middle."""
    height, width = values.shape[:2]
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return F.pad(values, (0, 0, left, side - width - left, top, side - height - top))


# -- a picture with its companions -------------------------------------------------------------------------------------------


def read_photo(path: Path, label: str) -> Photo:
    """A picture with alpha as it is; one without cut out, centred and scaled as scripts/preprocess_image.py does, saying so.

    Beside NAME_rgba.png lie, if anybody wants them, NAME_depth.png and NAME_normal.png.
    """
    rgb, alpha = read_picture(path, label)
    if alpha is None:
        from nerf.cutout import centred, cut_out

        mask = cut_out(rgb, label)
        rgb, mask = centred(mask, rgb, mask)
        return Photo(rgb, mask, torch.ones_like(mask))
    height, width = alpha.shape[:2]
    if height != width:
        say(f"{label}: {width} x {height} pixels: transparent borders make it square")
    mask = square(alpha)
    depth, normal = _companions(path, label, mask)
    return Photo(square(rgb), mask, torch.ones_like(mask), depth, normal)


def companion(path: Path, kind: str) -> Path:
    """Where the `depth` or `normal` picture of a `NAME_rgba.png` lies."""
    return path.with_name(f"{path.stem.removesuffix(SUFFIX)}_{kind}.png")


def _companions(path: Path, label: str, mask: Float[Tensor, "S S 1"]) -> tuple[Tensor | None, Tensor | None]:
    if not path.stem.endswith(SUFFIX):
        return None, None
    depth = normal = None
    size = len(mask)
    if (place := companion(path, "depth")).is_file():
        depth = _fitted(square(read_grey(place, f"{label}: {place.name}")), size, f"{label}: {place.name}")
    if (place := companion(path, "normal")).is_file():
        rgb, _ = read_picture(place, f"{label}: {place.name}")
        normal = 2 * _fitted(square(rgb), size, f"{label}: {place.name}") - 1
        if float((normal[..., 2:] * mask).sum()) < 0:  # what is seen faces the viewer
            say(f"{label}: {place.name} has normals that point away from the viewer (Omnidata's sign); turned round")
            normal = -normal
        normal = F.normalize(normal, dim=-1)
    return depth, normal


def _fitted(values: Float[Tensor, "H H C"], size: int, label: str) -> Float[Tensor, "S S C"]:
    if len(values) != size:
        say(f"{label}: {len(values)} pixels wide, its picture {size}: resized")
    return resized(values[None], size)[0]


# -- several pictures --------------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> list[Row]:
    """The lines of an `--image_config`: a CSV file with the columns image, polar, azimuth, radius, and, if wanted, weight (or
    zero123_weight) and fovy. Paths are relative to the file. UserError for a missing column, file or number."""
    label = f"--image_config {path}"
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(f"{label}: cannot be read ({reason}); name a CSV file") from None
    lines = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    comma = ";" if lines and ";" in lines[0] and "," not in lines[0] else ","
    table = list(csv.reader(lines, delimiter=comma, skipinitialspace=True))
    header = [name.strip().lower() for name in table[0]] if table else []
    if missing := [name for name in COLUMNS if name not in header]:
        raise UserError(f"{label}: the column {missing[0]} is missing; the first line names {', '.join(COLUMNS)}")
    if len(table) < 2:
        raise UserError(f"{label}: has no pictures; give one line for each")
    return [_row(path, f"{label}, line {i}", header, values) for i, values in enumerate(table[1:], 2)]


def _row(path: Path, label: str, header: Sequence[str], values: Sequence[str]) -> Row:
    if len(values) != len(header):
        raise UserError(f"{label}: {len(values)} values for {len(header)} columns; correct it")
    found = dict(zip(header, (value.strip() for value in values), strict=True))

    def number(name: str, low: float, high: float) -> float:
        try:
            value = float(found[name])
        except ValueError:
            raise UserError(f"{label}: {name} {found[name]!r} is no number; correct it") from None
        if not low <= value <= high:
            raise UserError(f"{label}: {name} {value:g} is not within {low:g} and {high:g}; correct it")
        return value

    image = Path(found["image"]).expanduser()
    beside = path.parent / image
    if not beside.is_file() and not image.is_file():
        raise UserError(f"{label}: {beside}: no such file; paths are relative to the CSV file")
    weight = next((name for name in ("weight", "zero123_weight") if found.get(name)), None)
    return Row(
        beside if beside.is_file() else image,
        number("polar", 0, 180),
        number("azimuth", -360, 360),
        number("radius", 1e-3, 1e3),
        number("fovy", 1e-2, 179) if found.get("fovy") else None,
        number(weight, 0, 1e6) if weight else 1.0,
    )
