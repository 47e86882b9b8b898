"""Marching tetrahedra (Doi & Koide 1991): the surface where a signed distance is 0, differentiable as in DMTet (Shen et al. 2021)."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mesh.tetrahedra import Tetrahedra


def _table() -> list[list[tuple[tuple[int, int], ...]]]:
    """For every set of inside corners (bit i for corner i) the triangles, as triples of (inside corner, outside corner).

    With i, j, k, l an even order of the corners of a positively oriented tetrahedron, the triangle (ij, ik, il) faces away from i and the
    quadrilateral (ik, il, jl, jk) faces away from the edge ij: those are counter-clockwise seen from outside.
    """
    even = ((0, 1, 2, 3), (1, 0, 3, 2), (2, 3, 0, 1), (3, 2, 1, 0))  # corner i first
    table: list[list] = [[] for _ in range(16)]
    for i, j, k, l in even:
        table[1 << i] = [((i, j), (i, k), (i, l))]
        table[15 ^ 1 << i] = [((j, i), (l, i), (k, i))]
    for i, j, k, l in ((0, 1, 2, 3), (0, 2, 3, 1), (0, 3, 1, 2), (2, 3, 0, 1), (3, 1, 0, 2), (1, 2, 0, 3)):
        table[1 << i | 1 << j] = [((i, k), (i, l), (j, l)), ((i, k), (j, l), (j, k))]
    return table


_TRIANGLES = _table()


def marching_tets(
    positions: Float[Tensor, "V 3"], sdf: Float[Tensor, "V"], grid: Tetrahedra
) -> tuple[Float[Tensor, "N 3"], Int[Tensor, "M 3"]]:
    """Triangles of the surface sdf = 0, counter-clockwise seen from outside (sdf < 0 is inside, 0 counts as outside).

    `positions` are the grid's vertices, moved or not. A vertex lies on every edge whose ends differ in sign, at the zero of the linear
    interpolation, (p_a s_b - p_b s_a) / (s_b - s_a): differentiable in the positions and in the signed distance, while which edges
    those are is not. One triangle for one or three corners inside, two for two. The surface is a manifold, and closed unless the shape
    reaches the grid's boundary; empty if nothing changes sign.
    """
    inside = sdf.detach() < 0
    # The four flags of a tetrahedron read as one 32-bit number: the millions that the surface does not cross cost one comparison.
    flags = inside.view(torch.uint8).index_select(0, grid.tets.reshape(-1)).view(torch.int32)
    crossed = ((flags != 0) & (flags != 0x01010101)).nonzero()[:, 0]
    tets = grid.tets[crossed]
    case = (inside[tets] * torch.tensor([1, 2, 4, 8], device=sdf.device)).sum(1)

    count = len(positions)
    corners = []  # of every triangle: the edge it lies on, as inside end * count + outside end
    for number, triangles in enumerate(_TRIANGLES):
        if not triangles:
            continue
        these = tets[case == number]
        for triangle in triangles:
            corners.append(torch.stack([these[:, a] * count + these[:, b] for a, b in triangle], 1))
    cut, faces = torch.unique(torch.cat(corners), return_inverse=True)
    a, b = torch.div(cut, count, rounding_mode="floor"), cut % count
    weight = (sdf[b] / (sdf[b] - sdf[a]))[:, None]  # of the inside end a; s_a < 0 <= s_b, so nothing is divided by 0
    return weight * positions[a] + (1 - weight) * positions[b], faces
