"""Regularisers of meshes against numbers worked out by hand, and their gradients."""

import math

import pytest
import torch
import trimesh
from torch.nn import functional as F

from mesh.losses import adjacency, edges_of, eikonal, laplacian, normal_consistency, sign_changes

OCTAHEDRON = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
OCTAHEDRON_FACES = torch.tensor(
    [[0, 2, 4], [2, 1, 4], [1, 3, 4], [3, 0, 4], [2, 0, 5], [1, 2, 5], [3, 1, 5], [0, 3, 5]]
)
# Two triangles over the same edge, folded by a right angle.
TENT = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1]])
TENT_FACES = torch.tensor([[0, 1, 2], [1, 0, 3]])


def test_adjacency_leaves_out_boundary_edges():
    assert adjacency(TENT_FACES).tolist() == [[0, 1]]
    assert len(adjacency(OCTAHEDRON_FACES)) == 12
    assert len(adjacency(TENT_FACES[:1])) == 0 and len(adjacency(TENT_FACES[:0])) == 0
    fan = torch.tensor([[0, 1, 2], [0, 1, 3], [1, 0, 4]])  # three faces on one edge
    assert adjacency(fan).tolist() == [[0, 1], [1, 2]]


def test_edges_once_each():
    assert edges_of(TENT_FACES, 4).tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3]]
    assert len(edges_of(OCTAHEDRON_FACES, 6)) == 12


def test_normal_consistency():
    # Faces of an octahedron that meet in an edge: n . n' = (1 + 1 - 1) / 3.
    assert float(normal_consistency(OCTAHEDRON, OCTAHEDRON_FACES)) == pytest.approx(2 / 3)
    assert float(normal_consistency(TENT, TENT_FACES)) == pytest.approx(1)
    flat = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.3, -1, 0]])
    assert float(normal_consistency(flat, TENT_FACES)) == pytest.approx(0, abs=1e-6)
    folded = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 1, 1e-4]])
    assert float(normal_consistency(folded, TENT_FACES)) == pytest.approx(2, abs=1e-6)


def test_laplacian():
    assert float(laplacian(OCTAHEDRON, OCTAHEDRON_FACES)) == pytest.approx(1)  # the four neighbours' mean is the centre
    with_loose = torch.cat([OCTAHEDRON, torch.full((2, 3), 7.0)])
    assert float(laplacian(with_loose, OCTAHEDRON_FACES)) == pytest.approx(1)
    sizes = [math.sqrt(1 / 9 * 3), math.sqrt(1 + 1 / 9 + 1 / 9), math.sqrt(1 / 4 + 1), math.sqrt(1 / 4 + 1)]
    assert float(laplacian(TENT, TENT_FACES)) == pytest.approx(sum(sizes) / 4)


def test_eikonal():
    assert float(eikonal(torch.tensor([[0.0, 0, 1], [0, 3, 4], [0, 0, 0]]))) == pytest.approx((0 + 16 + 1) / 3)


def test_sign_changes():
    sdf = torch.tensor([-0.5, 2.0, 0.0, -1.0])
    edges = torch.tensor([[0, 1], [1, 2], [0, 3], [2, 3]])
    first = F.softplus(torch.tensor(0.5)) + F.softplus(torch.tensor(2.0))  # -log sigmoid(-0.5), -log sigmoid(-2)
    second = F.softplus(torch.tensor(0.0)) + F.softplus(torch.tensor(1.0))
    assert float(sign_changes(sdf, edges)) == pytest.approx(float(first + second) / 2)
    sdf.requires_grad_()
    sign_changes(sdf, edges).backward()
    assert sdf.grad[0] < 0 and sdf.grad[1] > 0  # descent lifts the inside end and lowers the outside one
    assert float(sign_changes(sdf.detach().abs(), edges)) == 0


def test_degenerate_faces_and_flat_places_give_no_nan():
    vertices = torch.cat([OCTAHEDRON, OCTAHEDRON[:1]]).requires_grad_()
    faces = torch.cat([OCTAHEDRON_FACES, torch.tensor([[0, 6, 2], [1, 1, 3], [0, 2, 6]])])
    loss = normal_consistency(vertices, faces) + laplacian(vertices, faces)
    loss.backward()
    assert bool(torch.isfinite(loss)) and bool(torch.isfinite(vertices.grad).all())
    assert float(normal_consistency(vertices.detach(), faces)) == pytest.approx(2 / 3)
    thin = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [0.5, 0, 1e-6]], requires_grad=True)
    normal_consistency(thin, torch.cat([TENT_FACES, torch.tensor([[0, 2, 3]])])).backward()
    assert float(thin.grad.abs().max()) < 10
    grid = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [-1, 0, 0], [0, -1, 0]], requires_grad=True)
    laplacian(grid, torch.tensor([[0, 1, 2], [0, 2, 3], [0, 3, 4], [0, 4, 1]])).backward()  # |L v| = 0 in the middle
    assert bool(torch.isfinite(grid.grad).all())
    still = torch.zeros(3, 3, requires_grad=True)
    eikonal(still).backward()
    assert bool(torch.isfinite(still.grad).all())


@pytest.mark.parametrize("loss", [normal_consistency, laplacian, eikonal, sign_changes])
def test_nothing_gives_zero_with_a_gradient(loss):
    inputs = {
        eikonal: (torch.zeros(0, 3),),
        sign_changes: (torch.zeros(0), torch.zeros(0, 2, dtype=torch.int64)),
    }.get(loss, (torch.zeros(0, 3), torch.zeros(0, 3, dtype=torch.int64)))
    inputs[0].requires_grad_()
    value = loss(*inputs)
    value.backward()
    assert float(value.detach()) == 0


@pytest.mark.parametrize("loss", [normal_consistency, laplacian])
def test_gradients(loss):
    ball = trimesh.creation.icosphere(1)
    generator = torch.Generator().manual_seed(0)
    vertices = torch.tensor(ball.vertices).double()
    vertices = (vertices + 0.1 * torch.randn(vertices.shape, generator=generator)).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: loss(v, torch.tensor(ball.faces)), vertices)


def test_gradients_of_fields():
    generator = torch.Generator().manual_seed(0)
    slope = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(eikonal, slope)
    sdf = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    edges = torch.combinations(torch.arange(6))
    assert torch.autograd.gradcheck(lambda s: sign_changes(s, edges), sdf)
