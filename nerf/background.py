"""What is behind the object: a tiny network on the viewing direction, a plain colour, or a random one."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoding import get_encoder
from errors import UserError

NAMED = {"white": (1.0, 1.0, 1.0), "black": (0.0, 0.0, 0.0)}
CHOICES = "random, mlp, white, black or #rrggbb"


class BackgroundNetwork(nn.Module):
    """A colour for every direction: frequencies, one hidden layer of 32, sigmoid (raw for anything but 3 channels).

    It is small so that it cannot paint the prompt on the sky.
    """

    def __init__(self, channels: int = 3, degree: int = 6, hidden: int = 32):
        super().__init__()
        self.channels = channels
        self.encoder, width = get_encoder("frequency", input_dim=3, multires=degree)
        self.layers = nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, channels))

    def forward(self, directions: Float[Tensor, "*rays 3"]) -> Float[Tensor, "*rays C"]:
        colour = self.layers(self.encoder(directions)).float()
        return torch.sigmoid(colour) if self.channels == 3 else colour


def plain_colour(text: str) -> tuple[float, float, float]:
    """The colour named by `white`, `black` or `#rrggbb`, in [0, 1]; UserError for anything else."""
    digits = text.removeprefix("#")
    if text in NAMED:
        return NAMED[text]
    if text.startswith("#") and len(digits) == 6 and all(d in "0123456789abcdefABCDEF" for d in digits):
        return tuple(int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4))
    raise UserError(f"--background {text}: give {CHOICES}")


def training_background(
    opt: Any, batch: int, generator: torch.Generator, channels: int = 3, has_network: bool = False
) -> Float[Tensor, "B C"] | None:
    """What `render(background=...)` gets in a training step, on the generator's device; None is the background network.

    `--background random`: a random colour for each view. `mlp`: with probability `background_ratio` the network, else that,
    because the network would learn the object if it were always there. Or the plain colour named. With other than 3 channels
    (latents) random backgrounds are normal deviates and plain ones zero. Every call draws the same numbers.
    """
    like = {"generator": generator, "device": generator.device}
    network = bool(torch.rand(1, **like) < opt.background_ratio) and has_network
    draw = torch.rand(batch, 3, **like) if channels == 3 else torch.randn(batch, channels, **like)
    if opt.background in ("mlp", "random"):
        return None if network and opt.background == "mlp" else draw
    colour = plain_colour(opt.background)
    return draw.new_tensor(colour).expand(batch, 3) if channels == 3 else torch.zeros_like(draw)
