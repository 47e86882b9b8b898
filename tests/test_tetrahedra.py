"""The tetrahedral grid: it fills the cube once, its parts fit together, and none is upside down."""

import numpy as np
import pytest
import torch

from mesh.tetrahedra import cells, grid

FACES = [[1, 2, 3], [0, 3, 2], [0, 1, 3], [0, 2, 1]]  # of a positively oriented tetrahedron, seen from outside


def _volumes(tetrahedra, vertices=None):
    a, b, c, d = (tetrahedra.vertices if vertices is None else vertices).double()[tetrahedra.tets].unbind(1)
    return torch.linalg.det(torch.stack([b - a, c - a, d - a], 1)) / 6


@pytest.mark.parametrize("resolution", [1, 5, 8, 33])
def test_fills_the_cube_once_with_equal_positive_volumes(resolution):
    tetrahedra = grid(resolution)
    volumes = _volumes(tetrahedra)
    assert float(volumes.sum()) == pytest.approx(8, rel=1e-5)
    assert torch.allclose(volumes, volumes.new_tensor(tetrahedra.spacing**3 / 12), rtol=1e-3)
    assert float(tetrahedra.vertices.min()) == -1 and float(tetrahedra.vertices.max()) == 1
    assert tetrahedra.tets.unique().numel() == len(tetrahedra.vertices)


@pytest.mark.parametrize("resolution", [1, 8])
def test_conforming(resolution):
    """Every triangle belongs to two tetrahedra, from opposite sides, or lies on the cube's surface."""
    tetrahedra = grid(resolution)
    triangles = tetrahedra.tets.numpy()[:, FACES].reshape(-1, 3)
    sorted_, owner, count = np.unique(np.sort(triangles, 1), axis=0, return_inverse=True, return_counts=True)
    assert count.max() == 2
    outer = tetrahedra.vertices.numpy()[sorted_[count == 1]]
    assert (np.abs(outer.mean(1)).max(1) == 1).all()
    assert len(outer) == 12 * cells(resolution) ** 2
    turns = np.array([np.linalg.det(np.eye(3)[np.argsort(np.argsort(triangle))]) for triangle in triangles])
    both = np.zeros(len(sorted_))
    np.add.at(both, owner.reshape(-1), turns)
    assert (both[count == 2] == 0).all()


def test_edges_are_those_of_the_tetrahedra():
    tetrahedra = grid(12)
    pairs = tetrahedra.tets[:, [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]].reshape(-1, 2)
    wanted = torch.unique(pairs.sort(1).values, dim=0)
    given = tetrahedra.edges.sort(1).values
    assert len(given) == len(wanted) and torch.equal(torch.unique(given, dim=0), wanted)


def test_sizes_follow_the_usual_grids():
    for resolution, usual in ((32, 30136), (64, 192492), (128, 1524684)):
        assert 12 * cells(resolution) ** 3 == pytest.approx(usual, rel=0.15)
    assert len(grid(32).tets) == 26364 and len(grid(32).vertices) == 4941


def test_nothing_turns_over_below_a_fifth_of_the_spacing():
    tetrahedra = grid(16)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shift = torch.randn(tetrahedra.vertices.shape, generator=generator)
        shift *= 0.2 * tetrahedra.spacing / shift.norm(dim=1, keepdim=True)
        assert float(_volumes(tetrahedra, tetrahedra.vertices + shift).min()) > 0
    assert 0.2 * grid(128).spacing == pytest.approx(1 / 128, rel=0.01)


def test_boundary():
    tetrahedra = grid(8)
    n = cells(8)
    assert int(tetrahedra.boundary.sum()) == (n + 1) ** 3 - (n - 1) ** 3
