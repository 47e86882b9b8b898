"""A rough shape that the scene should fill: Sketch-Shape of Latent-NeRF (Metzer et al. 2023, section 3.2)."""

from pathlib import Path

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F

from errors import UserError
from nerf.probes import probes
from nerf.renderer import Render

NODES = 64  # along an axis of the grid of distances
AROUND = 0.3  # that grid reaches so far beyond the shape, world units
TOLERANCE = 0.3  # how far from the guide's surface the scene is held to it, world units
STRENGTH = 0.2  # a density counts as full by 1 - exp(-0.2 sigma)
SURE = 1e-4  # the guide's word is taken as being within this of empty and full


class GuideShape:
    """The signed distance to a mesh, on a grid made once (seconds), so that a step needs neither the CPU nor libigl.

    The file's y axis is up and its z axis front, as in the scene. It is centred and scaled so that its farthest vertex lies `size` world units
    from the origin. Distances are off by 0.02 at most, 0.0006 on average (a box, 64 nodes, `size` 0.7): nothing beside the tolerance of 0.3.
    UserError naming --guide_shape where the file or libigl is missing.
    """

    def __init__(self, path: Path | str, size: float = 0.7, tolerance: float = TOLERANCE, nodes: int = NODES):
        from mesh.files import load_mesh
        from mesh.repair import normalise
        from mesh.shapes import mesh_sdf

        try:
            import igl  # noqa: F401
        except ImportError:
            raise UserError(f"--guide_shape {path}: needs the package libigl; pip install libigl") from None
        mesh = normalise(load_mesh(Path(path), "--guide_shape"), size)
        self.reach, self.tolerance = size + AROUND, tolerance
        axis = torch.linspace(-self.reach, self.reach, nodes)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")  # grid_sample counts its axes from the last one back
        values = mesh_sdf(mesh.vertices, mesh.faces)(torch.stack([x, y, z], -1).reshape(-1, 3))
        if not bool((values < 0).any()):
            raise UserError(f"--guide_shape {path}: it encloses no room, or is too thin; give a closed, solid shape")
        self.grid = values.reshape(1, 1, nodes, nodes, nodes)

    def sdf(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The signed distance, negative inside, world units, without gradient; beyond the grid a lower bound of it."""
        self.grid = self.grid.to(x.device)
        x = x.detach().float()
        nearest = x.clamp(-self.reach, self.reach)
        places = (nearest / self.reach)[None, None, None]
        inner = F.grid_sample(self.grid, places, padding_mode="border", align_corners=True).reshape(-1)
        beyond = (x - nearest).square().sum(-1)
        return torch.where(beyond > 0, (inner.square() + beyond).sqrt(), inner)

    def loss(self, render: Render, scene: nn.Module) -> Float[Tensor, ""]:
        """How far the scene is from full inside and empty outside: the mean of `disagreement` over the picture's samples (2^14 of them at
        most) and a quarter as many points anywhere in the box."""
        x = probes(render, scene.bound)
        return disagreement(scene.sigma(x).float(), self.sdf(x), self.tolerance).mean()


def disagreement(
    sigma: Float[Tensor, "M"], distance: Float[Tensor, "M"], tolerance: float = TOLERANCE
) -> Float[Tensor, "M"]:
    """(1 - exp(-d^2 / (2 tolerance^2))) CE(o, inside), with o = 1 - exp(-0.2 sigma) and
    CE(o, g) = -o log g - (1 - o) log(1 - g), g the guide's word kept within 1e-4 of 0 and 1.

    Near the guide's surface nothing is asked. The published loss is the sum over a step's samples, times 5e-6: with the 10^5 to 2 10^5 samples
    of a 64 x 64 picture that is 0.5 to 1 times the mean. (Its g is kept within 1e-2: CE reaches 4.6 there, 9.2 here as in threestudio.)
    """
    weight = -torch.expm1(-distance.square() / (2 * tolerance**2))
    inside: Bool[Tensor, "M"] = distance < 0
    full = -torch.expm1(-STRENGTH * sigma)
    given = torch.where(inside, 1 - SURE, SURE).to(full.dtype)
    return weight * (-full * given.log() - (1 - full) * (1 - given).log())
