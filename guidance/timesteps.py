"""Noise levels that fall with the run instead of being drawn: first the shape, then the details."""

import torch
from jaxtyping import Float
from torch import Tensor


def falling_timestep(
    name: str, progress: float, first: int, last: int, signal: Float[Tensor, "T"], sigma: Float[Tensor, "T"]
) -> int:
    """The timestep at a point of the run (0 .. 1), from `last` down to `first`.

    name: "linear"; "sqrt": last - (last - first) sqrt(progress) (HiFA, Zhu et al. 2024); "dreamtime": see below. signal, sigma: the prior's
    noise levels, on the CPU.
    """
    if name == "linear":
        return round(last - (last - first) * progress)
    if name == "sqrt":
        return round(last - (last - first) * progress**0.5)
    if name == "dreamtime":
        return _dreamtime(progress, first, last, signal, sigma)
    raise ValueError(f"no schedule of timesteps is called {name}")


def _dreamtime(progress: float, first: int, last: int, signal: Tensor, sigma: Tensor) -> int:
    """Time spent at t is proportional to W(t) = sqrt((1 - abar) / abar) W_p(t), where W_p is 1 between t = 500 and 800 of 1000 and falls
    off as a Gaussian of width 100 below and 300 above (DreamTime, Huang et al. 2024, equations 6 to 8): the t whose mass above it is the
    share of the run that is done."""
    t = torch.arange(first, last + 1, dtype=torch.float64)
    unit = len(signal) / 1000
    below, above = (500 * unit - t).clamp(min=0) / (100 * unit), (t - 800 * unit).clamp(min=0) / (300 * unit)
    mass = (sigma[first : last + 1].double() / signal[first : last + 1].double().clamp(min=1e-6)) * torch.exp(
        -(below**2 + above**2) / 2
    )
    spent = mass.flip(0).cumsum(0).flip(0) / mass.sum()  # from the noisiest level down to t
    return first + int((spent - progress).abs().argmin())
