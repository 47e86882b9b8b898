"""The default field: a hash grid and a small network. All colours are independent of the viewing direction."""

from typing import Any

from jaxtyping import Float
from torch import Tensor

from encoding import get_encoder
from nerf.field import Field, mlp


class NeRFNetwork(Field):
    """Hash grid (`num_levels` x `level_dim`, smoothstep) -> `mlp_layers` linear layers of `hidden_dim` -> density and `channels` colours."""

    def __init__(self, opt: Any, channels: int = 3):
        encoder, width = get_encoder(
            "hashgrid",
            input_dim=3,
            num_levels=opt.num_levels,
            level_dim=opt.level_dim,
            base_resolution=opt.base_resolution,
            log2_hashmap_size=opt.log2_hashmap_size,
            desired_resolution=round(opt.desired_resolution * opt.bound),
            interpolation="smoothstep",
        )
        super().__init__(opt, channels, encoder, mlp(width, opt.hidden_dim, 1 + channels, opt.mlp_layers))

    def encode(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M F"]:
        return self.encoder(x, bound=self.bound, max_level=self.max_level)
