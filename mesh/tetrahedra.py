"""A grid of tetrahedra that fills the cube [-1, 1]^3: the body-centred cubic lattice (as in isosurface stuffing, Labelle & Shewchuk 2007).

The lattice has the corners and the centres of n^3 cubes of side h = 2 / n. Two cubes that share a face give four tetrahedra: the line
between their centres with each of the face's four sides. A cube's face on the outer surface gives two: the centre with either half of
the face. All 12 n^3 tetrahedra have the same volume h^3 / 12, and edges of length h and sqrt(3) h / 2 (and the diagonals of the outer
faces, sqrt(2) h). It is nearly isotropic, so a surface cut out of it does not show the axes.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CELLS_PER_RESOLUTION = (
    0.4  # makes the numbers of tetrahedra those of the usual grids of that name, 32 to 256, within 15 %
)


@dataclass(frozen=True)
class Tetrahedra:
    """Tetrahedra over vertices in [-1, 1]^3; det(b - a, c - a, d - a) > 0 for every one, and `edges` holds each edge once.

    `spacing` is h, the side of a cube. As long as every vertex moves by less than h / 5 (1 / resolution), no tetrahedron turns over: none
    fits between two parallel planes closer together than 0.408 h (h / 2 away from the cube's surface).
    """

    vertices: Float[Tensor, "V 3"]
    tets: Int[Tensor, "T 4"]
    edges: Int[Tensor, "E 2"]
    spacing: float

    def to(self, device: torch.device | str) -> "Tetrahedra":
        if torch.device(device) == self.vertices.device:
            return self
        return Tetrahedra(self.vertices.to(device), self.tets.to(device), self.edges.to(device), self.spacing)

    @property
    def boundary(self) -> Bool[Tensor, "V"]:
        """Which vertices lie on the cube's surface: a shape that is outside at all of them is closed."""
        return self.vertices.abs().amax(1) == 1


def cells(resolution: int) -> int:
    """Cubes along an axis, 0.4 of the resolution: 13, 26, 51, 102 for 32, 64, 128, 256 (26,364, 210,912, 1,591,812, 12,734,496 tetrahedra)."""
    return max(round(CELLS_PER_RESOLUTION * resolution), 1)


@lru_cache(maxsize=1)
def grid(resolution: int) -> Tetrahedra:
    """The grid of that resolution, on the CPU; the last one is kept. Its tensors are shared: do not write to them.

    0.1 s and 100 MB at 128, 1 s and 0.7 GB at 256.
    """
    n = cells(resolution)
    axis = np.arange(n + 1)
    corner = _number((n + 1,) * 3, 0)
    centre = _number((n,) * 3, corner.size)
    lattice = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    middles = np.stack(np.meshgrid(axis[:-1], axis[:-1], axis[:-1], indexing="ij"), -1).reshape(-1, 3) + 0.5
    vertices = (np.concatenate([lattice, middles]) * (2 / n) - 1).astype(np.float32)

    tets, edges = [], []
    for a in range(3):
        # With a, b, c a cyclic permutation of the axes, the corners of a face across axis a, counter-clockwise seen from +a.
        b, c = (a + 1) % 3, (a + 2) % 3
        face = [_part(corner, {b: q, c: r}) for q, r in ((0, 0), (1, 0), (1, 1), (0, 1))]
        below, above = _part(centre, {a: 0}), _part(centre, {a: 1})
        inner = [_slab(side, a, slice(1, -1)) for side in face]
        for i in range(4):
            tets.append((below, inner[i], inner[(i + 1) % 4], above))
        for at, apex in ((0, _slab(centre, a, slice(0, 1))), (-1, _slab(centre, a, slice(-1, None)))):
            side = [_slab(part, a, slice(at, at + 1 or None)) for part in face]
            if at == 0:  # the apex lies on +a's side of the face there, on -a's side of the other
                tets += [(side[0], side[1], side[2], apex), (side[0], side[2], side[3], apex)]
            else:
                tets += [(side[0], side[2], side[1], apex), (side[0], side[3], side[2], apex)]
            edges.append((side[0], side[2]))  # the diagonal
        edges += [(_part(corner, {a: 0}), _part(corner, {a: 1})), (below, above)]
    for x in np.ndindex(2, 2, 2):
        edges.append((_part(corner, dict(enumerate(x))), centre))
    return Tetrahedra(torch.from_numpy(vertices), _stack(tets, 4), _stack(edges, 2), 2 / n)


def _number(shape: tuple[int, ...], first: int) -> Int[np.ndarray, "X Y Z"]:
    return np.arange(first, first + int(np.prod(shape)), dtype=np.int64).reshape(shape)


def _part(numbers: Int[np.ndarray, "X Y Z"], shift: dict[int, int]) -> Int[np.ndarray, "x y z"]:
    """Without the last (shift 0) or the first (shift 1) of the named axes: entry i then belongs to cube i's near or far side."""
    pick = [slice(None)] * 3
    for axis, far in shift.items():
        pick[axis] = slice(1, None) if far else slice(None, -1)
    return numbers[tuple(pick)]


def _slab(numbers: Int[np.ndarray, "X Y Z"], axis: int, pick: slice) -> Int[np.ndarray, "x y z"]:
    return numbers[(slice(None),) * axis + (pick,)]


def _stack(rows: list[tuple[np.ndarray, ...]], width: int) -> Int[Tensor, "N width"]:
    """The rows of all parts in one array, filled part by part: no second copy of the whole."""
    out = np.empty((sum(row[0].size for row in rows), width), np.int64)
    start = 0
    for row in rows:
        for i, column in enumerate(row):
            out[start : start + row[0].size, i] = column.reshape(-1)
        start += row[0].size
    return torch.from_numpy(out)
