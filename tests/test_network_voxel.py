"""The dense grid: what its nodes say, what its density is, what each question costs, and what learns."""

import math

import pytest
import torch
from torch.nn import functional as F

from nerf.losses import regularise_gradients
from nerf.network_voxel import NeRFNetwork

PUBLISHED = ("--density_activation", "softplus", "--blob_density", 0)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def points(count, reach=1.0, seed=0):
    return (2 * torch.rand(count, 3, generator=seeded(seed)) - 1) * reach


def filled(opt, channels=3, spread=1.0):
    """Every number random, the scale too."""
    scene = NeRFNetwork(opt, channels)
    with torch.no_grad():
        for i, p in enumerate(scene.parameters()):
            p.normal_(std=spread, generator=seeded(i))
    return scene


@pytest.fixture
def small(options):
    return lambda *typed: options("--backbone", "voxel", "--voxel_size", 9, "--bound", 1.5, *typed)


def test_nodes_span_the_box_and_are_interpolated_in_between(small):
    """Against torch's own sampling of a cube [z, y, x] whose outermost nodes lie on the walls."""
    scene, x = filled(small(*PUBLISHED), 4), points(300, 1.5)
    colours = scene.encoder.colours[0].embeddings[: 9**3].T.reshape(1, 4, 9, 9, 9)
    expected = F.grid_sample(colours, x.reshape(1, -1, 1, 1, 3) / 1.5, align_corners=True).reshape(4, -1).T
    assert torch.allclose(scene.density(x)["albedo"], expected, atol=1e-5)
    corner = torch.tensor([[1.5, -1.5, -1.5]])  # eight steps along x
    assert torch.equal(scene.density(corner)["albedo"][0], colours[0, :, 0, 0, 8])


def test_density_is_that_of_score_jacobian_chaining(small):
    """softplus(v exp(s) - 1), an empty one everywhere at first."""
    scene = NeRFNetwork(small(*PUBLISHED))
    x = points(50, 1.5)
    assert torch.allclose(scene.sigma(x), F.softplus(torch.tensor(-1.0)).expand(50), atol=1e-3)
    with torch.no_grad():
        scene.encoder.density.embeddings.fill_(2.0)
        scene.trunk.log_scale.fill_(math.log(3.0))
    assert torch.allclose(scene.sigma(x), F.softplus(torch.tensor(2.0 * 3.0 - 1.0)).expand(50), atol=1e-5)


def test_starts_from_the_blob_that_is_asked_for(small):
    scene = NeRFNetwork(small("--density_activation", "softplus", "--blob_density", 10, "--blob_radius", 0.5))
    sigma = scene.sigma(torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0, 1.2, 0]]))
    assert torch.allclose(sigma, F.softplus(torch.tensor([10.0, 6.0, -10.0])), atol=0.02)


@pytest.mark.parametrize(("channels", "tables"), [(3, [2, 1]), (4, [4]), (16, [8, 8])])
def test_as_many_numbers_as_channels(small, channels, tables):
    scene = filled(small(), channels, 30.0)
    assert [t.embeddings.shape[1] for t in scene.encoder.colours] == tables
    albedo = scene.density(points(40))["albedo"]
    assert albedo.shape == (40, channels)
    inside = (albedo >= 0).all() and (albedo <= 1).all()
    assert inside if channels == 3 else albedo.min() < -1 and albedo.max() > 1  # latents are raw
    found, features = scene.colour(points(40))
    assert torch.equal(found, albedo) and features.shape == (40, channels)


def test_who_asks_for_the_density_pays_for_no_colours(small):
    scene = filled(small("--normals", "finite"))
    calls = []
    scene.encoder.colours[0].register_forward_hook(lambda *_: calls.append(1))
    scene.sigma(points(9))
    assert not calls
    scene.query(points(9), normals=True)  # six more densities
    assert len(calls) == 1


def test_normals(small):
    """Where the density falls fastest: analytic and finite ones agree away from the walls of cells, and so does the density."""
    analytic, finite = filled(small()), filled(small("--normals", "finite"))
    place = torch.randint(8, (200, 3), generator=seeded()) + 0.5 + 0.2 * points(200)
    x = place * (3 / 8) - 1.5
    a, f = analytic.normal(x), finite.normal(x)
    assert torch.allclose(a.norm(dim=-1), torch.ones(200), atol=1e-4)
    assert ((a * f).sum(-1) > 0.99).all()
    with torch.no_grad():
        raw = [analytic._raw(x + s * 1e-3 * a)[0] for s in (1, -1)]
    assert (raw[0] < raw[1]).all()


def test_normals_teach_the_densities(small):
    """The gradient of a loss on normals is what really happens when the densities move."""
    scene, x = filled(small()), points(30)
    target = F.normalize(torch.randn(30, 3, generator=seeded(5)), dim=-1)
    table = scene.encoder.density.embeddings

    def loss():
        return (scene.normal(x) * target).sum()

    loss().backward()
    direction = torch.randn(table.shape, generator=seeded(6)) * (table.grad != 0)
    expected = (table.grad * direction).sum().item()
    with torch.no_grad():
        table += 1e-3 * direction
        ahead = loss()
        table -= 2e-3 * direction
        behind = loss()
    assert math.isclose((ahead - behind) / 2e-3, expected, rel_tol=0.03, abs_tol=0.05)


def test_parameter_groups(small):
    scene = NeRFNetwork(small("--background", "mlp"), 4)
    groups = {group["name"]: group["params"] for group in scene.parameter_groups(0.05)}
    assert list(groups) == ["encoder", "trunk", "background"]
    assert groups["trunk"] == [scene.trunk.log_scale]
    assert sum(p.numel() for p in groups["encoder"]) == 736 * 5  # 9^3, filled up to a multiple of 8
    given = [id(p) for group in groups.values() for p in group]
    assert sorted(given) == sorted(id(p) for p in scene.parameters())


def test_the_regularisers_of_the_grid_reach_every_table(small):
    opt = small("--lambda_tv", 1, "--lambda_wd", 0)
    scene = filled(opt)
    regularise_gradients(opt, 0, scene)
    assert all(table.embeddings.grad.abs().max() > 0 for table in (scene.encoder.density, *scene.encoder.colours))
    opt = small("--lambda_tv", 0, "--lambda_wd", 0.5)
    scene = filled(opt)
    regularise_gradients(opt, 0, scene)
    colours = scene.encoder.colours[1].embeddings
    assert torch.allclose(colours.grad, colours / len(colours))


def test_a_picture_of_it_can_be_learned(small, options):
    """A few steps of Adam on alpha: dense in the middle, the whole scene through both renderers."""
    from nerf.provider import orbit

    for typed in (), ("--cuda_ray",):
        opt = small(*PUBLISHED, *typed)
        scene = NeRFNetwork(opt, 4).train()
        optimizer = torch.optim.Adam(scene.parameter_groups(0.2))
        camera = orbit(torch.tensor([80.0]), torch.tensor([30.0]), 3.2, 40.0, 16, 16)
        want = torch.zeros(1, 16, 16, 1)
        want[:, 5:11, 5:11] = 1
        for step in range(40):
            if step % 8 == 0:
                scene.update_occupancy(step, seeded(step))
            render = scene.render(camera, background=torch.zeros(4), generator=seeded(step))
            loss = (render.alpha - want).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss < 0.05, typed
        assert render.image.shape == (1, 16, 16, 4)
        copy = NeRFNetwork(opt, 4)
        copy.load_state_dict(scene.state_dict())
        assert torch.equal(copy.sigma(points(20)), scene.sigma(points(20)))
