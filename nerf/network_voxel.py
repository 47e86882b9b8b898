"""The field of Score Jacobian Chaining: numbers in the nodes of a cube, and no network. Fast to ask, quick to learn, never smooth."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from encoding import get_encoder
from nerf.field import Field, density_blob

FLOOR = -1.0  # raw density of an empty node, where the scene does not start from a blob


def _table(size: int, width: int) -> nn.Module:
    """`width` (1, 2, 4 or 8) numbers in each of size^3 nodes, the outermost on the walls of the box; within 1e-4 of 0 at first."""
    return get_encoder(
        "tiledgrid",
        num_levels=1,
        level_dim=width,
        base_resolution=size,
        desired_resolution=size,
        log2_hashmap_size=(size**3 - 1).bit_length(),
        align_corners=True,
    )[0]


def _widths(channels: int) -> list[int]:
    """`channels` as a sum of what a table can hold."""
    return [8] * (channels // 8) + [width for width in (4, 2, 1) if channels & width]


class Voxels(nn.Module):
    """A density and `channels` colours in every node, trilinear in between; in tables of their own, so that a density costs no colours."""

    def __init__(self, size: int, channels: int):
        super().__init__()
        self.density = _table(size, 1)
        self.colours = nn.ModuleList(_table(size, width) for width in _widths(channels))

    def forward(self, x: Float[Tensor, "M 3"], bound: float) -> Float[Tensor, "M C"]:
        """The colours as they stand there, without an activation."""
        return torch.cat([table(x, bound=bound) for table in self.colours], -1)

    @property
    def embeddings(self) -> nn.Parameter:
        """The densities, which stand for all tables where only a place and a number of rows are asked for."""
        return self.density.embeddings

    def grad_total_variation(self, weight: float, x: Float[Tensor, "N 3"], bound: float) -> None:
        """`GridEncoder.grad_total_variation` of every table."""
        for table in (self.density, *self.colours):
            table.grad_total_variation(weight, x, bound)

    def grad_weight_decay(self, weight: float) -> None:
        """`GridEncoder.grad_weight_decay` of every table."""
        for table in (self.density, *self.colours):
            table.grad_weight_decay(weight)


class Scale(nn.Module):
    """v -> v exp(s), s learnable and 0 at first: all densities can grow at once."""

    def __init__(self):
        super().__init__()
        self.log_scale = nn.Parameter(torch.zeros(1))

    def forward(self, v: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        return v * self.log_scale.exp()


class NeRFNetwork(Field):
    """`voxel_size`^3 nodes over [-bound, bound]^3: sigma = act(v exp(s) + b(x)), colours raw (latents) or, 3 of them, sigmoid.

    b is the blob that every field starts from, or with `--blob_density 0` the -1 of Score Jacobian Chaining (Wang et al. 2023), whose
    density is softplus(v exp(s) - 1). Its background, a coarse map of the directions, is the background network here, as everywhere.
    """

    def __init__(self, opt: Any, channels: int = 3):
        super().__init__(opt, channels, Voxels(opt.voxel_size, channels), Scale())

    def encode(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M C"]:
        return self.encoder(x, self.bound)

    def colour(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M C"], Float[Tensor, "M C"]]:
        """Albedo, and the numbers that it is made from."""
        features = self.encode(x)
        return self._activated(features), features

    def _raw(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M 3"]]:
        """The raw density, and what the colours are made from: the place itself, so that who wants no colours pays for none."""
        v = self.encoder.density(x, bound=self.bound).float()[:, 0]
        floor = density_blob(x, self._activation, *self._blob) if self._blob[0] > 0 else FLOOR
        return self.trunk(v) + floor, x.detach()

    def _albedo(self, hidden: Float[Tensor, "M 3"]) -> Float[Tensor, "M C"]:
        return self._activated(self.encode(hidden))

    def _activated(self, features: Float[Tensor, "M C"]) -> Float[Tensor, "M C"]:
        return torch.sigmoid(features.float()) if self.channels == 3 else features.float()
