"""Who is seen where, interpolation, and their gradients: by hand, against exact rays, and compiled against the twin."""

import math

import pytest
import torch

import extension
import rasterizer
from errors import UserError
from rasterizer import reference


@pytest.fixture(params=["auto", "reference"], ids=["compiled", "twin"])
def backend(request, monkeypatch):
    """Runs a test on the compiled kernels and on their twin."""
    monkeypatch.setenv("SOMNIUM_KERNELS", request.param)
    if request.param == "auto" and extension.load(rasterizer.FOLDER, "rasterizer") is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture
def compiled():
    if extension.load(rasterizer.FOLDER, "rasterizer") is None:
        pytest.skip("no C++ compiler here")


def sphere(n):
    """A unit sphere of 12 n^2 faces: a cube's sides, n x n squares each, blown up; welded, counter-clockwise from outside."""
    t = torch.linspace(-1, 1, n + 1, dtype=torch.float64) * (math.pi / 4)
    u, v = torch.meshgrid(t.tan(), t.tan(), indexing="ij")
    one = torch.ones_like(u)
    sides = [(one, u, v), (-one, v, u), (v, one, u), (u, -one, v), (u, v, one), (v, u, -one)]
    points = torch.stack([torch.stack(side, -1) for side in sides]).reshape(-1, 3)
    _, index = (points * 1e6).round().unique(dim=0, return_inverse=True)
    vertices = torch.zeros(int(index.max()) + 1, 3, dtype=torch.float64)
    vertices[index] = torch.nn.functional.normalize(points, dim=-1)
    grid = index.view(6, n + 1, n + 1)
    a, b, c, d = (x.flatten() for x in (grid[:, :-1, :-1], grid[:, 1:, :-1], grid[:, 1:, 1:], grid[:, :-1, 1:]))
    return vertices, torch.cat([torch.stack([a, b, c], -1), torch.stack([a, c, d], -1)])


def perspective(points, distance=3.0, focal=2.0, near=0.5, far=20.0):
    """Clip coordinates [..., 4] for a camera on the z axis, `distance` before the origin; focal: in half pictures."""
    x, y, z = points.unbind(-1)
    w = distance - z
    return torch.stack([focal * x, focal * y, ((far + near) * w - 2 * far * near) / (far - near), w], -1)


def flat(points):
    """Clip coordinates of points (column, row, z/w) on a picture of 8 x 8 pixels."""
    x, y, z = torch.as_tensor(points, dtype=torch.float64).unbind(-1)
    return torch.stack([x / 4 - 1, 1 - y / 4, z, torch.ones_like(z)], -1)[None]


def soup(dtype, views=2, count=60, seed=0):
    """Triangles of all sizes in all places, some behind the camera and many through it or through each other."""
    g = torch.Generator().manual_seed(seed)
    middle = torch.randn(views, count, 1, 3, generator=g, dtype=torch.float64) * torch.tensor([1, 1, 2.0])
    size = 2 * torch.rand(count, 1, 1, generator=g, dtype=torch.float64) ** 3
    corners = middle + size * torch.randn(views, count, 3, 3, generator=g, dtype=torch.float64)
    return perspective(corners.flatten(1, 2)).to(dtype), torch.arange(3 * count).view(-1, 3)


TRIANGLE = flat([[1, 1, 0.5], [7, 1, 0.5], [1, 7, 0.5]])


def test_where_a_triangle_lies(backend):
    """Row 0 is the top one; u and v are the weights of corners 0 and 1; the edge itself belongs to the triangle."""
    raster = rasterizer.rasterize(TRIANGLE, torch.tensor([[0, 1, 2]]), 8, 8)[0]
    expected = torch.tensor([[1 <= i <= 6 and 1 <= j <= 7 - i for j in range(8)] for i in range(8)])
    assert ((raster[..., 3] == 1) == expected).all()
    assert (raster[~expected] == 0).all()
    torch.testing.assert_close(raster[1, 2], torch.tensor([8 / 12, 3 / 12, 0.5, 1]).double())  # at (2.5, 1.5)
    assert (rasterizer.rasterize(TRIANGLE, torch.tensor([[2, 1, 0]]), 8, 8)[0, ..., 3] == raster[..., 3]).all()


def test_the_nearest_is_seen_and_of_equals_the_first(backend):
    faces = torch.tensor([[0, 1, 2], [3, 4, 5], [0, 1, 2]])
    for z, winner in (0.2, 2), (0.8, 1), (0.5, 1), (-1.1, 1), (-1.0, 2):
        positions = torch.cat([TRIANGLE, flat([[1, 1, z], [7, 1, z], [1, 7, z]])], 1)
        assert rasterizer.rasterize(positions, faces, 8, 8)[0, 2, 2, 3] == winner, z
    alone = rasterizer.rasterize(flat([[1, 1, 1.01], [7, 1, 1.01], [1, 7, 1.01]]), faces[:1], 8, 8)
    assert (alone == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_correct_in_perspective(backend, dtype):
    """The interpolated clip position of a pixel is one that lies at the pixel's centre; so for every pixel of a soup."""
    positions, faces = soup(dtype)
    raster = rasterizer.rasterize(positions, faces, 37, 53)
    seen = raster[..., 3] > 0
    assert 0.3 < seen.double().mean() < 1
    clip = rasterizer.interpolate(positions, raster, faces)
    x, y, z, w = clip[seen].double().unbind(-1)
    assert (w > 0).all()
    _, row, column = seen.nonzero(as_tuple=True)
    close = {"rtol": 0, "atol": 2e-3 if dtype == torch.float32 else 1e-9}
    torch.testing.assert_close((1 + x / w) * 53 / 2, column.double() + 0.5, **close)
    torch.testing.assert_close((1 - y / w) * 37 / 2, row.double() + 0.5, **close)
    torch.testing.assert_close(z / w, raster[seen][:, 2].double(), **close)
    assert (raster[seen][:, :2] >= 0).all() and (raster[seen][:, :2].sum(-1) <= 1 + 1e-6).all()


def test_a_sphere_against_exact_rays(backend):
    vertices, faces = sphere(40)
    size = 200
    raster = rasterizer.rasterize(perspective(vertices)[None].float(), faces, size, size)
    seen = raster[0, ..., 3] > 0
    place = (torch.arange(size, dtype=torch.float64) + 0.5) / size * 2 - 1
    y, x = torch.meshgrid(-place, place, indexing="ij")
    ray = torch.nn.functional.normalize(torch.stack([x / 2, y / 2, -torch.ones_like(x)], -1), dim=-1)
    along = -3 * ray[..., 2]  # to the point next to the centre, from (0, 0, 3)
    root = 1 - (9 - along**2)
    hit = root > 0
    assert (seen != hit).sum() <= 0.002 * hit.sum()
    exact = torch.tensor([0, 0, 3.0]) + (along - root.clamp(min=0).sqrt())[..., None] * ray
    normal = torch.nn.functional.normalize(rasterizer.interpolate(vertices[None].float(), raster, faces)[0], dim=-1)
    inner = seen & (root > 0.05)
    assert (normal[inner] - exact[inner]).norm(dim=-1).mean() < 2e-3


def test_a_plane_through_the_camera(backend):
    """The ground at y = -1 reaches behind the camera at (0, 0, 3): below the horizon every pixel shows it, none above."""
    ground = torch.tensor([[-90, -1, 90], [90, -1, 90], [90, -1, -15], [-90, -1, -15.0]]).double()
    positions, faces = perspective(ground, far=1e3)[None], torch.tensor([[0, 1, 2], [2, 0, 3]])
    raster = rasterizer.rasterize(positions, faces, 64, 65)
    point = rasterizer.interpolate(ground[None], raster, faces)[0]
    y = 1 - (torch.arange(64).double() + 0.5) / 32
    depth = torch.where(y < 0, -2 / y, torch.inf)  # in front of the camera; the plane ends at 18, the near plane is 0.5
    assert ((raster[0, ..., 3] > 0) == (depth < 18)[:, None]).all()
    rows = depth < 18
    torch.testing.assert_close(point[rows][..., 2], (3 - depth[rows])[:, None].expand(-1, 65))


def test_nothing_behind_the_camera_and_nothing_nearer_than_near(backend):
    points = torch.tensor([[-1, -1, 0], [1, -1, 0], [0, 1, 0.0]])
    faces = torch.tensor([[0, 1, 2]])
    for z, drawn in (4.0, False), (2.8, False), (2.4, True):
        raster = rasterizer.rasterize(perspective(points + torch.tensor([0, 0, z]))[None], faces, 16, 16)
        assert bool((raster[..., 3] > 0).any()) == drawn, z


def test_what_cannot_be_drawn_is_left_out(backend):
    """No area, a NaN, an infinity, a vertex that is not there: the other face is drawn as ever."""
    bad = flat([[0, 0, 0], [4, 4, 0], [8, 8, 0]])
    broken = TRIANGLE.repeat(1, 2, 1)
    broken[0, 0, 1], broken[0, 3, 3] = math.nan, math.inf
    positions = torch.cat([bad, broken, TRIANGLE], 1)
    faces = torch.tensor([[0, 1, 2], [0, 0, 2], [3, 4, 5], [6, 7, 8], [0, 1, 99], [-1, 1, 2], [9, 10, 11]])
    raster = rasterizer.rasterize(positions, faces, 8, 8)[0]
    assert (raster[..., 3].unique() == torch.tensor([0, 7])).all()
    alone = rasterizer.rasterize(TRIANGLE, torch.tensor([[0, 1, 2]]), 8, 8)[0]
    torch.testing.assert_close(raster[..., :3], alone[..., :3])
    positions.requires_grad_()
    raster = rasterizer.rasterize(positions, faces, 8, 8)
    (gradient,) = torch.autograd.grad(rasterizer.interpolate(positions, raster, faces).sum(), positions)
    assert gradient.isfinite().all() and gradient[0, 9:].any() and not gradient[0, :9].any()


@pytest.mark.parametrize("turn", [0.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_no_pixel_is_missed_between_neighbours(backend, turn, dtype):
    """A plane cut into triangles along lines that pass through pixels' centres, facing all ways, has no holes."""
    g = torch.Generator().manual_seed(0)
    place = torch.linspace(-1, 1, 11, dtype=torch.float64)
    x, y = (axis.flatten() for axis in torch.meshgrid(place, place, indexing="ij"))
    points = torch.stack([x * math.cos(turn) - y * math.sin(turn), x * math.sin(turn) + y * math.cos(turn)], -1)
    w = 1 + 0.1 * points.sum(-1, keepdim=True)
    positions = (torch.cat([points, torch.zeros_like(w), torch.ones_like(w)], -1) * w)[None].to(dtype)
    corner = (torch.arange(10)[:, None] * 11 + torch.arange(10)).flatten()
    faces = torch.cat([corner[:, None] + torch.tensor([[0, 11, 12]]), corner[:, None] + torch.tensor([[0, 12, 1]])])
    faces = torch.stack([face[torch.randperm(3, generator=g)] for face in faces])
    raster = rasterizer.rasterize(positions, faces, 30, 30)  # three pixels a square: centres on the diagonals
    place = (torch.arange(30) + 0.5) / 15 - 1
    inner = (place[:, None] ** 2 + place**2 < 0.98) if turn else torch.ones(30, 30, dtype=torch.bool)
    assert (raster[0, ..., 3] > 0)[inner].all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("views", [1, 3])
def test_compiled_equals_its_twin(compiled, dtype, views):
    positions, faces = soup(dtype, views)
    g = torch.Generator().manual_seed(1)
    results = []
    for package in rasterizer, reference:
        g.manual_seed(1)
        p = positions.clone().requires_grad_()
        raster, slopes = package.rasterize(p, faces, 45, 70, True)
        attributes = torch.randn(1, positions.shape[1], 5, generator=g, dtype=dtype).requires_grad_()
        own = torch.randn(views, positions.shape[1], 2, generator=g, dtype=dtype).requires_grad_()
        shared, derivatives = package.interpolate(attributes, raster, faces, slopes)
        other = package.interpolate(own, raster, faces)
        weights = [torch.randn(x.shape, generator=g, dtype=dtype) for x in (raster, shared, other)]
        loss = sum((w * x).sum() for w, x in zip(weights, (raster, shared, other), strict=True))
        gradients = torch.autograd.grad(loss, [p, attributes, own])
        results.append([raster, slopes, shared, derivatives, other, *gradients])
    for fast, plain in zip(*results, strict=True):
        scale = plain.abs().max()
        torch.testing.assert_close(
            fast / scale, plain / scale, rtol=1e-5, atol=1e-5 if dtype == torch.float32 else 1e-9
        )


def test_derivatives_by_a_finer_picture(backend):
    """At three times the size, the pixels beside a coarse pixel's middle one are a third of it away."""
    positions = perspective(torch.tensor([[-2, -1.5, 1], [2, -1, -4], [0, 2, -1.0]]).double())[None]
    faces = torch.tensor([[0, 1, 2]])
    attributes = torch.randn(1, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    raster, slopes = rasterizer.rasterize(positions, faces, 20, 24, True)
    fine = rasterizer.rasterize(positions, faces, 60, 72)
    _, along = rasterizer.interpolate(attributes, raster, faces, slopes)
    full = torch.nn.functional.max_pool2d((fine[..., 3] == 0).double(), 3, 1, 1) == 0
    full = full[0, 1::3, 1::3]
    assert full.sum() > 50
    values = rasterizer.interpolate(attributes, fine, faces)
    for picture, got in (
        (fine[..., :2], slopes.unflatten(-1, (2, 2)).transpose(-1, -2)),
        (values, along.unflatten(-1, (2, 4))),
    ):
        dx = (picture[0, 1::3, 2::3] - picture[0, 1::3, 0::3]) * 1.5
        dy = (picture[0, 2::3, 1::3] - picture[0, 0::3, 1::3]) * 1.5
        torch.testing.assert_close(got[0, full], torch.stack([dx, dy], -2)[full], rtol=0.02, atol=1e-4)


def test_gradients_by_finite_differences(backend):
    positions, faces = soup(torch.float64, 2, 6, seed=3)
    g = torch.Generator().manual_seed(0)
    weight = torch.randn(2, 7, 9, 3, generator=g, dtype=torch.float64)

    def weights_and_depth(p):
        return (rasterizer.rasterize(p, faces, 7, 9)[..., :3] * weight).sum((1, 2))

    assert torch.autograd.gradcheck(weights_and_depth, positions.requires_grad_(), eps=1e-7, atol=1e-4, rtol=1e-3)
    raster = rasterizer.rasterize(positions, faces, 7, 9).detach()
    attributes = torch.randn(2, 18, 3, generator=g, dtype=torch.float64).requires_grad_()

    def values(a, uv):
        return rasterizer.interpolate(a, torch.cat([uv, raster[..., 2:]], -1), faces)

    uv = raster[..., :2].clone().requires_grad_()
    assert torch.autograd.gradcheck(values, (attributes, uv))
    assert torch.autograd.gradcheck(values, (attributes[:1].detach().requires_grad_(), uv))


def test_texture_coordinates_have_vertices_of_their_own(backend):
    """The same raster with other attributes and the faces that index them."""
    raster = rasterizer.rasterize(TRIANGLE, torch.tensor([[0, 1, 2]]), 8, 8)
    uvs = torch.tensor([[[9.0, 9], [0, 0], [1, 0], [0, 1]]]).double()
    uv = rasterizer.interpolate(uvs, raster, torch.tensor([[1, 2, 3]]))
    torch.testing.assert_close(uv[0, 1, 2], torch.tensor([3 / 12, 1 / 12]).double())


@pytest.mark.parametrize(
    ("views", "vertices", "count", "height", "width"),
    [(0, 3, 1, 5, 4), (2, 0, 0, 5, 4), (2, 3, 0, 5, 4), (1, 3, 1, 0, 4), (1, 3, 1, 1, 1), (2, 3, 1, 67, 1)],
)
def test_nothing_and_little(backend, views, vertices, count, height, width):
    positions = torch.rand(views, vertices, 4).requires_grad_()
    faces = torch.arange(3 * count).view(-1, 3)
    raster, slopes = rasterizer.rasterize(positions, faces, height, width, True)
    values, along = rasterizer.interpolate(torch.rand(1, vertices, 3), raster, faces, slopes)
    smooth = rasterizer.antialias(values, raster, positions, faces)
    picture = rasterizer.texture(
        torch.rand(1, 2, 3, 2), values[..., :2], along.unflatten(-1, (2, 3))[..., :2].flatten(-2)
    )
    (raster.sum() + smooth.sum() + picture.sum()).backward()
    assert positions.grad.shape == positions.shape
    assert [x.shape[-1] for x in (raster, slopes, values, along, smooth, picture)] == [4, 4, 3, 6, 3, 2]
    assert all(x.shape[:3] == (views, height, width) for x in (raster, slopes, values, along, smooth, picture))


def test_gradients_do_not_depend_on_the_number_of_threads(compiled):
    positions, faces = soup(torch.float32, 1, 200)
    colour = torch.rand(1, 600, 3, generator=torch.Generator().manual_seed(0))
    threads, results = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            p, c = positions.clone().requires_grad_(), colour.clone().requires_grad_()
            raster = rasterizer.rasterize(p, faces, 60, 60)
            picture = rasterizer.antialias(rasterizer.interpolate(c, raster, faces), raster, p, faces)
            results.append([picture, *torch.autograd.grad(picture.square().sum(), [p, c])])
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


def test_what_a_caller_can_get_wrong(backend):
    positions, faces = soup(torch.float32)
    raster = rasterizer.rasterize(positions, faces, 4, 4)
    with pytest.raises(ValueError, match="3 views"):
        rasterizer.interpolate(torch.rand(3, 9, 2), raster, faces)
    with pytest.raises(ValueError, match="wrap"):
        rasterizer.texture(torch.rand(1, 2, 2, 3), raster[..., :2], wrap="mirror")
    with pytest.raises(ValueError, match="picture"):
        rasterizer.texture(torch.rand(1, 0, 2, 3), raster[..., :2])
    with pytest.raises(UserError, match="--rasterizer metal: .*own or nvdiffrast"):
        rasterizer.backend("metal")
    assert rasterizer.interpolate(torch.rand(1, 180, 2).half(), raster, faces.int()).dtype == torch.float32
