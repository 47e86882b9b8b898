"""A guessed depth as a file keeps it, and the normals that follow from it."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

RELIEF = 0.5  # how deep what is seen of an object is taken to be, as a share of its width: a ball's front half
SMOOTH = 0.008  # standard deviation of the blur before slopes are taken, as a share of the picture's edge


def within(depth: Float[Tensor, "S S 1"], mask: Float[Tensor, "S S 1"]) -> Float[Tensor, "S S 1"]:
    """Scaled and shifted so that the mask has 0 (nearest) to 1 (farthest); 0 outside. A flat depth becomes one half."""
    inside = depth[mask > 0.5]
    low, high = inside.amin(), inside.amax()
    if float(high - low) < 1e-9:
        return torch.where(mask > 0.5, 0.5, 0.0)
    return torch.where(mask > 0.5, (depth - low) / (high - low), 0.0)


def normals_of(depth: Float[Tensor, "S S 1"], mask: Float[Tensor, "S S 1"]) -> Float[Tensor, "S S 3"]:
    """Unit normals (x right, y up, z towards the viewer) of a relative depth (0 nearest to 1 farthest); (0, 0, 1) outside the mask.

    With parallel rays n ~ (dz/dx, -dz/dy, 1), x to the right and y downwards in the picture, z = depth. How deep the object is nobody knows:
    its depth is taken for `RELIEF` times its width, the side of a square of its area. The depth is blurred within the mask first.
    """
    size = len(depth)
    inside = (mask > 0.5).to(depth)
    width = inside.sum().sqrt().clamp(min=1.0)
    kernel = _gaussian(SMOOTH * size).to(depth)

    def blur(x: Tensor) -> Tensor:
        x = x.permute(2, 0, 1)[:, None]
        pad = len(kernel) // 2
        x = F.conv2d(F.pad(x, (pad, pad, 0, 0)), kernel[None, None, None])
        return F.conv2d(F.pad(x, (0, 0, pad, pad)), kernel[None, None, :, None])[:, 0].permute(1, 2, 0)

    z = blur(depth * inside) / blur(inside).clamp(min=1e-3) * RELIEF * width  # in pixels
    right, down = _slope(z, inside, 1), _slope(z, inside, 0)
    normal = F.normalize(torch.cat([right, -down, torch.ones_like(z)], -1), dim=-1)
    return torch.where(inside > 0, normal, torch.tensor([0.0, 0.0, 1.0]).to(normal))


def _gaussian(sigma: float) -> Float[Tensor, "K"]:
    reach = max(1, round(3 * sigma))
    x = torch.arange(-reach, reach + 1).float()
    weight = torch.exp(-0.5 * (x / max(sigma, 1e-3)) ** 2)
    return weight / weight.sum()


def _slope(z: Float[Tensor, "S S 1"], inside: Float[Tensor, "S S 1"], axis: int) -> Float[Tensor, "S S 1"]:
    """Mean of the differences to the two neighbours along an axis, as far as they lie inside."""
    step = torch.roll(z, -1, axis) - z
    both = inside * torch.roll(inside, -1, axis)
    both[(-1,) if axis == 0 else (slice(None), -1)] = 0  # the last has no next
    before, before_both = torch.roll(step, 1, axis), torch.roll(both, 1, axis)
    return (step * both + before * before_both) / (both + before_both).clamp(min=1)
