"""View words: which words a camera position adds to a prompt, and how much each of them counts.

Azimuth 0 looks at the object's front (+z); +90 is the +x side, which is the object's own left. Polar 0 is straight above, 90 the horizon.
Four words are the ones that DreamFusion published (front, side, back, overhead); the eight-word set also tells left from right and the
diagonals apart, and keeps them when seen from above. Nothing here reads a prompt: see prompt.py.
"""

import torch
from jaxtyping import Float
from torch import Tensor

_AROUND = (
    "front view",
    "front left view",
    "left side view",
    "back left view",
    "back view",
    "back right view",
    "right side view",
    "front right view",
)
WORDS: dict[int, tuple[str, ...]] = {
    0: ("",),
    4: ("front view", "side view", "back view", "overhead view"),
    8: _AROUND + tuple(f"overhead {words}" for words in _AROUND),
}


def view_weights(
    polar: Float[Tensor, "B"],
    azimuth: Float[Tensor, "B"],
    words: int,
    blend: bool = True,
    angle_overhead: float = 30.0,
    angle_front: float = 60.0,
) -> Float[Tensor, "B N"]:
    """How much each entry of `WORDS[words]` counts for each camera; every row sums to 1.

    With `blend` neighbouring words fade into each other linearly with the angle, those from above between polar 0 (all) and twice
    `angle_overhead` (none), so that the mixture tells the elevation as well; without, each camera gets one word: the overhead words
    below `angle_overhead`, else (four words) front and back within `angle_front / 2` of the axis, or (eight words) the nearest one.
    Angles in degrees.
    """
    if words == 0:
        return torch.ones_like(polar)[:, None]
    turn = torch.remainder(azimuth, 360.0)
    if blend:
        above = (1 - polar / (2 * max(angle_overhead, 1e-6))).clamp(0, 1)
    else:
        above = (polar < angle_overhead).to(polar.dtype)
    if words == 4:
        away = torch.where(turn > 180, 360 - turn, turn)  # 0 front .. 180 back
        if blend:
            around = torch.stack([1 - away / 90, 1 - (away - 90).abs() / 90, away / 90 - 1], -1).clamp(min=0)
        else:
            front, back = away < angle_front / 2, away > 180 - angle_front / 2
            around = torch.stack([front, ~(front | back), back], -1).to(polar.dtype)
        return torch.cat([around * (1 - above)[:, None], above[:, None]], -1)
    place = turn / 45.0
    if not blend:
        place = torch.round(place)
    centres = torch.arange(8, device=polar.device, dtype=polar.dtype)
    gap = (place[:, None] - centres).abs()
    around = (1 - torch.minimum(gap, 8 - gap)).clamp(min=0)
    return torch.cat([around * (1 - above)[:, None], around * above[:, None]], -1)
