"""Outlines: which pixels a mesh covers, how well two outlines agree, and which density makes a mesh's outline that of the rendered field."""

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from nerf.provider import Cameras

_TESTS_AT_ONCE = 1 << 21  # pixel-in-triangle tests held in memory


def rasterise(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], cameras: Cameras
) -> Bool[np.ndarray, "B H W"]:
    """The pixels whose centre lies inside the projection of some triangle; either winding, no depth.

    Every triangle must lie in front of every camera; those that do not are left out.
    """
    height, width = cameras.height, cameras.width
    mvp = cameras.mvp().double().cpu().numpy()
    covered = np.zeros((len(mvp), height, width), bool)
    corners = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
    for view, matrix in enumerate(mvp):
        clip = corners @ matrix.T
        ahead = clip[:, 3] > 1e-6
        ndc = clip[:, :2] / np.where(ahead, clip[:, 3], 1.0)[:, None]
        # In units where the centre of the pixel in column i, row j is (i, j).
        points = np.stack([(1 + ndc[:, 0]) * width / 2, (1 - ndc[:, 1]) * height / 2], -1) - 0.5
        _fill(points[faces[ahead[faces].all(1)]], covered[view])
    return covered


def _fill(triangles: Float[np.ndarray, "F 3 2"], covered: Bool[np.ndarray, "H W"]) -> None:
    """Mark the pixels of each triangle: all pixels of its bounding box are tested, boxes of a similar size together."""
    height, width = covered.shape
    low = np.maximum(np.ceil(triangles.min(1)), 0).astype(np.int64)
    high = np.minimum(np.floor(triangles.max(1)), [width - 1, height - 1]).astype(np.int64)
    size = (high - low).max(1) + 1
    some = (high >= low).all(1)
    side = 1
    while some.any() and side < 2 * max(height, width):
        chosen = np.flatnonzero(some & (size > side // 2) & (size <= side))
        offset = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
        step = max(1, _TESTS_AT_ONCE // side**2)
        for start in range(0, len(chosen), step):
            part = chosen[start : start + step]
            pixel = low[part][:, None] + offset
            a, b, c = (triangles[part][:, None, i] for i in range(3))
            edges = np.stack([_side(a, b, pixel), _side(b, c, pixel), _side(c, a, pixel)])
            inside = ((edges >= 0).all(0) | (edges <= 0).all(0)) & (pixel <= high[part][:, None]).all(-1)
            hit = pixel[inside]
            covered[hit[:, 1], hit[:, 0]] = True
        side *= 2


def _side(a: np.ndarray, b: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Twice the signed area of (a, b, p)."""
    return (b[..., 0] - a[..., 0]) * (p[..., 1] - a[..., 1]) - (b[..., 1] - a[..., 1]) * (p[..., 0] - a[..., 0])


def overlap(a: Bool[np.ndarray, "..."], b: Bool[np.ndarray, "..."]) -> float:
    """Intersection over union; 1 if both are empty."""
    union = np.count_nonzero(a | b)
    return np.count_nonzero(a & b) / union if union else 1.0


def ray_densities(
    grid: Float[Tensor, "X Y Z"],
    low: Float[Tensor, "3"],
    high: Float[Tensor, "3"],
    origins: Float[Tensor, "R 3"],
    directions: Float[Tensor, "R 3"],
) -> tuple[Float[Tensor, "R S"], Float[Tensor, "R S"]]:
    """The grid's density at S places along each ray, about three to two cells, and their distances from the ray's origin.

    The grid's first and last nodes lie at `low` and `high`; outside it there is nothing.
    """
    reach = float((high - low).norm()) / 2
    towards = (low + high) / 2 - origins
    middle = (towards * directions).sum(-1, keepdim=True)
    distance = middle + torch.linspace(-reach, reach, int(1.5 * max(grid.shape)), device=grid.device)
    volume = grid.permute(2, 1, 0)[None, None]
    found = torch.zeros_like(distance)
    near = torch.nonzero((towards - middle * directions).norm(dim=-1) < reach)[:, 0]  # others miss the grid's ball
    for part in near.split(1 << 13):
        points = torch.addcmul(origins[part, None], distance[part, :, None], directions[part, None])
        places = ((points - (low + high) / 2) * (2 / (high - low)))[None, None]
        found[part] = F.grid_sample(volume, places, padding_mode="zeros", align_corners=True)[0, 0, 0]
    return found, distance


def choose_threshold(
    densities: Float[Tensor, "R S"],
    distances: Float[Tensor, "R S"],
    covered: Bool[Tensor, "R"],
    depth: Float[Tensor, "R"],
    slack: float = 0.003,
) -> tuple[float, float]:
    """The density at which the surface {density = threshold} has the outline `covered`, and the overlap (IoU) it reaches.

    A ray crosses that surface exactly if the largest density along it exceeds the threshold. So, with the rays sorted by that
    maximum, every threshold is a cut, and the overlaps of all cuts come from one cumulative sum: the best one is found, not searched for.
    Many thresholds are usually within `slack` of it (a hard object looks the same at all of them); among these the one wins whose first
    crossing lies nearest to the rendered depth (median over the rays that both cover).
    """
    peak, order = densities.amax(1).sort(descending=True)
    hits = covered[order].double().cumsum(0)
    total = int(covered.sum())
    cuts = torch.arange(1, len(peak) + 1, device=peak.device)
    overlaps = torch.where(peak > 0, hits / (total + cuts - hits), 0.0)
    best = float(overlaps.max())
    good = torch.nonzero(overlaps >= best - slack)[:, 0]
    upper, lower = float(peak[good[0]]), float(peak[good[-1]])
    # A cut lies between two maxima; below the last good one there may be nothing for a long way.
    following = float(peak[good[-1] + 1]) if int(good[-1]) + 1 < len(peak) else 0.0
    lower = max((lower * max(following, 0.0)) ** 0.5, lower / 4)
    candidates = np.geomspace(max(lower, 1e-6), max(upper * (1 - 1e-6), 1e-6), 12)
    densities, distances, depth = densities[covered], distances[covered], depth[covered]
    errors = []
    for candidate in candidates:
        above = densities > candidate
        first = distances.gather(1, above.byte().argmax(1, keepdim=True))[:, 0]
        gap = (first - depth)[above.any(1)].abs()
        errors.append(float(gap.median()) if len(gap) else float("inf"))
    return float(candidates[int(np.argmin(errors))]), best
