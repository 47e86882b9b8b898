"""Pictures and videos on the disk: what a render looks like as 8-bit pixels, PNG files, contact sheets and streamed mp4."""

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
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
    size = f"{width + width % 2}x{height + height % 2}"
    with atomic(path) as beside:
        encoder = _encoder(beside, size, fps)

        def append(frame: Pixels) -> None:
            frame = np.pad(frame, ((0, height % 2), (0, width % 2), (0, 0)), mode="edge")
            encoder.stdin.write(np.ascontiguousarray(frame))

        try:
            yield append
            encoder.stdin.close()
        except BrokenPipeError:  # it has ended, and said why
            pass
        except BaseException:
            encoder.kill()
            with suppress(OSError):
                encoder.stdin.close()
            raise
        finally:
            said = encoder.stderr.read().decode(errors="replace").strip()
            encoder.stderr.close()
            failed = encoder.wait() != 0
        if failed:
            raise OSError(said.partition("\n")[0].rpartition(": ")[2] or "the video encoder failed")


def _encoder(path: Path, size: str, fps: int) -> subprocess.Popen:
    """ffmpeg, waiting for frames. A Ctrl-C is for this program, not for it."""
    import imageio_ffmpeg

    frames = ["-f", "rawvideo", "-pix_fmt", "rgb24", "-s", size, "-r", str(fps), "-i", "-"]
    coded = ["-an", "-c:v", "libx264", "-pix_fmt", "yuv420p", "-crf", "10", "-movflags", "+faststart"]
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", *frames, *coded, str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True)


def read_video(path: Path, most: int) -> list[Pixels]:
    """At most `most` frames of a video, evenly spread over it."""
    import imageio_ffmpeg

    reader = imageio_ffmpeg.read_frames(str(path))
    width, height = next(reader)["size"]
    frames = [np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader]
    if len(frames) <= most:
        return frames
    return [frames[i * len(frames) // most] for i in range(most)]
