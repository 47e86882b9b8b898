"""The last steps before a mesh is written: which triangles, what colour, textures."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mesh import Mesh
from mesh.bake import Ask
from mesh.extract import clean, colors_seen, decimate, vertex_normals


@torch.no_grad()
def of_surface(scene: Any, most: int) -> Mesh | None:
    """The triangles of a `MeshScene`, without colours; None if there are none.

    Locked ones as they are; others without crumbs and hollows, and `most` faces at most (0 or less: all of them).
    """
    if scene.locked:
        return scene.geometry.mesh() if len(scene.geometry.faces) else None
    surface = scene.surface()
    vertices, faces = clean(surface.vertices.double().cpu().numpy(), surface.faces.cpu().numpy())
    if len(faces) == 0:
        return None
    if 0 < most < len(faces):
        vertices, faces = decimate(vertices, faces, most)
    normals = vertex_normals(vertices, faces)
    return Mesh(vertices.astype(np.float32), faces, None, normals.astype(np.float32))


def what_rays_see(density: Callable[[Tensor], dict[str, Tensor]], mesh: Mesh, resolution: int, iso: float) -> Ask:
    """`colors_seen` of a field whose surface, found on a grid of that resolution at the density `iso`, is `mesh`."""
    spacing = float(np.ptp(mesh.vertices, axis=0).max()) / resolution

    def ask(points: Tensor, normals: Tensor) -> dict[str, Tensor]:
        return {"albedo": colors_seen(density, points, normals, spacing, iso)}

    return ask


def with_colors(mesh: Mesh, ask: Ask, device: torch.device | str = "cpu") -> Mesh:
    """The mesh with the colours of its vertices and no textures; `ask` gets tensors on `device`."""
    at = (torch.as_tensor(value, dtype=torch.float32, device=device) for value in (mesh.vertices, mesh.normals))
    with torch.no_grad():
        albedo = ask(*at)["albedo"]
    return replace(mesh, colors=albedo.float().clamp(0, 1).cpu().numpy(), uvs=None, uv_faces=None, textures={})
