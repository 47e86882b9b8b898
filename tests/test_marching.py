"""Marching tetrahedra: every case of one tetrahedron, golden bodies, and gradients against finite differences."""

import itertools
import math

import pytest
import torch
import trimesh

from mesh.marching import marching_tets
from mesh.tetrahedra import Tetrahedra, grid

CORNERS = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
SINGLE = Tetrahedra(CORNERS, torch.tensor([[0, 1, 2, 3]]), torch.combinations(torch.arange(4)), 1.0)


def _solid(vertices, faces):
    return trimesh.Trimesh(vertices.detach().numpy(), faces.numpy(), process=False)


@pytest.mark.parametrize("inside", list(itertools.product([False, True], repeat=4)))
def test_every_case_of_one_tetrahedron(inside):
    inside = torch.tensor(inside)
    sdf = torch.where(inside, -1.0, 1.0)
    vertices, faces = marching_tets(CORNERS, sdf, SINGLE)
    count = int(inside.sum())
    assert len(faces) == (0, 1, 2, 1, 0)[count] and len(vertices) == (0, 3, 4, 3, 0)[count]
    if len(faces):
        a, b, c = vertices[faces].unbind(1)
        normals = torch.linalg.cross(b - a, c - a)
        outwards = CORNERS[~inside].mean(0) - CORNERS[inside].mean(0)
        assert bool((normals @ outwards > 0).all())
        # The quadrilateral is flat here: its area is right only if the two triangles do not overlap.
        outline = vertices if count != 2 else vertices[[0, 1, 3, 2]]
        total = sum(torch.linalg.cross(outline[i - 1], outline[i]) for i in range(len(outline))).norm()
        assert float(normals.norm(dim=1).sum()) == pytest.approx(float(total), rel=1e-5)


def test_golden_sphere():
    """Of radius 0.3 in the unit cube. Another grid of this kind (24,444 tetrahedra) gives 1122 vertices, 2240 faces, volume 0.11115."""
    tetrahedra = grid(32)
    vertices, faces = marching_tets(tetrahedra.vertices, tetrahedra.vertices.norm(dim=1) - 0.6, tetrahedra)
    solid = _solid(vertices / 2, faces)
    assert solid.is_watertight and solid.is_winding_consistent and solid.euler_number == 2
    assert (len(vertices), len(faces)) == (1262, 2520)
    assert solid.volume == pytest.approx(0.11124, abs=1e-5)  # 1.6 % below 4/3 pi 0.3^3: chords lie inside
    assert (solid.face_normals * solid.triangles_center).sum(1).min() > 0


def test_volume_converges_quadratically():
    errors = []
    for resolution in (40, 80):
        tetrahedra = grid(resolution)
        solid = _solid(*marching_tets(tetrahedra.vertices, tetrahedra.vertices.norm(dim=1) - 0.6, tetrahedra))
        errors.append(1 - solid.volume / (4 / 3 * math.pi * 0.6**3))
    assert 0 < errors[1] < 0.003 and errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_manifold_whatever_the_values_and_the_deformation():
    tetrahedra = grid(14)
    generator = torch.Generator().manual_seed(3)
    sdf = torch.randn(len(tetrahedra.vertices), generator=generator)
    sdf[torch.rand(len(sdf), generator=generator) < 0.2] = 0
    sdf[tetrahedra.boundary] = 1
    moved = tetrahedra.vertices + 0.2 * tetrahedra.spacing * (torch.rand(sdf.shape + (3,), generator=generator) - 0.5)
    vertices, faces = marching_tets(moved, sdf, tetrahedra)
    edges = torch.cat([faces[:, :2], faces[:, 1:], faces[:, [2, 0]]])
    assert len(torch.unique(edges, dim=0)) == len(edges)  # each direction once ...
    assert torch.equal(torch.unique(edges, dim=0), torch.unique(edges.flip(1), dim=0))  # ... and each edge both ways
    assert bool(torch.isfinite(vertices).all()) and len(torch.unique(faces)) == len(vertices)


def test_zero_counts_as_outside():
    vertices, faces = marching_tets(CORNERS, torch.tensor([-1.0, 0, 0, 0]), SINGLE)
    assert len(faces) == 1 and torch.equal(vertices.sort(0).values, CORNERS[1:].sort(0).values)
    assert not len(marching_tets(CORNERS, torch.tensor([0.0, 0, 0, 0]), SINGLE)[1])


def test_vertices_lie_at_the_linear_zero():
    sdf = torch.tensor([-1.0, 3.0, 1.0, 0.25])
    vertices, _ = marching_tets(CORNERS, sdf, SINGLE)
    assert torch.allclose(vertices, torch.tensor([[0.25, 0, 0], [0, 0.5, 0], [0, 0, 0.8]]))


def test_gradients_of_positions_and_values():
    generator = torch.Generator().manual_seed(1)
    double = {"dtype": torch.float64, "generator": generator}
    tetrahedra = grid(5)
    positions = tetrahedra.vertices.double() + 0.05 * torch.randn(tetrahedra.vertices.shape, **double)
    sdf = positions.norm(dim=1) - 0.6
    assert torch.autograd.gradcheck(
        lambda p, s: marching_tets(p, s, tetrahedra)[0], (positions.requires_grad_(), sdf.detach().requires_grad_())
    )
