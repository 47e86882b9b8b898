"""An atlas without any library: the surface seen along the six axes, cut where that view changes or where it would overlap, packed on shelves."""

import numpy as np
from jaxtyping import Float, Int

from mesh.texels import covered

# For each direction (+x, -x, +y, -y, +z, -z): what is right and what is up for someone who looks at it from outside.
_RIGHT = np.array([[0, 0, -1], [0, 0, 1], [1, 0, 0], [1, 0, 0], [1, 0, 0], [-1, 0, 0]], float)
_UP = np.array([[0, 1, 0], [0, 1, 0], [0, 0, -1], [0, 0, 1], [0, 1, 0], [0, 1, 0]], float)
_OUT = np.cross(_RIGHT, _UP)
_STEEPEST = 0.35  # cosine between a face's normal and the direction it is seen along, at least
_ROUNDS = 12


def box_atlas(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], size: int, padding: int
) -> tuple[Float[np.ndarray, "T 2"], Int[np.ndarray, "F 3"]]:
    """uvs in [0, 1] and uv_faces; charts lie `padding` texels of a `size` x `size` picture apart (less if there are too many of them).

    A chart is a connected set of faces seen along one axis. Faces that such a view hides, at the picture's resolution, move to charts of
    their own, so that no two places of the surface share a texel.
    """
    points = vertices.astype(np.float64)
    neighbours = _neighbours(faces)
    direction = _directions(points, faces, neighbours)
    flat = np.stack([(points[faces] * _RIGHT[direction][:, None]).sum(-1), -(points[faces] * _UP[direction][:, None]).sum(-1)], -1)  # fmt: skip
    depth = (points[faces] * _OUT[direction][:, None]).sum(-1)
    ax, ay = (flat[:, 1] - flat[:, 0]).T
    bx, by = (flat[:, 2] - flat[:, 0]).T
    # The texels per unit if 60 % of the picture were used, which is a bit more than there will be: overlaps are looked for at that resolution.
    density = size * np.sqrt(0.6 / max(np.abs(ax * by - ay * bx).sum() / 2, 1e-30))
    chart = _charts(flat * density, depth, direction, neighbours)
    return _pack(flat, chart, faces, size, padding)


def _neighbours(faces: np.ndarray) -> np.ndarray:
    """Pairs of faces that share an edge."""
    ends = np.sort(np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]]), axis=1)
    order = np.lexsort(ends.T)
    same = (ends[order[1:]] == ends[order[:-1]]).all(1)
    return np.stack([order[:-1][same], order[1:][same]], 1) % len(faces)


def _directions(points: np.ndarray, faces: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """The direction each face is seen along: the nearest to its normal, or that of its neighbours where it is not much worse."""
    normals = np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]])
    normals /= np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-30)
    facing = normals @ _OUT.T
    direction = facing.argmax(1)
    allowed = np.where((facing >= _STEEPEST) | (facing == facing.max(1, keepdims=True)), facing, -np.inf)
    for _ in range(_ROUNDS):
        votes = np.zeros_like(facing)
        for one, other in (neighbours.T, neighbours.T[::-1]):
            np.add.at(votes, (one, direction[other]), 1.0)
        direction = (allowed + 0.35 * votes).argmax(1)
    return direction


def _components(count: int, links: np.ndarray) -> np.ndarray:
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    graph = coo_matrix((np.ones(len(links), bool), (links[:, 0], links[:, 1])), shape=(count, count))
    return connected_components(graph, directed=False)[1]


def _charts(flat: np.ndarray, depth: np.ndarray, direction: np.ndarray, neighbours: np.ndarray) -> np.ndarray:
    """The chart of each face. `flat` [F 3 2] are its corners in texels, `depth` [F 3] how far out they lie."""
    layer = direction.copy()
    for turn in range(_ROUNDS):
        links = neighbours[layer[neighbours[:, 0]] == layer[neighbours[:, 1]]]
        chart = _components(len(flat), links)
        hidden = _hidden(flat, depth, chart)
        if len(hidden) == 0:
            return chart
        layer[hidden] += 6 * (1 + turn)  # a number of its own for each direction and turn
    chart[hidden] = chart.max() + 1 + np.arange(len(hidden))
    return chart


def _hidden(flat: np.ndarray, depth: np.ndarray, chart: np.ndarray) -> np.ndarray:
    """The faces of which some texel is covered by another face of the same chart that lies further out."""
    low = np.full((chart.max() + 1, 2), np.inf)
    np.minimum.at(low, chart, flat.min(1))
    local = flat - low[chart][:, None]
    width, height = (int(x) + 2 for x in np.ceil(local.max((0, 1))))
    texel, face, weights = covered(local, height, width)
    strictly = weights.min(1) > 1e-6  # an edge that two neighbours share is no overlap
    texel, face, weights = texel[strictly], face[strictly], weights[strictly]
    key = chart[face] * (height * width) + texel
    inorder = np.sort(key)
    twice = np.isin(key, inorder[1:][inorder[1:] == inorder[:-1]])
    key, face, weights = key[twice], face[twice], weights[twice]
    order = np.lexsort([-(depth[face] * weights).sum(1), key])
    behind = key[order[1:]] == key[order[:-1]]
    return np.unique(face[order[1:][behind]])


def _pack(
    flat: np.ndarray, chart: np.ndarray, faces: np.ndarray, size: int, padding: int
) -> tuple[np.ndarray, np.ndarray]:
    """Charts onto shelves of one square, as large as fits; uvs and uv_faces."""
    count = chart.max() + 1
    low, high = np.full((count, 2), np.inf), np.full((count, 2), -np.inf)
    np.minimum.at(low, chart, flat.min(1))
    np.maximum.at(high, chart, flat.max(1))
    local, extent = flat - low[chart][:, None], high - low
    lying = extent[:, 0] < extent[:, 1]  # high ones are turned by a quarter: shelves like them low
    turned = np.stack([extent[chart][:, None, 1] - local[..., 1], local[..., 0]], -1)
    local = np.where(lying[chart][:, None, None], turned, local)
    extent = np.where(lying[:, None], extent[:, ::-1], extent)
    order = np.argsort(-extent[:, 1], kind="stable")
    square = size
    while _shelves(np.zeros_like(extent) + padding, square) is None:
        square *= 2  # charts so many that their padding alone does not fit: everything gets smaller
    low_scale, high_scale = 0.0, square / max(extent.max(), 1e-30)
    for _ in range(30):
        scale = (low_scale + high_scale) / 2
        fits = _shelves(extent[order] * scale + padding, square) is not None
        low_scale, high_scale = (scale, high_scale) if fits else (low_scale, scale)
    place = np.zeros((count, 2))
    place[order] = _shelves(extent[order] * low_scale + padding, square)
    # Corners of one chart at one vertex share their uv.
    vertex = faces.reshape(-1)
    pairs, first, uv_faces = np.unique(
        np.repeat(chart, 3) * np.int64(vertex.max() + 1) + vertex, return_index=True, return_inverse=True
    )
    uvs = (place[chart][:, None] + padding / 2 + local * low_scale).reshape(-1, 2)[first] / square
    return uvs, uv_faces.reshape(-1, 3).astype(np.int64)


def _shelves(boxes: Float[np.ndarray, "N 2"], square: float) -> Float[np.ndarray, "N 2"] | None:
    """Left upper corners of boxes (width, height), highest first, row by row in a square of side `square`; None if they do not fit."""
    ends = np.cumsum(boxes[:, 0])
    places, first, y = np.zeros_like(boxes), 0, 0.0
    while first < len(boxes):
        start = ends[first] - boxes[first, 0]
        last = int(np.searchsorted(ends, start + square + 1e-9, side="right"))
        if last == first or y + boxes[first, 1] > square + 1e-9:
            return None
        places[first:last, 0] = ends[first:last] - boxes[first:last, 0] - start
        places[first:last, 1] = y
        y += boxes[first, 1]
        first = last
    return places
