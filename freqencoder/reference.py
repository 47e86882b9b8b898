"""The frequency encoding in plain PyTorch: the definition, the fallback and the test oracle."""

import torch
from jaxtyping import Float
from torch import Tensor


def frequency_encode(x: Float[Tensor, "N D"], degree: int, active: int) -> Float[Tensor, "N W"]:
    """x, then sin(2^k x), cos(2^k x) for k = 0 .. degree - 1; bands from `active` on are zero. W = D (1 + 2 degree)."""
    columns = [x]
    for band in range(degree):
        if band < active:
            columns += [torch.sin(2.0**band * x), torch.cos(2.0**band * x)]
        else:
            columns += [torch.zeros_like(x), torch.zeros_like(x)]
    return torch.cat(columns, dim=-1)
