"""Charts: none overlaps another, all lie in [0, 1], there is room between them, and nothing that xatlas does ends the run."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest
import trimesh

from mesh import unwrap as module
from mesh.atlas import box_atlas
from mesh.texels import covered
from mesh.unwrap import pieces, unwrap

SIZE, PADDING = 512, 6


def _ball():
    ball = trimesh.creation.icosphere(3)
    return np.asarray(ball.vertices) * 0.3 + 5, np.asarray(ball.faces)


def _blocks():
    boxes = [trimesh.creation.box((2, 1, 1)), trimesh.creation.box((0.5, 3, 0.5))]
    solid = trimesh.util.concatenate(boxes).subdivide().subdivide()
    return np.asarray(solid.vertices), np.asarray(solid.faces)


def _spiral():
    """A screw: seen from above its steps hide one another, though they are one sheet."""
    angle, radius = np.meshgrid(np.linspace(0, 6 * np.pi, 121), [0.3, 0.6, 1.0], indexing="ij")
    points = np.stack([radius * np.cos(angle), 0.1 * angle, radius * np.sin(angle)], -1).reshape(-1, 3)
    i = (np.arange(120)[:, None] * 3 + np.arange(2)).reshape(-1)
    return points, np.concatenate([np.stack([i, i + 1, i + 4], 1), np.stack([i, i + 4, i + 3], 1)])[:, ::-1]


def _soup():
    """Triangles that have nothing to do with each other."""
    rng = np.random.default_rng(0)
    return rng.normal(size=(600, 3)), np.arange(600).reshape(-1, 3)


SHAPES = {"ball": _ball, "blocks": _blocks, "spiral": _spiral, "soup": _soup}
OWN = lambda vertices, faces: box_atlas(vertices, faces, SIZE, PADDING)  # noqa: E731
XATLAS = lambda vertices, faces: unwrap(vertices, faces, size=SIZE, padding=PADDING)  # noqa: E731


def _charts(uv_faces):
    """The chart of each face: faces that share a uv belong together."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    ends = np.concatenate([uv_faces[:, :2], uv_faces[:, 1:]])
    graph = coo_matrix((np.ones(len(ends)), ends.T), shape=(uv_faces.max() + 1,) * 2)
    return connected_components(graph, directed=False)[1][uv_faces[:, 0]]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", [OWN, XATLAS], ids=["own", "xatlas"])
def test_an_atlas_can_be_painted_on(shape, make, capsys):
    vertices, faces = SHAPES[shape]()
    uvs, uv_faces = make(vertices, faces)
    assert capsys.readouterr().err == ""
    assert uv_faces.shape == faces.shape and uv_faces.max() == len(uvs) - 1 and uvs.min() >= 0 and uvs.max() <= 1
    corners = uvs[uv_faces].astype(float) * SIZE
    assert min(corners.min(), SIZE - corners.max()) > 0.9 * PADDING / 2

    texel, face, weights = covered(corners, SIZE, SIZE)
    inside = weights.min(1) > 1e-3
    times = np.bincount(texel[inside], minlength=SIZE * SIZE)
    assert np.count_nonzero(times > 1) <= 2  # a texel's centre on a common edge
    assert np.count_nonzero(times) > 0.2 * SIZE * SIZE

    chart = _charts(uv_faces)
    owner = np.full(SIZE * SIZE, -1)
    owner[texel] = chart[face]
    gap = _gap(owner.reshape(SIZE, SIZE))
    assert gap >= PADDING - 3  # texels; xatlas rounds

    # Every face gets its share of the picture: no part of the surface is left with next to nothing.
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    (ux, uy), (vx, vy) = (corners[:, 1] - corners[:, 0]).T, (corners[:, 2] - corners[:, 0]).T
    density = np.sqrt(np.abs(ux * vy - uy * vx) / area)
    assert np.percentile(density, 1) > 0.45 * np.median(density) and density.max() < 2.5 * np.median(density)


def _gap(owner):
    """The smallest distance between two charts, along rows and columns."""
    smallest = 1000
    for step in range(1, 12):
        for a, b in ((owner[step:], owner[:-step]), (owner[:, step:], owner[:, :-step])):
            if ((a != b) & (a >= 0) & (b >= 0)).any():
                smallest = min(smallest, step)
    return smallest


def test_faces_keep_their_order_and_charts_their_shape():
    """Flat faces of one side of a box look alike in the picture: same angles, not mirrored."""
    vertices, faces = _blocks()
    uvs, uv_faces = OWN(vertices, faces)
    p, q = vertices[faces], uvs[uv_faces]
    for i, j in ((1, 2), (2, 0), (0, 1)):
        ratio = np.linalg.norm(q[:, i] - q[:, j], axis=1) / np.linalg.norm(p[:, i] - p[:, j], axis=1)
        assert np.ptp(ratio) < 1e-3 * ratio.mean()
    (ux, uy), (vx, vy) = (q[:, 1] - q[:, 0]).T, (q[:, 2] - q[:, 0]).T
    assert (ux * vy - uy * vx < 0).all()  # v runs down: counter-clockwise outside is clockwise in numbers


def test_hidden_steps_of_a_screw_get_charts_of_their_own():
    vertices, faces = _spiral()
    assert len(np.unique(_charts(OWN(vertices, faces)[1]))) >= 3


def test_vertices_that_lie_together_make_no_seam():
    vertices, faces = _blocks()
    apart = vertices[faces].reshape(-1, 3), np.arange(faces.size).reshape(-1, 3)
    assert len(np.unique(_charts(XATLAS(*apart)[1]))) < 40  # of 384 faces


def test_more_charts_than_there_is_room_for():
    """1000 loose triangles in 16 x 16 texels: charts lose their padding, not their place."""
    rng = np.random.default_rng(0)
    uvs, uv_faces = box_atlas(rng.normal(size=(3000, 3)), np.arange(3000).reshape(-1, 3), 16, 6)
    assert uvs.min() >= 0 and uvs.max() <= 1 and len(np.unique(_charts(uv_faces))) == 1000


def test_odd_meshes_get_coordinates():
    flat = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 1, 0]])
    for faces in ([[0, 1, 2]], [[0, 1, 3], [0, 1, 2]], [[0, 0, 0], [0, 1, 3]]):
        uvs, uv_faces = unwrap(flat, np.array(faces))
        assert np.isfinite(uvs).all() and uv_faces.shape == (len(faces), 3) and uvs.min() >= 0 and uvs.max() <= 1
    uvs, uv_faces = unwrap(flat, np.zeros((0, 3), int))
    assert uvs.shape == (0, 2) and uv_faces.shape == (0, 3)
    for scale in (1e-9, 1e9):
        vertices, faces = _ball()
        uvs, uv_faces = unwrap(vertices * scale, faces, size=SIZE)
        assert 3 <= len(np.unique(_charts(uv_faces))) < 40


def test_pieces_are_neighbours_of_the_right_number():
    vertices, faces = _ball()
    number = pieces(vertices, faces, 100)
    assert np.bincount(number).max() <= 100 and np.bincount(number).min() >= 50 and len(number) == len(faces)
    spread = [np.ptp(vertices[faces[number == i]].reshape(-1, 3), axis=0).max() for i in range(number.max() + 1)]
    assert np.mean(spread) < 0.75 * np.ptp(vertices, axis=0).max()


@pytest.mark.parametrize(
    ("script", "said"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "xatlas crashed (SIGSEGV)"),
        ("import time; time.sleep(60)", "xatlas did not finish within 0.5 seconds"),
        ("raise SystemExit(3)", "xatlas is not installed"),
        ("raise ValueError('no charts today')", "no charts today"),
        (
            "import sys, numpy; numpy.savez(sys.argv[2], uvs=numpy.ones((3, 2)), uv_faces=numpy.ones((1, 3)))",
            "no usable answer",
        ),
        ("pass", "xatlas failed"),
    ],
)
def test_whatever_happens_to_xatlas_there_is_an_atlas_and_one_line(script, said, tmp_path, monkeypatch, capsys):
    child = tmp_path / "child.py"
    child.write_text(script)
    monkeypatch.setattr(module, "_CHILD", child)
    start = time.monotonic()
    uvs, uv_faces = unwrap(*_ball(), size=256, seconds=0.5 if "sleep" in script else 60)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and said in lines[0] and "cut along the axes" in lines[0]
    assert len(uvs) and uv_faces.shape == (1280, 3) and time.monotonic() - start < 30


def test_the_child_says_when_xatlas_is_missing(tmp_path):
    (tmp_path / "xatlas.py").write_text("raise ImportError('not here')")
    command = [sys.executable, str(module._CHILD), "a.npz", "b.npz"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    assert subprocess.run(command, env=environment, capture_output=True).returncode == 3


def test_a_large_smooth_ball_does_not_crash_xatlas(capsys):
    """An icosphere of 82 000 faces in one piece does (xatlas 0.0.11, its issue 146)."""
    ball = trimesh.creation.icosphere(6)
    _, uv_faces = unwrap(np.asarray(ball.vertices), np.asarray(ball.faces))
    assert capsys.readouterr().err == "" and len(np.unique(_charts(uv_faces))) < 300
