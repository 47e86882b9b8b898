"""Silhouettes: coverage and its gradients against exact areas, whatever the size of the triangles."""

import math

import pytest
import torch
from test_rasterizer import backend, compiled, flat, perspective, soup, sphere  # noqa: F401

import rasterizer
from rasterizer import reference

SQUARE = torch.tensor([[0, 1, 2], [0, 2, 3]])


def square(left, right, top=-5.0, bottom=13.0, z=0.0):
    """A rectangle on a picture of 8 x 8 pixels, in clip coordinates."""
    return flat([[left, top, z], [left, bottom, z], [right, bottom, z], [right, top, z]])


def coverage(positions, faces, height, width, topology=None, smooth=True):
    """How much of each pixel is covered, [B, H, W]."""
    raster = rasterizer.rasterize(positions, faces, height, width)
    mask = (raster[..., 3:] > 0).to(positions.dtype)
    return (rasterizer.antialias(mask, raster, positions, faces, topology) if smooth else mask)[..., 0]


@pytest.mark.parametrize("swap", [False, True])
def test_a_straight_edge_covers_what_it_covers(backend, swap):  # noqa: F811
    """An edge at 1.3 leaves 0.7 of pixel 1, one at 6.8 covers 0.8 of pixel 6; so does a horizontal one; gradients follow."""
    ends = torch.tensor([1.3, 6.8], dtype=torch.float64, requires_grad=True)
    y, x = torch.tensor([-5, 13, 13, -5.0]).double(), ends[[0, 0, 1, 1]]
    x, y = (y, x) if swap else (x, y)
    positions = torch.stack([x / 4 - 1, 1 - y / 4, 0 * x, 1 + 0 * x], -1)[None]
    area = coverage(positions, SQUARE, 8, 8)[0]
    area = area.T if swap else area
    expected = torch.tensor([0, 0.7, 1, 1, 1, 1, 0.8, 0]).double()
    torch.testing.assert_close(area, expected.expand(8, 8))
    (gradient,) = torch.autograd.grad((area * torch.arange(64).view(8, 8)).sum(), ends)
    columns = torch.arange(64).view(8, 8).double().sum(0)
    torch.testing.assert_close(gradient, torch.stack([-columns[1], columns[6]]))


def test_colours_flow_over_the_edge(backend):  # noqa: F811
    """What is blended is the two pixels' colours, and their gradients are the shares."""
    positions = square(1.3, 6.8)
    raster = rasterizer.rasterize(positions, SQUARE, 8, 8)
    colour = torch.rand(1, 8, 8, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    out = rasterizer.antialias(colour, raster, positions, SQUARE)
    torch.testing.assert_close(out[0, :, 1], 0.7 * colour[0, :, 1] + 0.3 * colour[0, :, 0])
    torch.testing.assert_close(out[0, :, 7], colour[0, :, 7])
    (gradient,) = torch.autograd.grad(out.sum(), colour)
    shares = torch.tensor([1.3, 0.7, 1, 1, 1, 1, 0.8, 1.2]).double()
    torch.testing.assert_close(gradient[0], shares[:, None].expand(8, 8, 2))


def test_a_cell_that_two_surfaces_share(backend):  # noqa: F811
    """The nearer square's edge counts, not that of the one behind it; and nothing is blended inside of a surface."""
    positions = torch.cat([square(-9.0, 4.8, z=0.0), square(-9.0, 4.2, z=0.5)], 1)
    faces = torch.cat([SQUARE, SQUARE + 4])
    torch.testing.assert_close(coverage(positions, faces, 8, 8)[0, 0, 3:6], torch.tensor([1, 0.8, 0]).double())


def test_a_surface_that_ends_before_one_nearer_in_its_own_pixel(backend):  # noqa: F811
    """A slope falls away from us; the square that hides its lower part has its edge at 4.3, though deeper than pixel 3's slope."""
    slope = flat([[-8, -8, -0.8], [-8, 16, -0.8], [16, 16, 0.8], [16, -8, 0.8]])  # z = (column - 4) / 15
    positions = torch.cat([slope, square(4.2, 20.0, z=0.03)], 1)
    faces = torch.cat([SQUARE, SQUARE + 4])
    raster = rasterizer.rasterize(positions, faces, 8, 8)
    assert raster[0, 0, 4, 3] > 2 and raster[0, 0, 3, 3] <= 2 and raster[0, 0, 3, 2] < raster[0, 0, 4, 2]
    colour = (raster[..., 3:] > 2).double()
    out = rasterizer.antialias(colour, raster, positions, faces)[0, :, :, 0]
    torch.testing.assert_close(out[:, 3:6], torch.tensor([0, 0.8, 1]).double().expand(8, 3))


def test_a_smooth_surface_is_left_alone(backend):  # noqa: F811
    """On a ball with a colour per face, only pixels beside the background change: though every pair differs in its face."""
    vertices, faces = sphere(16)
    positions = perspective(vertices)[None]
    raster = rasterizer.rasterize(positions, faces, 60, 60)
    seen = (raster[..., 3] > 0).double()[:, None]
    around = torch.nn.functional.avg_pool2d(seen, 3, 1, 1, count_include_pad=False)[:, 0]
    out = rasterizer.antialias(raster[..., 3:], raster, positions, faces)
    changed = (out != raster[..., 3:])[..., 0]
    assert not changed[(around == 0) | (around == 1)].any()
    assert changed.sum() > 100


@pytest.mark.parametrize(("n", "size", "bar"), [(9, 512, 0.03), (41, 512, 0.03), (82, 512, 0.03), (82, 64, 0.05)])
def test_the_gradient_of_an_area(compiled, n, size, bar):  # noqa: F811
    """A ball seen in parallel: area A = pi R^2, its growth by scale 2 A; its moments move by A; 972 .. 80688 faces.

    The last has a dozen faces to a pixel, and more at the rim. Many faces are seen exactly from the side.
    """
    vertices, faces = sphere(n)
    topology = rasterizer.edges_of(faces)
    p = torch.tensor([1, 0.0031, 0.0017], dtype=torch.float64, requires_grad=True)
    points = vertices * p[0] + torch.cat([p[1:], p.new_zeros(1)])
    positions = torch.cat([points * torch.tensor([0.8, 0.8, -0.5]), torch.ones_like(points[:, :1])], 1)[None]
    covered = coverage(positions, faces, size, size, topology)[0]
    radius, place = 0.4 * size, torch.arange(size) + 0.5 - size / 2
    area = math.pi * radius**2
    sums = torch.stack([covered.sum(), (covered * place).sum(), -(covered * place[:, None]).sum()])
    gradient = torch.stack([torch.autograd.grad(x, p, retain_graph=True)[0] for x in sums])
    expected = torch.diag(torch.tensor([2 * area, area * radius, area * radius]).double())
    expected[1:, 0] = 2 * area * radius * p.detach()[1:]
    scale = area * torch.tensor([[2, 1, 1], [radius] * 3, [radius] * 3])
    assert abs(sums[0] / area - 1) < 0.015  # of a ball with corners
    assert ((gradient - expected).abs() < bar * scale).all(), (gradient - expected) / scale


def test_the_gradient_of_an_area_in_perspective_and_with_folds(compiled):  # noqa: F811
    """A bumpy ball seen from near, against differences of a coverage of sixteen samples per pixel."""
    vertices, faces = sphere(41)
    vertices = vertices * (1 + 0.2 * torch.sin(5 * vertices[:, :1]) * torch.sin(4 * vertices[:, 1:2] + 1))
    topology = rasterizer.edges_of(faces)

    def area(p, size, smooth):
        points = perspective(vertices * p[0] + torch.stack([0 * p[0], 0 * p[0], p[1]]), distance=2.5, focal=1.7)
        return coverage(points[None], faces, size, size, topology, smooth).sum() / size**2

    p = torch.tensor([1.0, 0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(area(p, 256, True), p)
    step = 0.01 * torch.eye(2, dtype=torch.float64)
    exact = torch.stack([area(p + e, 1024, False) - area(p - e, 1024, False) for e in step]) / 0.02
    assert ((gradient / exact - 1).abs() < 0.03).all(), gradient / exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mesh", ["soup", "ball", "fine ball"])
def test_compiled_equals_its_twin(compiled, dtype, mesh):  # noqa: F811
    if mesh == "soup":
        positions, faces = soup(dtype, 2)
        positions[0, 5, 1], positions[1, 20, 3] = math.nan, math.inf
        faces = torch.cat([faces, faces[:20].roll(1, 1) + torch.tensor([0, 0, 7])])  # edges with up to three faces
    else:
        vertices, faces = sphere(4 if mesh == "ball" else 30)
        vertices = vertices * (1 + 0.3 * torch.sin(7 * vertices[:, :1]))
        positions = torch.stack([perspective(vertices, 3), perspective(vertices, 1.6)]).to(dtype)
    g = torch.Generator()
    raster = rasterizer.rasterize(positions, faces, 45, 70)
    results = []
    for package in rasterizer, reference:
        g.manual_seed(0)
        p, colour = (
            x.clone().requires_grad_() for x in (positions, torch.rand(2, 45, 70, 3, generator=g, dtype=dtype))
        )
        topology = package.edges_of(faces)
        out = package.antialias(colour, raster, p, faces, topology)
        gradient = torch.randn(out.shape, generator=g, dtype=dtype)
        results.append([topology, out, *torch.autograd.grad(out, [colour, p], gradient)])
    assert (results[0][1] != colour).sum() > 500
    assert torch.equal(results[0][0], results[1][0])
    for fast, plain in zip(results[0][1:], results[1][1:], strict=True):
        scale = plain.abs().max()
        torch.testing.assert_close(
            fast / scale, plain / scale, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9
        )


def test_gradients_by_finite_differences(backend):  # noqa: F811
    positions, faces = soup(torch.float64, 1, 5, seed=3)
    raster = rasterizer.rasterize(positions, faces, 7, 9)
    g = torch.Generator().manual_seed(0)
    colour = torch.rand(1, 7, 9, 2, generator=g, dtype=torch.float64).requires_grad_()
    weight = torch.randn(1, 7, 9, 2, generator=g, dtype=torch.float64)

    def sums(c, p):
        return (rasterizer.antialias(c, raster, p, faces) * weight).sum((0, 1, 3))

    assert torch.autograd.gradcheck(sums, (colour, positions.requires_grad_()), eps=1e-7, atol=1e-4, rtol=1e-3)


def test_edges_by_hand(backend):  # noqa: F811
    """Two faces at the edge 1-2, three at 0-1 in a ring, one that names a vertex twice, and borders."""
    faces = torch.tensor([[0, 1, 2], [3, 2, 1], [0, 1, 4], [1, 0, 5], [1, 2, 2]])
    ring = rasterizer.edges_of(faces)
    assert ring.tolist() == [[3, 1, 8], [0, 4, 5], [6, 7, 11], [9, 10, 2], [12, 13, 14]]
    assert rasterizer.edges_of(faces[:0]).shape == (0, 3)


def test_an_edge_between_three_faces_ends_no_surface_that_goes_on(backend):  # noqa: F811
    """A fin behind a plane, at an edge of it, changes nothing."""
    plane = flat([[-9, -9, 0], [-9, 17, 0], [4.2, 17, 0], [4.2, -9, 0], [17, 17, 0], [17, -9, 0], [3.1, 4, 0.5]])
    faces = torch.tensor([[0, 1, 2], [0, 2, 3], [2, 3, 6], [3, 2, 4], [3, 4, 5]])
    raster = rasterizer.rasterize(plane, faces, 8, 8)
    colour = raster[..., 3:]
    assert len(colour.unique()) > 1
    assert torch.equal(rasterizer.antialias(colour, raster, plane, faces), colour)


def test_a_topology_of_other_faces_does_no_harm(compiled):  # noqa: F811
    """Stale numbers give a wrong picture, not a crash."""
    vertices, faces = sphere(4)
    positions = perspective(vertices)[None]
    raster = rasterizer.rasterize(positions, faces, 30, 30)
    stale = torch.full_like(faces, 10**9)
    assert rasterizer.antialias(raster[..., :3], raster, positions, faces, stale).isfinite().all()
    assert rasterizer.antialias(raster[..., :3], raster, positions[:, :5], faces[:7], stale[:7]).isfinite().all()
