"""The field of `-O2`: frequencies and a deeper network. Slower and smoother than the grid; a few thousand parameters."""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from encoding import get_encoder
from errors import say
from nerf.field import Field

DEGREE = 12
BLOCKS = 3


class _Block(nn.Module):
    """x -> SiLU(x + LayerNorm(Linear(x)))."""

    def __init__(self, width: int):
        super().__init__()
        self.linear, self.norm = nn.Linear(width, width), nn.LayerNorm(width)

    def forward(self, x: Float[Tensor, "M W"]) -> Float[Tensor, "M W"]:
        return F.silu(x + self.norm(self.linear(x)))


class NeRFNetwork(Field):
    """12 octaves of sines (75 numbers) -> linear, ReLU, 3 residual blocks, linear (`hidden_dim`) -> density and `channels` colours."""

    def __init__(self, opt: Any, channels: int = 3):
        idle = [f"--{flag}" for flag in ("lambda_tv", "lambda_wd") if getattr(opt, flag).max() > 0]
        if idle:  # presets set them for the grid
            say(f"the vanilla backbone has no grid to regularise: {' and '.join(idle)} left out")
        encoder, width = get_encoder("frequency", input_dim=3, multires=DEGREE)
        hidden = opt.hidden_dim
        last = nn.Linear(hidden, 1 + channels)
        nn.init.zeros_(last.bias)
        blocks = [_Block(hidden) for _ in range(BLOCKS)]
        super().__init__(opt, channels, encoder, nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), *blocks, last))

    def encode(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M F"]:
        return self.encoder(x, max_level=self.max_level)
