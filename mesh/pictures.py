"""Textures as files: 8 bits, PNG, and back."""

import io
from typing import Any

import numpy as np
from jaxtyping import Float

from mesh import Mesh

LARGEST = 4096  # texels on a side; what is larger is made smaller when it is read


def png(picture: Float[np.ndarray, "h w *C"]) -> bytes:
    """The bytes of a PNG with the values in [0, 1] as 0 to 255."""
    from PIL import Image

    held = io.BytesIO()
    Image.fromarray(np.round(np.clip(picture, 0, 1) * 255).astype(np.uint8)).save(held, "png")
    return held.getvalue()


def metallic_roughness(mesh: Mesh) -> Float[np.ndarray, "h w 3"] | None:
    """glTF's picture of both: green is roughness (1 where there is no such texture), blue metallic (else 0), red 1 (unused); None without either.

    If the two differ in size, the smaller one is read at the nearest texels of the larger.
    """
    both = [mesh.textures.get(name) for name in ("roughness", "metallic")]
    shapes = [picture.shape for picture in both if picture is not None]
    if not shapes:
        return None
    height, width = (max(sides) for sides in zip(*shapes, strict=True))
    channels = [np.ones((height, width), np.float32)]
    for picture, plain in zip(both, (1.0, 0.0), strict=True):
        picture = np.full((1, 1), plain, np.float32) if picture is None else picture
        rows, columns = (np.arange(n) * m // n for n, m in zip((height, width), picture.shape, strict=True))
        channels.append(picture[rows][:, columns].astype(np.float32))
    return np.stack(channels, -1)


def read_picture(source: Any) -> tuple[Float[np.ndarray, "h w 3"], str | None]:
    """The colours of a picture file (a path or a stream) in [0, 1], and a remark if it had to be made smaller; OSError if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(source) as image:
            remark, size = None, image.size
            if max(size) > LARGEST:
                scale = LARGEST / max(size)
                smaller = tuple(max(1, round(side * scale)) for side in size)
                image = image.convert("RGB").resize(smaller, Image.Resampling.LANCZOS)
                remark = f"a texture of {size[0]} x {size[1]} was made smaller: {smaller[0]} x {smaller[1]}"
            if image.mode.startswith("I"):  # 16 bits of grey
                grey = np.asarray(image, np.float32) / 65535
                return np.repeat(grey[..., None], 3, 2), remark
            return np.asarray(image.convert("RGB"), np.float32) / 255, remark
    except (ValueError, SyntaxError, EOFError, Image.DecompressionBombError, MemoryError) as error:
        raise OSError(str(error)) from None
