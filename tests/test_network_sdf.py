"""The field of signed distances: its density, what it starts as, its normals, and what makes it a distance."""

import math

import pytest
import torch

from nerf.losses import regularisers
from nerf.network_sdf import SHARPEST, NeRFNetwork
from nerf.provider import orbit
from nerf.renderer import Render

QUIET = ("--lambda_entropy", 0, "--lambda_opacity", 0, "--lambda_orient", 0, "--lambda_center", 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, reach=0.9, seed=0):
    return reach * (2 * torch.rand(count, 3, generator=seeded(seed)) - 1)


def build(options, *flags, rough=0.0):
    """A field; `rough` gives its table features and its distance a residual, as after some training."""
    torch.manual_seed(0)
    scene = NeRFNetwork(options("--backbone", "sdf", *flags))
    if rough:
        with torch.no_grad():
            scene.encoder.embeddings.uniform_(-rough, rough, generator=seeded())
            scene.trunk[-1].weight[:1].uniform_(-0.3, 0.3, generator=seeded(1))
    return scene


def sampled(x):
    """A render that consists of these samples alone."""
    none = torch.zeros(1, 1, 1, 1)
    cameras = orbit(90.0, 0.0, 3.0, 30.0, 1, 1)
    return Render(
        none.expand(1, 1, 1, 3), none, none, None, cameras, len(x), torch.zeros(len(x)), x, generator=seeded()
    )


def eikonal(options, render, scene):
    """The regulariser alone, as training adds it up."""
    return regularisers(options("--backbone", "sdf", "--lambda_eikonal", 1, *QUIET), 0, scene, render)["eikonal"]


def test_density_is_that_of_volsdf(options):
    """1 / (2 beta) on the surface, else the Laplace distribution's share below -s, over beta; and beta learns."""
    scene = build(options, "--sdf_beta", 0.1)
    assert math.isclose(scene.beta.item(), 0.1, rel_tol=1e-5)
    s = torch.tensor([0.0, 0.2, -0.2, -3.0, 9.0])
    half = 0.5 * math.exp(-2)
    expected = torch.tensor([5.0, 10 * half, 10 * (1 - half), 10.0, 0.0])
    assert torch.allclose(scene._sigma(-s), expected, atol=1e-4)
    line = torch.zeros(5, 3)
    line[:, 0] = 0.5 + torch.tensor([-0.3, -0.1, 0.0, 0.1, 0.3])  # from the middle outward through the ball
    assert torch.allclose(scene.sigma(line), scene._sigma(torch.tensor([0.3, 0.1, 0.0, -0.1, -0.3])), atol=1e-4)

    scene.sigma(line[2:3]).sum().backward()
    beta = scene.beta.item()  # on the surface: d(1 / (2 beta)) = -1 / (2 beta^2) dbeta, dbeta = -(beta - 0.001) dv
    assert math.isclose(scene.sharpness.grad.item(), (beta - 1e-3) / (2 * beta**2), rel_tol=1e-3)
    with torch.no_grad():
        scene.sharpness.fill_(50.0)
    assert scene.beta.item() >= 1e-3 and torch.isfinite(scene.sigma(points(50))).all()


@pytest.mark.parametrize("kind", ["analytic", "finite"])
def test_begins_as_the_shape(options, kind):
    """Negative inside; the gradient has length 1 and points outward; so do the normals."""
    scene = build(options, "--shape_init", "box 0.3 0.5 0.2", "--normals", kind)
    x = torch.tensor([[0.0, 0.0, 0.0], [0.6, 0.1, 0.05], [0.1, -0.8, 0.1], [0.0, 0.1, 0.15], [0.0, 0.1, 0.95]])
    assert torch.allclose(scene.sdf(x), torch.tensor([-0.2, 0.3, 0.3, -0.05, 0.75]), atol=1e-5)
    outward = torch.tensor([[1.0, 0, 0], [0, -1.0, 0], [0, 0, 1.0], [0, 0, 1.0]])
    assert torch.allclose(scene.sdf_gradient(x[1:]), outward, atol=1e-4)
    assert torch.allclose(scene.normal(x[1:]), outward, atol=1e-4)
    assert torch.isfinite(scene.normal(torch.zeros(1, 3))).all()


def test_both_gradients_agree(options):
    """On a field that is smooth over the finite one's cell."""
    flags = ("--num_levels", 2, "--base_resolution", 4, "--desired_resolution", 64)
    analytic, finite = (build(options, *flags, "--normals", kind, rough=1.0) for kind in ("analytic", "finite"))
    with torch.no_grad():
        analytic.encoder.embeddings[analytic.encoder.spec.levels[1].offset :] = 0
    finite.load_state_dict(analytic.state_dict())
    x = points(300)
    a, f = analytic.sdf_gradient(x), finite.sdf_gradient(x)
    bent = (
        (a - x / x.norm(dim=-1, keepdim=True)).norm(dim=-1).mean()
    )  # by the residual; the shape's own gradient is easy
    assert bent > 0.05 and (a - f).norm(dim=-1).mean() < 0.15 * bent
    with torch.no_grad():
        still = analytic.sdf_gradient(x)
    assert not still.requires_grad and torch.allclose(still, a, atol=1e-6)


def test_finite_step_is_a_cell_of_the_finest_level_in_use(options, monkeypatch):
    """16 and 32 vertices in a box of 2: taps at 1/8, later at 1/16; none leaves the box, where the grid knows nothing."""
    flags = ("--num_levels", 2, "--base_resolution", 16, "--desired_resolution", 32, "--normals", "finite")
    scene = build(options, *flags)
    asked = []
    raw = scene._raw
    monkeypatch.setattr(scene, "_raw", lambda x: asked.append(x) or raw(x))
    for level, tap in (0.5, 1 / 8), (None, 1 / 16):
        scene.max_level = level
        scene.sdf_gradient(torch.tensor([[0.1, 0.2, 0.3]]))
        ahead, behind = asked.pop().reshape(2, 3, 3)
        assert torch.allclose(ahead - behind, 2 * tap * torch.eye(3), atol=1e-6)
        scene.sdf_gradient(torch.tensor([[1.0, -1.0, 0.0]]))
        assert asked.pop().abs().max() <= 1


def test_eikonal(options, monkeypatch):
    """Of a distance 0; of twice a distance 1; and it asks in empty space too."""
    scene = build(options)
    x = points(500)
    assert eikonal(options, sampled(x), scene).item() < 1e-6
    shape, asked = scene._shape, []
    monkeypatch.setattr(scene, "_shape", lambda p: asked.append(p) or 2 * shape(p))
    assert math.isclose(eikonal(options, sampled(x), scene).item(), 1, abs_tol=1e-3)
    assert torch.equal(asked[0][:500], x) and len(asked[0]) == 625


@pytest.mark.parametrize("kind", ["analytic", "finite"])
def test_eikonal_teaches_the_grid(options, kind):
    """Its gradient agrees with what really happens when the table moves."""
    scene = build(options, "--desired_resolution", 17, "--normals", kind, rough=2.0)
    scene.trunk[1], scene.trunk[3] = torch.nn.Tanh(), torch.nn.Tanh()  # slopes of a ReLU network jump
    table, render = scene.encoder.embeddings, sampled(points(60))

    def loss():
        render.generator = seeded()
        return eikonal(options, render, scene)

    loss().backward()
    direction = torch.randn(table.shape, generator=seeded(6)) * (table.grad != 0)
    expected = (table.grad * direction).sum().item()
    with torch.no_grad():
        table += 1e-3 * direction
        ahead = loss().item()
        table -= 2e-3 * direction
        behind = loss().item()
    assert math.isclose((ahead - behind) / 2e-3, expected, rel_tol=0.03, abs_tol=1e-3) and abs(expected) > 0.005


@pytest.mark.parametrize("beta", [0.03, 0.005])
def test_both_samplers_show_the_soft_ball(options, beta):
    """Alpha of a ball of radius 1/2 against the integral of its density, its wide faint skirt included."""
    flags = ("--sdf_beta", beta, "--max_steps", 512, "--bg_radius", -1, "--background", "white", "--grid_size", 64)
    stratified = build(options, *flags, "--num_steps", 96, "--upsample_steps", 96).eval()
    marched = build(options, *flags, "--cuda_ray").eval()
    for step in range(2):
        marched.update_occupancy(step, seeded(step))
    cameras = orbit(70.0, 30.0, 3.0, 30.0, 16, 16)
    origins, directions = cameras.rays()
    t = torch.linspace(2, 4, 2001)
    x = origins[..., None, :] + directions[..., None, :] * t[:, None]
    with torch.no_grad():
        density = marched._sigma(0.5 - x.reshape(-1, 3).norm(dim=-1)).reshape(x.shape[:-1]) * (x.abs().amax(-1) < 1)
    alpha = 1 - torch.exp(-density.sum(-1) * (t[1] - t[0]))
    assert (stratified.render(cameras).alpha[..., 0] - alpha).abs().max() < 0.02
    assert (marched.render(cameras).alpha[..., 0] - alpha).abs().max() < 0.05


def test_parameters_and_state(options):
    scene = build(options, "--cuda_ray", rough=0.3)
    groups = {group["name"]: group for group in scene.parameter_groups(0.002)}
    assert groups["beta"]["lr"] == 0.002 and groups["beta"]["weight_decay"] == 0
    given = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in scene.parameters())
    with torch.no_grad():
        scene.sharpness += 0.5
    other = build(options, "--cuda_ray", "--sdf_beta", 0.02)
    other.load_state_dict(scene.state_dict())
    assert torch.equal(other.density(points(9))["sigma"], scene.density(points(9))["sigma"])


def test_even_density_has_the_same_surface(options):
    """1 on the surface, and the same slope on both sides of it, however sharp the density has become."""
    scene = build(options, "--sdf_beta", 0.002, "--shape_init", "box 0.4 0.3 0.2")
    line = torch.zeros(3, 3)
    line[:, 0] = 0.4 + torch.tensor([-0.02, 0.0, 0.02])
    inside, on, outside = scene.even_density(line)["sigma"].log().tolist()
    assert abs(on) < 1e-5 and math.isclose(inside, 0.4, rel_tol=1e-4) and math.isclose(outside, -0.4, rel_tol=1e-4)


def test_half_precision_leaves_the_surface_alone(options):
    scene = build(options, rough=0.3)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        half = scene.sdf(points(50))
    assert half.dtype == torch.float32 and torch.equal(half, scene.sdf(points(50)))


def test_a_step_moves_everything(options):
    """A picture's loss reaches table, network and softness, and the distance has left its shape."""
    scene = build(options, "--cuda_ray", "--shape_init", "sphere 0.4").train()
    optimizer = torch.optim.Adam(scene.parameter_groups(1e-2))
    before = {name: p.detach().clone() for name, p in scene.named_parameters() if "background" not in name}
    for step in range(3):
        scene.update_occupancy(step, seeded(step))
        render = scene.render(orbit(80.0, 0.0, 3.0, 30.0, 12, 12), "lambertian", ambient=0.5, generator=seeded(step))
        loss = render.image.square().mean() + 0.1 * eikonal(options, render, scene)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    moved = {name for name, p in scene.named_parameters() if name in before and not torch.equal(p, before[name])}
    assert moved == set(before)
    assert (scene.sdf(points(200)) - (points(200).norm(dim=-1) - 0.4)).abs().max() > 1e-3
    assert SHARPEST < scene.beta.item() < 0.2
