"""Ray marching through an occupancy grid, and compositing of the samples that it finds.

Compiled (CPU, CUDA) where `extension.py` can build it, else the PyTorch twins in `reference.py`. Rays have unit length:
t is a distance. The scene is the box [-bound, bound]^3; cascade l of the occupancy grid covers the box of half size
min(2^l, bound) with grid_size^3 cells (a power of two, 8 .. 1024), packed by `packbits` in Morton order.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import extension
from raymarching import reference
from raymarching.reference import Samples

__all__ = [
    "Samples",
    "composite_rays",
    "composite_rays_train",
    "march_rays",
    "march_rays_train",
    "morton3D",
    "morton3D_invert",
    "near_far_from_aabb",
    "packbits",
    "render_rays",
]

FOLDER = Path(__file__).resolve().parent


def _ops(tensor: Tensor) -> Any | None:
    return extension.ops_for(tensor, FOLDER, "raymarching")


def _wide(tensor: Tensor) -> Tensor:
    """float32 or float64, contiguous, outside of autograd."""
    return (tensor if tensor.dtype == torch.float64 else tensor.float()).detach().contiguous()


def near_far_from_aabb(
    rays_o: Float[Tensor, "N 3"], rays_d: Float[Tensor, "N 3"], aabb: Float[Tensor, "6"], min_near: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """Where rays enter and leave the box aabb = (x0, y0, z0, x1, y1, z1), its faces included.

    Returns near (at least min_near) and far. A ray that misses the box, has it behind its origin or leaves it before
    min_near gets near = far = infinity. Directions may have components of 0.
    """
    rays_o = _wide(rays_o)
    rays_d, aabb = _wide(rays_d).to(rays_o), _wide(aabb).to(rays_o)
    ops = _ops(rays_o)
    return (ops.near_far if ops else reference.near_far_from_aabb)(rays_o, rays_d, aabb, min_near)


def morton3D(coords: Int[Tensor, "N 3"]) -> Int[Tensor, "N"]:
    """Cells (x, y, z) in 0 .. 1023 to their place on the Z-order curve (int32): bits interleaved, x lowest."""
    coords = coords.int().contiguous()
    ops = _ops(coords)
    return (ops or reference).morton3D(coords)


def morton3D_invert(indices: Int[Tensor, "N"]) -> Int[Tensor, "N 3"]:
    """Places on the Z-order curve back to cells (int32): the inverse of `morton3D`."""
    indices = indices.int().contiguous()
    ops = _ops(indices)
    return (ops or reference).morton3D_invert(indices)


def packbits(grid: Float[Tensor, "C H3"], thresh: float) -> UInt8[Tensor, "bytes"]:
    """The occupancy bits `grid > thresh`, eight cells to a byte, the first in the lowest bit; C H^3 / 8 bytes.

    grid: one row of cells in Morton order per cascade.
    """
    grid = _wide(grid)
    ops = _ops(grid)
    return (ops or reference).packbits(grid, thresh)


def march_rays_train(
    rays_o: Float[Tensor, "N 3"],
    rays_d: Float[Tensor, "N 3"],
    bound: float,
    bitfield: UInt8[Tensor, "bytes"],
    cascades: int,
    grid_size: int,
    near: Float[Tensor, "N"],
    far: Float[Tensor, "N"],
    noise: Float[Tensor, "N"] | None = None,
    dt_gamma: float = 0.0,
    max_steps: int = 1024,
) -> Samples:
    """Cuts every ray into intervals and keeps those whose middle lies in an occupied cell.

    An interval that begins at t is clamp(dt_gamma t, dt_min, dt_max) long, dt_min = 2 sqrt(3) / max_steps (the diagonal of
    the box [-1, 1]^3 in max_steps) and dt_max = 2 sqrt(3) bound / grid_size (never below dt_min). Middles lie in
    [near, far). A ray gets at most max_steps samples: with bound > 1 and a scene full of matter, raise dt_gamma or
    max_steps. The cell is looked up in the finest cascade that holds the point and whose cells are not smaller than half
    the interval.

    Args:
        rays_o, rays_d: origins and unit directions; near, far: from `near_far_from_aabb` (near = far: no samples).
        noise: in [0, 1), moves a ray's intervals along it by (noise - 1/2) intervals; None fills [near, far].
    Returns:
        Samples ordered by ray, then by distance; the same on every run. `rays` holds (first sample, count).
    """
    grid = bound, bitfield, cascades, grid_size
    ops = _ops(rays_o)
    if ops is None:
        return reference.march_rays_train(rays_o, rays_d, *grid, near, far, noise, dt_gamma, max_steps)
    return _march(ops, rays_o, rays_d, grid, near, far, noise, None, dt_gamma, max_steps, max_steps)[0]


def march_rays(
    rays_o: Float[Tensor, "N 3"],
    rays_d: Float[Tensor, "N 3"],
    bound: float,
    bitfield: UInt8[Tensor, "bytes"],
    cascades: int,
    grid_size: int,
    near: Float[Tensor, "N"],
    far: Float[Tensor, "N"],
    cursor: Int[Tensor, "N 2"],
    budget: int,
    noise: Float[Tensor, "N"] | None = None,
    dt_gamma: float = 0.0,
    max_steps: int = 1024,
) -> tuple[Samples, Int[Tensor, "N 2"]]:
    """The next `budget` samples (or fewer) of rays that are still alive; other arguments as in `march_rays_train`.

    cursor: int32, per ray the interval to go on from and the number of samples so far; zeros at first. Returns the samples
    (no unused slots) and the new cursor, whose first column is -1 where the ray has no more samples. All calls together
    give what `march_rays_train` gives.
    """
    grid = bound, bitfield, cascades, grid_size
    ops = _ops(rays_o)
    if ops is None:
        return reference.march_rays(rays_o, rays_d, *grid, near, far, cursor, budget, noise, dt_gamma, max_steps)
    return _march(ops, rays_o, rays_d, grid, near, far, noise, cursor, dt_gamma, max_steps, budget)


def _march(
    ops: Any,
    rays_o: Tensor,
    rays_d: Tensor,
    grid: tuple[float, Tensor, int, int],
    near: Tensor,
    far: Tensor,
    noise: Tensor | None,
    cursor: Tensor | None,
    dt_gamma: float,
    max_steps: int,
    budget: int,
) -> tuple[Samples, Tensor]:
    bound, bitfield, cascades, grid_size = grid
    rays_o = _wide(rays_o)
    rays_d, near, far = (_wide(x).to(rays_o) for x in (rays_d, near, far))
    noise = None if noise is None else _wide(noise).to(rays_o)
    cursor = None if cursor is None else cursor.int().contiguous()
    ray = rays_o, rays_d, near, far, noise
    scene = bitfield, bound, cascades, grid_size, dt_gamma, max_steps
    count, first, following = ops.march_count(*ray, cursor, *scene, budget)
    end = count.cumsum(0)  # int64
    total = int(end[-1]) if len(end) else 0
    if total >= 2**31:
        raise ValueError(f"{total} samples at once: march fewer rays, or raise dt_gamma")
    rays = torch.stack([end - count, count], 1).int()
    return Samples(*ops.march_write(*ray, *scene, first, rays, total), rays), following


def composite_rays_train(
    sigma: Float[Tensor, "M"],
    rgb: Float[Tensor, "M K"],
    t: Float[Tensor, "M 2"],
    rays: Int[Tensor, "N 2"],
    T_thresh: float = 1e-4,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N K"]]:
    """Weights, alpha, depth and image of rays: w_i = T_i (1 - exp(-sigma_i dt_i)), T_i = exp(-sum over j < i of sigma_j dt_j).

    alpha = sum w, depth = sum w t (distance times alpha, not normalised), image = sum w rgb (no background). A ray ends
    before the first sample with T_i < T_thresh; from there on weights and gradients are 0. Differentiable once in sigma
    and rgb through all four outputs; t and rays get no gradient.

    Args:
        sigma: density, not negative; rgb: K channels of any meaning, K >= 1; half precision is widened to float32.
        t, rays: as in `Samples`; every sample belongs to one ray.
    """
    sigma = sigma if sigma.dtype.itemsize >= 4 else sigma.float()
    rgb, t = rgb.to(sigma.dtype), t.to(sigma.dtype)
    ops = _ops(sigma)
    if ops is None:
        return reference.composite_rays_train(sigma, rgb, t, rays, T_thresh)
    return _Composite.apply(sigma.contiguous(), rgb.contiguous(), t.contiguous(), rays.contiguous(), T_thresh, ops)


class _Composite(Function):
    @staticmethod
    def forward(
        ctx: Any, sigma: Tensor, rgb: Tensor, t: Tensor, rays: Tensor, T_thresh: float, ops: Any
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        weights, behind, alpha, depth, image = ops.composite_train(sigma, rgb, t, rays, T_thresh)
        ctx.save_for_backward(rgb, t, rays, weights, behind)
        ctx.ops = ops
        ctx.set_materialize_grads(False)
        return weights, alpha, depth, image

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, weights: Tensor | None, alpha: Tensor | None, depth: Tensor | None, image: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        grads = [None if grad is None else grad.contiguous() for grad in (weights, alpha, depth, image)]
        return *ctx.ops.composite_backward(*ctx.saved_tensors, *grads), None, None, None, None


def composite_rays(
    sigma: Float[Tensor, "M"],
    rgb: Float[Tensor, "M K"],
    t: Float[Tensor, "M 2"],
    rays: Int[Tensor, "N 2"],
    transmittance: Float[Tensor, "N"],
    alpha: Float[Tensor, "N"],
    depth: Float[Tensor, "N"],
    image: Float[Tensor, "N K"],
    T_thresh: float = 1e-4,
) -> None:
    """Goes on compositing: adds more samples to the last four in place; no gradient.

    transmittance (1 at first) is the light that is left; a ray is finished once it is below T_thresh. Everything is
    contiguous and of one type. Samples and sums are those of `march_rays` and `composite_rays_train`.
    """
    ops = _ops(sigma)
    composite = ops.composite_more if ops else reference.composite_rays
    composite(sigma, rgb, t, rays, transmittance, alpha, depth, image, T_thresh)


@torch.no_grad()
def render_rays(
    field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    rays_o: Float[Tensor, "N 3"],
    rays_d: Float[Tensor, "N 3"],
    bound: float,
    bitfield: UInt8[Tensor, "bytes"],
    cascades: int,
    grid_size: int,
    near: Float[Tensor, "N"],
    far: Float[Tensor, "N"],
    noise: Float[Tensor, "N"] | None = None,
    dt_gamma: float = 0.0,
    max_steps: int = 1024,
    T_thresh: float = 1e-4,
    channels: int = 3,
    burst: int = 8,
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N K"]]:
    """Alpha, depth and image [N, channels] of a field, without gradients and without samples behind opaque matter.

    field(xyz[M,3], direction[M,3]) -> (sigma[M], rgb[M, channels]). It is asked for the next `burst` samples of all living
    rays, and for more of each (up to 8 times) as they become fewer, so that a call stays worth its while.
    """
    rays_o = _wide(rays_o)
    size = len(rays_o)
    alive = (near < far).nonzero()[:, 0]
    cursor = torch.zeros(len(alive), 2, dtype=torch.int32, device=rays_o.device)
    state = [rays_o.new_ones(size), rays_o.new_zeros(size), rays_o.new_zeros(size), rays_o.new_zeros(size, channels)]
    while len(alive):
        budget = burst * min(max(size // len(alive), 1), 8)
        samples, cursor = march_rays(
            *(rays_o[alive], rays_d[alive], bound, bitfield, cascades, grid_size, near[alive], far[alive]),
            *(cursor, budget, None if noise is None else noise[alive], dt_gamma, max_steps),
        )
        part = [whole[alive] for whole in state]
        if len(samples.xyz):
            sigma, rgb = field(samples.xyz, samples.direction)
            composite_rays(_wide(sigma).to(rays_o), _wide(rgb).to(rays_o), samples.t, samples.rays, *part, T_thresh)
        for whole, values in zip(state, part, strict=True):
            whole[alive] = values
        going = (cursor[:, 0] >= 0) & ~(part[0] < T_thresh)
        alive, cursor = alive[going], cursor[going]
    return state[1], state[2], state[3]
