"""The ray marcher in plain PyTorch: the definition, the fallback without a compiler, and the oracle of the tests.

Nothing is skipped here: `march_rays` looks at every point of the lattice and keeps those in occupied cells. The compiled
marcher must return the same samples, sooner. Conventions: rays have unit length; the scene is the box [-bound, bound]^3;
cascade `l` of the occupancy grid covers the box of half size min(2^l, bound) with `grid_size`^3 cells in Morton order,
eight to a byte, lowest bit first.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor


class Samples(NamedTuple):
    """The samples of N rays, one ray after the other."""

    xyz: Float[Tensor, "M 3"]  # position, at the middle of its interval
    direction: Float[Tensor, "M 3"]  # of the ray it lies on
    t: Float[Tensor, "M 2"]  # distance of that middle from the origin, and the interval's length
    rays: Int[Tensor, "N 2"]  # int32: first sample of the ray, number of its samples


def near_far_from_aabb(
    rays_o: Float[Tensor, "N 3"], rays_d: Float[Tensor, "N 3"], aabb: Float[Tensor, "6"], min_near: float
) -> tuple[Float[Tensor, "N"], Float[Tensor, "N"]]:
    """See `raymarching.near_far_from_aabb`."""
    low, high = aabb[:3] - rays_o, aabb[3:] - rays_o
    parallel = rays_d == 0
    slope = torch.where(parallel, 1, rays_d)
    enter, leave = torch.minimum(low / slope, high / slope), torch.maximum(low / slope, high / slope)
    between = (low <= 0) & (high >= 0)  # a parallel ray stays between the two planes for ever, or never is
    enter = torch.where(parallel, torch.where(between, -math.inf, math.inf), enter)
    leave = torch.where(parallel, torch.where(between, math.inf, -math.inf), leave)
    near, far = enter.amax(-1).clamp(min=min_near), leave.amin(-1)
    hit = near <= far
    return torch.where(hit, near, math.inf), torch.where(hit, far, math.inf)


def morton3D(coords: Int[Tensor, "*any 3"]) -> Int[Tensor, "*any"]:
    """See `raymarching.morton3D`."""
    spread = coords.int()
    for shift, mask in (16, 0x030000FF), (8, 0x0300F00F), (4, 0x030C30C3), (2, 0x09249249):
        spread = (spread | spread << shift) & mask
    return spread[..., 0] | spread[..., 1] << 1 | spread[..., 2] << 2


def morton3D_invert(indices: Int[Tensor, "N"]) -> Int[Tensor, "N 3"]:
    """See `raymarching.morton3D_invert`."""
    packed = torch.stack([indices.int() >> axis for axis in range(3)], -1) & 0x09249249
    for shift, mask in (2, 0x030C30C3), (4, 0x0300F00F), (8, 0x030000FF), (16, 0x000003FF):
        packed = (packed | packed >> shift) & mask
    return packed


def packbits(grid: Float[Tensor, "C H3"], thresh: float) -> UInt8[Tensor, "bytes"]:
    """See `raymarching.packbits`."""
    bits = (grid > thresh).view(-1, 8).to(torch.uint8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=grid.device)).sum(-1, dtype=torch.uint8)


def step_range(bound: float, grid_size: int, max_steps: int) -> tuple[float, float]:
    """The shortest and the longest interval of the lattice (`raymarching.march_rays_train` explains them)."""
    shortest = 2 * math.sqrt(3) / max_steps
    return shortest, max(shortest, 2 * math.sqrt(3) * bound / grid_size)


def lattice(
    near: Float[Tensor, "N"],
    noise: Float[Tensor, "N"] | None,
    index: Int[Tensor, "*any"],
    dt_gamma: float,
    steps: tuple[float, float],
) -> tuple[Float[Tensor, "N K"], Float[Tensor, "N K"]]:
    """Middle and length of the lattice's intervals `index` ([K] or [N, K]) on every ray.

    An interval that starts at t is clamp(dt_gamma t, steps[0], steps[1]) long. That recursion has a closed form, which
    `count` inverts: the number of intervals up to t is linear, then logarithmic, then linear in t.
    """
    dt_min, dt_max = steps
    offset = 0.5 if noise is None else noise[:, None]
    if dt_gamma == 0:
        middle = near[:, None] + (index + offset) * dt_min
        return middle, torch.full_like(middle, dt_min)

    rate = math.log1p(dt_gamma)
    t_low, t_high = dt_min / dt_gamma, dt_max / dt_gamma  # where the growth begins and ends
    n_low = t_low / dt_min
    n_high = n_low + math.log(t_high / t_low) / rate

    def count(t: Tensor) -> Tensor:
        middle = n_low + torch.log(t.clamp(t_low, t_high) / t_low) / rate
        return torch.where(t < t_low, t / dt_min, torch.where(t < t_high, middle, n_high + (t - t_high) / dt_max))

    def distance(n: Tensor) -> Tensor:
        middle = t_low * torch.exp((n.clamp(n_low, n_high) - n_low) * rate)
        return torch.where(n < n_low, n * dt_min, torch.where(n < n_high, middle, t_high + (n - n_high) * dt_max))

    n = (count(near)[:, None] + (offset - 0.5)) + index
    start, end = distance(n), distance(n + 1)
    return (start + end) / 2, end - start


def occupied(
    xyz: Float[Tensor, "*any 3"],
    dt: Float[Tensor, "*any"],
    bound: float,
    bitfield: Tensor,
    cascades: int,
    grid_size: int,
) -> Bool[Tensor, "*any"]:
    """Whether the cell around each point is occupied, in the finest cascade that holds the point and is not finer than dt."""
    level = torch.maximum(torch.frexp(xyz.abs().amax(-1))[1], torch.frexp(dt * (grid_size / 2))[1])
    level = level.clamp(0, cascades - 1)
    box = torch.exp2(level.to(xyz.dtype)).clamp(max=bound)[..., None]
    cell = (xyz * (grid_size / 2 / box) + grid_size / 2).floor().clamp(0, grid_size - 1).int()
    bit = level.long() * grid_size**3 + morton3D(cell)
    return (bitfield[bit >> 3] >> (bit & 7).to(torch.uint8)) & 1 != 0


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
    """See `raymarching.march_rays`."""
    steps = step_range(bound, grid_size, max_steps)
    hit = (near < far) & far.isfinite() & (cursor[:, 0] >= 0)
    near, far = torch.where(hit, near, 0), torch.where(hit, far, -1)
    longest = int((far - near).clamp(min=0).max() / steps[0]) + 2 if len(near) else 1
    index = torch.arange(longest, device=near.device)

    middle, dt = lattice(near, noise, index, dt_gamma, steps)
    xyz = (rays_o[:, None] + middle[..., None] * rays_d[:, None]).clamp(-bound, bound)
    keep = (middle < far[:, None]) & (index >= cursor[:, :1])
    keep &= occupied(xyz, dt, bound, bitfield, cascades, grid_size)

    room = (max_steps - cursor[:, 1:]).clamp(0, budget)
    rank = keep.cumsum(1)
    later = keep & (rank > room)  # what the next call finds, unless max_steps forbids it
    keep &= rank <= room
    count = keep.sum(1)
    rays = torch.stack([count.cumsum(0) - count, count], 1).int()

    taken = cursor[:, 1] + count
    following = torch.where(later.any(1) & (taken < max_steps), later.int().argmax(1), -1)
    ray = keep.nonzero()[:, 0]
    samples = Samples(xyz[keep], rays_d[ray], torch.stack([middle[keep], dt[keep]], -1), rays)
    return samples, torch.stack([following, taken], 1).int()


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
    """See `raymarching.march_rays_train`."""
    cursor = torch.zeros(len(rays_o), 2, dtype=torch.int32, device=rays_o.device)
    grid = bound, bitfield, cascades, grid_size
    return march_rays(rays_o, rays_d, *grid, near, far, cursor, max_steps, noise, dt_gamma, max_steps)[0]


def pad(rays: Int[Tensor, "N 2"]) -> tuple[Int[Tensor, "N K"], Bool[Tensor, "N K"]]:
    """A table of every ray's sample numbers, as wide as the longest ray, and which of its entries exist."""
    offset, count = rays.long().unbind(1)
    column = torch.arange(int(count.max()) if len(rays) else 0, device=rays.device)
    exists = column < count[:, None]
    return torch.where(exists, offset[:, None] + column, 0), exists


def composite(
    sigma: Float[Tensor, "M"],
    rgb: Float[Tensor, "M K"],
    t: Float[Tensor, "M 2"],
    rays: Int[Tensor, "N 2"],
    transmittance: Float[Tensor, "N"],
    T_thresh: float,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """Weights, and per ray alpha, depth, image and the transmittance that is left, of rays that start with some."""
    index, exists = pad(rays)
    thickness = torch.where(exists, sigma[index] * t[index, 1], 0)
    behind = torch.exp(-thickness.cumsum(1)) * transmittance[:, None]  # light that is left after the sample
    before = torch.cat([transmittance[:, None], behind], 1)[:, :-1]
    lit = exists & ~(before < T_thresh)  # a NaN stays visible
    weights = torch.where(lit, before * -torch.expm1(-thickness), 0)
    image = torch.einsum("nk,nkc->nc", weights, rgb[index])
    flat = torch.zeros_like(sigma).index_put((index[exists],), weights[exists])
    alpha = weights.sum(1)
    return flat, alpha, (weights * t[index, 0]).sum(1), image, transmittance - alpha


def composite_rays_train(
    sigma: Float[Tensor, "M"],
    rgb: Float[Tensor, "M K"],
    t: Float[Tensor, "M 2"],
    rays: Int[Tensor, "N 2"],
    T_thresh: float = 1e-4,
) -> tuple[Float[Tensor, "M"], Float[Tensor, "N"], Float[Tensor, "N"], Float[Tensor, "N K"]]:
    """See `raymarching.composite_rays_train`."""
    return composite(sigma, rgb, t, rays, sigma.new_ones(len(rays)), T_thresh)[:4]


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
    """See `raymarching.composite_rays`."""
    _, more_alpha, more_depth, more_image, left = composite(sigma, rgb, t, rays, transmittance, T_thresh)
    transmittance.copy_(left)
    alpha += more_alpha
    depth += more_depth
    image += more_image
