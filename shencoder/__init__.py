"""Spherical harmonics: a direction becomes the values there of an orthonormal basis of functions on the sphere."""

from pathlib import Path
from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import extension
from shencoder import reference

FOLDER = Path(__file__).resolve().parent
MAX_DEGREE = 8


class SHEncoder(nn.Module):
    """Unit direction -> the real spherical harmonics Y_lm of all l < degree, at column l^2 + l + m; twice differentiable.

    They carry the Condon-Shortley sign (-1)^m and are orthonormal on the sphere: the first column is 1 / sqrt(4 pi), the
    next three are sqrt(3 / (4 pi)) (-y, z, -x). Negative m are the sines. Inputs are taken as they are: away from unit
    length the columns are polynomials in x, y, z without a meaning, and gradients are those of these polynomials.

    Args:
        input_dim: must be 3.
        degree: 1 .. 8; the output has `output_dim` = degree^2 columns.
    """

    def __init__(self, input_dim: int = 3, degree: int = 4):
        super().__init__()
        if input_dim != 3 or not 1 <= degree <= MAX_DEGREE:
            raise ValueError(f"SHEncoder needs input_dim = 3 and degree 1 .. 8, got {input_dim} and {degree}")
        self.input_dim, self.degree, self.output_dim = input_dim, degree, degree**2

    def forward(self, x: Float[Tensor, "*batch 3"]) -> Float[Tensor, "*batch C"]:
        """Encodes unit directions; half precision is widened to float32."""
        return spherical_harmonics(x.reshape(-1, 3), self.degree).reshape(*x.shape[:-1], self.output_dim)

    def extra_repr(self) -> str:
        return f"degree={self.degree}, output_dim={self.output_dim}"


def spherical_harmonics(x: Float[Tensor, "N 3"], degree: int) -> Float[Tensor, "N C"]:
    """The encoding as a function: C = degree^2 columns."""
    x = x if x.dtype.itemsize >= 4 else x.float()
    ops = extension.ops_for(x, FOLDER, "shencoder")
    if ops is None:
        return reference.spherical_harmonics(x, degree)
    return _Encode.apply(x.contiguous(), ops, degree)


class _Encode(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, ops: Any, degree: int) -> Tensor:
        ctx.save_for_backward(x)
        ctx.rest = ops, degree
        return ops.encode(x, None, degree)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        return _InputGradient.apply(grad.contiguous(), x, *ctx.rest), None, None


class _InputGradient(Function):
    """The gradient in x, itself differentiable: linear in `grad`, and a Hessian product in x."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor, ops: Any, degree: int) -> Tensor:
        ctx.save_for_backward(grad, x)
        ctx.rest = ops, degree
        return ops.input_gradient(grad, x, None, degree)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, direction: Tensor) -> tuple[Tensor | None, ...]:
        grad, x = ctx.saved_tensors
        ops, degree = ctx.rest
        direction = direction.contiguous()
        nodes = [node for node, _ in ctx.next_functions]
        along = ops.encode(x, direction, degree) if extension.will_compute(nodes[0]) else None
        bent = ops.input_gradient(grad, x, direction, degree) if extension.will_compute(nodes[1]) else None
        return along, bent, None, None
