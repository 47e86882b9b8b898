"""Multi-resolution hash grid: trainable features in the vertices of grids of growing resolution, interpolated."""

import math
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import extension
from gridencoder import reference
from gridencoder.reference import GridSpec, grid_spec

FOLDER = Path(__file__).resolve().parent
VARIATION_SAMPLES = 1 << 17  # points that grad_total_variation draws ...
VARIATION_REFERENCE = 1_000_000  # ... standing for this many, so that published weights keep their meaning


class GridEncoder(nn.Module):
    """Position -> features of every level, twice differentiable in the position and the table.

    Level l has R_l = ceil(base_resolution s^l) vertices per axis, with s such that the last has `desired_resolution`;
    a cell's corners are interpolated (`linear`, or `smoothstep`: 3 f^2 - 2 f^3 in place of the fraction f).

    Args:
        input_dim: D, 2 .. 5.
        num_levels, level_dim: L levels of F = 1, 2, 4 or 8 features; `output_dim` = L F.
        base_resolution, desired_resolution: vertices per axis of the first and the last level, at least 2.
        log2_hashmap_size: a level has at most 2^this rows; finer ones share rows, by a hash or (`tiled`) by wrapping.
        align_corners: outermost vertices on the border (True), or half a cell inside of it (False).
    """

    def __init__(
        self,
        input_dim: int = 3,
        num_levels: int = 16,
        level_dim: int = 2,
        base_resolution: int = 16,
        log2_hashmap_size: int = 19,
        desired_resolution: int = 2048,
        gridtype: str = "hash",
        align_corners: bool = False,
        interpolation: str = "linear",
    ):
        super().__init__()
        for name, value, allowed in [
            ("input_dim", input_dim, range(2, 6)),
            ("num_levels", num_levels, range(1, 33)),
            ("level_dim", level_dim, (1, 2, 4, 8)),
            ("base_resolution", base_resolution, range(2, 1 << 20)),
            ("desired_resolution", desired_resolution, range(base_resolution, 1 << 20)),
            ("log2_hashmap_size", log2_hashmap_size, range(3, 32)),
            ("gridtype", gridtype, ("hash", "tiled")),
            ("interpolation", interpolation, ("linear", "smoothstep")),
        ]:
            if value not in allowed:
                raise ValueError(f"GridEncoder: {name} = {value!r} is not in {allowed}")
        self.input_dim, self.num_levels, self.level_dim = input_dim, num_levels, level_dim
        self.output_dim = num_levels * level_dim
        growth = (desired_resolution / base_resolution) ** (1 / max(num_levels - 1, 1))
        # Less a rounding error: base * growth^(L - 1) must not come out as desired_resolution + 1.
        resolutions = [math.ceil(base_resolution * growth**level - 1e-6) for level in range(num_levels)]
        self.spec = grid_spec(input_dim, resolutions, log2_hashmap_size, gridtype, interpolation, align_corners)
        self.embeddings = nn.Parameter(torch.empty(self.spec.entries, level_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Fills the table uniformly from [-1e-4, 1e-4]."""
        nn.init.uniform_(self.embeddings, -1e-4, 1e-4)

    def active_levels(self, max_level: float | None) -> int:
        """How many levels a fraction 0..1 leaves on: ceil(fraction * L), at least 1; None: all."""
        if max_level is None:
            return self.num_levels
        return min(max(math.ceil(max_level * self.num_levels), 1), self.num_levels)

    def forward(
        self, x: Float[Tensor, "*batch D"], bound: float = 1.0, max_level: float | None = None
    ) -> Float[Tensor, "*batch W"]:
        """Features [..., L F], in the table's dtype, of points in [-bound, bound]^D; zeros for points outside.

        `max_level`: fraction 0..1 of the levels in use, coarse to fine; the features of the others are zero.
        """
        if x.shape[-1] != self.input_dim:
            raise ValueError(f"GridEncoder expects {self.input_dim} numbers per point, got {x.shape[-1]}")
        flat = x.reshape(-1, self.input_dim)
        out = grid_encode(flat, self.embeddings, self.spec, self.active_levels(max_level), bound)
        return out.reshape(*x.shape[:-1], self.output_dim)

    @torch.no_grad()
    def grad_total_variation(
        self,
        weight: float,
        x: Float[Tensor, "N D"] | None = None,
        bound: float = 1.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Adds to the table's .grad that of weight/(2 D) * (sum over points and levels of the total variation there).

        The variation at a point is that of the vertex nearest to it against its neighbours, see
        `reference.variation_gradient`. x None: points drawn uniformly (by `generator`), counted as a million.
        """
        if x is None:
            shape, device = (VARIATION_SAMPLES, self.input_dim), self.embeddings.device
            x = (torch.rand(shape, generator=generator, device=device) * 2 - 1) * bound
            weight = weight * (VARIATION_REFERENCE / VARIATION_SAMPLES)
        weight = weight / (2 * self.input_dim)
        x = _points_like(x, self.embeddings)
        ops = extension.ops_for(x, FOLDER, "gridencoder")
        if ops is None:
            gradient = reference.variation_gradient(x, self.embeddings, self.spec, self.num_levels, bound, weight)
        else:
            gradient = ops.variation_gradient(
                x, self.embeddings, self.spec.numbers, self.num_levels, self.spec.align_corners, bound, weight
            )
        self._add_to_grad(gradient)

    @torch.no_grad()
    def grad_weight_decay(self, weight: float) -> None:
        """Adds to the table's .grad that of weight * (sum over levels of the mean over rows of its squares)."""
        gradient = self.embeddings * (2 * weight)
        for level in self.spec.levels:
            gradient[level.offset : level.offset + level.entries] /= level.entries
        self._add_to_grad(gradient)

    def _add_to_grad(self, gradient: Tensor) -> None:
        if self.embeddings.grad is None:
            self.embeddings.grad = torch.zeros_like(self.embeddings)
        self.embeddings.grad += gradient.to(self.embeddings.dtype)

    def extra_repr(self) -> str:
        first, last = self.spec.levels[0].resolution, self.spec.levels[-1].resolution
        return f"{self.num_levels} levels of {self.level_dim}, resolution {first} .. {last}, {self.spec.entries} rows"


def grid_encode(
    x: Float[Tensor, "N D"],
    table: Float[Tensor, "P F"],
    spec: GridSpec,
    active: int | None = None,
    bound: float = 1.0,
) -> Float[Tensor, "N W"]:
    """The encoding as a function: W = levels * F features per point, in the table's dtype.

    x is computed in float32 with float16 and float32 tables, in float64 with float64 tables.
    """
    active = len(spec.levels) if active is None else active
    x = _points_like(x, table)
    ops = extension.ops_for(x, FOLDER, "gridencoder")
    if ops is None:
        return reference.grid_encode(x, table, spec, active, bound)
    return _Encode.apply(x, table.contiguous(), ops, spec, active, float(bound))


def _points_like(x: Tensor, table: Tensor) -> Tensor:
    return x.to(torch.float64 if table.dtype == torch.float64 else torch.float32).contiguous()


# The kernels take an optional direction v and then compute the derivative along v of what they compute otherwise. With
# y = encode(x, T), gT = table_gradient(g, x) and gx = input_gradient(g, x, T), that is all a double backward needs:
#   d<v, gx>/dg = encode(x, T; v)    d<v, gx>/dT = table_gradient(g, x; v)    d<v, gx>/dx = input_gradient(g, x, T; v)
#   d<u, gT>/dg = encode(x, u)       d<u, gT>/dx = input_gradient(g, x, u)


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, table: Tensor, ops: Any, spec: GridSpec, active: int, bound: float) -> Tensor:
        ctx.save_for_backward(x, table)
        ctx.rest = ops, spec, active, bound
        return ops.encode(x, table, None, spec.numbers, active, spec.smoothstep, spec.align_corners, bound)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, table = ctx.saved_tensors
        for_x, for_table = (extension.will_compute(node) for node, _ in ctx.next_functions[:2])
        grad = grad.contiguous()
        gradient_x = _InputGradient.apply(grad, x, table, *ctx.rest) if for_x else None
        gradient_table = _TableGradient.apply(grad, x, table.dtype, *ctx.rest) if for_table else None
        return gradient_x, gradient_table, None, None, None, None


class _InputGradient(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, table: Tensor, ops: Any, spec: GridSpec, active: int, bound: float
    ) -> Tensor:
        ctx.save_for_backward(grad, x, table)
        ctx.rest = ops, spec, active, bound
        return ops.input_gradient(
            grad, x, table, None, spec.numbers, active, spec.smoothstep, spec.align_corners, bound
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, v: Tensor) -> tuple[Tensor | None, ...]:
        grad, x, table = ctx.saved_tensors
        ops, spec, active, bound = ctx.rest
        how = active, spec.smoothstep, spec.align_corners, bound
        for_grad, for_x, for_table = (extension.will_compute(node) for node, _ in ctx.next_functions[:3])
        v = v.contiguous()
        out: list[Tensor | None] = [None] * 7
        if for_grad:
            out[0] = ops.encode(x, table, v, spec.numbers, *how)
        if for_x:
            out[1] = ops.input_gradient(grad, x, table, v, spec.numbers, *how)
        if for_table:
            out[2] = ops.table_gradient(grad, x, v, spec.numbers, table.shape[1], *how).to(table.dtype)
        return tuple(out)


class _TableGradient(Function):
    @staticmethod
    def forward(
        ctx: Any, grad: Tensor, x: Tensor, dtype: torch.dtype, ops: Any, spec: GridSpec, active: int, bound: float
    ) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.rest = ops, spec, active, bound
        features = grad.shape[1] // len(spec.levels)
        how = active, spec.smoothstep, spec.align_corners, bound
        return ops.table_gradient(grad, x, None, spec.numbers, features, *how).to(dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, u: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        ops, spec, active, bound = ctx.rest
        how = active, spec.smoothstep, spec.align_corners, bound
        for_grad, for_x = (extension.will_compute(node) for node, _ in ctx.next_functions[:2])
        u = u.contiguous()
        out: list[Tensor | None] = [None] * 7
        if for_grad:
            out[0] = ops.encode(x, u, None, spec.numbers, *how)
        if for_x:
            out[1] = ops.input_gradient(grad, x, u, None, spec.numbers, *how)
        return tuple(out)
