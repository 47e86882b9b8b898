"""Textures by hand and against the twin; and nvdiffrast's conventions, with a stand-in for that library."""

import sys
import types

import pytest
import torch
from test_rasterizer import backend, compiled, soup  # noqa: F401

import rasterizer
from errors import UserError
from rasterizer import reference


def numbers(h, w, channels=1):
    """A picture [1, h, w, C] whose texels are all different."""
    return torch.arange(h * w * channels, dtype=torch.float64).view(1, h, w, channels)


def at(points):
    """Texture coordinates [1, 1, N, 2]."""
    return torch.tensor(points, dtype=torch.float64)[None, None]


@pytest.mark.parametrize("wrap", ["wrap", "clamp"])
def test_the_centre_of_a_texel_shows_the_texel(backend, wrap):  # noqa: F811
    """Row 0 is at the top, v = 0; u runs to the right."""
    picture = numbers(3, 5, 2)
    u, v = (torch.arange(5) + 0.5) / 5, (torch.arange(3) + 0.5) / 3
    uv = torch.stack([u.expand(3, 5), v[:, None].expand(3, 5)], -1)[None].double()
    torch.testing.assert_close(rasterizer.texture(picture, uv, wrap=wrap), picture, rtol=0, atol=1e-5)


def test_between_texels_and_beyond_the_border(backend):  # noqa: F811
    picture = torch.tensor([[1.0, 2], [3, 5]], dtype=torch.float64).view(1, 2, 2, 1)
    points = [(0.5, 0.5), (0.375, 0.25), (0, 0.25), (1, 0.25), (-0.25, 0.25), (7.25, -3.25), (0.25, 1.0)]
    for wrap, expected in {
        "wrap": [2.75, 1.25, 1.5, 1.5, 2, 3, 2],
        "clamp": [2.75, 1.25, 1, 2, 1, 2, 3],
    }.items():
        out = rasterizer.texture(picture, at(points), wrap=wrap).flatten()
        torch.testing.assert_close(out, torch.tensor(expected).double())


def test_what_has_no_place_shows_nothing(backend):  # noqa: F811
    uv = at([(float("nan"), 0.5), (0.5, float("inf")), (0.5, 0.5)]).requires_grad_()
    picture = numbers(4, 4).requires_grad_()
    out = rasterizer.texture(picture, uv)
    assert out.flatten().tolist() == [0, 0, 7.5]
    for gradient in torch.autograd.grad(out.sum(), [picture, uv]):
        assert gradient.isfinite().all() and gradient.sum() != 0


def test_a_chain_of_averages():
    chain = reference.mip_chain(numbers(4, 6))
    assert [tuple(level.shape[1:3]) for level in chain] == [(4, 6), (2, 3), (1, 2), (1, 1)]
    assert chain[1][0, ..., 0].tolist() == [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]]
    assert chain[2][0, ..., 0].tolist() == [[10.5, 13.5]]  # the odd column stays alone


def test_far_away_a_texture_is_its_average(backend):  # noqa: F811
    """A pixel as wide as 2^k texels looks at level k, one between two levels at both; the longer side decides."""
    picture = torch.rand(1, 8, 8, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    chain = reference.mip_chain(picture)
    uv = at([(0.3, 0.6)])
    levels = [rasterizer.texture(level, uv).item() for level in chain]
    for texels, expected in {
        0.5: levels[0],
        1: levels[0],
        2: levels[1],
        2 * 2**0.5: (levels[1] + levels[2]) / 2,
        8: picture.mean().item(),
        1e9: picture.mean().item(),
    }.items():
        for slopes in [texels / 8, 0, 0, 0], [0.01, 0, 0, texels / 8], [0, 0, texels / 8 * 0.6, -texels / 8 * 0.8]:
            out = rasterizer.texture(picture, uv, torch.tensor(slopes, dtype=torch.float64).view(1, 1, 1, 4))
            assert out.item() == pytest.approx(expected), (texels, slopes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pictures", [1, 2])
@pytest.mark.parametrize("wrap", ["wrap", "clamp"])
def test_compiled_equals_its_twin(compiled, dtype, pictures, wrap):  # noqa: F811
    g = torch.Generator().manual_seed(0)
    picture = torch.rand(pictures, 13, 22, 3, generator=g, dtype=dtype)
    uv = torch.rand(2, 9, 17, 2, generator=g, dtype=dtype) * 3 - 1
    slopes = torch.randn(2, 9, 17, 4, generator=g, dtype=dtype).exp() * 0.05
    weight = torch.randn(2, 9, 17, 3, generator=g, dtype=dtype)
    for uv_da in None, slopes:
        results = []
        for package in rasterizer, reference:
            leaves = [picture.clone().requires_grad_(), uv.clone().requires_grad_()]
            out = package.texture(*leaves, uv_da, wrap)
            results.append([out, *torch.autograd.grad(out, leaves, weight)])
        for fast, plain in zip(*results, strict=True):
            close = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {}
            torch.testing.assert_close(fast, plain, **close)


@pytest.mark.parametrize("wrap", ["wrap", "clamp"])
def test_gradients_by_finite_differences(backend, wrap):  # noqa: F811
    g = torch.Generator().manual_seed(0)
    picture = torch.rand(1, 5, 4, 2, generator=g, dtype=torch.float64).requires_grad_()
    uv = (torch.rand(2, 2, 3, 2, generator=g, dtype=torch.float64) * 2 - 0.5).requires_grad_()
    slopes = torch.rand(2, 2, 3, 4, generator=g, dtype=torch.float64)
    for uv_da in None, slopes:
        assert torch.autograd.gradcheck(lambda p, x, da=uv_da: rasterizer.texture(p, x, da, wrap), (picture, uv))


class StandIn(types.ModuleType):
    """A library with nvdiffrast's functions and conventions: rows from the bottom to the top, d/dX and d/dY in turns."""

    def __init__(self):
        super().__init__("nvdiffrast.torch")
        self.calls = []

    def rasterize(self, context, pos, tri, resolution, grad_db=True):
        assert context == "context" and pos.dtype == torch.float32 and tri.dtype == torch.int32
        self.calls.append(("rasterize", tuple(resolution), grad_db))
        raster, slopes = rasterizer.rasterize(pos, tri, *resolution, True)
        return raster.flip(1), (slopes * torch.tensor([1, -1, 1, -1])).flip(1)

    def interpolate(self, attr, rast, tri, rast_db=None, diff_attrs=None):
        if rast_db is None:
            return rasterizer.interpolate(attr, rast, tri), None
        assert diff_attrs == "all"
        out, slopes = rasterizer.interpolate(attr, rast, tri, rast_db)
        return out, torch.stack(slopes.chunk(2, -1), -1).flatten(-2)

    def texture(self, tex, uv, uv_da=None, filter_mode="auto", boundary_mode="wrap"):
        self.calls.append(("texture", filter_mode, boundary_mode))
        slopes = None if uv_da is None else torch.cat([uv_da[..., 0::2], uv_da[..., 1::2]], -1)
        return rasterizer.texture(tex, uv, slopes, boundary_mode)

    def antialias_construct_topology_hash(self, tri):
        assert tri.dtype == torch.int32
        return rasterizer.edges_of(tri)

    def antialias(self, color, rast, pos, tri, topology_hash=None):
        return rasterizer.antialias(color.flip(1), rast.flip(1), pos, tri, topology_hash).flip(1)


def test_nvdiffrast_gives_what_the_own_rasteriser_gives(monkeypatch):
    library, package = StandIn(), types.ModuleType("nvdiffrast")
    package.torch = library
    monkeypatch.setitem(sys.modules, "nvdiffrast", package)
    monkeypatch.setitem(sys.modules, "nvdiffrast.torch", library)
    positions, faces = soup(torch.float32, 2)
    g = torch.Generator().manual_seed(0)
    attributes = torch.rand(1, positions.shape[1], 2, generator=g)
    picture = torch.rand(1, 16, 16, 3, generator=g)
    theirs = rasterizer.backend("nvdiffrast")
    with pytest.raises(UserError, match="CUDA, not on cpu.*--rasterizer own"):
        theirs.rasterize(positions, faces, 20, 30)
    theirs.contexts[torch.device("cpu")] = "context"
    results = []
    for package in rasterizer.backend("own"), theirs:
        p = positions.clone().requires_grad_()
        raster, slopes = package.rasterize(p, faces, 20, 30, derivatives=True)
        uv, uv_da = package.interpolate(attributes, raster, faces, slopes)
        plain = package.interpolate(attributes, package.rasterize(p, faces, 20, 30), faces)
        colour = package.texture(picture, uv, uv_da)
        near = package.texture(picture, uv, wrap="clamp")
        out = package.antialias(colour, raster, p, faces, package.edges_of(faces))
        (gradient,) = torch.autograd.grad(out.square().sum(), p)
        results.append([raster, slopes, uv, uv_da, plain, colour, near, out, gradient / gradient.abs().max()])
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(other, own, rtol=1e-3, atol=1e-4)
    assert library.calls == [
        *[("rasterize", (20, 30), True), ("rasterize", (20, 30), False)],
        *[("texture", "linear-mipmap-linear", "wrap"), ("texture", "linear", "clamp")],
    ]


def test_nvdiffrast_is_optional(monkeypatch):
    monkeypatch.setitem(sys.modules, "nvdiffrast", None)
    monkeypatch.delitem(sys.modules, "nvdiffrast.torch", raising=False)
    with pytest.raises(UserError, match="--rasterizer nvdiffrast: .*not installed"):
        rasterizer.backend("nvdiffrast")
