"""Each regulariser against numbers worked out by hand, and that only active ones are computed."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from gridencoder import GridEncoder
from nerf.losses import (
    center_of_mass,
    convexity,
    emptiness,
    entropy,
    normal_smooth_2d,
    normal_smooth_3d,
    opacity,
    opaque,
    orientation,
    regularise_gradients,
    regularisers,
    sparsity,
    z_variance,
)
from nerf.provider import orbit
from nerf.renderer import Render

NAMES = ("entropy", "opacity", "orient", "2d_normal_smooth", "3d_normal_smooth", "zvar", "center", "tv", "wd")
NAMES += ("mesh_normal", "mesh_laplacian", "sparsity", "opaque", "emptiness", "convex", "eikonal", "shape")


def picture(weights, rays, height, width, **values):
    """A render of H x W pixels with these samples, alpha summed from their weights."""
    weights, rays = torch.tensor(weights), torch.tensor(rays, dtype=torch.int32)
    owner = torch.repeat_interleave(torch.arange(len(rays)), rays[:, 1].long())
    alpha = torch.zeros(len(rays)).index_add(0, owner, weights).reshape(-1, height, width, 1)
    cameras = orbit(torch.full((len(alpha),), 90.0), 0.0, 3.0, 30.0, height, width)
    values = {name: torch.tensor(value) if isinstance(value, list) else value for name, value in values.items()}
    return Render(alpha.expand(-1, -1, -1, 3), alpha, alpha, None, cameras, len(weights), weights, rays=rays, **values)


class Scene(torch.nn.Module):
    """Something with just these attributes."""

    def __init__(self, **values):
        super().__init__()
        self.__dict__.update(values)


def options(**active):
    values = {name: active.get(name, 0.0) for name in NAMES}
    return SimpleNamespace(**{f"lambda_{name}": lambda step, value=value: value for name, value in values.items()})


def test_entropy():
    """Binary entropy in bits: 1 at 1/2, 0.8113 at 1/4; nothing at 0 and 1."""
    render = picture([0.5, 0.25, 1.0, 0.0], [[0, 2], [2, 2]], 1, 2)
    assert math.isclose(float(entropy(render)), (1 + 0.811278) / 4, rel_tol=1e-3)
    sure = picture([1.0, 0.0], [[0, 1], [1, 1]], 1, 2)
    assert float(entropy(sure)) < 2e-4


def test_opacity():
    assert math.isclose(
        float(opacity(picture([0.5, 0.25, 0.2], [[0, 2], [2, 1]], 1, 2))), (0.75**2 + 0.2**2) / 2, rel_tol=1e-6
    )


def test_z_variance():
    """Two samples of weights 0.6 and 0.2 at depths 1 and 2: shares 3/4 and 1/4, variance 3/16; a ray less than half covered does not
    count, nor does the height above the ray."""
    positions = [[0.0, 0.0, -1.0], [0.3, 0.0, -2.0], [0.0, 0.0, 0.0], [0.0, 0.0, -9.0]]
    directions = torch.tensor([[0.0, 0.0, -1.0]]).expand(4, 3)
    render = picture([0.6, 0.2, 0.1, 0.3], [[0, 2], [2, 2]], 1, 2, positions=positions, directions=directions)
    weights = render.weights.clone().requires_grad_()
    loss = z_variance(replace(render, weights=weights))
    assert math.isclose(loss.item(), 3 / 16, rel_tol=1e-5)
    loss.backward()
    assert weights.grad[1] > 0 and torch.equal(weights.grad[2:], torch.zeros(2))
    thin = picture([0.1, 0.1], [[0, 2]], 1, 1, positions=positions[:2], directions=directions[:2])
    assert float(z_variance(thin)) == 0


def test_orientation():
    """Only the part of a normal along the ray counts, and only the normals learn."""
    normals = torch.tensor([[0.0, 0.6, -0.8], [0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], requires_grad=True)
    directions = torch.tensor([[0.0, 0.0, -1.0]]).expand(3, 3)
    render = picture([0.5, 0.5, 1.0], [[0, 3]], 1, 1, normals=normals, directions=directions)
    render = replace(render, weights=render.weights.requires_grad_(True))
    loss = orientation(render)
    assert math.isclose(loss.item(), 0.5 * 0.64 / 3, rel_tol=1e-6)
    loss.backward()
    assert render.weights.grad is None
    assert (
        torch.allclose(normals.grad[0], torch.tensor([0.0, 0.0, -2 * 0.5 * 0.8 / 3])) and (normals.grad[1:] == 0).all()
    )


def test_normal_smooth_2d():
    """Pixels of (n + 1) / 2: (1, .5, .5) | (.5, 1, .5) over (1, .5, .5) | empty."""
    normals = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    render = picture([1.0, 1.0, 1.0], [[0, 1], [1, 1], [2, 1], [3, 0]], 2, 2, normals=normals)
    down = (0 + (0.25 + 1 + 0.25)) / 6
    across = ((0.25 + 0.25) + (1 + 0.25 + 0.25)) / 6
    assert math.isclose(float(normal_smooth_2d(render)), down + across, rel_tol=1e-6)


def test_normal_smooth_3d():
    """Against a scene whose normals are constant: the mean difference, whatever the shift; the shift repeats."""
    asked = []

    def normal(x):
        asked.append(x)
        return torch.tensor([0.0, 0.0, 1.0]).expand_as(x)

    scene = Scene(normal=normal, bound=1.0)
    normals, positions = [[0.0, 0.0, 1.0], [1.0, 0.0, 0.0]], [[0.2, 0.0, 0.0], [1.0, 0.5, 0.0]]
    for _ in range(2):
        generator = torch.Generator().manual_seed(0)
        render = picture([1.0, 1.0], [[0, 2]], 1, 1, normals=normals, positions=positions, generator=generator)
        assert math.isclose(float(normal_smooth_3d(render, scene)), 2 / 6, rel_tol=1e-6)
    shift = asked[0] - torch.tensor(positions)
    assert torch.equal(asked[0], asked[1]) and 0.001 < shift.abs().mean() < 0.02 and asked[0].max() <= 1


def test_center_of_mass():
    """Two samples at x = 0.4 (weight 1) and x = 0.1 (weight 3): centre 0.175. Distance along the view does not count."""
    positions = [[0.4, 0.0, 0.9], [0.1, 0.0, 0.9]]
    render = picture([1.0, 3.0], [[0, 1], [1, 1]], 1, 2, positions=positions)
    assert math.isclose(float(center_of_mass(render)), 0.175**2, rel_tol=1e-5)
    both = picture(
        [1.0, 3.0, 1.0, 0.0], [[0, 1], [1, 1], [2, 1], [3, 1]], 1, 2, positions=positions + [[0.0, 0.2, 0.0]] * 2
    )
    assert math.isclose(float(center_of_mass(both)), (0.175**2 + 0.2**2) / 2, rel_tol=1e-5)


def test_center_of_mass_pulls_back():
    render = picture([0.5, 0.5], [[0, 1], [1, 1]], 1, 2, positions=[[0.5, 0.0, 0.0], [0.0, 0.0, 0.0]])
    render = replace(render, weights=render.weights.requires_grad_(True))
    center_of_mass(render).backward()
    assert render.weights.grad[0] > 0 > render.weights.grad[1]  # less there, more here


def test_nothing_to_see():
    """No sample at all: zeros that can be differentiated."""
    none = torch.zeros(0, 3, requires_grad=True)
    render = picture([], [[0, 0]] * 4, 2, 2, normals=none, directions=none, positions=none)
    assert [loss(render).item() for loss in (entropy, opacity, orientation, normal_smooth_2d, center_of_mass)] == [
        0
    ] * 5


def test_only_active_losses_weighted():
    render = picture([0.5, 0.25], [[0, 1], [1, 1]], 1, 2)
    assert regularisers(options(), 0, Scene(), render) == {}
    got = regularisers(options(entropy=2.0, opacity=3.0, orient=1.0), 0, Scene(), render)
    assert set(got) == {"entropy", "opacity"}  # no normals in this picture
    assert math.isclose(float(got["opacity"]), 3 * float(opacity(render)), rel_tol=1e-6)
    assert math.isclose(float(got["entropy"]), 2 * float(entropy(render)), rel_tol=1e-6)


def test_threestudio_s_values():
    """Golden values of the reference: sparsity 0.1 at alpha 0, opaque ln 2 at 1/2; emptiness by hand."""
    empty, half = picture([0.0], [[0, 1]], 1, 1), picture([0.5], [[0, 1]], 1, 1)
    assert float(sparsity(empty)) == pytest.approx(0.1) and float(sparsity(half)) == pytest.approx(math.sqrt(0.26))
    assert float(opaque(half)) == pytest.approx(math.log(2))
    assert float(opaque(empty)) == pytest.approx(-0.001 * math.log(0.001) - 0.999 * math.log(0.999), rel=1e-4)
    both = picture([0.5, 0.25], [[0, 1], [1, 1]], 1, 2)
    assert float(emptiness(both)) == pytest.approx((math.log(6) + math.log(3.5)) / 2)


@pytest.mark.parametrize("azimuth", [0.0, 130.0])
def test_a_ball_is_convex_and_a_bowl_is_not_from_every_side(azimuth):
    cameras = orbit(70.0, azimuth, 3.0, 30.0, 32, 32)
    x, y = torch.meshgrid(torch.linspace(-0.6, 0.6, 32), torch.linspace(0.6, -0.6, 32), indexing="xy")
    found = []
    for sign in (1, -1):
        local = torch.stack([sign * x, sign * y, (1 - x**2 - y**2).sqrt()], -1)
        render = picture([0.0], [[0, 1]], 1, 1)
        render.cameras, render.normal = cameras, (local @ cameras.c2w[0, :3, :3].T)[None]
        found.append(float(convexity(render)))
    assert found[0] < -0.1 and found[1] == pytest.approx(-found[0], rel=1e-4)


def test_a_mesh_has_losses_of_its_own():
    """Two triangles at a right angle: 1 - cos 90; every vertex has the others as neighbours, or the two of the fold."""
    vertices = torch.tensor([[0.0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 1]])
    surface = SimpleNamespace(vertices=vertices, faces=torch.tensor([[0, 1, 2], [1, 0, 3]]))
    render = picture([0.5, 0.25], [[0, 1], [1, 1]], 1, 2)
    render.weights, render.surface = None, surface
    every = dict.fromkeys(NAMES, 1.0) | {"mesh_normal": 2.0}
    got = regularisers(options(**every), 0, Scene(), render)
    assert set(got) == {"opacity", "sparsity", "opaque", "mesh_normal", "mesh_laplacian"}
    assert float(got["mesh_normal"]) == pytest.approx(2)


def test_weights_follow_the_step():
    render = picture([0.5], [[0, 1]], 1, 1)
    opt = options()
    opt.lambda_opacity = lambda step: step / 100
    assert regularisers(opt, 0, Scene(), render) == {}
    assert float(regularisers(opt, 50, Scene(), render)["opacity"]) == pytest.approx(0.125)


def test_grid_gradients():
    """Nothing without weights; else decay as it is and, on average over steps, the variation of a million points."""
    encoder = GridEncoder(num_levels=2, base_resolution=4, desired_resolution=8, log2_hashmap_size=9)
    scene = Scene(encoder=encoder, bound=2.0)
    torch.nn.init.normal_(encoder.embeddings, generator=torch.Generator().manual_seed(0))
    regularise_gradients(options(), 0, scene)
    assert encoder.embeddings.grad is None
    regularise_gradients(options(wd=0.1), 0, scene)
    encoder.embeddings.grad, decay = None, encoder.embeddings.grad
    encoder.grad_weight_decay(0.1)
    assert torch.equal(decay, encoder.embeddings.grad)

    encoder.embeddings.grad = None
    for step in range(400):
        regularise_gradients(options(tv=0.5), step, scene)
    mean, encoder.embeddings.grad = encoder.embeddings.grad / 400, None
    encoder.grad_total_variation(0.5, bound=2.0, generator=torch.Generator().manual_seed(0))
    expected = encoder.embeddings.grad
    assert torch.nn.functional.cosine_similarity(mean.flatten(), expected.flatten(), 0) > 0.99
    assert math.isclose(mean.norm(), expected.norm(), rel_tol=0.05)
    encoder.embeddings.grad = None
    regularise_gradients(options(tv=0.5), 3, scene)
    first, encoder.embeddings.grad = encoder.embeddings.grad, None
    regularise_gradients(options(tv=0.5), 3, scene)
    assert torch.equal(encoder.embeddings.grad, first)
