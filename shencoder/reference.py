"""Real spherical harmonics in plain PyTorch: the definition, the fallback without a compiler, and the tests' oracle."""

import math

import torch
from jaxtyping import Float
from torch import Tensor


def norm(l: int, m: int) -> float:
    """The factor that gives the function of degree l and order +-m unit length on the sphere, with its sign (-1)^m."""
    ratio = math.factorial(l - m) / math.factorial(l + m)
    return (-1) ** m * math.sqrt((2 * l + 1) / (4 * math.pi) * ratio * (2 if m else 1))


def spherical_harmonics(x: Float[Tensor, "B 3"], degree: int) -> Float[Tensor, "B C"]:
    """See `shencoder.SHEncoder`.

    With s the sine of the polar angle, s^m cos(m phi) and s^m sin(m phi) are the real and imaginary part of (x + iy)^m,
    and the associated Legendre function over s^m is a polynomial in z with a recurrence of two terms in l.
    """
    x, y, z = x.unbind(-1)
    columns: list = [None] * degree**2
    real, imaginary = 1 + 0 * x, 0 * x  # part of the graph, even where only the constant is asked for
    diagonal = 1.0  # the polynomial for l = m: (2m - 1)!!
    for m in range(degree):
        before, legendre = torch.zeros_like(z), torch.full_like(z, diagonal)
        for l in range(m, degree):
            columns[l * l + l + m] = norm(l, m) * legendre * real
            if m:
                columns[l * l + l - m] = norm(l, m) * legendre * imaginary
            before, legendre = legendre, ((2 * l + 1) * z * legendre - (l + m) * before) / (l + 1 - m)
        real, imaginary = x * real - y * imaginary, x * imaginary + y * real
        diagonal *= 2 * m + 1
    return torch.stack(columns, -1)
