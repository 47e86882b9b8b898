"""Pictures and videos on the disk: what a render looks like as 8-bit pixels, PNG files, contact sheets and streamed mp4."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from files import atomic

KINDS = ("rgb", "depth", "normal")
FPS = 25

Pixels = UInt8[np.ndarray, "H W C"]


def pixels(image: Float[Tensor, "*B H W C"]) -> UInt8[np.ndarray, "*B H W C"]:
    """[0, 1] to [0, 255], rounded; what lies outside is clipped, what is not a number becomes black."""
    return (torch.nan_to_num(image.detach().float()).clamp(0, 1) * 255).round().byte().cpu().numpy()


def depth_picture(
    depth: Float[Tensor, "B H W 1"], alpha: Float[Tensor, "B H W 1"], radius: float, reach: float
) -> Float[Tensor, "B H W 3"]:
    """Grey that falls linearly from 1 at distance `radius - reach` to 0 at `radius + reach`, faded out with alpha.

    `depth` is sum_i w_i t_i, as rendered: divided by alpha it is the mean distance. The range is the same for all frames of a video.
    """
    distance = depth / alpha.clamp(min=1e-4)
    near = ((radius + reach - distance) / (2 * reach)).clamp(0, 1)
    return (near * alpha).expand(*alpha.shape[:-1], 3)


def normal_picture(normal: Float[Tensor, "B H W 3"], alpha: Float[Tensor, "B H W 1"]) -> Float[Tensor, "B H W 3"]:
    """(n + 1) / 2 of the unit normals, on white. `normal` is alpha-weighted, as rendered."""
    unit = torch.nn.functional.normalize(normal, dim=-1)
    return (unit + 1) / 2 * alpha + (1 - alpha)


def pictures(render: Any, radius: float, reach: float) -> dict[str, UInt8[np.ndarray, "B H W 3"]]:
    """The three pictures of each view of a `Render`: colour, depth, normal (where there is one)."""
    found = {
        "rgb": pixels(render.image[..., :3]),
        "depth": pixels(depth_picture(render.depth, render.alpha, radius, reach)),
    }
    if render.normal is not None:
        found["normal"] = pixels(normal_picture(render.normal, render.alpha))
    return found


def with_alpha(
    premultiplied: Float[Tensor, "B H W 3"], alpha: Float[Tensor, "B H W 1"]
) -> UInt8[np.ndarray, "B H W 4"]:
    """RGBA for files, where colour is not multiplied by alpha: `premultiplied` is a render on black."""
    return pixels(torch.cat([premultiplied / alpha.clamp(min=1e-4), alpha], -1))


def sheet(views: UInt8[np.ndarray, "N h w C"], columns: int = 8) -> Pixels:
    """The views as tiles of one picture, row by row; white where there are none left."""
    count, height, width, channels = views.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    filled = np.full((rows * columns, height, width, channels), 255, np.uint8)
    filled[:count] = views
    tiles = filled.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return np.ascontiguousarray(tiles.reshape(rows * height, columns * width, channels))


def save_png(path: Path, picture: Pixels) -> Path:
    """Write one picture (1, 3 or 4 channels), whole or not at all."""
    from PIL import Image

    with atomic(path) as beside:
        Image.fromarray(picture.squeeze(-1) if picture.shape[-1] == 1 else picture).save(beside)
    return path


@contextmanager
def video(path: Path, height: int, width: int, fps: int = FPS) -> Iterator[Callable[[Pixels], None]]:
    """A function that appends one RGB frame to an mp4 (H.264), streamed: no frame is kept. The file appears when the block ends well.

    H.264 wants even sizes: an odd row or column is repeated.
    """
    import imageio_ffmpeg

    even = (width + width % 2, height + height % 2)
    with atomic(path) as beside:
        stream = imageio_ffmpeg.write_frames(
            str(beside),
            even,
            fps=fps,
            quality=8,
            codec="libx264",  # else it tries encoders out, which takes seconds
            macro_block_size=2,
            ffmpeg_log_level="error",
            output_params=["-movflags", "+faststart"],
        )
        stream.send(None)

        def append(frame: Pixels) -> None:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            stream.send(np.ascontiguousarray(frame))

        try:
            yield append
        finally:
            stream.close()


def read_video(path: Path, most: int) -> list[Pixels]:
    """At most `most` frames of a video, evenly spread over it."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    if len(frames) <= most:
        return frames
    return [frames[i * len(frames) // most] for i in range(most)]
