"""Physically based shading: white stays white, mirrors look the right way, and the table is the integral it stands for."""

import math

import pytest
import torch
from torch.nn import functional as F

from mesh.environment import load_environment, prefilter, sphere
from mesh.export import srgb_to_linear as decode_array
from mesh.material import (
    brdf,
    brdf_table,
    in_tangent_space,
    linear_to_srgb,
    perturb_normal,
    radiance,
    shade_pbr,
    srgb_to_linear,
)

UP, RIGHT, FRONT = torch.eye(3)[[1, 0, 2]]


def _inputs(count, dtype=torch.float32, seed=0):
    """albedo, roughness, metallic, normal, view: normals within 80 degrees of the view."""
    generator = torch.Generator().manual_seed(seed)
    like = {"generator": generator, "dtype": dtype}
    view = F.normalize(torch.randn(count, 3, **like), dim=1)
    normal = F.normalize(torch.randn(count, 3, **like), dim=1)
    normal = F.normalize(normal + (0.2 - (normal * view).sum(1, keepdim=True)).clamp(min=0) * view, dim=1)
    return [torch.rand(count, n, **like) * 0.8 + 0.1 for n in (3, 1, 1)] + [normal, view]


@pytest.fixture(scope="module")
def white():
    return load_environment("white")


def test_white_furnace(white):
    """In uniform light 1: white metal is exactly 1 at any roughness; matte paint of albedo a under a clear coat is a (1 - E) + E."""
    albedo, roughness, _, normal, view = _inputs(2000)
    one = torch.ones_like(roughness)
    found = radiance(torch.ones_like(albedo), roughness, one, normal, view, white)
    assert torch.allclose(found, torch.ones_like(found), atol=1e-4)
    a, b = brdf((normal * view).sum(1, keepdim=True), roughness).split(1, 1)
    coat = (0.04 * a + b) * (1 + 0.04 * (1 / (a + b) - 1))
    assert 0.015 < float(coat.min()) and float(coat.max()) < 0.4
    found = radiance(albedo, roughness, 0 * one, normal, view, white)
    assert torch.allclose(found, albedo * (1 - coat) + coat, atol=1e-4)
    assert float(radiance(torch.ones_like(albedo), roughness, 0 * one, normal, view, white).max()) < 1.0001
    gold = radiance(albedo, 0.1 * one, one, view, view, white)  # head-on a smooth metal shows its colour
    assert torch.allclose(gold, albedo, atol=0.005)


@pytest.mark.parametrize("roughness", [0.4, 0.7, 1.0])
@pytest.mark.parametrize("nv", [0.15, 0.6, 1.0])
def test_table_against_a_monte_carlo_integral(roughness, nv):
    """Uniform directions over the hemisphere; D, G and F as the textbooks write them."""
    generator = torch.Generator().manual_seed(0)
    alpha = roughness**2
    nl = torch.rand(400_000, dtype=torch.float64, generator=generator)
    turn = 2 * math.pi * torch.rand(nl.shape, dtype=torch.float64, generator=generator)
    side = (1 - nl**2).sqrt()
    l = torch.stack([side * turn.cos(), side * turn.sin(), nl], 1)
    v = torch.tensor([math.sqrt(1 - nv**2), 0, nv], dtype=torch.float64)
    h = F.normalize(l + v, dim=1)
    d = alpha**2 / (math.pi * (h[:, 2] ** 2 * (alpha**2 - 1) + 1) ** 2)

    def smith(cosine):
        return (torch.sqrt(1 + alpha**2 * (1 - cosine**2) / cosine**2) - 1) / 2

    g = 1 / (1 + smith(nl) + smith(torch.tensor(nv, dtype=torch.float64)))
    value = d * g / (4 * nl * nv) * nl * 2 * math.pi
    fresnel = (1 - h @ v) ** 5
    wanted = torch.stack([((1 - fresnel) * value).mean(), (fresnel * value).mean()])
    found = brdf(torch.tensor([[nv]]), torch.tensor([[roughness]]))[0].double()
    assert torch.allclose(found, wanted, atol=0.006)


def test_table_is_bounded():
    total = brdf_table().sum(0)
    assert float(total.max()) <= 1 + 1e-6 and float(brdf_table().min()) >= 0
    assert float(total[-1, -1]) == pytest.approx(1 - math.log(2), abs=0.005)  # alpha = 1, head-on, in closed form
    assert float(total[0, 1:].min()) > 0.99


def test_mirror_is_not_mirrored():
    """A light at +x on a mirror ball seen from the front: the highlight is where the normal is halfway, on the picture's right."""
    picture = torch.zeros(32, 64, 3)
    picture[15:17, 47:49] = 50.0
    environment = prefilter(picture)
    x, y = torch.meshgrid(torch.linspace(-1, 1, 41), torch.linspace(-1, 1, 41), indexing="xy")
    on = (x**2 + y**2) < 0.95
    normal = torch.stack([x, y, (1 - x**2 - y**2).clamp(min=0).sqrt()], -1)[on]
    ones = torch.ones_like(normal[:, :1])
    colour = radiance(ones.expand(-1, 3), 0.1 * ones, ones, normal, FRONT.expand_as(normal), environment)[:, 0]
    best = normal[colour.argmax()]
    assert torch.allclose(best, F.normalize(RIGHT + FRONT, dim=0), atol=0.06)
    matte = radiance(ones.expand(-1, 3), ones, 0 * ones, normal, FRONT.expand_as(normal), environment)[:, 0]
    assert float(matte[normal[:, 0] > 0.5].mean()) > 20 * float(matte[normal[:, 0] < -0.1].mean())


def test_metal_colours_its_highlight_and_plastic_does_not():
    environment = load_environment("white")
    red = torch.tensor([[1.0, 0.0, 0.0]])
    one, view = torch.ones(1, 1), FRONT[None]
    metal = radiance(red, 0.1 * one, one, view, view, environment)[0]
    assert metal[0] > 0.99 and metal[1] < 0.01
    black = radiance(0 * red, 0.1 * one, 0 * one, view, view, environment)[0]
    assert torch.allclose(black, torch.full((3,), 0.04), atol=0.002)


def test_values_are_srgb_coded(white):
    albedo, roughness, metallic, normal, view = _inputs(100)
    linear = radiance(srgb_to_linear(albedo), roughness, metallic, normal, view, white)
    assert torch.allclose(shade_pbr(albedo, roughness, metallic, normal, view, white), linear_to_srgb(linear))
    bright = load_environment("white", scale=30.0)
    assert float(shade_pbr(albedo, roughness, metallic, normal, view, bright).max()) == pytest.approx(1)


def test_srgb():
    value = torch.linspace(0, 1, 1001, dtype=torch.float64, requires_grad=True)
    assert torch.allclose(srgb_to_linear(value).detach(), torch.from_numpy(decode_array(value.detach().numpy())))
    assert torch.allclose(linear_to_srgb(srgb_to_linear(value)), value, atol=1e-7)
    (slope,) = torch.autograd.grad(linear_to_srgb(value).sum(), value)
    assert float(slope[0].detach()) == pytest.approx(12.92) and bool(torch.isfinite(slope).all())


def test_gradients():
    directions, _ = sphere(32, 64)
    environment = prefilter(
        (1.2 + directions @ torch.tensor([0.3, 0.6, -0.5]))[..., None] * torch.tensor([0.4, 0.5, 0.3])
    )
    inputs = [value.requires_grad_() for value in _inputs(6, torch.float64, seed=3)]
    assert torch.autograd.gradcheck(lambda *values: shade_pbr(*values, environment), inputs, eps=1e-7, atol=1e-4)


def test_pixels_without_a_surface_do_no_harm(white):
    inputs = [torch.zeros(4, n, requires_grad=True) for n in (3, 1, 1, 3, 3)]
    colour = shade_pbr(*inputs, white)
    colour.sum().backward()
    assert bool(torch.isfinite(colour).all())
    assert all(float(value.grad.abs().max()) < 1e3 for value in inputs if value.grad is not None)


def test_pictures_of_any_shape(white):
    inputs = [value.reshape(2, 3, 4, -1) for value in _inputs(24)]
    colour = shade_pbr(*inputs, white)
    assert torch.allclose(colour.reshape(24, 3), shade_pbr(*_inputs(24), white))


def test_perturbed_normals():
    _, _, _, normal, tangent = _inputs(200)
    bump = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    still = torch.full_like(bump, 0.5)
    for frame in (None, tangent):
        assert torch.allclose(perturb_normal(normal, still, frame), normal, atol=1e-6)
        found = perturb_normal(3 * normal, bump, frame)
        assert torch.allclose(found.norm(dim=1), torch.ones(200), atol=1e-5)
        assert float((found * normal).sum(1).min()) > 0
    # x along the tangent, y along n x t; b = normalize(0.6, -0.2, 1), the third component cut at 1.
    found = perturb_normal(UP[None], torch.tensor([[0.8, 0.4, 0.9]]), RIGHT[None])
    wanted = F.normalize(0.6 * RIGHT - 0.2 * torch.linalg.cross(UP, RIGHT) + UP, dim=0)
    assert torch.allclose(found[0], wanted)
    world = perturb_normal(UP[None], torch.tensor([[0.8, 0.1, 0.4]]))
    assert torch.allclose(world[0], F.normalize(torch.tensor([0.6, 1.0, -0.2]), dim=0))


def test_normal_maps_hold_what_was_shaded():
    _, _, _, normal, tangent = _inputs(200)
    bump = torch.rand(200, 3, generator=torch.Generator().manual_seed(1))
    coded = in_tangent_space(perturb_normal(normal, bump, tangent), normal, tangent)
    b = F.normalize((2 * bump - 1 + torch.tensor([0.0, 0, 1])).clamp(-1, 1), dim=1)
    assert torch.allclose(2 * coded - 1, b, atol=1e-5)
    assert torch.allclose(in_tangent_space(normal, normal, tangent), torch.tensor([0.5, 0.5, 1.0]), atol=1e-5)
