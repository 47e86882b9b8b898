"""The fields: what density they start with, what their normals are, and what an optimizer gets of them."""

import math

import pytest
import torch

from errors import UserError
from nerf import build_scene
from nerf.background import plain_colour, training_background
from nerf.field import density_blob, trunc_exp
from nerf.losses import regularise_gradients
from nerf.network_grid import NeRFNetwork as Grid
from nerf.network_vanilla import NeRFNetwork as Vanilla


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, radius=0.8, seed=0):
    x = torch.randn(count, 3, generator=seeded(seed))
    return x / x.norm(dim=-1, keepdim=True) * radius * torch.rand(count, 1, generator=seeded(seed + 1)) ** (1 / 3)


def rough(opt, channels=3, scale=0.3):
    """A grid field whose table is large enough to have features: as after some training."""
    torch.manual_seed(0)
    scene = Grid(opt, channels)
    with torch.no_grad():
        scene.encoder.embeddings.uniform_(-scale, scale, generator=seeded())
    return scene


def test_trunc_exp():
    x = torch.tensor([-2.0, 0.0, 3.0, 20.0, 500.0], requires_grad=True)
    y = trunc_exp(x)
    assert torch.allclose(y, torch.exp(torch.tensor([-2.0, 0.0, 3.0, 20.0, 40.0])))
    y.sum().backward()
    assert torch.allclose(x.grad, torch.exp(torch.tensor([-2.0, 0.0, 3.0, 15.0, 15.0])))


def test_blob():
    x = torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0, 1.2, 0]])
    exp = density_blob(x, "exp", 5.0, 0.2)
    assert torch.allclose(exp, torch.tensor([5.0, 5 * (2 * math.exp(-0.5) - 1), -5.0]), atol=1e-3)
    soft = density_blob(x, "softplus", 10.0, 0.5)
    assert torch.allclose(soft, torch.tensor([10.0, 6.0, -10.0]), atol=1e-2)


@pytest.mark.parametrize("activation", [("exp", 5, 0.2), ("softplus", 10, 0.5)])
@pytest.mark.parametrize("backbone", ["grid", "vanilla"])
def test_starts_as_a_ball_in_nearly_empty_space(options, activation, backbone):
    name, height, radius = activation
    flags = ("--density_activation", name, "--blob_density", height, "--blob_radius", radius)
    scene = build_scene(options("--backbone", backbone, *flags))
    centre = scene.density(torch.zeros(1, 3))["sigma"]
    assert 0.3 * math.exp(5) < centre < 3 * math.exp(5) if name == "exp" else 8 < centre < 12
    line = torch.zeros(400, 3)
    line[:, 0], line[:, 1] = torch.linspace(-1, 1, 400), 0.9
    fog = 1 - torch.exp(-scene.density(line)["sigma"].mean() * 2)
    assert fog < 0.06


def test_albedo_and_latents(options):
    opt = options()
    out = rough(opt).density(points(50))
    assert out["albedo"].shape == (50, 3) and 0 < out["albedo"].min() and out["albedo"].max() < 1
    latents = rough(opt, 4, scale=50.0).density(points(50))["albedo"]
    assert latents.shape == (50, 4) and latents.min() < -1 and latents.max() > 1


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_normals_of_the_blob_point_outwards(options, activation):
    for kind in "analytic", "finite":
        scene = Grid(options("--normals", kind, "--density_activation", activation))
        with torch.no_grad():
            for layer in scene.trunk[::2]:
                layer.weight.zero_()
        x = points(40, radius=0.4)
        assert torch.allclose(scene.normal(x), x / x.norm(dim=-1, keepdim=True), atol=2e-3), kind
        assert torch.isfinite(scene.normal(torch.zeros(1, 3))).all()


@pytest.mark.parametrize("backbone", [Grid, Vanilla])
def test_analytic_normals_agree_with_finite_ones(options, backbone):
    """On a field smooth over the finite differences' 0.01; both are unit vectors."""
    analytic, finite = (
        backbone(options("--normals", kind, "--desired_resolution", 17)) for kind in ("analytic", "finite")
    )
    if backbone is Grid:
        with torch.no_grad():
            analytic.encoder.embeddings.uniform_(-0.3, 0.3, generator=seeded())
    else:
        with torch.no_grad():  # keep the sines that 0.01 resolves: 4 octaves
            analytic.trunk[0].weight[:, 3 + 6 * 4 :] = 0
    finite.load_state_dict(analytic.state_dict())
    x = points(200)
    a, f = analytic.normal(x), finite.normal(x)
    assert torch.allclose(a.norm(dim=-1), torch.ones(200), atol=1e-4)
    assert ((a * f).sum(-1) > 0.99).float().mean() > 0.9
    # the density falls along the normal
    with torch.no_grad():
        ahead, behind = (analytic.density(x + s * 1e-3 * a)["sigma"] for s in (1, -1))
    assert (ahead < behind).float().mean() > 0.98


@pytest.mark.parametrize("kind", ["analytic", "finite"])
def test_normals_teach_the_grid(options, kind):
    """The gradient of a loss on normals agrees with what really happens when the table moves."""
    scene = rough(options("--normals", kind, "--desired_resolution", 17))
    scene.trunk[1], scene.trunk[3] = torch.nn.Tanh(), torch.nn.Tanh()  # normals of a ReLU network jump
    x, target = points(30), torch.nn.functional.normalize(torch.randn(30, 3, generator=seeded(5)), dim=-1)

    def loss():
        return (scene.normal(x) * target).sum()

    table = scene.encoder.embeddings
    loss().backward()
    direction = torch.randn(table.shape, generator=seeded(6)) * (table.grad != 0)
    expected = (table.grad * direction).sum()
    with torch.no_grad():
        table += 1e-3 * direction
        ahead = loss()
        table -= 2e-3 * direction
        behind = loss()
    assert math.isclose((ahead - behind) / 2e-3, expected, rel_tol=0.03, abs_tol=0.05)


def test_no_graph_without_gradients(options):
    scene = rough(options())
    with torch.no_grad():
        sigma, albedo, normal = scene.query(points(10), normals=True)
    assert not (sigma.requires_grad or albedo.requires_grad or normal.requires_grad)
    trained = scene.query(points(10), normals=True)
    for mine, theirs in zip((sigma, albedo, normal), trained, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert scene.query(points(10))[2] is None


@pytest.mark.parametrize("backbone", ["grid", "vanilla"])
def test_parameter_groups(options, backbone):
    scene = build_scene(options("--backbone", backbone, "--bg_radius", 1.4, "--background", "mlp"))
    groups = {group["name"]: group for group in scene.parameter_groups(0.002)}
    assert {name: group["lr"] for name, group in groups.items()} == (
        {"encoder": 0.002, "trunk": 0.002, "background": 0.002}
        if backbone == "grid"
        else {"trunk": 0.002, "background": 0.002}
    )
    given = [id(p) for group in groups.values() for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in scene.parameters())


def test_progressive_levels(options):
    scene = rough(options("--progressive_level"))
    x = points(20)
    scene.set_progress(1.0)
    full = scene.encode(x)
    for ratio, share in (0.0, 0.25), (0.125, 0.5), (0.375, 1.0):
        scene.set_progress(ratio)
        assert scene.max_level == (share if share < 1 else None)
        live = round(share * full.shape[1])
        assert torch.equal(scene.encode(x)[:, :live], full[:, :live]) and (scene.encode(x)[:, live:] == 0).all()
    opened = rough(options("--max_level", "[0, 0.25, 1, 1]", "--iters", 100))
    opened.set_progress(0.5)
    assert opened.max_level == pytest.approx(0.625)
    plain = rough(options())
    plain.set_progress(0.0)
    assert plain.max_level is None


def test_state_holds_the_level(options):
    scene, other = rough(options("--progressive_level")), Grid(options("--progressive_level"))
    scene.set_progress(0.125)
    other.load_state_dict(scene.state_dict())
    assert other.max_level == 0.5
    assert torch.equal(other.density(points(9))["sigma"], scene.density(points(9))["sigma"])


def test_vanilla_has_no_grid_to_regularise(options, capsys):
    """Said once, and then left alone: the preset of the embedded model sets them for the grid."""
    opt = options("--backbone", "vanilla", "--lambda_tv", 0.1, "--lambda_wd", 0)
    scene = Vanilla(opt)
    said = capsys.readouterr().err
    assert "--lambda_tv" in said and "--lambda_wd" not in said
    regularise_gradients(opt, 0, scene)
    assert all(p.grad is None for p in scene.parameters())


def test_background_network(options):
    none = build_scene(options("--bg_radius", -1, "--background", "white"))
    directions = torch.nn.functional.normalize(torch.randn(2, 5, 3, generator=seeded()), dim=-1)
    assert torch.equal(none.background(directions), torch.ones(2, 5, 3))
    scene = build_scene(options("--bg_radius", 1.4, "--background", "mlp"))
    colour = scene.background(directions)
    assert colour.shape == (2, 5, 3) and 0 < colour.min() and colour.max() < 1 and colour.std() > 1e-3
    assert build_scene(options("--bg_radius", 1.4, "--background", "mlp"), 4).background(directions).shape == (2, 5, 4)


def test_training_background(options):
    assert plain_colour("#ff8000") == (1.0, 128 / 255, 0.0) and plain_colour("black") == (0.0, 0.0, 0.0)
    with pytest.raises(UserError, match="--background"):
        plain_colour("#12345g")
    opt = options("--background", "#ff8000")
    assert torch.allclose(training_background(opt, 2, seeded()), torch.tensor([1, 128 / 255, 0]).expand(2, 3))
    opt = options("--background", "random")
    one, two = (training_background(opt, 2, seeded()) for _ in range(2))
    assert torch.equal(one, two) and one.shape == (2, 3) and not torch.equal(one[0], one[1])
    assert training_background(opt, 2, seeded(), channels=4).shape == (2, 4)
    generator = seeded()
    assert all(training_background(opt, 1, generator, has_network=True) is not None for _ in range(20))
    painted = options("--background", "mlp", "--bg_radius", 1)
    absent = sum(training_background(painted, 1, generator, has_network=True) is None for _ in range(400))
    assert 160 < absent < 240
