"""Frequency encoding: a coordinate becomes itself and sines and cosines of growing frequency."""

import math
from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import extension
from freqencoder import reference

FOLDER = Path(__file__).resolve().parent


class FreqEncoder(nn.Module):
    """x -> (x, sin(2^0 x), cos(2^0 x), ..., sin(2^(degree-1) x), cos(2^(degree-1) x)), twice differentiable.

    Args:
        input_dim: D, numbers per point.
        degree: bands; the output has `output_dim` = D (1 + 2 degree) columns, each block of D columns in x's order.
    """

    def __init__(self, input_dim: int = 3, degree: int = 6):
        super().__init__()
        if input_dim < 1 or degree < 0:
            raise ValueError(f"FreqEncoder needs input_dim >= 1 and degree >= 0, got {input_dim} and {degree}")
        self.input_dim, self.degree = input_dim, degree
        self.output_dim = input_dim * (1 + 2 * degree)

    def forward(self, x: Float[Tensor, "*batch D"], max_level: float | None = None) -> Float[Tensor, "*batch W"]:
        """Encodes x (any range; float16 is widened to float32). `max_level` in 0..1 keeps that fraction of the bands."""
        if x.shape[-1] != self.input_dim:
            raise ValueError(f"FreqEncoder expects {self.input_dim} numbers per point, got {x.shape[-1]}")
        active = self.degree
        if max_level is not None:
            active = min(max(math.ceil(max_level * self.degree), 0), self.degree)
        flat = frequency_encode(x.reshape(-1, self.input_dim), self.degree, active)
        return flat.reshape(*x.shape[:-1], self.output_dim)

    def extra_repr(self) -> str:
        return f"input_dim={self.input_dim}, degree={self.degree}, output_dim={self.output_dim}"


def frequency_encode(x: Float[Tensor, "N D"], degree: int, active: int | None = None) -> Float[Tensor, "N W"]:
    """The encoding as a function: W = D (1 + 2 degree) columns, bands from `active` on zero."""
    active = degree if active is None else active
    x = x if x.dtype.itemsize >= 4 else x.float()
    ops = extension.ops_for(x, FOLDER, "freqencoder")
    if ops is None:
        return reference.frequency_encode(x, degree, active)
    return _Encode.apply(x.contiguous(), ops, degree, active)


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: Any, degree: int, active: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = ops, degree, active
        return ops.encode(x, None, degree, active)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _InputGradient.apply(grad.contiguous(), x, *ctx.rest), None, None, None


class _InputGradient(Function):
    """The gradient in x, itself differentiable: linear in `grad`, and a Hessian product in x."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, ops: Any, degree: int, active: int) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.rest = ops, degree, active
        return ops.input_gradient(grad, x, None, degree, active)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        ops, degree, active = ctx.rest
        direction = direction.contiguous()
        nodes = [node for node, _ in ctx.next_functions]
        along = ops.encode(x, direction, degree, active) if extension.will_compute(nodes[0]) else None
        bent = ops.input_gradient(grad, x, direction, degree, active) if extension.will_compute(nodes[1]) else None
        return along, bent, None, None, None
