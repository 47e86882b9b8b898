"""Points at which a loss asks the field itself: where a picture was sampled, and anywhere."""

import torch
from jaxtyping import Float
from torch import Tensor

from nerf.renderer import Render
from nerf.sampling import uniform

MOST = 1 << 14  # samples of a picture that are asked again, at most
ELSEWHERE = 0.25  # points anywhere in the box, as a share of those


def probes(render: Render, bound: float, most: int = MOST) -> Float[Tensor, "K 3"]:
    """The render's sample positions, `most` drawn at random if there are more, and a quarter as many (at least 64) points of the whole box.

    Samples follow the density; without the others nothing would be said about space that the occupancy grid takes for empty.
    """
    x, generator = render.positions.detach(), render.generator
    if len(x) > most:
        x = x[(uniform((most,), generator, x.device) * len(x)).long().clamp(max=len(x) - 1)]
    elsewhere = uniform((max(64, round(ELSEWHERE * len(x))), 3), generator, x.device)
    return torch.cat([x, (2 * elsewhere - 1) * bound])
