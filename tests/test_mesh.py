"""The surface of a known field: where it is, which way it faces, its colours, and what the files say."""

import json
import struct

import numpy as np
import pytest
import torch
import trimesh
from standins import lopsided

from mesh import Mesh
from mesh.export import export, linear_to_srgb, read_glb, srgb_to_linear
from mesh.extract import clean, decimate, extract, smooth, vertex_normals
from mesh.silhouette import choose_threshold, overlap, rasterise
from nerf.provider import orbit

ALPHA_HALF = float(np.log(2))


def _field(x):
    return dict(zip(("sigma", "albedo"), lopsided(x), strict=True))


def _render(field, cameras, count=96):
    """Alpha and depth by brute force: midpoints of equal intervals between radius - 1.1 and radius + 1.1."""
    origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays())
    step = 2.2 / count
    t = 2.1 + (torch.arange(count) + 0.5) * step
    parts = []
    for o, d in zip(origins.split(2048), directions.split(2048), strict=True):
        sigma = field((o[:, None] + t[:, None] * d[:, None]).reshape(-1, 3))["sigma"].reshape(-1, count)
        optical = sigma * step
        weight = (1 - torch.exp(-optical)) * torch.exp(optical - optical.cumsum(1))
        parts.append(torch.stack([weight.sum(1), (weight * t).sum(1)]))
    shape = (len(cameras), cameras.height, cameras.width, 1)
    alpha, depth = torch.cat(parts, 1)
    return alpha.reshape(shape), depth.reshape(shape)


def _views(shift, size=48):
    turn = torch.arange(4) * 90.0 + shift
    return orbit(torch.tensor([60.0, 90.0, 75.0, 100.0]), turn, 3.2, 30.0, size, size)


@pytest.fixture(scope="module")
def fitted():
    cameras = _views(10.0)
    return cameras, *_render(_field, cameras)


@pytest.fixture(scope="module")
def lopsided_mesh(fitted):
    return extract(_field, *fitted, bound=1.0, resolution=48, decimate_target=4000)


def test_outline_agrees_with_the_rendered_one_and_is_not_mirrored(lopsided_mesh):
    mesh, threshold = lopsided_mesh
    fresh = _views(55.0)
    outline = (_render(_field, fresh)[0][..., 0] > 0.5).numpy()
    covered = rasterise(mesh.vertices, mesh.faces, fresh)
    assert overlap(outline, covered) >= 0.95
    assert overlap(outline, rasterise(mesh.vertices * [-1, 1, 1], mesh.faces, fresh)) < 0.9  # the test can see a mirror
    assert 0.5 < threshold < 60


def test_colours_lie_on_the_right_sides(lopsided_mesh):
    mesh, _ = lopsided_mesh
    for axis, color in ((0, (0.9, 0.1, 0.1)), (2, (0.1, 0.8, 0.1)), (1, (0.1, 0.1, 0.9))):
        furthest = mesh.vertices[:, axis].argmax()
        assert np.allclose(mesh.colors[furthest], color, atol=0.02)
    assert np.allclose(mesh.colors[mesh.vertices[:, 0].argmin()], 0.5, atol=0.02)  # no arm on the other side


def test_it_is_closed_light_and_faces_outward(lopsided_mesh):
    mesh, _ = lopsided_mesh
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    assert solid.is_watertight and solid.is_winding_consistent and solid.volume > 0
    assert len(mesh.faces) <= 4000 and len(np.unique(mesh.faces)) == len(mesh.vertices)
    assert np.allclose(np.linalg.norm(mesh.normals, axis=1), 1, atol=1e-5)
    front = mesh.vertices[:, 2].argmax()
    assert mesh.normals[front, 2] > 0.9


def test_threshold_follows_the_scale_of_the_scene():
    """A ball of radius r with density s: alpha is 1/2 where the chord is ln 2 / s, so the outline is nearly the whole ball, at any scale."""
    found = []
    for scale in (1.0, 0.25):

        def ball(x, scale=scale):
            inside = 0.8 * scale - x.norm(dim=-1)
            return {"sigma": 40 / scale * torch.sigmoid(inside / (0.01 * scale)), "albedo": torch.ones_like(x)}

        cameras = orbit(90.0, torch.arange(2) * 70.0, 3.2 * scale, 30.0, 32, 32)
        alpha, _ = _render(
            lambda x, s=scale, f=ball: {"sigma": f(x * s)["sigma"] * s}, orbit(90.0, 0.0, 3.2, 30.0, 32, 32)
        )
        alpha, depth = alpha.repeat(2, 1, 1, 1), torch.full((2, 32, 32, 1), 2.4 * scale) * alpha
        mesh, threshold = extract(ball, cameras, alpha, depth, bound=scale, resolution=32, decimate_target=0)
        radius = np.linalg.norm(mesh.vertices, axis=1).mean()
        assert abs(radius / scale - 0.8) < 0.06
        found.append(threshold * scale)
    assert found[0] == pytest.approx(found[1], rel=0.3) and 0.2 < found[0] < 40


def test_a_given_threshold_is_used(fitted):
    mesh, threshold = extract(_field, *fitted, bound=1.0, resolution=40, decimate_target=0, threshold=30.0)
    assert threshold == 30.0
    assert abs(mesh.vertices[:, 0].max() - 0.7) < 0.01  # sigma is 30 exactly on the arm's sphere


def test_nothing_there_is_one_line_and_no_mesh(fitted, capsys):
    cameras, alpha, depth = fitted
    nothing = lambda x: {"sigma": torch.zeros(len(x)), "albedo": torch.ones_like(x)}  # noqa: E731
    assert extract(nothing, cameras, 0 * alpha, depth, bound=1.0, resolution=16) is None
    assert extract(_field, cameras, alpha, depth, bound=1.0, resolution=16, threshold=1e4) is None
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "empty" in lines[0] and "--mesh_threshold" in lines[1]


def test_a_scene_that_fills_its_box_is_closed_at_the_wall(fitted):
    cameras, alpha, depth = fitted
    full = lambda x: {"sigma": torch.full((len(x),), 50.0), "albedo": torch.ones_like(x)}  # noqa: E731
    mesh, _ = extract(
        full, cameras, torch.ones_like(alpha), depth, bound=1.0, resolution=16, threshold=10.0, decimate_target=0
    )
    solid = trimesh.Trimesh(mesh.vertices, mesh.faces)
    assert np.allclose(np.abs(mesh.vertices).max(0), 1.0, atol=0.05) and 7 < solid.volume < 8.1 and solid.is_watertight


def test_choose_threshold_by_hand():
    """Three covered rays that reach 8 and one uncovered that reaches 1/4: every cut between is perfect; the depth decides."""
    densities = torch.tensor([[0.0, 2.0, 8.0, 0.0], [0.0, 3.0, 8.0, 1.0], [0.0, 2.5, 8.0, 0.0], [0.25, 0.0, 0.0, 0.0]])
    distances = torch.arange(4.0).expand(4, 4)
    covered = torch.tensor([True, True, True, False])
    value, best = choose_threshold(densities, distances, covered, torch.full((4,), 2.0))
    assert best == 1.0 and 2.5 <= value < 8  # seen at distance 2: behind the 2 and the 2.5
    value, _ = choose_threshold(densities, distances, covered, torch.full((4,), 1.0))
    assert 0.25 <= value < 2.5
    covered[0] = False  # now no cut is perfect: with all three 2 of 3
    assert choose_threshold(densities, distances, covered, torch.full((4,), 2.0))[1] == pytest.approx(2 / 3)


def test_rasterise_counts_pixel_centres():
    """A square of side 1 in the plane z = 0, seen from distance 4 with 16 pixels per unit: 16 x 16 pixels."""
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0.5, 0.5, 0], [-0.5, 0.5, 0]])
    fovy = 2 * np.degrees(np.arctan(2 / 4))  # 4 units across 64 pixels
    cameras = orbit(90.0, 0.0, 4.0, float(fovy), 64, 48)
    covered = rasterise(corners, np.array([[0, 1, 2], [0, 2, 3]]), cameras)
    rows, columns = np.nonzero(covered[0])
    assert covered.sum() == 256 and (rows.min(), rows.max(), columns.min(), columns.max()) == (24, 39, 16, 31)
    right = corners + [0.5, 0, 0]  # +x is to the right of a camera in front
    assert np.nonzero(rasterise(right, np.array([[2, 1, 0], [0, 2, 3]]), cameras)[0])[1].min() == 24
    behind = rasterise(corners + [0, 0, 5], np.array([[0, 1, 2]]), cameras)
    assert not behind.any()


def test_rasterise_big_and_tiny_triangles_alike():
    rng = np.random.default_rng(0)
    cameras = orbit(90.0, 0.0, 3.0, 40.0, 20, 24)
    vertices = rng.normal(size=(30, 3)) * 0.6
    faces = rng.integers(0, 30, (40, 3))
    matrix = cameras.mvp()[0].numpy()
    clip = np.c_[vertices, np.ones(30)] @ matrix.T
    points = np.stack([(1 + clip[:, 0] / clip[:, 3]) * 12, (1 - clip[:, 1] / clip[:, 3]) * 10], -1)
    expected = np.zeros((20, 24), bool)
    for y in range(20):
        for x in range(24):
            for face in faces:
                a, b, c = points[face] - [x + 0.5, y + 0.5]
                sides = [a[0] * b[1] - a[1] * b[0], b[0] * c[1] - b[1] * c[0], c[0] * a[1] - c[1] * a[0]]
                distinct = len(set(face)) == 3
                expected[y, x] |= distinct and (min(sides) >= 0 or max(sides) <= 0)
    assert (rasterise(vertices, faces, cameras)[0] == expected).mean() > 0.995


def _box(size, center=(0, 0, 0), inward=False):
    box = trimesh.creation.box(extents=[size] * 3)
    faces = box.faces[:, ::-1] if inward else box.faces
    return np.asarray(box.vertices) + center, np.asarray(faces)


def test_clean_drops_dust_hollows_and_unused_vertices():
    parts = [_box(1.0), _box(0.5, inward=True), _box(0.05, (2, 0, 0)), _box(0.4, (3, 0, 0))]
    vertices = np.concatenate([v for v, _ in parts] + [np.ones((5, 3))])
    faces = np.concatenate([f + 8 * i for i, (_, f) in enumerate(parts)])
    for order in (faces, faces[:, ::-1]):  # turned inside out it is turned back
        cleaned, kept = clean(vertices, np.concatenate([order, [[0, 0, 1]]]))
        assert len(kept) == 24 and len(cleaned) == 16
        assert trimesh.Trimesh(cleaned, kept, process=False).volume == pytest.approx(1 + 0.4**3)


def test_decimate_and_normals_of_a_ball():
    ball = trimesh.creation.icosphere(4)
    vertices, faces = decimate(np.asarray(ball.vertices), np.asarray(ball.faces), 800)
    assert 700 <= len(faces) <= 800
    assert trimesh.Trimesh(vertices, faces).volume == pytest.approx(4.19, rel=0.03)
    normals = vertex_normals(vertices, faces)
    assert (normals * vertices).sum(1).min() > 0.97


def test_smoothing_takes_the_ripple_and_leaves_the_size():
    ball = trimesh.creation.icosphere(4)
    faces = np.asarray(ball.faces)
    ripple = np.random.default_rng(0).normal(size=(len(ball.vertices), 1)) * 0.01
    radii = np.linalg.norm(smooth(ball.vertices * (1 + ripple), faces), axis=1)
    assert radii.std() < 0.5 * 0.01 and radii.mean() == pytest.approx(1, abs=0.002)


def test_srgb_coding():
    values = np.array([0.0, 0.02, 0.5, 1.0])
    assert np.allclose(srgb_to_linear(values), [0, 0.02 / 12.92, 0.2140, 1], atol=1e-4)
    assert np.allclose(linear_to_srgb(srgb_to_linear(values)), values)


def test_files_load_with_their_colours(tmp_path):
    vertices, faces = _box(1.0, (0.2, 0, 0))
    colors = np.linspace(0, 1, 24).reshape(8, 3)
    mesh = Mesh(vertices.astype(np.float32), faces.astype(np.int64), colors, vertex_normals(vertices, faces))
    obj, glb = export(mesh, tmp_path / "mesh", "a box\nof lines")
    loaded = trimesh.load(obj, process=False)
    assert np.allclose(loaded.vertices, vertices) and (loaded.faces == faces).all() and loaded.volume > 0
    assert np.allclose(loaded.visual.vertex_colors[:, :3] / 255, colors, atol=0.005)  # sRGB, as rendered
    assert np.allclose(loaded.vertex_normals, mesh.normals, atol=1e-3)
    (loaded,) = trimesh.load(glb, process=False).geometry.values()
    assert np.allclose(loaded.vertices, vertices) and (loaded.faces == faces).all()
    linear = np.asarray(loaded.visual.vertex_attributes["color"], float)[:, :3] / 65535
    assert np.allclose(linear, srgb_to_linear(colors), atol=1e-4)  # linear, as glTF says
    assert loaded.visual.material.metallicFactor == 0 and loaded.visual.material.roughnessFactor == 1
    again, title = read_glb(glb)
    assert title == "a box\nof lines" and np.allclose(again.colors, colors, atol=1e-3) and (again.faces == faces).all()


def test_glb_layout(tmp_path):
    vertices, faces = _box(1.0)
    mesh = Mesh(vertices.astype(np.float32), faces.astype(np.int64), np.ones((8, 3)), vertex_normals(vertices, faces))
    data = export(mesh, tmp_path, "box")[1].read_bytes()
    magic, version, length, size, kind = struct.unpack_from("<4sIII4s", data)
    assert (magic, version, length, kind) == (b"glTF", 2, len(data), b"JSON") and size % 4 == 0
    head = json.loads(data[20 : 20 + size])
    assert all(view["byteOffset"] % 4 == 0 for view in head["bufferViews"])
    assert head["accessors"][0]["min"] == [-0.5] * 3 and head["accessors"][3]["count"] == 36
    (tmp_path / "other.glb").write_bytes(b"something else entirely")
    with pytest.raises(ValueError, match="not a mesh of this program"):
        read_glb(tmp_path / "other.glb")
