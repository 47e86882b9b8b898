"""What a surface looks like where the field alone does not say it: a head for physical materials, and fitting a field to given colours."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from mesh import Mesh
from mesh.material import METALLIC, ROUGHNESS, perturb_normal
from nerf.progress import Bar
from nerf.renderer import NeRFRenderer

FIT_STEPS, FIT_POINTS, FIT_RATE = 300, 4096, 0.01


class PhysicalHead(nn.Module):
    """From a field's features to a material, as Fantasia3D's (Chen et al. 2023); it begins half rough, hardly metallic and not bent."""

    def __init__(self, width: int):
        super().__init__()
        self.layer = nn.Linear(width, 5)
        nn.init.zeros_(self.layer.weight)
        with torch.no_grad():
            self.layer.bias.copy_(torch.tensor([0.0, -2.0, 0.0, 0.0, 0.0]))

    def forward(self, hidden: Float[Tensor, "M F"], normal: Float[Tensor, "M 3"]) -> dict[str, Float[Tensor, "M _"]]:
        """`roughness`, `metallic` [M, 1] and the bent unit `normal` [M, 3], in world space, of points with these features and unit normals."""
        raw = torch.sigmoid(self.layer(hidden).float())
        (low, high), (none, most) = ROUGHNESS, METALLIC
        return {
            "roughness": low + (high - low) * raw[:, :1],
            "metallic": none + (most - none) * raw[:, 1:2],
            "normal": perturb_normal(normal, raw[:, 2:]),
        }


def fit_colours(field: NeRFRenderer, mesh: Mesh, generator: torch.Generator) -> float:
    """Train `field` until its albedo on the surface is the mesh's own colour (texture or vertex colours); returns the mean absolute error.

    Adam on random points of the surface, spread evenly by area.
    """
    ask = colour_of(mesh)
    areas = torch.as_tensor(_areas(mesh), dtype=torch.float32)
    if ask is None or not len(areas):
        return 0.0
    device = field.aabb.device
    corners = torch.as_tensor(mesh.vertices[mesh.faces], dtype=torch.float32)
    parameters = [
        p for group in field.parameter_groups(FIT_RATE) if group["name"] != "background" for p in group["params"]
    ]
    optimizer = torch.optim.Adam(parameters, lr=FIT_RATE, betas=(0.9, 0.99))
    error = torch.zeros(())
    with torch.enable_grad(), Bar("colours", FIT_STEPS) as bar:
        for step in range(FIT_STEPS):
            face = torch.multinomial(areas, FIT_POINTS, replacement=True, generator=generator)
            weights = torch.rand(FIT_POINTS, 2, generator=generator)
            weights = torch.where(weights.sum(-1, keepdim=True) > 1, 1 - weights, weights)
            weights = torch.cat([weights, 1 - weights.sum(-1, keepdim=True)], -1)
            points = (corners[face] * weights[..., None]).sum(1).to(device)
            albedo = field.colour(points.clamp(-field.bound, field.bound))[0][:, :3]
            error = (albedo - ask(face, weights).to(device)).abs().mean()
            for group in optimizer.param_groups:
                group["lr"] = FIT_RATE * (1 - 0.9 * step / FIT_STEPS)
            optimizer.zero_grad()
            error.backward()
            optimizer.step()
            bar.update(step + 1)
    return float(error.detach())


def colour_of(mesh: Mesh) -> Any:
    """(triangles [N], weights of their corners [N, 3]) -> colours [N, 3] of the mesh's texture, else of its vertices; None if it has neither."""
    if mesh.uvs is not None and "albedo" in mesh.textures:
        from rasterizer import texture

        picture = torch.as_tensor(mesh.textures["albedo"], dtype=torch.float32)[None]
        uvs = torch.as_tensor(mesh.uvs[mesh.uv_faces], dtype=torch.float32)
        return lambda face, weights: texture(picture, (uvs[face] * weights[..., None]).sum(1)[None, None])[0, 0]
    if mesh.colors is not None:
        colours = torch.as_tensor(mesh.colors[mesh.faces], dtype=torch.float32)
        return lambda face, weights: (colours[face] * weights[..., None]).sum(1)
    return None


def _areas(mesh: Mesh) -> Any:
    import numpy as np

    a, b, c = (mesh.vertices[mesh.faces[:, corner]] for corner in range(3))
    return np.linalg.norm(np.cross(b - a, c - a), axis=1) / 2
