"""Pictures of light: Radiance .hdr (RGBE, read here), OpenEXR .exr, and ordinary 8-bit pictures, all as linear radiance."""

from pathlib import Path

import numpy as np
from jaxtyping import Float, UInt8

from errors import UserError


def read_radiance(path: Path, flag: str = "--environment") -> Float[np.ndarray, "H W 3"]:
    """The picture at `path` as linear RGB, row 0 at the top, none of it negative or infinite; ordinary pictures are decoded from sRGB.

    UserError naming `flag` for a file that is absent, is no picture, or is cut short.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{flag} {path}: no such file")
    kind = path.suffix.lower()
    try:
        if kind in (".hdr", ".pic", ".rgbe"):
            picture = decode_rgbe(path.read_bytes())
        elif kind == ".exr":
            picture = _read_exr(path, flag)
        else:
            from PIL import Image

            coded = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
            picture = np.where(coded <= 0.04045, coded / 12.92, ((coded + 0.055) / 1.055) ** 2.4)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{flag} {path}: cannot be read ({reason}); give a .hdr, .exr, .png or .jpg picture") from None
    return np.nan_to_num(np.maximum(picture, 0), nan=0.0, posinf=65504.0).astype(np.float32)


def decode_rgbe(data: bytes) -> Float[np.ndarray, "H W 3"]:
    """A Radiance picture: red, green and blue share one exponent, value = (m + 1/2) / 256 * 2^(e - 128), and 0 where e is 0.

    Scan lines are plain, run-length coded by component (2 2 high low), or in the older way (1 1 1 count repeats the pixel before).
    Ward's half is left out, as most readers do, so that round values stay round. ValueError for anything else.
    """
    if not data.startswith(b"#?"):
        raise ValueError("not a Radiance picture")
    head, separator, rest = data.partition(b"\n\n")
    line, _, body = rest.partition(b"\n")
    words = line.split()
    if not separator or len(words) != 4 or words[0] not in (b"-Y", b"+Y") or words[2] not in (b"-X", b"+X"):
        raise ValueError("no line with the size, as -Y 512 +X 1024")
    exposure = 1.0
    for entry in head.splitlines():
        name, _, value = entry.partition(b"=")
        if name == b"FORMAT" and value.strip() != b"32-bit_rle_rgbe":
            raise ValueError(f"its format is {value.strip().decode(errors='replace')}, not 32-bit_rle_rgbe")
        if name == b"EXPOSURE":
            exposure *= float(value)
    height, width = int(words[1]), int(words[3])
    if not (0 < height <= 1 << 15 and 0 < width <= 1 << 16):
        raise ValueError(f"its size is {width} x {height}")
    pixels = _scan_lines(body, height, width)
    scale = np.ldexp(1.0, pixels[..., 3:].astype(np.int32) - 136) * (pixels[..., 3:] > 0)
    picture = (pixels[..., :3] * scale / exposure).astype(np.float32)
    return picture[:: 1 if words[0] == b"-Y" else -1, :: 1 if words[2] == b"+X" else -1]


def _scan_lines(body: bytes, height: int, width: int) -> UInt8[np.ndarray, "H W 4"]:
    pixels = np.zeros((height, width, 4), np.uint8)
    at = 0
    try:
        for row in pixels:
            if 8 <= width < 1 << 15 and body[at : at + 2] == b"\2\2" and body[at + 2] < 128:
                if body[at + 2] << 8 | body[at + 3] != width:
                    raise ValueError("a scan line has another width")
                at = _components(body, at + 4, row)
            else:
                at = _plain(body, at, row)
    except IndexError:
        raise ValueError("the file is cut short") from None
    return pixels


def _components(body: bytes, at: int, row: UInt8[np.ndarray, "W 4"]) -> int:
    """One line whose four components follow each other, each as runs (128 + count, value) and stretches (count, values)."""
    for component in range(4):
        x = 0
        while x < len(row):
            count = body[at]
            run = count > 128
            count = count - 128 if run else count
            if count == 0 or x + count > len(row):
                raise ValueError("a run goes beyond its scan line")
            values = body[at + 1 : at + 2 if run else at + 1 + count]
            if len(values) != (1 if run else count):
                raise IndexError
            row[x : x + count, component] = values[0] if run else np.frombuffer(values, np.uint8)
            at += 1 + len(values)
            x += count
    return at


def _plain(body: bytes, at: int, row: UInt8[np.ndarray, "W 4"]) -> int:
    """One line of plain pixels, where 1 1 1 n repeats the last one n times (n * 256 for a second such mark in a row)."""
    x, shift = 0, 0
    while x < len(row):
        pixel = body[at : at + 4]
        if len(pixel) != 4:
            raise IndexError
        at += 4
        if pixel[:3] == b"\1\1\1":
            count = pixel[3] << shift
            if x == 0 or x + count > len(row):
                raise ValueError("a run goes beyond its scan line")
            row[x : x + count] = row[x - 1]
            x, shift = x + count, shift + 8
        else:
            row[x] = np.frombuffer(pixel, np.uint8)
            x, shift = x + 1, 0
    return at


def _read_exr(path: Path, flag: str) -> Float[np.ndarray, "H W 3"]:
    try:
        import OpenEXR
    except ImportError:
        raise UserError(f"{flag} {path}: .exr needs the package OpenEXR; pip install it or give a .hdr file") from None
    with OpenEXR.File(str(path)) as file:
        channels = file.channels()
        if "RGB" in channels or "RGBA" in channels:
            return np.asarray(channels.get("RGB", channels.get("RGBA")).pixels, np.float32)[..., :3]
        names = ["R", "G", "B"] if "R" in channels else ["Y"] * 3
        return np.stack([np.asarray(channels[name].pixels, np.float32) for name in names], -1)
