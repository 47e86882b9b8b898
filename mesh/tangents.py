"""The frame that normal maps are written in: per corner a unit tangent T along growing u and a sign w.

    B = w N x T,   n = x T + y B + z N

as glTF has it: +x right, +y up (against growing v) in the picture, +z out of the surface; w = 1 where the picture is not mirrored. T is the
derivative of the position along u, averaged over the faces around a corner by their angles there, made perpendicular to N. N and T are
interpolated across a face and normalised. The frame is written to files, so a viewer need not invent one.
"""

import numpy as np
from jaxtyping import Float, Int

from mesh import Mesh


def split(mesh: Mesh) -> tuple[Int[np.ndarray, "P"], Int[np.ndarray, "P"], Int[np.ndarray, "F 3"]]:
    """One corner for each pair of a vertex and a uv that occurs: the vertex, the uv, and the faces in corners, for files that know one index.

    Corners are sorted by vertex, so a mesh with one uv per vertex keeps its faces; vertices without a face stay.
    """
    uvs = max(len(mesh.uvs), 1)
    pairs = (mesh.faces * uvs + mesh.uv_faces).reshape(-1)
    unused = np.setdiff1d(np.arange(len(mesh.vertices)), mesh.faces)
    pairs, index = np.unique(np.concatenate([pairs, unused * uvs]), return_inverse=True)
    return pairs // uvs, pairs % uvs, index[: mesh.faces.size].reshape(-1, 3)


def tangents(mesh: Mesh) -> Float[np.ndarray, "P 4"]:
    """(T, w) for each corner of `split`."""
    vertex, uv, faces = split(mesh)
    points, places = mesh.vertices.astype(np.float64)[vertex][faces], mesh.uvs.astype(np.float64)[uv][faces]
    (p1, p2), (q1, q2) = (np.moveaxis(x[:, 1:] - x[:, :1], 1, 0) for x in (points, places))
    turn = q1[:, 0] * q2[:, 1] - q1[:, 1] * q2[:, 0]
    along_u = (p1 * q2[:, 1:] - p2 * q1[:, 1:]) * np.sign(turn)[:, None]
    along_v = (p2 * q1[:, :1] - p1 * q2[:, :1]) * np.sign(turn)[:, None]
    sums = np.zeros((2, len(vertex), 3))
    for i in range(3):
        here, ahead, behind = points[:, i], points[:, (i + 1) % 3], points[:, (i + 2) % 3]
        angle = np.arccos(np.clip((_unit(ahead - here) * _unit(behind - here)).sum(1), -1, 1))[:, None]
        np.add.at(sums[0], faces[:, i], angle * _unit(along_u))
        np.add.at(sums[1], faces[:, i], angle * _unit(along_v))
    normal = _unit(mesh.normals.astype(np.float64)[vertex])
    tangent = sums[0] - (sums[0] * normal).sum(1, keepdims=True) * normal
    lost = np.linalg.norm(tangent, axis=1) < 1e-9  # no area in the picture: any direction will do
    other = np.eye(3)[np.abs(normal).argmin(1)]
    tangent[lost] = np.cross(normal, other)[lost]
    tangent = _unit(tangent)
    sign = np.where((np.cross(normal, tangent) * sums[1]).sum(1) > 0, -1.0, 1.0)  # v runs down, B up
    return np.concatenate([tangent, sign[:, None]], 1)


def frame(normals: Float[np.ndarray, "N 3"], tangents: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, "N 3 3"]:
    """Matrices with the columns T, B, N from interpolated normals and tangents."""
    normal, tangent = _unit(normals), _unit(tangents[:, :3])
    sign = np.where(tangents[:, 3:] < 0, -1.0, 1.0)
    return np.stack([tangent, sign * np.cross(normal, tangent), normal], -1)


def decode(
    values: Float[np.ndarray, "N 3"], normals: Float[np.ndarray, "N 3"], tangents: Float[np.ndarray, "N 4"]
) -> Float[np.ndarray, "N 3"]:
    """World normals from a normal texture's values in [0, 1]."""
    return _unit(np.einsum("nij,nj->ni", frame(normals, tangents), 2.0 * values - 1))


def encode(
    world: Float[np.ndarray, "N 3"], normals: Float[np.ndarray, "N 3"], tangents: Float[np.ndarray, "N 4"]
) -> Float[np.ndarray, "N 3"]:
    """The inverse of `decode`."""
    matrix = frame(normals, tangents)
    flat = np.abs(np.linalg.det(matrix)) < 1e-6
    matrix[flat] = np.eye(3)
    return (_unit(np.linalg.solve(matrix, world.astype(np.float64)[..., None])[..., 0]) + 1) / 2


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-30)
