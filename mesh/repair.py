"""Meshes as people have them, made into meshes that can be worked with."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from mesh import Mesh
from mesh.extract import vertex_normals


def normalise(mesh: Mesh, reach: float) -> Mesh:
    """Moved and evenly scaled: the middle of its bounding box at the origin, its farthest vertex at the distance `reach` from there."""
    vertices = mesh.vertices.astype(np.float64)
    if len(vertices) == 0:
        return mesh
    vertices = vertices - (vertices.min(0) + vertices.max(0)) / 2
    farthest = float(np.linalg.norm(vertices, axis=1).max())
    return replace(mesh, vertices=(vertices * (reach / max(farthest, 1e-30))).astype(np.float32))


def repair(mesh: Mesh) -> tuple[Mesh, list[str]]:
    """The mesh without what trips other steps up, and what was done, in words; an empty list if nothing was amiss.

    Dropped: faces with a corner that is not finite, faces without area, second copies of a face, unused vertices. Turned: faces wound against
    their neighbours, and the whole mesh if it is inside out. Cut: edges of more than two faces and places where surfaces only touch in a
    vertex; each sheet gets vertices of its own, so that nothing moves.
    """
    done: list[str] = []
    faces, uv_faces = mesh.faces.astype(np.int64), mesh.uv_faces

    def keep(good: Bool[np.ndarray, "F"], what: str) -> None:
        nonlocal faces, uv_faces
        if not good.all():
            done.append(f"{np.count_nonzero(~good)} {what} were dropped")
            faces, uv_faces = faces[good], None if uv_faces is None else uv_faces[good]

    keep(np.isfinite(mesh.vertices).all(1)[faces].all(1), "faces with a corner that is not a number")
    points = mesh.vertices.astype(np.float64)
    size = float(np.ptp(points[faces].reshape(-1, 3), axis=0).max()) if len(faces) else 1.0
    points = points / max(size, 1e-300)
    keep(_have_area(points, faces), "faces without area")
    _, first = np.unique(np.sort(faces, axis=1), axis=0, return_index=True)
    keep(np.isin(np.arange(len(faces)), first), "second copies of a face")
    turn = _against_neighbours(points, faces)
    if turn.any():
        done.append(f"{np.count_nonzero(turn)} faces wound against their neighbours were turned")
        faces, uv_faces = _turned(faces, turn), None if uv_faces is None else _turned(uv_faces, turn)
    inside_out = _closed(faces) and _volume(points, faces).sum() < 0
    if inside_out:
        done.append("it was inside out and is turned")
        faces, uv_faces = faces[:, ::-1], None if uv_faces is None else uv_faces[:, ::-1]
    cut, origin, edges = _cut(faces, len(points))
    if edges:
        done.append(f"{edges} edges of more than two faces were cut open")
    used, index = np.unique(cut, return_inverse=True)
    faces, old = index.reshape(-1, 3).astype(np.int64), origin[used]
    normals = mesh.normals[old]
    vertices = mesh.vertices[old].astype(np.float32)
    made = vertex_normals(points[old], faces)
    wrong = (normals * made).sum(1) < 0
    if turn.any() or inside_out or edges or np.count_nonzero(wrong) > len(wrong) / 2:
        normals = made
    colors = None if mesh.colors is None else mesh.colors[old]
    uv_faces = None if uv_faces is None else np.ascontiguousarray(uv_faces)
    return replace(mesh, vertices=vertices, faces=faces, normals=normals, colors=colors, uv_faces=uv_faces), done


def _have_area(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """False for faces that are lines or points, to the precision of the numbers."""
    a, b, c = (points[faces[:, i]] for i in range(3))
    longest = np.max([((p - q) ** 2).sum(1) for p, q in ((a, b), (b, c), (c, a))], axis=0, initial=0)
    distinct = (faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])
    return distinct & (np.linalg.norm(np.cross(b - a, c - a), axis=1) > 1e-10 * longest)


def _edges(faces: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each side of each face (side * F + face): the number of its edge and whether it runs up in vertex numbers; how many sides each edge has."""
    ends = np.concatenate([faces[:, [0, 1]], faces[:, [1, 2]], faces[:, [2, 0]]])
    up = ends[:, 0] < ends[:, 1]
    ends = np.sort(ends, axis=1)
    _, edge, count = np.unique(
        ends[:, 0] * (faces.max(initial=0) + 1) + ends[:, 1], return_inverse=True, return_counts=True
    )
    return edge, up, count


def _pairs(edge: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two sides of every edge that has two."""
    order = np.argsort(edge, kind="stable")
    first = np.cumsum(count) - count
    two = first[count == 2]
    return order[two], order[two + 1]


def _closed(faces: np.ndarray) -> bool:
    return len(faces) > 0 and bool((_edges(faces)[2] % 2 == 0).all())


def _volume(points: np.ndarray, faces: np.ndarray) -> np.ndarray:
    a, b, c = (points[faces[:, i]] - points[faces[:, 0]].mean(0) for i in range(3))
    return (a * np.cross(b, c)).sum(1) / 6


def _turned(faces: np.ndarray, turn: np.ndarray) -> np.ndarray:
    return np.where(turn[:, None], faces[:, ::-1], faces)


def _against_neighbours(points: np.ndarray, faces: np.ndarray) -> Bool[np.ndarray, "F"]:
    """Which faces to turn so that neighbours run along their common edge in opposite directions, as far as that is possible.

    Of a connected piece, the side is chosen that encloses a volume, or, if it is open, that of the larger area.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import breadth_first_order, connected_components

    number = len(faces)
    edge, up, count = _edges(faces)
    one, other = _pairs(edge, count)
    same = up[one] == up[other]
    if not same.any():
        return np.zeros(number, bool)
    one, other = one % number, other % number
    graph = coo_matrix((1.0 + same, (one, other)), shape=(number, number))
    _, piece = connected_components(graph, directed=False)
    _, root = np.unique(piece, return_index=True)
    # One more node, tied to a face of each piece, makes one tree of all; 1: same sense, 2: opposite.
    rows = np.concatenate([one, other, np.full(len(root), number)])
    columns = np.concatenate([other, one, root])
    values = np.concatenate([1.0 + same, 1.0 + same, np.ones(len(root))])
    both, place = np.unique(rows * np.int64(number + 1) + columns, return_index=True)  # two faces may share two edges
    graph = coo_matrix((values[place], (both // (number + 1), both % (number + 1))), shape=(number + 1,) * 2).tocsr()
    order, before = breadth_first_order(graph, number, directed=True)
    turn = np.zeros(number + 1, bool)
    opposite = np.zeros(number + 1, bool)
    opposite[order[1:]] = np.asarray(graph[before[order[1:]], order[1:]]).reshape(-1) > 1.5
    for face in order[1:]:
        turn[face] = turn[before[face]] ^ opposite[face]
    turn = turn[:number]
    area = np.linalg.norm(np.cross(points[faces[:, 1]] - points[faces[:, 0]], points[faces[:, 2]] - points[faces[:, 0]]), axis=1)  # fmt: skip
    against = np.bincount(piece, np.where(turn, area, -area)) > 0
    border = np.unique(piece[np.flatnonzero(count[edge] != 2) % number])
    volume = np.bincount(piece, np.where(turn, -1, 1) * _volume(points, faces))
    mixed = np.zeros(len(root), bool)
    mixed[piece[one[same]]] = True
    closed = mixed & ~np.isin(np.arange(len(root)), border)
    against = np.where(closed, volume < 0, against)
    return turn ^ against[piece]


def _cut(faces: Int[np.ndarray, "F 3"], vertices: int) -> tuple[Int[np.ndarray, "F 3"], Int[np.ndarray, "W"], int]:
    """Faces with vertices of their own for each sheet, the old number of each new vertex, and how many edges had more than two faces.

    Corners at one vertex belong together if their faces share an edge there that has just these two faces, in opposite directions.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    number = len(faces)
    edge, up, count = _edges(faces)
    crowded = np.count_nonzero(count > 2)
    one, other = _pairs(edge, count)
    opposite = up[one] != up[other]
    one, other = one[opposite], other[opposite]
    # Side s * F + f runs from corner s * F + f to corner ((s + 1) % 3) * F + f; its twin runs the other way.
    following = (np.arange(3 * number) + number) % max(3 * number, 1)
    links = np.concatenate([np.stack([one, following[other]]), np.stack([following[one], other])], 1)
    graph = coo_matrix((np.ones(links.shape[1], bool), links), shape=(3 * number,) * 2)
    if number == 0:
        return faces, np.arange(vertices), 0
    _, group = connected_components(graph, directed=False)
    corner = faces.T.reshape(-1)
    # New vertices in the order of the old ones: where nothing is cut, nothing is renumbered.
    _, first = np.unique(group, return_index=True)
    order = np.argsort(corner[first], kind="stable")
    rank = np.empty_like(order)
    rank[order] = np.arange(len(order))
    return rank[group].reshape(3, number).T, corner[first][order], int(crowded)


def bounds(vertices: Float[np.ndarray, "V 3"]) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]] | None:
    """The corners of the box around all vertices that are numbers; None without any."""
    usable = vertices[(np.abs(vertices) < 1e150).all(1)]
    return (usable.min(0), usable.max(0)) if len(usable) else None
