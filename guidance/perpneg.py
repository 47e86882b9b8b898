"""Perp-Neg (Armandpour et al. 2023): each view is pushed away from the words of the other views, at right angles to its own words only.

An object with a face on every side comes from a prior that answers "back view" with a front. Its own words pull too weakly; pushing away
from "front view" as a whole would also push away what both wordings have in common, the object itself.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True)
class PerpNeg:
    """How strongly, 0 or less, and how fast the push from the front's and the side's words falls as a view comes to show them."""

    negative_w: float = -2.0
    front_decay_factor: float = 2.0
    side_decay_factor: float = 10.0


def perp_neg_weights(azimuth: Float[Tensor, "B"], strength: PerpNeg) -> Float[Tensor, "2 B"]:
    """Weights of the front's (row 0) and the side's words (row 1) for each camera (degrees), on the schedule of stable-dreamfusion.

    With a the angle from the front (0 .. 180), w the strength, f and s the decay factors:
    in front, r = 1 - a / 90: front w exp(-f r), 0 if r > 0.8; side w exp(-s (1 - r)), 0 if r < 0.2;
    behind, r = 2 - a / 90: front w; side w / 2 exp(-s r), 0 if r > 0.8.
    """
    turn = torch.remainder(azimuth, 360.0)
    away = torch.where(turn > 180, 360 - turn, turn)
    in_front = away < 90
    r = torch.where(in_front, 1 - away / 90, 2 - away / 90)
    front = torch.where(in_front, (-strength.front_decay_factor * r).exp() * (r <= 0.8), 1.0)
    side_in_front = (-strength.side_decay_factor * (1 - r)).exp() * (r >= 0.2)
    side_behind = 0.5 * (-strength.side_decay_factor * r).exp() * (r <= 0.8)
    return strength.negative_w * torch.stack([front, torch.where(in_front, side_in_front, side_behind)])


def perpendicular(x: Float[Tensor, "B *s"], y: Float[Tensor, "B *s"]) -> Float[Tensor, "B *s"]:
    """The part of x at right angles to y: x - y <x, y> / max(|y|^2, 1e-6), with one inner product over the whole of each sample."""
    dims = tuple(range(1, x.ndim))
    along = (x * y).sum(dims, keepdim=True) / y.square().sum(dims, keepdim=True).clamp(min=1e-6)
    return x - along * y


def aggregate(
    main: Float[Tensor, "B *s"], deltas: Float[Tensor, "K B *s"], weights: Float[Tensor, "K B"]
) -> Float[Tensor, "B *s"]:
    """The direction of guidance, main + sum_k w_k perpendicular(delta_k, main); all are noise estimates less the unguided one.

    A weight below 0 pushes away; what has weight 0 is ignored, even if it is not finite. Each sample is by itself.
    """
    total = main
    for delta, weight in zip(deltas, weights, strict=True):
        weight = weight.reshape(-1, *[1] * (main.ndim - 1))
        total = total + torch.where(weight == 0, 0.0, weight * perpendicular(delta, main))
    return total
