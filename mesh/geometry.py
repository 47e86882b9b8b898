"""Where a surface comes from, as tensors that can be trained: tetrahedra that enclose it, or triangles that stay as they are."""

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mesh import Mesh
from mesh.marching import marching_tets
from mesh.tetrahedra import grid

SHIFT = 0.115  # of a grid cell along each axis: together below a fifth of one, so that no tetrahedron turns over


@dataclass(frozen=True)
class Surface:
    """Triangles as tensors, counter-clockwise seen from outside, and a unit normal at every vertex."""

    vertices: Float[Tensor, "V 3"]
    faces: Int[Tensor, "F 3"]
    normals: Float[Tensor, "V 3"]


def vertex_normals(vertices: Float[Tensor, "V 3"], faces: Int[Tensor, "F 3"]) -> Float[Tensor, "V 3"]:
    """Unit normals, each the mean of the faces around the vertex, weighted by their areas; +z where there is none."""
    a, b, c = (vertices[faces[:, corner]] for corner in range(3))
    across = torch.linalg.cross(b - a, c - a)
    total = torch.zeros_like(vertices)
    for corner in range(3):
        total = total.index_add(0, faces[:, corner], across)
    length = total.norm(dim=-1, keepdim=True)
    none = length <= 1e-20
    return torch.where(none, total.new_tensor([0.0, 0.0, 1.0]), total / length.masked_fill(none, 1.0))


class Tetrahedral(nn.Module):
    """The surface where a distance, known at the vertices of a grid of tetrahedra, is zero (DMTet: Shen et al. 2021).

    Parameters: `distance` [V], signed, negative inside, and `shift` [V, 3], which moves the vertices of the grid; both in units of the grid's
    spacing, so that a learning rate means the same at every resolution and size. The grid fills the box from -`reach` to `reach`.
    """

    def __init__(self, resolution: int, reach: Float[Tensor, "3"]):
        super().__init__()
        self.grid = grid(resolution)
        count = len(self.grid.vertices)
        self.register_buffer("reach", reach.float().clone())
        self.distance = nn.Parameter(torch.ones(count))
        self.shift = nn.Parameter(torch.zeros(count, 3))
        self._kept: tuple[Any, Surface] | None = None

    @property
    def spacing(self) -> Float[Tensor, "3"]:
        """The side of a grid cell along each axis, in world units."""
        return self.grid.spacing * self.reach

    @property
    def nodes(self) -> Float[Tensor, "V 3"]:
        """The vertices of the grid where they started, in world units."""
        return self.grid.vertices.to(self.reach) * self.reach

    @torch.no_grad()
    def fill(self, sdf: Float[Tensor, "V"]) -> None:
        """Start from signed distances in world units, at `nodes`. They are kept within 4 spacings: far away only the sign counts."""
        self.distance.copy_((sdf.to(self.distance) / self.spacing.mean()).clamp(-4, 4))
        self.shift.zero_()

    def forward(self) -> Surface:
        """The surface as it is now, with gradients; without them it is computed once."""
        if not torch.is_grad_enabled():
            made_of = (self.distance._version, self.shift._version, self.distance.device)
            if self._kept is None or self._kept[0] != made_of:
                self._kept = (made_of, self._march())
            return self._kept[1]
        return self._march()

    def _march(self) -> Surface:
        self.grid = self.grid.to(self.distance.device)
        moved = self.nodes + torch.tanh(self.shift) * (SHIFT * self.spacing)
        # outside at the walls of the grid, so that the surface is closed
        distance = torch.where(self.grid.boundary, self.distance.clamp(min=0.1), self.distance)
        vertices, faces = marching_tets(moved, distance, self.grid)
        return Surface(vertices, faces, vertex_normals(vertices, faces))

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """Both parameters, at `lr` grid spacings a step."""
        return [{"name": "geometry", "params": [self.distance, self.shift], "lr": lr}]

    def adapt(self, values: dict[str, Tensor]) -> None:
        """Nothing to prepare for `values` of a checkpoint: the shapes follow from the resolution."""


class Fixed(nn.Module):
    """Triangles that nothing changes; buffers `vertices`, `faces`, `normals`, and `uvs`, `uv_faces` of a mesh that came with texture coordinates."""

    NAMES = ("vertices", "faces", "normals", "uvs", "uv_faces")

    def __init__(self, mesh: Any | None = None):
        """`mesh`: a `mesh.Mesh` or a `Surface`; None is for a checkpoint, which brings its own."""
        super().__init__()
        for name in self.NAMES:
            value = getattr(mesh, name, None)
            kind = torch.int64 if name.endswith("faces") else torch.float32
            width = 2 if name == "uvs" else 3
            empty = torch.zeros(0, width, dtype=kind)
            self.register_buffer(name, empty if value is None else torch.as_tensor(value).to(kind, copy=True))

    def forward(self) -> Surface:
        return Surface(self.vertices, self.faces, self.normals)

    def mesh(self) -> Mesh:
        """The same as arrays, without colours."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in self.NAMES}
        if not len(arrays["uv_faces"]):
            arrays |= {"uvs": None, "uv_faces": None}
        return Mesh(colors=None, **arrays)

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """None: nothing is trained."""
        return []

    def adapt(self, values: dict[str, Tensor]) -> None:
        """Take the shapes of `values`, a checkpoint's entries for this module, which are about to be loaded."""
        for name in self.NAMES:
            if name in values:
                setattr(self, name, torch.empty_like(values[name], device=getattr(self, name).device))
