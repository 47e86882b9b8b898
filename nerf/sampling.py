"""Where along its ray the scene is evaluated: stratified and importance samples, and which samples can be seen at all."""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from ranks import mine


def uniform(shape: tuple[int, ...], generator: torch.Generator | None, device: torch.device) -> Float[Tensor, "*shape"]:
    """Random numbers in [0, 1), drawn where the generator lives: the same ones whatever device the scene is on."""
    source = generator.device if generator is not None else device
    return torch.rand(shape, generator=generator, device=source).to(device)


def ray_of_sample(rays: Int[Tensor, "N 2"], total: int) -> Int[Tensor, "M"]:
    """The index of the ray that each of the `total` samples lies on."""
    index = torch.arange(len(rays), device=rays.device)
    return torch.repeat_interleave(index, rays[:, 1].long(), output_size=total)


def places(
    shape: tuple[int, int], jitter: bool, generator: torch.Generator | None, device: torch.device
) -> Float[Tensor, "N T"]:
    """For N rows one number in each of T equal parts of [0, 1]: somewhere in its part, or without jitter in the middle."""
    if jitter:
        offset = mine(lambda rows: uniform((rows, shape[1]), generator, device), shape[0])
    else:
        offset = torch.full(shape, 0.5, device=device)
    return (torch.arange(shape[1], device=device) + offset) / shape[1]


def importance(
    edges: Float[Tensor, "N T1"], weights: Float[Tensor, "N T"], quantiles: Float[Tensor, "N S"]
) -> Float[Tensor, "N S"]:
    """Distances at these quantiles (rising, in [0, 1]) of `weights` spread over the intervals between `edges`; each
    interval keeps a small chance."""
    cumulative = torch.cumsum(weights + 1e-5, -1)
    cumulative = torch.cat([torch.zeros_like(cumulative[:, :1]), cumulative], -1) / cumulative[:, -1:]
    above = torch.searchsorted(cumulative, quantiles, right=True).clamp(1, weights.shape[1])
    low, high = cumulative.gather(1, above - 1), cumulative.gather(1, above)
    start, end = edges.gather(1, above - 1), edges.gather(1, above)
    return start + (end - start) * ((quantiles - low) / (high - low).clamp(min=1e-12)).clamp(0, 1)


def interval_edges(
    t: Float[Tensor, "N T"], near: Float[Tensor, "N 1"], far: Float[Tensor, "N 1"]
) -> Float[Tensor, "N T1"]:
    """Borders between sorted samples, half way between neighbours, so that the intervals fill [near, far] exactly."""
    return torch.cat([near, (t[:, 1:] + t[:, :-1]) / 2, far], -1)


def transmittance_weights(sigma: Float[Tensor, "N T"], dt: Float[Tensor, "N T"]) -> Float[Tensor, "N T"]:
    """Compositing weights w_i = (1 - exp(-sigma_i dt_i)) exp(-sum_{j<i} sigma_j dt_j)."""
    depth = sigma * dt
    before = torch.cumsum(depth, -1) - depth
    return -torch.expm1(-depth) * torch.exp(-before)


def visible(
    sigma: Float[Tensor, "M"], t: Float[Tensor, "M 2"], rays: Int[Tensor, "N 2"], threshold: float
) -> tuple[Bool[Tensor, "M"], Int[Tensor, "N 2"]]:
    """Which samples get more than `threshold` of the light of their ray, and the rays' slices once the others are dropped.

    What is dropped is the rear end of a ray, and it could change a colour by `threshold` at most.
    """
    # One running sum over all rays needs the digits of a double: a ray's own share of it is small.
    depth = (sigma.detach() * t[:, 1]).double().clamp(max=100)
    before = torch.cat([depth.new_zeros(1), torch.cumsum(depth, 0)])
    first, last = rays[:, 0].long(), (rays[:, 0] + rays[:, 1]).long()
    own = before[:-1] - before[first][ray_of_sample(rays, len(depth))]
    keep = own < -math.log(threshold)
    kept = torch.cat([first.new_zeros(1), torch.cumsum(keep, 0)])
    return keep, torch.stack([kept[first], kept[last] - kept[first]], -1).to(rays.dtype)
