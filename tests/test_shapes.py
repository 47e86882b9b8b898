"""Signed distances to start from: exact, negative inside, and clear words for a shape that is none."""

import math

import numpy as np
import pytest
import torch
import trimesh

from errors import UserError
from mesh.marching import marching_tets
from mesh.shapes import SHAPES, mesh_sdf, shape_sdf
from mesh.tetrahedra import grid

BODIES = {
    "sphere 0.5": 4 / 3 * math.pi * 0.5**3,
    "ellipsoid 0.3 0.6 0.4": 4 / 3 * math.pi * 0.3 * 0.6 * 0.4,
    "box 0.3 0.4 0.5": 8 * 0.3 * 0.4 * 0.5,
    "cylinder 0.4 0.5": math.pi * 0.4**2 * 1.0,
    "capsule 0.3 0.4": math.pi * 0.3**2 * 0.8 + 4 / 3 * math.pi * 0.3**3,
    "torus 0.5 0.2": 2 * math.pi**2 * 0.5 * 0.2**2,
}


def _points(count=400):
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 2 - 1


def test_every_shape_is_tested():
    assert {text.split()[0] for text in BODIES} == set(SHAPES)


@pytest.mark.parametrize("text", BODIES)
def test_zero_on_the_surface_and_as_far_as_the_closest_point(text):
    """Against a dense mesh of the surface: |d| is the distance to it, and the sign is the winding number's."""
    distance = shape_sdf(text)
    tetrahedra = grid(64)
    surface, faces = marching_tets(tetrahedra.vertices, distance(tetrahedra.vertices), tetrahedra)
    solid = trimesh.Trimesh(surface.numpy(), faces.numpy(), process=False)
    assert solid.is_watertight and solid.volume == pytest.approx(BODIES[text], rel=0.02)
    assert solid.euler_number == (0 if text.startswith("torus") else 2)
    points = _points()
    gap = (distance(points) - mesh_sdf(surface.numpy(), faces.numpy())(points)).abs().max()
    assert float(gap) < 0.6 * tetrahedra.spacing  # the grid cuts sharp edges


@pytest.mark.parametrize("text", BODIES)
def test_a_distance_has_slope_one_and_leads_to_the_surface(text):
    distance = shape_sdf(text)
    points = _points(2000).requires_grad_()
    value = distance(points)
    slope = torch.autograd.grad(value.sum(), points)[0]
    assert torch.allclose(slope.norm(dim=1), torch.ones(2000, dtype=torch.float64), atol=1e-6)
    assert float(distance(points - slope * value[:, None]).detach().abs().max()) < 1e-6


def test_numbers_along_the_axes():
    axes = torch.eye(3)
    assert torch.allclose(shape_sdf("ellipsoid 0.3 0.6 0.2")(axes), torch.tensor([0.7, 0.4, 0.8]))
    assert torch.allclose(shape_sdf("box .3,.6,.2")(axes), torch.tensor([0.7, 0.4, 0.8]))
    assert torch.allclose(shape_sdf("cylinder 0.3 0.6")(axes), torch.tensor([0.7, 0.4, 0.7]))
    assert torch.allclose(shape_sdf("capsule 0.3 0.6")(axes), torch.tensor([0.7, 0.1, 0.7]))
    assert torch.allclose(shape_sdf("torus 0.7 0.2")(axes), torch.tensor([0.1, math.sqrt(1.49) - 0.2, 0.1]))


def test_ellipsoid_where_the_closest_point_is_not_unique():
    distance = shape_sdf("ellipsoid 0.3 0.6 0.2")
    centre = distance(torch.zeros(1, 3, dtype=torch.float64))
    assert float(centre) == pytest.approx(-0.2, abs=1e-8)
    ball = shape_sdf("ellipsoid 0.5 0.5 0.5")(_points())
    assert torch.allclose(ball, shape_sdf("sphere 0.5")(_points()), atol=1e-8)
    # On the long axis near the middle the nearest point lies off the axis: (0, y, 0.2 sqrt(1 - y'^2)) with y' = 0.6 y / (0.36 - 0.04).
    y = 0.1
    side = math.hypot(y - 0.36 * y / 0.32, 0.2 * math.sqrt(1 - (0.6 * y / 0.32) ** 2))
    assert float(distance(torch.tensor([[0, y, 0]], dtype=torch.float64))) == pytest.approx(-side, abs=1e-8)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("", "no such shape"),
        ("sphere", "takes 1 number;"),
        ("ball 1", "no such shape"),
        ("box 1 2", "takes 3 numbers"),
        ("sphere big", "lengths are numbers"),
        ("sphere -0.5", "above 0"),
        ("sphere nan", "above 0"),
        ("torus 0.8 0.3", "reaches 1.1"),
    ],
)
def test_what_is_no_shape(text, word):
    with pytest.raises(UserError, match=word) as error:
        shape_sdf(text)
    assert "--shape_init" in str(error.value) and "\n" not in str(error.value)
    if word != "reaches 1.1":
        assert "torus ring_radius tube_radius" in str(error.value)


def test_a_wider_grid_takes_larger_shapes():
    assert float(shape_sdf("sphere 1.5", limit=2.0)(torch.zeros(1, 3))) == -1.5


def _ball():
    ball = trimesh.creation.icosphere(4, 0.6)
    return np.asarray(ball.vertices), np.asarray(ball.faces)


def test_mesh_distance():
    vertices, faces = _ball()
    points = _points().float()
    distance = mesh_sdf(vertices, faces)(points)
    assert distance.dtype == torch.float32
    assert float((distance - (points.norm(dim=1) - 0.6)).abs().max()) < 0.003
    assert mesh_sdf(vertices, faces)(points[:0]).shape == (0,)


def test_mesh_distance_bears_broken_meshes():
    vertices, faces = _ball()
    points = _points()
    wanted = points.norm(dim=1) - 0.6
    clear = wanted.abs() > 0.01
    twice_and_flat = np.concatenate([faces, faces[:50], np.zeros((3, 3), int), faces[:5, ::-1]])
    for broken in (twice_and_flat, faces[:, ::-1]):
        assert float((mesh_sdf(vertices, broken)(points) - wanted).abs()[clear].max()) < 0.003
    # Without its cap the ball is still solid, and values remain distances to what is there.
    open_ = faces[vertices[faces].mean(1)[:, 1] < 0.45]
    distance = mesh_sdf(vertices, open_)(points)
    below = points[:, 1] < 0.2
    assert bool(((distance < 0) == (wanted < 0))[below & clear].all())
    deep = below & (points.norm(dim=1) < 0.3) & (points[:, 1] < 0)
    assert float((distance - wanted).abs()[deep].max()) < 0.003
