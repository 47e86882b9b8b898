"""Textures from a field: every texel is asked for at its place on the surface.

Texels beside a chart are asked for at the chart's nearest edge, all others copy the nearest one, so neither bilinear interpolation nor small
mip levels reach anything that is not surface.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import say
from mesh import TEXTURES, Mesh
from mesh.tangents import encode, split, tangents
from mesh.texels import covered, look_up
from mesh.unwrap import unwrap

_POINTS_AT_ONCE = 1 << 17
_BESIDE = 2.0  # texels: how far from a chart the nearest edge is asked for

Ask = Callable[[Float[Tensor, "N 3"], Float[Tensor, "N 3"]], dict[str, Any]]


def bake(mesh: Mesh, ask: Ask, size: int = 1024, device: torch.device | str = "cpu", seconds: float = 60) -> Mesh:
    """The mesh with textures of `size` x `size` texels, and with vertex colours read from them.

    `ask(points [N 3], unit normals [N 3])`, tensors on `device`, answers with some of "albedo" [N 3], "roughness" and "metallic" [N 1] or [N], all in
    [0, 1], and "normal" [N 3], unit vectors in the world, which the texture holds in the frame of `mesh.tangents`. A mesh whose texture
    coordinates give each place of the surface its own texel keeps them; others get new ones within about `seconds` (`unwrap`).
    """
    if len(mesh.faces) == 0:
        raise ValueError("a mesh without faces cannot be baked")
    if not has_own_texels(mesh, size):
        if mesh.uvs is not None:
            say("the mesh's texture coordinates overlap or repeat: it gets new ones")
        uvs, uv_faces = unwrap(mesh.vertices, mesh.faces, seconds, size)
        mesh = replace(mesh, uvs=uvs, uv_faces=uv_faces, textures={})
    face, weights, nearest = places_of(mesh, size)
    vertices, normals = (torch.as_tensor(x, dtype=torch.float32) for x in (mesh.vertices, mesh.normals))
    corners, shares = torch.as_tensor(mesh.faces[face]), torch.as_tensor(weights, dtype=torch.float32)[..., None]
    answers: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        for part in torch.arange(len(face)).split(_POINTS_AT_ONCE):
            point, normal = ((x[corners[part]] * shares[part]).sum(1).to(device) for x in (vertices, normals))
            normal = torch.nn.functional.normalize(normal, dim=-1)
            for name, value in ask(point, normal).items():
                value = torch.nan_to_num(torch.as_tensor(value).float()).reshape(len(part), -1)
                answers.setdefault(name, []).append(value.cpu().numpy())
    found = {name: np.concatenate(parts) for name, parts in answers.items()}
    if "normal" in found:
        found["normal"] = _in_tangent_frame(mesh, found["normal"], face, weights)
    textures = {}
    for name in TEXTURES:
        if name in found:
            values = np.clip(found[name], 0, 1)[nearest].astype(np.float32)
            textures[name] = values.reshape(size, size, -1) if values.shape[1] > 1 else values.reshape(size, size)
    mesh = replace(mesh, textures=textures)
    return replace(mesh, colors=vertex_colors(mesh)) if "albedo" in textures else mesh


def has_own_texels(mesh: Mesh, size: int) -> bool:
    """Whether the texture coordinates lie in [0, 1] and at most 1 % of the texels they cover belong to two places of the surface."""
    if mesh.uvs is None or mesh.uvs.size == 0 or mesh.uvs.min() < 0 or mesh.uvs.max() > 1:
        return False
    texel, _, weights = covered(mesh.uvs.astype(np.float64)[mesh.uv_faces] * size, size, size)
    times = np.bincount(texel[weights.min(1) > 1e-3])
    return 0 < len(times) and bool(np.count_nonzero(times > 1) <= 0.01 * np.count_nonzero(times))


def places_of(
    mesh: Mesh, size: int
) -> tuple[Int[np.ndarray, "P"], Float[np.ndarray, "P 3"], Int[np.ndarray, "texels"]]:
    """Places on the surface, as faces and weights of their corners, and for each texel of the picture which of them it shows.

    A texel whose centre is in a chart shows that place, one just beside a chart the nearest place on the chart's edge, all others what the
    nearest texel in a chart shows.
    """
    from scipy.ndimage import distance_transform_edt

    places = mesh.uvs.astype(np.float64)[mesh.uv_faces] * size
    texel, face, weights = covered(places, size, size)
    # A face too small for any texel's centre gets the texel of its middle, if no other has it.
    lost = np.setdiff1d(np.arange(len(mesh.faces)), face)
    middle = np.clip(np.floor(places[lost].mean(1)), 0, size - 1).astype(np.int64)
    texel = np.concatenate([texel, middle[:, 1] * size + middle[:, 0]])
    face = np.concatenate([face, lost])
    weights = np.concatenate([weights, np.full((len(lost), 3), 1 / 3)])
    texel, first = np.unique(texel, return_index=True)
    face, weights = face[first], weights[first]
    shown = np.full(size * size, -1)
    shown[texel] = np.arange(len(texel))
    away, (row, column) = distance_transform_edt(shown.reshape(size, size) < 0, return_indices=True)
    shown = shown[(row * size + column).reshape(-1)]
    beside = np.flatnonzero((away > 0) & (away <= _BESIDE))
    of = face[shown[beside]]
    edge = closest(places[of], np.stack([beside % size + 0.5, beside // size + 0.5], 1))
    shown[beside] = len(texel) + np.arange(len(beside))
    return np.concatenate([face, of]), np.concatenate([weights, edge]), shown


def closest(triangles: Float[np.ndarray, "N 3 2"], points: Float[np.ndarray, "N 2"]) -> Float[np.ndarray, "N 3"]:
    """Barycentric weights of the place on each triangle's border that is nearest to a point outside it."""
    best, weights = np.full(len(points), np.inf), np.zeros((len(points), 3))
    for i, j in ((0, 1), (1, 2), (2, 0)):
        side = triangles[:, j] - triangles[:, i]
        along = ((points - triangles[:, i]) * side).sum(1) / np.maximum((side**2).sum(1), 1e-30)
        along = np.clip(along, 0, 1)
        gap = ((triangles[:, i] + along[:, None] * side - points) ** 2).sum(1)
        found = np.zeros_like(weights)
        found[:, i], found[:, j] = 1 - along, along
        weights = np.where((gap < best)[:, None], found, weights)
        best = np.minimum(gap, best)
    return weights


def _in_tangent_frame(mesh: Mesh, world: np.ndarray, face: np.ndarray, weights: np.ndarray) -> np.ndarray:
    vertex, _, corners = split(mesh)
    shares = weights[..., None]
    normal = (mesh.normals.astype(np.float64)[vertex][corners[face]] * shares).sum(1)
    return encode(world, normal, (tangents(mesh)[corners[face]] * shares).sum(1))


def vertex_colors(mesh: Mesh) -> Float[np.ndarray, "V 3"]:
    """The albedo texture at the vertices; the mean where a vertex has several places in it, grey where it has none."""
    total, count = np.zeros((len(mesh.vertices), 3)), np.zeros(len(mesh.vertices))
    vertex, uv = mesh.faces.reshape(-1), mesh.uv_faces.reshape(-1)
    np.add.at(total, vertex, look_up(mesh.textures["albedo"], mesh.uvs[uv].astype(np.float64)))
    np.add.at(count, vertex, 1)
    return np.where(count[:, None] > 0, total / np.maximum(count, 1)[:, None], 0.5)
