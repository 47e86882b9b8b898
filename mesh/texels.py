"""Which texels a triangle covers in its texture, and what a texture shows at a place."""

import numpy as np
from jaxtyping import Float, Int

_TESTS_AT_ONCE = 1 << 20  # texel-in-triangle tests held in memory


def covered(
    corners: Float[np.ndarray, "F 3 2"], height: int, width: int
) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Float[np.ndarray, "P 3"]]:
    """Every pair of a texel and a triangle that holds its centre: the texel (row * width + column), the triangle, its barycentric weights.

    `corners` are in texels: (0.5, 0.5) is the centre of the first one. Either winding. A texel on an edge counts for both sides; a triangle
    without area covers nothing. All texels of a triangle's bounding box are tested, boxes of a similar size together.
    """
    a, b, c = (corners[:, i].astype(np.float64) - 0.5 for i in range(3))
    area = _cross(b - a, c - a)
    stacked = np.stack([a, b, c])
    low = np.maximum(np.ceil(stacked.min(0) - 1e-9), 0).astype(np.int64)
    high = np.minimum(np.floor(stacked.max(0) + 1e-9), [width - 1, height - 1]).astype(np.int64)
    size = (high - low).max(1) + 1
    some = (high >= low).all(1) & (np.abs(area) > 1e-12)
    found = [(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 3)))]
    side = 1
    while some.any() and side < 2 * max(height, width):
        chosen = np.flatnonzero(some & (size > side // 2) & (size <= side))
        offset = np.stack(np.meshgrid(np.arange(side), np.arange(side), indexing="xy"), -1).reshape(1, -1, 2)
        for part in np.split(chosen, np.arange(0, len(chosen), max(1, _TESTS_AT_ONCE // side**2))[1:]):
            place = low[part][:, None] + offset
            p, q, r = (x[part][:, None] for x in (a, b, c))
            weights = np.stack([_cross(r - q, place - q), _cross(p - r, place - r)], -1) / area[part][:, None, None]
            weights = np.concatenate([weights, 1 - weights.sum(-1, keepdims=True)], -1)
            inside = (weights >= -1e-9).all(-1) & (place <= high[part][:, None]).all(-1)
            where = place[inside]
            triangle = np.broadcast_to(part[:, None], inside.shape)[inside]
            found.append((where[:, 1] * width + where[:, 0], triangle, weights[inside]))
        side *= 2
    return tuple(np.concatenate(arrays) for arrays in zip(*found, strict=True))


def _cross(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def look_up(picture: np.ndarray, uvs: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N *C"]:
    """The texture [h w] or [h w C] at `uvs`, bilinear, repeated outside [0, 1]."""
    height, width = picture.shape[:2]
    place = (uvs - np.floor(uvs)) * [width, height] - 0.5
    corner = np.floor(place).astype(np.int64)
    share = (place - corner).reshape(-1, 2, *(1,) * (picture.ndim - 2))
    total = 0.0
    for right in (0, 1):
        for down in (0, 1):
            weight = np.abs(1 - right - share[:, 0]) * np.abs(1 - down - share[:, 1])
            total = total + weight * picture[(corner[:, 1] + down) % height, (corner[:, 0] + right) % width]
    return total
