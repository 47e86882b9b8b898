"""A rough shape that the scene should fill: Sketch-Shape of Latent-NeRF (Metzer et al. 2023, section 3.2)."""

from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from errors import UserError
from nerf.probes import probes
from nerf.renderer import Render

NODES = 64  # along an axis of the grid of distances
AROUND = 0.3  # that grid reaches so far beyond the shape, world units
TOLERANCE = 0.3  # how far from the guide's surface the scene is held to it, world units
STRENGTH = 0.2  # a density counts as full by 1 - exp(-0.2 sigma)
SURE = 1e-4  # the guide's word is taken as being within this of empty and full


@dataclass(frozen=True)
class DistanceGrid:
    """Signed distances at the nodes of a cube from -reach to reach; trilinear in between, differentiable in the points."""

    values: Float[Tensor, "1 1 N N N"]
    reach: float

    @classmethod
    def around(cls, vertices: Any, faces: Any, reach: float, nodes: int = NODES) -> "DistanceGrid":
        """Those of a triangle mesh, negative inside (arrays; `mesh.shapes.mesh_sdf`)."""
        from mesh.shapes import mesh_sdf

        axis = torch.linspace(-reach, reach, nodes)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")  # x varies fastest
        values = mesh_sdf(vertices, faces)(torch.stack([x, y, z], -1).reshape(-1, 3))
        return cls(values.reshape(1, 1, nodes, nodes, nodes), reach)

    def to(self, device: torch.device | str) -> "DistanceGrid":
        return DistanceGrid(self.values.to(device), self.reach)

    def __call__(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The distance, world units; beyond the cube a lower bound of it."""
        nearest = x.clamp(-self.reach, self.reach)
        nodes = self.values.shape[-1]
        place = (nearest / self.reach + 1) * ((nodes - 1) / 2)
        corner = place.detach().long().clamp(0, nodes - 2)
        along = place - corner
        inner = torch.zeros_like(x[:, 0])
        table = self.values.reshape(-1)
        for dx, dy, dz in product(
            (0, 1), repeat=3
        ):  # by hand: normals that learn need a second derivative, which grid_sample lacks
            weight = torch.stack([along, 1 - along])[[1 - dx, 1 - dy, 1 - dz], :, [0, 1, 2]].prod(0)
            index = ((corner[:, 2] + dz) * nodes + corner[:, 1] + dy) * nodes + corner[:, 0] + dx
            inner = inner + weight * table[index]
        beyond = (x - nearest).square().sum(-1)
        return torch.where(beyond > 0, (inner.square() + beyond + 1e-12).sqrt(), inner)


class GuideShape:
    """The signed distance to a mesh, on a grid made once (seconds), so that a step needs neither the CPU nor libigl.

    The file's y axis is up and its z axis front, as in the scene. It is centred and scaled so that its farthest vertex lies `size` world units
    from the origin. Distances are off by 0.02 at most, 0.0006 on average (a box, 64 nodes, `size` 0.7): nothing beside the tolerance of 0.3.
    UserError naming --guide_shape where the file or libigl is missing.
    """

    def __init__(self, path: Path | str, size: float = 0.7, tolerance: float = TOLERANCE, nodes: int = NODES):
        from mesh.files import load_mesh
        from mesh.repair import normalise

        try:
            import igl  # noqa: F401
        except ImportError:
            raise UserError(f"--guide_shape {path}: needs the package libigl; pip install libigl") from None
        mesh = normalise(load_mesh(Path(path), "--guide_shape"), size)
        self.tolerance = tolerance
        self.grid = DistanceGrid.around(mesh.vertices, mesh.faces, size + AROUND, nodes)
        if not bool((self.grid.values < 0).any()):
            raise UserError(
                f"--guide_shape {path}: it encloses no room; give a closed shape that is not thinner than a sheet"
            )

    def sdf(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The signed distance, negative inside, world units, without gradient; beyond the grid a lower bound of it."""
        self.grid = self.grid.to(x.device)
        return self.grid(x.detach().float())

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
