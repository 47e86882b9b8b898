"""Canny's edges, as the ControlNet for edges was trained on them: those of OpenCV's `Canny`."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

_SOBEL = ((-1.0, 0.0, 1.0), (-2.0, 0.0, 2.0), (-1.0, 0.0, 1.0))
_SLOPE = 2**0.5 - 1  # tan 22.5 degrees: between the row and the diagonal


@torch.no_grad()
def canny(image: Float[Tensor, "B C h w"], low: float = 100.0, high: float = 200.0) -> Float[Tensor, "B 1 h w"]:
    """1 on edges, 0 elsewhere, of pictures in [0, 1]; the thresholds are for 256 levels.

    Sobel gradients of the levels (no smoothing before: the published pictures had none), at every pixel those of the channel with the
    greatest |dx| + |dy|; kept where that is greatest across the edge; edges start above `high` and are followed down to `low`.
    """
    levels = F.pad((255 * image.float().clamp(0, 1)).round(), (1, 1, 1, 1), mode="replicate")
    kernel = torch.tensor(_SOBEL, device=image.device)
    batch, channels = image.shape[:2]
    slopes = F.conv2d(levels.flatten(0, 1)[:, None], torch.stack([kernel, kernel.T])[:, None])
    dx, dy = slopes.unflatten(0, (batch, channels)).unbind(2)
    strongest = (dx.abs() + dy.abs()).argmax(1, keepdim=True)
    dx, dy = dx.gather(1, strongest), dy.gather(1, strongest)
    x, y = dx.abs(), dy.abs()
    edges = _thinned(x + y, y < _SLOPE * x, y > (_SLOPE + 2) * x, dx * dy < 0) & (x + y > low)
    return _followed(edges, edges & (x + y > high)).to(image)


def _thinned(strength: Tensor, flat: Tensor, steep: Tensor, falling: Tensor) -> Tensor:
    """Where the strength is greatest along its gradient: flat (along the row), steep, or else along a diagonal."""
    height, width = strength.shape[-2:]
    around = F.pad(strength, (1, 1, 1, 1))

    def beside(row: int, column: int) -> Tensor:
        return around[..., 1 + row : 1 + row + height, 1 + column : 1 + column + width]

    along_row = (strength > beside(0, -1)) & (strength >= beside(0, 1))
    along_column = (strength > beside(-1, 0)) & (strength >= beside(1, 0))
    one = (strength > beside(-1, -1)) & (strength > beside(1, 1))
    other = (strength > beside(-1, 1)) & (strength > beside(1, -1))
    return torch.where(flat, along_row, torch.where(steep, along_column, torch.where(falling, other, one)))


def _followed(edges: Tensor, start: Tensor) -> Tensor:
    """The edge pixels that touch a start, or a pixel that does, and so on (8 neighbours)."""
    found = start
    while True:
        before = found
        for _ in range(8):  # looking whether anything changed makes a GPU wait
            found = edges & (F.max_pool2d(found.float(), 3, 1, 1) > 0)
        if torch.equal(found, before):
            return found
