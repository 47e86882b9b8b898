"""From a density field to a closed, coloured triangle mesh whose outline is that of the rendered field."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional as F

from errors import say
from mesh import Mesh
from mesh.silhouette import choose_threshold, ray_densities
from nerf.provider import Cameras

COARSE = 64  # nodes along each axis of the first look
SMALL = 0.01  # components with less than this share of the largest one's area are dust
SMOOTHING = 5  # rounds, before decimation
_POINTS_AT_ONCE = 1 << 17

Field = Callable[[Float[Tensor, "N 3"]], dict[str, Tensor]]  # points -> sigma [N], albedo [N, C]


def extract(
    field: Field,
    cameras: Cameras,
    alpha: Float[Tensor, "B H W 1"],
    depth: Float[Tensor, "B H W 1"],
    bound: float,
    resolution: int = 256,
    decimate_target: int = 50000,
    threshold: float | None = None,
    progress: Callable[[float], None] = lambda share: None,
    shape: Field | None = None,
) -> tuple[Mesh, float] | None:
    """The surface of `field` inside [-bound, bound]^3 and the density (1 / length) at which it lies; None, with a line said, if there is none.

    `alpha` and `depth` are renders of the field from `cameras`: the threshold is chosen so that the mesh has the outline alpha > 1/2
    (`choose_threshold`), unless one is given. A density is an inverse length, so a threshold holds whatever the grid's spacing or the number
    of samples. `resolution` nodes span the longest side of the box that holds the object, found on a coarse grid first.
    `decimate_target` faces at most; 0 or less keeps all. `progress` is called with the share done, 0 to 1. `shape`: something with the same level
    sets as `field` and an even slope, to find the surface by.
    """
    device = alpha.device
    covered = _covered(alpha)
    if covered is None and threshold is None:
        say("no mesh: the scene is empty (its alpha is below 0.05 in every view)")
        return None
    low, high = torch.full((3,), -float(bound)), torch.full((3,), float(bound))
    look = shape or field
    coarse = _evaluate(look, low, high, [min(COARSE, resolution)] * 3, device)
    progress(0.1)

    def level(grid: Tensor, low: Tensor, high: Tensor, every: int = 1) -> float:
        if threshold is not None:
            return threshold
        # Linear interpolation between densities that span orders of magnitude would put everything at the larger one.
        scale = _typical(coarse)
        squashed = grid / (grid + scale)
        pick = (slice(None), slice(None, None, every), slice(None, None, every))
        origins, directions = (rays.to(device)[pick].reshape(-1, 3) for rays in cameras.rays())
        seen, distance = ray_densities(squashed, low.to(device), high.to(device), origins, directions)
        mean_distance = (depth / alpha.clamp(min=1e-4))[pick].reshape(-1)
        value, _ = choose_threshold(seen, distance, covered[pick].reshape(-1), mean_distance)
        value = min(value, 1 - 1e-6)
        return scale * value / (1 - value)

    iso = level(coarse, low, high, every=2)
    box = _box(coarse, iso, low, high)
    if box is None:
        say(
            f"no mesh: the density reaches {float(coarse.max()):.3g} at most, the threshold is {iso:.3g} (--mesh_threshold)"
        )
        return None
    fine, low, high = _refine(look, coarse, iso, low, high, box, resolution, device)
    progress(0.5)
    iso = level(fine, low, high)
    vertices, faces = _march(fine, iso, low, high)
    vertices, faces = clean(vertices, faces)
    if len(faces) == 0:
        say(f"no mesh: nothing is left at the threshold {iso:.3g} (--mesh_threshold)")
        return None
    progress(0.6)
    vertices = smooth(vertices, faces)
    if 0 < decimate_target < len(faces):
        vertices, faces = decimate(vertices, faces, decimate_target)
    progress(0.8)
    normals = vertex_normals(vertices, faces)
    spacing = float((high - low).max()) / max(fine.shape)
    at = [torch.as_tensor(value, dtype=torch.float32, device=device) for value in (vertices, normals)]
    if shape is not None:
        iso = float(_query(field, at[0], "sigma").median())
    colors = colors_seen(field, *at, spacing, iso).cpu().numpy()
    progress(1.0)
    return Mesh(vertices.astype(np.float32), faces, colors, normals.astype(np.float32)), iso


def _covered(alpha: Tensor) -> Bool[Tensor, "B H W 1"] | None:
    """The outline: alpha > 1/2; of a thin scene, half of its largest alpha."""
    top = float(alpha.max()) if alpha.numel() else 0.0
    if top < 0.05:
        return None
    if top < 0.6:
        say(f"the scene is thin (alpha at most {top:.2f}): its outline is taken at half of that")
        return alpha > top / 2
    return alpha > 0.5


@torch.no_grad()
def _query(field: Field, points: Float[Tensor, "N 3"], name: str) -> Tensor:
    parts = [field(part)[name].float() for part in points.split(_POINTS_AT_ONCE)]
    return torch.nan_to_num(torch.cat(parts), nan=0.0, posinf=1e6)


def _nodes(low: Tensor, high: Tensor, shape: list[int], device: torch.device) -> Float[Tensor, "N 3"]:
    axes = [torch.linspace(float(low[i]), float(high[i]), shape[i], device=device) for i in range(3)]
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)


def _evaluate(
    field: Field, low: Tensor, high: Tensor, shape: list[int], device: torch.device
) -> Float[Tensor, "X Y Z"]:
    """The density on a grid whose first and last nodes lie at `low` and `high`."""
    return _query(field, _nodes(low, high, shape, device), "sigma").reshape(shape)


def _typical(grid: Float[Tensor, "X Y Z"]) -> float:
    """The density that best splits the grid's log densities into a thin and a dense class (Otsu: largest variance between the two)."""
    logs = grid.clamp(min=1e-4).log().reshape(-1).double()
    low, high = float(logs.min()), float(logs.max())
    if high - low < 1e-9:
        return float(np.exp(high))
    counts = torch.histc(logs, 256, low, high)
    centres = torch.linspace(low, high, 513, dtype=torch.float64, device=grid.device)[1::2]
    below = counts.cumsum(0)
    above = len(logs) - below
    sums = (counts * centres).cumsum(0)
    gap = sums / below.clamp(min=1) - (sums[-1] - sums) / above.clamp(min=1)
    cut = int((below * above * gap**2).argmax())
    return float(centres[cut].exp())


def _box(grid: Tensor, iso: float, low: Tensor, high: Tensor) -> tuple[Float[Tensor, "3"], Float[Tensor, "3"]] | None:
    """The corners of the part of the grid whose density reaches iso / 4, with a margin of two cells; None if none reaches iso."""
    if not bool((grid > iso).any()):
        return None
    where = torch.nonzero(grid > iso / 4).cpu()
    step = (high - low) / (torch.tensor(grid.shape) - 1)
    start, stop = where.amin(0) - 2, where.amax(0) + 2
    return torch.maximum(low + start * step, low), torch.minimum(low + stop * step, high)


def _refine(
    field: Field,
    coarse: Float[Tensor, "A B C"],
    iso: float,
    low: Tensor,
    high: Tensor,
    box: tuple[Tensor, Tensor],
    resolution: int,
    device: torch.device,
) -> tuple[Float[Tensor, "X Y Z"], Tensor, Tensor]:
    """A finer grid over `box` and its corners; only nodes near the surface are evaluated, the others are read off the coarse grid.

    Near means that the densities of the coarse nodes around span iso within a factor of 10.
    """
    start, stop = box
    spacing = float((stop - start).max()) / (resolution - 1)
    shape = [max(2, int(round(float(extent) / spacing)) + 1) for extent in stop - start]
    stop = start + (torch.tensor(shape) - 1) * spacing
    volume = coarse[None, None]
    most = F.max_pool3d(volume, 3, 1, 1)
    least = -F.max_pool3d(-volume, 3, 1, 1)
    near = ((most > iso / 10) & (least < iso * 10)).float()
    points = _nodes(start, stop, shape, device)
    # grid_sample counts its axes from the last one back
    places = (2 * (points - low.to(device)) / (high - low).to(device) - 1).flip(-1)[None, None, None]
    grid = F.grid_sample(volume, places, padding_mode="border", align_corners=True).reshape(-1)
    chosen = F.grid_sample(near, places, padding_mode="border", align_corners=True).reshape(-1) > 0
    grid[chosen] = _query(field, points[chosen], "sigma")
    return grid.reshape(shape), start, stop


def _march(
    grid: Float[Tensor, "X Y Z"], iso: float, low: Tensor, high: Tensor
) -> tuple[Float[np.ndarray, "V 3"], Int[np.ndarray, "F 3"]]:
    """Marching cubes at `iso`, in world units, closed where the grid ends.

    It runs on sigma / (sigma + iso), which crosses 1/2 exactly where sigma crosses iso and varies evenly on both sides: on the density itself
    the vertices would stick to the grid's outer nodes.
    """
    import mcubes

    values = np.pad((grid / (grid + iso)).double().cpu().numpy(), 1)
    vertices, faces = mcubes.marching_cubes(values, 0.5)
    step = ((high - low) / (torch.tensor(grid.shape) - 1)).double().numpy()
    world = low.double().numpy() + (vertices - 1) * step
    # The wall that closes the border lies half a cell outside the grid: pull it back onto it.
    world = np.clip(world, low.double().numpy(), high.double().numpy())
    return world, faces.astype(np.int64)


def clean(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]
) -> tuple[Float[np.ndarray, "W 3"], Int[np.ndarray, "G 3"]]:
    """Drop faces without area, dust (components below `SMALL` of the largest one's area) and inner hollows, and unused vertices.

    All components are wound outward: counter-clockwise seen from outside.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    if len(faces) == 0:
        return vertices[:0], faces[:0]
    crosses = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    volumes = (vertices[faces[:, 0]] * crosses).sum(1) / 6
    if volumes.sum() < 0:
        faces, volumes = faces[:, ::-1], -volumes
    areas = np.linalg.norm(crosses, axis=1) / 2
    solid = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]]])
    links = coo_matrix((np.ones(len(ends), bool), (ends[:, 0], ends[:, 1])), shape=(len(vertices), len(vertices)))
    count, of_vertex = connected_components(links, directed=False)
    of_face = of_vertex[faces[:, 0]]
    area = np.bincount(of_face, areas, count)
    volume = np.bincount(of_face, volumes, count)
    # A component with negative volume bounds a hollow from within: nobody sees it.
    keep = (area >= SMALL * area.max()) & (volume > 0)
    return compact(vertices, faces[keep[of_face] & solid])


def compact(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]
) -> tuple[Float[np.ndarray, "W 3"], Int[np.ndarray, "F 3"]]:
    """The vertices that faces use, and the faces renumbered."""
    used, renumbered = np.unique(faces, return_inverse=True)
    return vertices[used], renumbered.reshape(-1, 3).astype(np.int64)


def smooth(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], rounds: int = SMOOTHING
) -> Float[np.ndarray, "V 3"]:
    """Even out the ripple of the sampling grid without shrinking anything (Taubin 1995).

    Each round moves every vertex towards the mean of its neighbours by 0.5 of the way, then away from it by 0.53: what varies from one vertex to
    the next fades, what varies over many stays.
    """
    from scipy.sparse import coo_matrix, diags

    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    ends = np.concatenate([ends, ends[:, ::-1]])
    links = coo_matrix((np.ones(len(ends)), (ends[:, 0], ends[:, 1])), shape=(len(vertices), len(vertices))).tocsr()
    mean = diags(1 / np.maximum(np.asarray(links.sum(1))[:, 0], 1)) @ links
    for _ in range(rounds):
        for share in (0.5, -0.53):
            vertices = vertices + share * (mean @ vertices - vertices)
    return vertices


def decimate(
    vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"], target: int
) -> tuple[Float[np.ndarray, "W 3"], Int[np.ndarray, "G 3"]]:
    """At most about `target` faces, by quadric edge collapse."""
    import fast_simplification

    points, triangles = fast_simplification.simplify(
        vertices.astype(np.float32), faces.astype(np.int32), target_count=int(target)
    )
    return clean(points.astype(np.float64), triangles.astype(np.int64))


def vertex_normals(vertices: Float[np.ndarray, "V 3"], faces: Int[np.ndarray, "F 3"]) -> Float[np.ndarray, "V 3"]:
    """Unit normals, each the mean of the faces around the vertex, weighted by their areas."""
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    cross = np.cross(b - a, c - a)
    total = np.zeros_like(vertices)
    for i in range(3):
        np.add.at(total, faces[:, i], cross)
    length = np.linalg.norm(total, axis=1, keepdims=True)
    return np.where(length > 1e-20, total / np.maximum(length, 1e-20), [0.0, 0.0, 1.0])


def colors_seen(
    field: Field, start: Float[Tensor, "N 3"], normal: Float[Tensor, "N 3"], spacing: float, iso: float
) -> Float[Tensor, "N 3"]:
    """What a ray that meets the surface head-on sees: sum_i w_i c_i / sum_i w_i along the normal, from just outside inwards.

    `spacing`: the size of a cell of the grid that the surface was found on; `iso`: the density there. The colour exactly on
    the surface is seldom trained: most of what a camera sees lies about 1 / density behind it.
    """
    steps = 8
    reach = min(max(4 * spacing, 1 / max(iso, 1e-6)), 16 * spacing)
    offsets = torch.linspace(spacing, -reach, steps, device=start.device)
    found = [start.new_zeros(0, 3)]
    for part in torch.arange(len(start), device=start.device).split(_POINTS_AT_ONCE // steps):
        points = start[part, None] + offsets[None, :, None] * normal[part, None]
        with torch.no_grad():
            values = field(points.reshape(-1, 3))
        sigma = torch.nan_to_num(values["sigma"].float()).reshape(len(part), steps)
        albedo = values["albedo"].float().reshape(len(part), steps, -1)[..., :3]
        optical = sigma * (spacing + reach) / (steps - 1)
        before = optical.cumsum(1) - optical
        weight = (1 - torch.exp(-optical)) * torch.exp(-before) + 1e-8
        found.append((weight[..., None] * albedo).sum(1) / weight.sum(1, keepdim=True))
    return torch.nan_to_num(torch.cat(found)).clamp(0, 1)
