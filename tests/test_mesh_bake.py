"""What is baked is what the field says: rendered with its texture, a mesh looks like the field, at seams and from afar too."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import trimesh
from torch.nn.functional import normalize

from mesh import Mesh
from mesh.bake import bake, closest, vertex_colors
from mesh.extract import vertex_normals
from mesh.tangents import decode, encode, frame, split, tangents
from mesh.texels import covered, look_up
from nerf.provider import orbit
from rasterizer import interpolate, rasterize, texture


def _field(points, normals):
    """Smooth colours; a roughness that is 0.2 below and 0.8 above the middle; a normal that leans."""
    return {
        "albedo": 0.5 + 0.45 * torch.sin(points * torch.tensor([5.0, 7.0, 9.0]) + torch.tensor([0.3, 1.0, 2.0])),
        "roughness": torch.where(points[:, 1:2] > 0, 0.8, 0.2),
        "normal": normalize(normals + 0.4 * torch.sin(6 * points.roll(1, -1)), dim=-1),
    }


def _ball():
    ball = trimesh.creation.icosphere(3, radius=0.6)
    vertices = np.asarray(ball.vertices)
    return Mesh(vertices, np.asarray(ball.faces), None, vertices / 0.6)


def _blocks():
    """Two boxes that meet, with vertices of their own on each side, so that the shading is flat."""
    boxes = [trimesh.creation.box((0.9, 0.4, 0.5)), trimesh.creation.box((0.3, 0.9, 0.3))]
    solid = trimesh.util.concatenate(boxes).subdivide().subdivide()
    vertices, faces = solid.vertices[solid.faces].reshape(-1, 3), np.arange(3 * len(solid.faces)).reshape(-1, 3)
    return Mesh(vertices, faces, None, vertex_normals(vertices, faces))


@pytest.fixture(scope="module", params=[_ball, _blocks], ids=["ball", "blocks"])
def baked(request):
    return bake(request.param(), _field, size=512)


def _render(mesh, cameras):
    """The texture and the field, both where the mesh is seen; [P 3] each."""
    corners = torch.as_tensor(np.c_[mesh.vertices, np.ones(len(mesh.vertices))], dtype=torch.float32)
    clip = corners @ cameras.mvp().transpose(1, 2)
    faces, uv_faces = torch.as_tensor(mesh.faces), torch.as_tensor(mesh.uv_faces)
    raster = rasterize(clip, faces, cameras.height, cameras.width)
    uv = interpolate(torch.as_tensor(mesh.uvs)[None], raster, uv_faces)
    shown = texture(torch.as_tensor(mesh.textures["albedo"])[None], uv)
    places = interpolate(corners[None, :, :3].contiguous(), raster, faces)
    seen = raster[..., 3] > 0
    assert 0.05 < seen.float().mean() < 0.6
    return shown[seen], _field(places[seen], torch.zeros_like(places[seen]))["albedo"]


def test_a_rendered_texture_is_the_field(baked):
    cameras = orbit(torch.tensor([50.0, 80, 95, 120] * 2), torch.arange(8) * 45.0, 2.5, 40.0, 128, 128)
    shown, wanted = _render(baked, cameras)
    error = (shown - wanted).abs()
    assert -10 * torch.log10((error**2).mean()) > 45
    assert error.max() < 0.05  # not a single pixel shows a seam


def _far_away(mesh, size):
    """PSNR of a small picture, drawn from small mip levels, against a large one averaged down, where both are surface throughout."""
    cameras = orbit(torch.tensor([60.0, 100.0] * 4), torch.arange(8) * 45.0, 2.5, 40.0, size, size)
    corners = torch.as_tensor(np.c_[mesh.vertices, np.ones(len(mesh.vertices))], dtype=torch.float32)
    clip, faces = corners @ cameras.mvp().transpose(1, 2), torch.as_tensor(mesh.faces)
    picture, uvs, uv_faces = (torch.as_tensor(x) for x in (mesh.textures["albedo"], mesh.uvs, mesh.uv_faces))
    raster, derivatives = rasterize(clip, faces, size, size, derivatives=True)
    small = texture(picture[None], *interpolate(uvs[None], raster, uv_faces, derivatives))
    raster = rasterize(clip, faces, 8 * size, 8 * size)
    points = interpolate(corners[None, :, :3].contiguous(), raster, faces)
    large = _field(points, points)["albedo"]
    large, covered = (
        torch.nn.functional.avg_pool2d(x.permute(0, 3, 1, 2), 8).permute(0, 2, 3, 1)
        for x in (large, (raster[..., 3:] > 0).float())
    )
    error = (small - large)[covered[..., 0] > 0.999]
    return float(-10 * torch.log10((error**2).mean()))


def test_seams_do_not_show_in_small_mip_levels(baked):
    """32 pixels across: about 16 texels to a pixel, more than lie between two charts. With grey around the charts it would be seen."""
    assert _far_away(baked, 64) > 31
    assert _far_away(baked, 32) > max(28, 3 + _far_away(_unfilled(baked), 32))


def test_without_filling_seams_would_be_seen(baked):
    cameras = orbit(torch.tensor([60.0]), torch.tensor([20.0]), 2.5, 40.0, 128, 128)
    errors = [
        (shown - wanted).abs().max() for shown, wanted in (_render(mesh, cameras) for mesh in (baked, _unfilled(baked)))
    ]
    assert errors[1] > 4 * errors[0]


def _unfilled(mesh):
    """The mesh with grey around its charts."""
    texel, _, _ = covered(mesh.uvs[mesh.uv_faces] * 512.0, 512, 512)
    empty = np.full((512 * 512, 3), 0.5, np.float32)
    empty[texel] = mesh.textures["albedo"].reshape(-1, 3)[texel]
    return replace(mesh, textures={"albedo": empty.reshape(512, 512, 3)})


def _scattered(mesh, count=4000):
    """Random places on the surface: points, interpolated normals and tangents, uvs."""
    rng = np.random.default_rng(0)
    face, weights = rng.integers(0, len(mesh.faces), count), rng.dirichlet([1, 1, 1], count)[..., None]
    vertex, _, corners = split(mesh)
    return (
        (mesh.vertices[mesh.faces[face]] * weights).sum(1),
        (mesh.normals[vertex][corners[face]] * weights).sum(1),
        (tangents(mesh)[corners[face]] * weights).sum(1),
        (mesh.uvs[mesh.uv_faces[face]] * weights).sum(1),
    )


def test_a_normal_texture_gives_the_fields_normals_again(baked):
    points, normals, along, uvs = _scattered(baked)
    found = decode(look_up(baked.textures["normal"], uvs), normals, along)
    as_asked = normalize(torch.as_tensor(normals, dtype=torch.float32), dim=-1)
    wanted = _field(torch.as_tensor(points, dtype=torch.float32), as_asked)["normal"].numpy()
    degrees = np.degrees(np.arccos(np.clip((found * wanted).sum(1), -1, 1)))
    assert degrees.mean() < 0.5 and np.percentile(degrees, 99) < 3
    leaning = np.degrees(np.arccos(np.clip((as_asked.numpy() * wanted).sum(1), -1, 1)))
    assert leaning.mean() > 10  # there was something to say


def test_other_textures_and_the_vertex_colours(baked):
    points, _, _, uvs = _scattered(baked)
    clear = np.abs(points[:, 1]) > 0.02
    rough = look_up(baked.textures["roughness"], uvs)
    assert np.abs(rough - np.where(points[:, 1] > 0, 0.8, 0.2))[clear].max() < 0.01
    assert set(baked.textures) == {"albedo", "roughness", "normal"} and baked.textures["roughness"].shape == (512, 512)
    at_vertices = _field(torch.as_tensor(baked.vertices, dtype=torch.float32), torch.zeros(1, 3))["albedo"].numpy()
    assert np.abs(baked.colors - at_vertices).max() < 0.03


def test_coordinates_are_kept_if_they_can_be(baked, capsys):
    again = bake(baked, _field, size=128)
    assert (again.uvs == baked.uvs).all() and again.textures["albedo"].shape == (128, 128, 3)
    folded = Mesh(baked.vertices, baked.faces, None, baked.normals, 0.5 * baked.uvs, baked.uv_faces % 7)
    assert capsys.readouterr().err == ""
    fresh = bake(folded, _field, size=128)
    assert len(fresh.uvs) > 7 and "new ones" in capsys.readouterr().err
    pointed = replace(baked, uvs=0 * baked.uvs, textures={})  # all of it in one texel's corner
    assert len(np.unique(bake(pointed, _field, size=128).uvs, axis=0)) > 100
    with pytest.raises(ValueError, match="without faces"):
        bake(Mesh(np.zeros((0, 3)), np.zeros((0, 3), int), None, np.zeros((0, 3))), _field)


def test_faces_smaller_than_a_texel_still_have_their_colour():
    """A ball of 1280 faces in 16 x 16 texels: far more faces than texels, and none is grey or black."""
    mesh = bake(_ball(), lambda points, normals: {"albedo": 0 * points + torch.tensor([0.9, 0.2, 0.4])}, size=16)
    assert np.allclose(mesh.textures["albedo"], [0.9, 0.2, 0.4]) and np.allclose(mesh.colors, [0.9, 0.2, 0.4])


def test_texels_beside_a_chart_show_its_edge():
    """The square spans 3.2 to 12.2 of 16 texels; the field is x: the texel whose centre is 12.5 shows 1, not what lies at 11.5."""
    low, high = 3.2 / 16, 12.2 / 16
    mesh = bake(
        _square([[low, high], [high, high], [high, low], [low, low]]),
        lambda p, n: {"albedo": p[:, :1].expand(-1, 3)},
        size=16,
    )
    row = mesh.textures["albedo"][8, :, 0]
    assert np.allclose(row[3:12], (np.arange(3, 12) + 0.5 - 3.2) / 9, atol=1e-6)
    assert np.allclose(row[[2, 12, 13]], [0, 1, 1], atol=1e-6) and (row[14:] > 0.9).all() and (row[:2] < 0.1).all()


def test_a_chart_without_a_texels_centre_has_a_texel():
    mesh = _square([[0.1, 0.5], [0.5, 0.5], [0.5, 0.1], [0.1, 0.1]])
    tiny = np.array([[0.901, 0.901], [0.903, 0.901], [0.901, 0.903]])
    faces, uv_faces = np.r_[mesh.faces, [[4, 5, 6]]], np.r_[mesh.faces, [[4, 5, 6]]]
    vertices = np.r_[mesh.vertices, np.array([[0, 0, 9], [1, 0, 9], [0, 1, 9]])]
    both = Mesh(vertices, faces, None, np.tile([0.0, 0, 1], (7, 1)), np.r_[mesh.uvs, tiny], uv_faces)
    found = bake(both, lambda p, n: {"albedo": p[:, 2:].expand(-1, 3) / 9}, size=32)
    assert (found.uvs == both.uvs).all() and look_up(found.textures["albedo"], tiny).min() == 1
    assert found.textures["albedo"][8, 8].max() == 0


def _square(uvs):
    """The square [0, 1]^2 in the plane z = 0, seen from +z, with the uvs of its corners (0, 0), (1, 0), (1, 1), (0, 1)."""
    corners = np.array([[0, 0, 0], [1, 0, 0], [1, 1, 0], [0, 1, 0]], float)
    faces = np.array([[0, 1, 2], [0, 2, 3]])
    return Mesh(corners, faces, None, np.tile([0.0, 0, 1], (4, 1)), np.array(uvs, float), faces)


def test_the_frame_is_that_of_gltf():
    """A picture hung upright: T to the right, B up. Mirrored, T to the left, B still up. Turned by a quarter, both turn."""
    for uvs, right, up, sign in (
        ([[0, 1], [1, 1], [1, 0], [0, 0]], [1, 0, 0], [0, 1, 0], 1),
        ([[1, 1], [0, 1], [0, 0], [1, 0]], [-1, 0, 0], [0, 1, 0], -1),
        ([[0, 0], [0, 1], [1, 1], [1, 0]], [0, 1, 0], [-1, 0, 0], 1),
    ):
        mesh = _square(uvs)
        found = tangents(mesh)
        assert np.allclose(found, [*right, sign])
        assert np.allclose(frame(mesh.normals, found)[:, :, 1], up) and np.allclose(
            frame(mesh.normals, found)[:, :, 2], mesh.normals
        )
        leaning = np.tile([0.6, 0.0, 0.8], (4, 1))  # towards +x
        value = encode(leaning, mesh.normals, found)
        assert np.allclose(value[0], [(1 + 0.6 * right[0]) / 2, (1 + 0.6 * up[0]) / 2, 0.9])
        assert np.allclose(decode(value, mesh.normals, found), leaning)


def test_split_knows_pairs():
    mesh = _square([[0, 1], [1, 1], [1, 0], [0, 0]])
    vertex, uv, faces = split(mesh)
    assert (vertex == [0, 1, 2, 3]).all() and (uv == vertex).all() and (faces == mesh.faces).all()
    apart = Mesh(mesh.vertices, mesh.faces, None, mesh.normals, np.zeros((6, 2)), np.arange(6).reshape(2, 3))
    vertex, uv, faces = split(apart)
    assert len(vertex) == 6 and (vertex[faces] == mesh.faces).all() and (uv[faces] == apart.uv_faces).all()
    assert np.isfinite(tangents(apart)).all()  # without area in the picture


def test_covered_texels_by_hand():
    corners = np.array([[[0, 0], [4, 0], [0, 4]], [[3, 3], [3, 3], [5, 5]]], float)
    texel, face, weights = covered(corners, 4, 4)
    assert sorted(texel.tolist()) == [0, 1, 2, 3, 4, 5, 6, 8, 9, 12] and (face == 0).all()
    first = weights[texel == 0][0]
    assert np.allclose(first, [0.75, 0.125, 0.125])
    turned = covered(corners[:, ::-1], 4, 4)
    assert sorted(turned[0].tolist()) == sorted(texel.tolist())


def test_covered_counts_a_large_picture_once():
    """A grid of thin and thick triangles that fills the picture: every texel exactly once."""
    rng = np.random.default_rng(1)
    x = np.sort(np.r_[0, 40, rng.uniform(0, 40, 12)])
    grid = np.stack(np.meshgrid(x, x, indexing="ij"), -1)
    a, b, c, d = grid[:-1, :-1], grid[1:, :-1], grid[1:, 1:], grid[:-1, 1:]
    triangles = np.concatenate([np.stack([a, b, c], -2).reshape(-1, 3, 2), np.stack([a, c, d], -2).reshape(-1, 3, 2)])
    texel, face, weights = covered(triangles, 40, 40)
    assert set(texel.tolist()) == set(range(1600)) and len(texel) < 1650
    place = (triangles[face] * weights[..., None]).sum(1)
    assert np.allclose(place, np.stack([texel % 40, texel // 40], 1) + 0.5)


def test_closest_place_on_a_triangle():
    triangle = np.array([[[0, 0], [4, 0], [0, 4]]], float).repeat(4, 0)
    points = np.array([[1, -1], [-2, -3], [6, -1], [3, 3]], float)
    found = (triangle * closest(triangle, points)[..., None]).sum(1)
    assert np.allclose(found, [[1, 0], [0, 0], [4, 0], [2, 2]])


def test_look_up_is_bilinear_and_repeats():
    picture = np.array([[0.0, 1.0], [2.0, 3.0]])
    uvs = np.array([[0.25, 0.25], [0.75, 0.25], [0.5, 0.5], [1.25, -0.75], [0.0, 0.25]])
    assert np.allclose(look_up(picture, uvs), [0, 1, 1.5, 0, 0.5])


def test_vertex_colours_are_the_mean_over_a_seam():
    mesh = _square([[0.25, 0.5], [0.75, 0.5], [0.75, 0.5], [0.25, 0.5]])
    picture = np.zeros((1, 2, 3), np.float32)
    picture[0, 1] = 1
    seam = Mesh(
        mesh.vertices, mesh.faces, None, mesh.normals, mesh.uvs, np.array([[0, 1, 2], [1, 2, 3]]), {"albedo": picture}
    )
    assert np.allclose(vertex_colors(seam)[:, 0], [0.5, 1, 1, 0])
