"""A picture of pictures: rows and columns of tiles with their names."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from files import atomic

Tile = UInt8[np.ndarray, "h w 3"] | None
LABEL, LINE, GAP = 120, 18, 2  # width of the names at the left, height of a line of text, space between tiles; pixels


def sheet_size(rows: int, columns: int, tile: int) -> tuple[int, int]:
    """(height, width) of a `labelled_sheet` in pixels."""
    return 2 * LINE + rows * (tile + GAP), LABEL + columns * (tile + GAP)


def labelled_sheet(
    rows: Mapping[str, Sequence[Tile]], columns: Sequence[str], title: str, tile: int
) -> UInt8[np.ndarray, "H W 3"]:
    """The title, the names of the columns, and for each row its name (lines of it) and its pictures, scaled to squares of `tile` pixels.

    A picture that is None stays white; one that is too small is enlarged without smoothing.
    """
    from PIL import Image, ImageDraw, ImageFont

    height, width = sheet_size(len(rows), len(columns), tile)
    page = Image.new("RGB", (width, height), "white")
    draw, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    draw.text((4, 2), _fitting(title, width - 8, font), "black", font)
    for column, name in enumerate(columns):
        draw.text((LABEL + column * (tile + GAP), LINE + 2), _fitting(name, tile, font), "black", font)
    for row, (name, tiles) in enumerate(rows.items()):
        y = 2 * LINE + row * (tile + GAP)
        for number, line in enumerate(name.splitlines()):
            draw.text((4, y + 4 + number * (LINE - 2)), _fitting(line, LABEL - 8, font), "black", font)
        for column, picture in enumerate(tiles):
            if picture is not None:
                filter = Image.Resampling.NEAREST if max(picture.shape[:2]) <= tile else Image.Resampling.LANCZOS
                page.paste(Image.fromarray(picture).resize((tile, tile), filter), (LABEL + column * (tile + GAP), y))
    return np.asarray(page).copy()


def save_sheet(path: Path, sheet: UInt8[np.ndarray, "H W 3"]) -> None:
    """Write a PNG of 256 colors: half the bytes, and it looks the same."""
    from PIL import Image

    with atomic(path) as beside:
        Image.fromarray(sheet).quantize(256, method=Image.Quantize.FASTOCTREE).save(beside, "PNG", optimize=True)


def _fitting(text: str, width: int, font) -> str:
    """The text, cut off with dots if it is wider than that."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "...") > width:
        text = text[:-1]
    return text + "..."
