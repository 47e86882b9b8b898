"""A field whose surface is known: a hash grid gives the signed distance, and the density follows from it (VolSDF, Yariv et al. 2021)."""

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

from mesh.shapes import shape_sdf
from nerf.guide_shape import DistanceGrid
from nerf.network_grid import NeRFNetwork as Grid

SHARPEST = 1e-3  # beta stays above this, world units
EVEN = 0.05  # length in which `even_density` falls by a factor of e, world units
MISSED = 1e-2  # optical depth, head-on, of the faint skirt outside that the occupancy grid may take for empty


class NeRFNetwork(Grid):
    """Hash grid and small network of the default field, read as s = shape(x) + residual(x), negative inside, and `channels` colours.

        sigma = Psi_beta(-s) / beta,  Psi_beta(z) = 1/2 exp(z / beta) for z <= 0, else 1 - 1/2 exp(-z / beta)

    so that sigma is 1 / (2 beta) on the surface, 1 / beta deep inside and falls to 0 within a few beta outside. The softness
    beta = 0.001 + exp(-sharpness) is learnt; it starts at `--sdf_beta`. The residual starts at 0: the field begins as `--shape_init`.
    Normals are those of s, outward; `--normals finite` takes differences over one cell of the finest level in use, so that coarse levels
    learn from a smooth surface (Neuralangelo, Li et al. 2023; TextMesh).
    """

    def __init__(self, opt: Any, channels: int = 3):
        super().__init__(opt, channels)
        self._shape, self._density_thresh = shape_sdf(opt.shape_init, self.bound), opt.density_thresh
        start = max(opt.sdf_beta - SHARPEST, SHARPEST / 100)
        self.sharpness = nn.Parameter(torch.tensor(-math.log(start)))
        nn.init.zeros_(self.trunk[-1].weight[:1])
        self.register_buffer("start", torch.zeros(1, 1, 0, 0, 0))  # distances that take the place of the shape

    @property
    def beta(self) -> Float[Tensor, ""]:
        """Softness of the surface, world units."""
        return SHARPEST + torch.exp(-self.sharpness)

    def begin_as(self, vertices: Any, faces: Any) -> None:
        """Start from a triangle mesh (arrays, world units) in place of `--shape_init`."""
        self.start = DistanceGrid.around(vertices, faces, self.bound).values

    def adapt(self, values: dict[str, Tensor]) -> None:
        """Take the shape of the distances in `values`, a checkpoint that is about to be loaded."""
        if "start" in values:
            self.start = torch.empty_like(values["start"], device=self.start.device)

    def sdf(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The signed distance to the surface, negative inside, world units."""
        return -self._raw(x)[0]

    def sdf_gradient(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M 3"]:
        """Its gradient as `--normals` says, of length 1 for a true distance; differentiable in the parameters unless gradients are off."""
        with torch.autocast(x.device.type, enabled=False):
            if self._finite_normals:
                return -self._finite_slope(x.float())
            learning = torch.is_grad_enabled()
            with torch.enable_grad():
                x = x.detach().float().requires_grad_(True)
                s = self.sdf(x)
                return grad(s, x, torch.ones_like(s), create_graph=learning)[0]

    def even_density(self, x: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """`sigma` [N] = exp(-s / 0.05): the density's level sets with an even slope, for marching cubes; it crosses 1 at the surface."""
        return {"sigma": torch.exp(-self.sdf(x) / EVEN)}

    def update_occupancy(self, step: int, generator: torch.Generator | None = None) -> None:
        """As of any field, but cells count as empty only where sigma < 0.01 / beta: a soft surface is faint far out, and wide."""
        if self.occupancy is not None:
            self.occupancy.threshold = min(self._density_thresh, MISSED / self.beta.item())
            super().update_occupancy(step, generator)

    def parameter_groups(self, lr: float) -> list[dict]:
        """The grid's, and `beta` (without weight decay, which would soften the surface)."""
        return [
            *super().parameter_groups(lr),
            {"name": "beta", "params": [self.sharpness], "lr": lr, "weight_decay": 0.0},
        ]

    def _raw(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M W"]]:
        """-s, which falls outward as a density does, and what the colours are made from; never in half precision, too coarse for a surface."""
        with torch.autocast(x.device.type, enabled=False):
            x = x.float()
            hidden, last = self.trunk[:-1](self.encode(x)), self.trunk[-1]
            residual = F.linear(hidden, last.weight[:1], last.bias[:1])[:, 0]
            shape = DistanceGrid(self.start, self.bound) if self.start.numel() else self._shape
            return -(shape(x) + residual), hidden

    def _sigma(self, raw: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        beta = self.beta
        tail = 0.5 * torch.exp(-raw.abs() / beta)
        return torch.where(raw > 0, 1 - tail, tail) / beta

    def _finite_slope(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M 3"]:
        """Central differences of -s over one cell of the finest level in use; nearer to a wall than that, those a little further in."""
        level = self.encoder.spec.levels[self.encoder.active_levels(self.max_level) - 1]
        tap = 2 * self.bound / level.resolution
        room = self.bound - tap
        x = x.clamp(-room, room)[:, None]
        step = tap * torch.eye(3, device=x.device)
        ahead, behind = self._raw(torch.stack([x + step, x - step]).reshape(-1, 3))[0].reshape(2, -1, 3)
        return (ahead - behind) / (2 * tap)
