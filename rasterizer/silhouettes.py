"""Where surfaces end between neighbouring pixels, and antialiasing there, in plain PyTorch: the twin of `antialias`.

Between the centres of two neighbours p and q a silhouette lies at p + s (q - p). To its left is p's colour, to its right
q's: of the area between the two, s - 1/2 of a pixel is on the wrong side of the border. That much of p's colour goes to q,
or of q's to p if it is negative. So sums over the picture are areas, and their gradients those of areas (to second
order), whoever is seen in the two pixels and however small the triangles are.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

MAX_STEPS = 512  # triangles that a walk between two pixels passes at most
MAX_SHARING = 8  # faces looked at around one edge
FOLD = 1e-3  # pixels: a surface that turns back by less goes on


def corners_of(positions: Float[Tensor, "B V 4"], height: int, width: int) -> Float[Tensor, "B V 4"]:
    """(X, Y, z, w) of clip positions, float64."""
    x, y, z, w = positions.double().unbind(-1)
    return torch.stack([(x + w) * (width / 2), (w - y) * (height / 2), z, w], -1)


def edges_of(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "F 3"]:
    """For edge k of face f, the one opposite to corner k: the next edge 3 f' + k' that joins the same two vertices.

    The edges that join the same vertices form a ring: of two for a manifold surface, of itself alone at a boundary.
    Edges of faces that name a vertex twice belong to no other ring.
    """
    faces = faces.long()
    a, b = faces.roll(-1, 1).flatten(), faces.roll(-2, 1).flatten()
    proper = ((a != b).view(-1, 3).all(1, keepdim=True)).expand(-1, 3).flatten()
    own = torch.arange(len(a), device=a.device)
    vertices = int(faces.max()) + 1 if len(a) else 0
    key = torch.where(proper, torch.minimum(a, b) * vertices + torch.maximum(a, b), -1 - own)
    key, order = key.sort(stable=True)
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[1:] = key[1:] != key[:-1]
    first = torch.where(starts, own, 0).cummax(0).values if len(a) else own  # of the ring that each one is in
    ends = torch.ones_like(starts)
    ends[:-1] = starts[1:]
    following = torch.where(ends, first, own + 1)
    ring = torch.empty_like(order)
    ring[order] = order[following] if len(a) else order
    return ring.view(-1, 3).int()


def antialias(
    colour: Float[Tensor, "B H W C"],
    raster: Float[Tensor, "B H W 4"],
    positions: Float[Tensor, "B V 4"],
    faces: Int[Tensor, "F 3"],
    topology: Int[Tensor, "F 3"] | None = None,
) -> Float[Tensor, "B H W C"]:
    """Silhouettes blended between the pixels on both sides; see `rasterizer.antialias`."""
    ring = (edges_of(faces) if topology is None else topology).long().flatten()
    faces, raster = faces.long(), raster.detach()
    corners = corners_of(positions, *raster.shape[1:3])
    out = colour
    for axis in (0, 1):
        dim = 2 - axis  # of the picture
        size = raster.shape[dim]
        if size < 2:
            continue
        p, q = raster.narrow(dim, 0, size - 1), raster.narrow(dim, 1, size - 1)
        where, edge = silhouettes(p, q, corners.detach(), faces, ring, axis)
        a, b = (faces[edge // 3, (edge + k) % 3] for k in (1, 2))
        s = crossing(screen(corners[where[0], a]), screen(corners[where[0], b]), centre(where), axis)
        blend = colour.new_zeros(p.shape[:3]).index_put(where, (s - 0.5).to(colour.dtype))[..., None]
        first, second = colour.narrow(dim, 0, size - 1), colour.narrow(dim, 1, size - 1)
        flow = blend * (first - second)
        to_first, to_second = torch.where(blend < 0, flow, 0), torch.where(blend > 0, flow, 0)
        nothing = torch.zeros_like(colour.narrow(dim, 0, 1))
        out = out + torch.cat([to_first, nothing], dim) + torch.cat([nothing, to_second], dim)
    return out


def screen(corners: Float[Tensor, "*N 4"]) -> Float[Tensor, "*N 2"]:
    """(column, row); a corner behind the camera has none."""
    w = corners[..., 3:]
    return corners[..., :2] / torch.where(w > 0, w, 1)


def centre(where: tuple[Tensor, ...]) -> Float[Tensor, "N 2"]:
    """(column, row) of pixels' centres."""
    return torch.stack([where[2], where[1]], -1) + 0.5


def crossing(
    a: Float[Tensor, "*N 2"], b: Float[Tensor, "*N 2"], origin: Float[Tensor, "*N 2"], axis: int
) -> Float[Tensor, "*N"]:
    """Where the edge a b crosses the line through origin along an axis, from origin."""
    a, b = a - origin, b - origin
    (along_a, across_a), (along_b, across_b) = (x.flip(-1).unbind(-1) if axis else x.unbind(-1) for x in (a, b))
    return (along_a * across_b - along_b * across_a) / (across_b - across_a)


def silhouettes(
    p: Float[Tensor, "B h w 4"],
    q: Float[Tensor, "B h w 4"],
    corners: Float[Tensor, "B V 4"],
    faces: Int[Tensor, "F 3"],
    ring: Int[Tensor, "E"],
    axis: int,
) -> tuple[tuple[Tensor, ...], Int[Tensor, "N"]]:
    """The pairs of neighbours p, q with a silhouette between their centres, and its edge 3 f + k.

    One starts at the pixel that shows the nearer surface and walks over that surface towards the other's centre. Where it
    ends before, is the silhouette; if it goes on as far as the other centre, the other's surface may end in front of it,
    so one walks from there, too; if it is the other's surface, there is nothing between the two. An edge counts only for
    pairs along the axis that it is steep to, else it would be there twice.
    """
    known = [(x[..., 3] >= 1) & (x[..., 3] <= len(faces)) for x in (p, q)]
    where = ((p[..., 3] != q[..., 3]) & (known[0] | known[1])).nonzero(as_tuple=True)
    ids = torch.stack([torch.where(k[where], x[where][:, 3], 0).long() - 1 for k, x in zip(known, (p, q), strict=True)])
    depths = torch.stack([torch.where(k[where], x[where][:, 2], torch.inf) for k, x in zip(known, (p, q), strict=True)])
    good = (corners[..., 3:] > 0) & corners.isfinite().all(-1, keepdim=True)
    place = torch.where(good, screen(corners), torch.nan)
    origin = centre(where)
    step = torch.zeros_like(origin[:1])
    step[:, axis] = 1
    front = (depths[1] < depths[0]).long()  # 0: p
    edge = torch.full_like(front, -1)
    going = torch.arange(len(front), device=front.device)
    for attempt in (0, 1):
        side = front[going] if attempt == 0 else 1 - front[going]
        start, goal = ids[side, going], ids[1 - side, going]
        exists = start >= 0
        going, side, start, goal = going[exists], side[exists], start[exists], goal[exists]
        sign = 1.0 - 2.0 * side
        begin = origin[going] + side[:, None] * step
        found, same = walk(place, faces, ring, where[0][going], start, goal, begin, sign, axis)
        edge[going] = found
        going = going[(found < 0) & ~same]
    a, b = (place[where[0], faces[edge.clamp(min=0) // 3, (edge + k) % 3]] for k in (1, 2))
    extent = (a - b).abs()
    along, across = extent[:, axis], extent[:, 1 - axis]
    kept = (edge >= 0) & ((across >= along) if axis == 0 else (across > along))
    return tuple(index[kept] for index in where), edge[kept]


def walk(
    place: Float[Tensor, "B V 2"],
    faces: Int[Tensor, "F 3"],
    ring: Int[Tensor, "E"],
    view: Int[Tensor, "N"],
    face: Int[Tensor, "N"],
    goal: Int[Tensor, "N"],
    origin: Float[Tensor, "N 2"],
    sign: Float[Tensor, "N"],
    axis: int,
) -> tuple[Int[Tensor, "N"], Bool[Tensor, "N"]]:
    """From a pixel's centre, seen on `face`, one pixel along an axis: the edge 3 f + k where the surface ends, or -1.

    The second result tells that the walk came to the face `goal`. A surface ends at its border, or where the face beyond
    an edge leads back (by more than FOLD: thin faces, seen from the side, lead nowhere): then at the furthest edge.
    """
    edge, same = torch.full_like(face, -1), torch.zeros_like(face, dtype=torch.bool)
    number = torch.arange(len(face), device=face.device)
    exit, distance = leave(place, faces, view, face, torch.full_like(face, -1), origin, sign, axis)
    furthest, best = torch.zeros_like(distance), torch.full_like(face, -1)
    for _ in range(MAX_STEPS):
        folded = distance < furthest - FOLD
        edge[number[folded]] = best[folded]
        going = (distance < 1) & ~folded
        number, view, face, goal, origin, sign, exit, distance, furthest, best = (
            x[going] for x in (number, view, face, goal, origin, sign, exit, distance, furthest, best)
        )
        if not len(number):
            break
        own = 3 * face + exit
        further = (best < 0) | (distance > furthest)
        furthest, best = torch.where(further, distance, furthest), torch.where(further, own, best)
        following, across = ring[own], torch.full_like(own, -1)
        distance = torch.full_like(distance, -torch.inf)
        for _ in range(MAX_SHARING):
            other, far = leave(place, faces, view, following // 3, following % 3, origin, sign, axis)
            better = (following != own) & (far > distance)
            across = torch.where(better, following, across)
            exit, distance = torch.where(better, other, exit), torch.where(better, far, distance)
            following = torch.where(following == own, own, ring[following])
            if (following == own).all():
                break
        border = across < 0
        edge[number[border]] = best[border]
        face = across // 3
        same[number[~border & (face == goal)]] = True
        distance = torch.where(border | (face == goal), torch.inf, distance)  # these have arrived
    return edge, same


def leave(
    place: Float[Tensor, "B V 2"],
    faces: Int[Tensor, "F 3"],
    view: Int[Tensor, "N"],
    face: Int[Tensor, "N"],
    entry: Int[Tensor, "N"],
    origin: Float[Tensor, "N 2"],
    sign: Float[Tensor, "N"],
    axis: int,
) -> tuple[Int[Tensor, "N"], Float[Tensor, "N"]]:
    """By which edge, and how far from the origin, a line leaves a face that it entered by the edge `entry` (-1: starts in).

    A face with a corner that has no place on the screen is left infinitely far away. Sides are told by the corners alone,
    so that every face that is entered has just one other edge to leave by.
    """
    P = place[view[:, None], faces[face]] - origin[:, None]
    along, across = sign[:, None] * P[..., axis], P[..., 1 - axis]
    upper = across >= 0
    cut = (upper.roll(-1, 1) != upper.roll(-2, 1)) & (torch.arange(3, device=face.device) != entry[:, None])
    x1, y1, x2, y2 = along.roll(-1, 1), across.roll(-1, 1), along.roll(-2, 1), across.roll(-2, 1)
    distance = torch.where(cut, (x1 * y2 - x2 * y1) / torch.where(cut, y2 - y1, 1), -torch.inf)
    distance, exit = distance.max(1)
    return exit, torch.where(P.isfinite().flatten(1).all(1), distance, torch.inf)
