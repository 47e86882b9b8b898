"""What repair does to spoiled meshes, and that it leaves good ones alone."""

import numpy as np
import pytest
import trimesh

from mesh import Mesh
from mesh.repair import normalise, repair


def _mesh(vertices, faces, **fields):
    vertices = np.asarray(vertices, float)
    return Mesh(vertices, np.asarray(faces), None, np.tile([0.0, 0, 1], (len(vertices), 1)), **fields)


def _ball():
    ball = trimesh.creation.icosphere(2)
    return Mesh(
        np.asarray(ball.vertices),
        np.asarray(ball.faces),
        np.asarray(ball.vertices) / 2 + 0.5,
        np.asarray(ball.vertices),
    )


def test_a_good_mesh_is_left_alone():
    mesh, done = repair(_ball())
    assert done == [] and (mesh.faces == _ball().faces).all() and np.allclose(mesh.vertices, _ball().vertices)
    assert np.allclose(mesh.colors, _ball().colors) and np.allclose(mesh.normals, _ball().normals)


def test_repair_drops_what_is_nothing():
    ball = _ball()
    extra = [[0, 0, 1], *ball.faces[:5, [1, 2, 0]], *ball.faces[:3, ::-1]]
    spoiled = Mesh(np.r_[ball.vertices, [[9, 9, 9]]], np.r_[ball.faces, extra], None, np.r_[ball.normals, [[0, 0, 1]]])
    mesh, done = repair(spoiled)
    assert (mesh.faces == ball.faces).all() and len(mesh.vertices) == 162
    assert done == ["1 faces without area were dropped", "8 second copies of a face were dropped"]


def test_repair_turns_faces_with_their_uvs():
    ball = _ball()
    faces, turned = ball.faces.copy(), np.zeros(320, bool)
    turned[::7] = True
    faces[turned] = faces[turned][:, ::-1]
    mesh, done = repair(Mesh(ball.vertices, faces, None, ball.normals, ball.vertices[:, :2], faces))
    assert done == ["46 faces wound against their neighbours were turned"]
    assert np.array_equal(np.sort(mesh.faces), np.sort(ball.faces)) and (mesh.uv_faces == mesh.faces).all()
    assert trimesh.Trimesh(mesh.vertices, mesh.faces, process=False).volume > 3.9
    mesh, done = repair(Mesh(ball.vertices, ball.faces[:, ::-1], None, -ball.normals))
    assert done == ["it was inside out and is turned"] and (mesh.normals * mesh.vertices).sum(1).min() > 0.9


def test_repair_turns_each_piece_by_itself():
    """Of the smaller of two balls most faces are wound inward, but not all: it is turned outward, not after the many."""
    ball = _ball()
    faces = ball.faces.copy()
    faces[:250] = faces[:250, ::-1]
    mesh, _ = repair(_mesh(np.r_[ball.vertices * 3, ball.vertices + 9], np.r_[ball.faces, faces + 162]))
    small = trimesh.Trimesh(mesh.vertices, mesh.faces[320:], process=False)
    assert small.volume > 3.9 and small.is_winding_consistent


def test_repair_turns_the_smaller_part_of_an_open_mesh():
    strip = np.array([[i, j, 0] for i in range(6) for j in range(2)], float)
    faces = np.concatenate([[[2 * i, 2 * i + 2, 2 * i + 1], [2 * i + 1, 2 * i + 2, 2 * i + 3]] for i in range(5)])
    spoiled = faces.copy()
    spoiled[3] = spoiled[3][::-1]
    mesh, done = repair(_mesh(strip, spoiled))
    assert (mesh.faces == faces).all() and len(done) == 1 and (mesh.normals == [0, 0, 1]).all()


def test_repair_cuts_edges_of_three_faces():
    """Three sheets that meet in one edge become three sheets; nothing moves."""
    fan = [[0, 0, 0], [0, 1, 0], [1, 0, 0], [-1, 0, 0.5], [-1, 0, -0.5]]
    mesh, done = repair(_mesh(fan, [[0, 1, 2], [1, 0, 3], [1, 0, 4]]))
    assert done == ["1 edges of more than two faces were cut open"] and len(mesh.vertices) == 9
    assert np.allclose(mesh.vertices[mesh.faces], np.array(fan)[[[0, 1, 2], [1, 0, 3], [1, 0, 4]]])


def test_repair_of_a_strip_with_one_side_ends():
    """A Moebius strip cannot be wound one way; it stays a strip."""
    angle = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    points = [
        [(1 + s * np.cos(a / 2)) * np.cos(a), (1 + s * np.cos(a / 2)) * np.sin(a), s * np.sin(a / 2)]
        for a in angle
        for s in (-0.3, 0.3)
    ]
    faces = []
    for i in range(24):
        a, b, c, d = 2 * i, 2 * i + 1, (2 * i + 2) % 48, (2 * i + 3) % 48
        if i == 23:
            c, d = d, c
        faces += [[a, c, b], [b, c, d]]
    mesh, _ = repair(_mesh(points, faces))
    assert len(mesh.faces) == 48 and len(mesh.vertices) == 50  # cut across, where it cannot be wound one way


def test_normalise():
    mesh = normalise(_mesh([[1, 1, 1], [5, 1, 1], [1, 3, 1]], [[0, 1, 2]]), 0.7)
    assert np.allclose((mesh.vertices.min(0) + mesh.vertices.max(0)) / 2, 0, atol=1e-7)
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(0.7) and mesh.vertices.dtype == np.float32
    assert np.allclose(mesh.vertices[1] - mesh.vertices[0], [4 * 0.7 / np.sqrt(5), 0, 0])
