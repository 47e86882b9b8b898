"""The multi-resolution grid in plain PyTorch: the definition, the fallback and the test oracle."""

import itertools
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

PRIMES = (1, 2654435761, 805459861, 3674653429, 2097192037)
VARIATION_EPSILON = 1e-9


@dataclass(frozen=True)
class Level:
    """One level: `resolution`^D vertices, stored in `entries` rows of the table from `offset` on.

    Vertex p lies in row (sum_d p_d multiplier_d) & mask, or, `hashed`, (xor_d p_d multiplier_d) & mask, in 32 bits.
    """

    offset: int
    entries: int
    resolution: int
    mask: int
    hashed: bool
    multipliers: tuple[int, ...]


@dataclass(frozen=True)
class GridSpec:
    """The layout of a table and how it is read."""

    levels: tuple[Level, ...]
    smoothstep: bool = False
    align_corners: bool = False

    @cached_property
    def entries(self) -> int:
        """Rows of the table."""
        return self.levels[-1].offset + self.levels[-1].entries

    @cached_property
    def numbers(self) -> list[int]:
        """The levels as the compiled operators take them."""
        rows = ([v.offset, v.entries, v.resolution, v.mask, int(v.hashed), *v.multipliers] for v in self.levels)
        return list(itertools.chain.from_iterable(rows))


def grid_spec(
    input_dim: int,
    resolutions: list[int],
    log2_hashmap_size: int,
    gridtype: str = "hash",
    interpolation: str = "linear",
    align_corners: bool = False,
) -> GridSpec:
    """Levels of the given resolutions: dense where R^D rows fit into 2^log2_hashmap_size, else hashed or wrapped."""
    levels, offset, most = [], 0, 1 << log2_hashmap_size
    for resolution in resolutions:
        dense = resolution**input_dim <= most
        hashed = gridtype == "hash" and not dense
        multipliers = PRIMES[:input_dim] if hashed else tuple(resolution**axis % 2**32 for axis in range(input_dim))
        entries = ((resolution**input_dim if dense else most) + 7) // 8 * 8
        levels.append(Level(offset, entries, resolution, 2**32 - 1 if dense else most - 1, hashed, multipliers))
        offset += entries
    return GridSpec(tuple(levels), interpolation == "smoothstep", align_corners)


def rows(level: Level, vertex: Int[Tensor, "N D"]) -> Int[Tensor, "N"]:
    """The table's row for each vertex of a level."""
    terms = vertex * torch.tensor(level.multipliers, device=vertex.device) & (2**32 - 1)
    index = terms[:, 0]
    for axis in range(1, terms.shape[1]):
        index = index ^ terms[:, axis] if level.hashed else index + terms[:, axis]
    return level.offset + (index & level.mask)


def coordinates(
    spec: GridSpec, level: Level, x: Float[Tensor, "N D"], bound: float
) -> tuple[Float[Tensor, "N D"], Bool[Tensor, "N"]]:
    """Where points of [-bound, bound]^D lie in a level, in vertices, 0 .. R - 1; and which points are inside at all."""
    inside = ((x >= -bound) & (x <= bound)).all(dim=1)
    u = torch.where(inside[:, None], (x + bound) * (0.5 / bound), 0)
    if spec.align_corners:
        return u * (level.resolution - 1), inside
    return (u * level.resolution - 0.5).clamp(0, level.resolution - 1), inside


def grid_encode(
    x: Float[Tensor, "N D"], table: Float[Tensor, "P F"], spec: GridSpec, active: int, bound: float = 1.0
) -> Float[Tensor, "N W"]:
    """Features of each level, interpolated between the corners of the cell that x lies in; W = levels * F.

    Levels from `active` on, and points outside [-bound, bound]^D, give zeros. A float16 table is computed in float32.
    """
    count, dims = x.shape
    features = []
    for number, level in enumerate(spec.levels):
        if number >= active:
            features.append(x.new_zeros(count, table.shape[1], dtype=table.dtype))
            continue
        position, inside = coordinates(spec, level, x, bound)
        cell = position.detach().long().clamp(max=level.resolution - 2)
        fraction = position - cell
        if spec.smoothstep:
            fraction = fraction * fraction * (3 - 2 * fraction)
        total = 0
        for corner in itertools.product((0, 1), repeat=dims):
            upper = torch.tensor(corner, device=x.device)
            weight = torch.where(upper == 1, fraction, 1 - fraction).prod(dim=1) * inside
            total = total + weight[:, None] * table[rows(level, cell + upper)].to(x.dtype)
        features.append(total.to(table.dtype))
    return torch.cat(features, dim=1)


def variation_gradient(
    x: Float[Tensor, "N D"],
    table: Float[Tensor, "P F"],
    spec: GridSpec,
    active: int,
    bound: float = 1.0,
    weight: float = 1.0,
) -> Float[Tensor, "P F"]:
    """For each point and level, the gradient of weight * sqrt(sum (t - t_n)^2 + 1e-9) in t, feature by feature.

    t are the features of the vertex nearest to the point, t_n those of its up to 2 D neighbours along the axes (fewer at
    the border), taken as constants. In x's dtype; points outside [-bound, bound]^D count for nothing.
    """
    gradient = torch.zeros_like(table, dtype=x.dtype)
    for level in spec.levels[:active]:
        position, inside = coordinates(spec, level, x, bound)
        vertex = (position[inside] + 0.5).long().clamp(max=level.resolution - 1)
        row = rows(level, vertex)
        value = table[row].to(x.dtype)
        total, squares = torch.zeros_like(value), torch.full_like(value, VARIATION_EPSILON)
        for axis, step in itertools.product(range(x.shape[1]), (-1, 1)):
            neighbour = vertex.clone()
            neighbour[:, axis] += step
            exists = (neighbour[:, axis] >= 0) & (neighbour[:, axis] < level.resolution)
            difference = (value - table[rows(level, neighbour.clamp(0, level.resolution - 1))].to(x.dtype)) * exists[
                :, None
            ]
            total, squares = total + difference, squares + difference * difference
        gradient.index_add_(0, row, weight * total / squares.sqrt())
    return gradient
