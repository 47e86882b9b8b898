"""Scenes of latents: what colours they are shown in, and the second stage that makes colours of them."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from errors import UserError
from nerf import build_field
from nerf.latent import (
    STABLE_DIFFUSION,
    Adapter,
    Colours,
    Latent,
    colours_of,
    continued,
    decode_with,
    fit,
    holds_latents,
    to_rgb,
)
from nerf.losses import regularise_gradients
from nerf.particles import Particles, each
from nerf.provider import orbit
from nerf.results import extract_mesh, plain_background
from toybox.models import MODELS

OFFSET = (0.1, -0.2, 0.3)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def camera(size=16):
    """So wide that rays in the corners miss the scene."""
    return orbit(torch.tensor([80.0]), torch.tensor([30.0]), 3.2, 60.0, size, size)


def points(count, seed=0):
    return torch.rand(count, 3, generator=seeded(seed)) - 0.5


def field(opt, channels=4):
    """With latents of different sizes all over the place."""
    scene = build_field(opt, channels)
    with torch.no_grad():
        for i, p in enumerate(scene.parameters()):
            p.normal_(std=0.4, generator=seeded(i))
    return scene


def latent(opt, channels=4):
    matrix = torch.randn(channels, 3, generator=seeded(9)) * 0.3
    return Latent(field(opt, channels), Colours(matrix, OFFSET))


# ---- the map ------------------------------------------------------------------------------------------------------------------


def test_published_map_of_stable_diffusion():
    """rgb = clamp((f A + 1) / 2, 0, 1), by hand for the first latent alone, for all, and beyond the range."""
    f = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1], [9, 9, 0, 0], [0, 0, 0, 0]]).reshape(1, 2, 2, 4)
    rgb = to_rgb(f)
    assert rgb.shape == (1, 2, 2, 3)
    assert torch.allclose(rgb[0, 0, 0], torch.tensor([0.649, 0.6035, 0.604]))
    assert torch.allclose(rgb[0, 0, 1], (torch.tensor([0.143, 0.411, 0.172]) + 1) / 2, atol=1e-6)
    assert torch.equal(rgb[0, 1], torch.tensor([[1.0, 1, 1], [0.5, 0.5, 0.5]]))
    assert len(STABLE_DIFFUSION) == 4


def test_gradients_pass_inside_the_range_alone():
    colours = Colours([[1.0, 0, 0], [0, 1.0, 0], [0, 0, 1.0]])
    f = torch.tensor([[0.5, 3.0, -3.0]], requires_grad=True)
    colours(f).sum().backward()
    assert torch.equal(f.grad, torch.tensor([[0.5, 0.0, 0.0]]))
    assert torch.equal(colours.bias.grad, torch.tensor([0.5, 0.0, 0.0]))


def test_inverse_is_the_shortest_of_the_latents_that_show_a_colour():
    colours, rgb = Colours(STABLE_DIFFUSION, OFFSET), torch.rand(5, 2, 3, generator=seeded())
    f = colours.inverse(rgb)
    assert torch.allclose(colours(f), rgb, atol=1e-5)
    unseen = torch.linalg.svd(colours.weight.detach())[2][3]  # a direction that changes no colour
    assert torch.allclose(colours(f + unseen), rgb, atol=1e-5) and (f @ unseen).abs().max() < 1e-4


def test_fit_finds_the_map_that_made_the_colours():
    latents = torch.randn(200, 5, generator=seeded())
    matrix = torch.randn(5, 3, generator=seeded(1)) * 0.1
    found = fit(latents, (latents @ matrix + torch.tensor(OFFSET) + 1) / 2)
    assert torch.allclose(found.weight.T, matrix, atol=1e-5)
    assert torch.allclose(found.bias, torch.tensor(OFFSET), atol=1e-5)


def test_building_a_map_moves_no_random_number():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    Colours()
    assert torch.equal(before, torch.get_rng_state())


def test_map_of_a_model(tmp_path):
    published = torch.tensor(STABLE_DIFFUSION)
    for nothing in None, tmp_path:
        assert torch.equal(colours_of(nothing).weight.T, published)
    (tmp_path / "latent_rgb.json").write_text(json.dumps({"matrix": [[1, 2, 3], [4, 5, 6]], "offset": [0, 0, 1]}))
    found = colours_of(tmp_path)
    assert found.in_features == 2 and found.weight.T.tolist() == [[1, 2, 3], [4, 5, 6]] and found.bias[2] == 1
    for broken in "{", "[]", '{"matrix": [[1, 2]], "offset": [0, 0, 0]}', '{"matrix": [[1, 2, 3]]}':
        (tmp_path / "latent_rgb.json").write_text(broken)
        with pytest.raises(UserError, match=r"latent_rgb\.json"):
            colours_of(tmp_path)


def test_map_of_the_embedded_model():
    """It shows the true colours of toybox pictures about as well as the file says; the published map would not."""
    from guidance.priors import load_prior
    from guidance.weights import resolve
    from toybox.latent_rgb import error, true_pairs

    folder = MODELS / "tiny-sd"
    prior = load_prior(resolve(SimpleNamespace(hf_key=str(folder), IF=False)), "cpu")
    known = true_pairs(prior, ["a hamburger", "a green car"])
    told = json.loads((folder / "latent_rgb.json").read_text())["psnr"]
    assert abs(error(colours_of(folder), *known) - told) < 2 and told > 19
    assert error(Colours(), *known) < 12


# ---- the first stage ----------------------------------------------------------------------------------------------------------


def test_trains_as_its_field(options):
    opt = options("--background", "mlp")
    scene = latent(opt).train()
    assert scene.channels == 4 and scene.encoder is scene.field.encoder and scene.background_network is not None
    like = {"background": torch.ones(1, 4), "generator": None}
    render = scene.render(camera(), **{**like, "generator": seeded()})
    expected = scene.field.render(camera(), **{**like, "generator": seeded()})
    assert torch.equal(render.image, expected.image) and render.image.shape[-1] == 4
    assert render.image.min() < 0  # latents, not colours
    trained = {id(p) for group in scene.parameter_groups(0.01) for p in group["params"]}
    assert trained == {id(p) for p in scene.field.parameters()}
    assert not any(p.requires_grad for p in scene.colours.parameters())


def test_is_shown_in_colours(options):
    opt = options()
    scene = latent(opt).eval()
    f = scene.field.show(camera(), torch.zeros(4), 0).image
    shown = scene.show(camera(), None, 0)
    assert shown.image.shape == (1, 16, 16, 3) and shown.normal is not None
    empty = shown.alpha[..., 0] < 1e-6
    assert empty.any() and torch.allclose(shown.image[empty], torch.ones(3), atol=1e-5)  # white, without a network
    grey = torch.tensor([0.2, 0.5, 0.7])
    for render in scene.show(camera(), grey, 0), scene.render(camera(), background=grey):
        assert torch.allclose(render.image[empty], grey.expand(int(empty.sum()), 3), atol=1e-5)
        behind = (1 - render.alpha) * scene.colours.inverse(grey)
        assert torch.allclose(render.image, scene.colours(f + behind), atol=1e-4)
    normals = scene.render(camera(), "normal", background=torch.ones(3)).image
    assert torch.equal(normals, scene.field.render(camera(), "normal", background=torch.ones(3)).image)
    x = points(20)
    told, inner = scene.density(x), scene.field.density(x)
    assert torch.equal(told["sigma"], inner["sigma"])
    assert torch.equal(told["albedo"], scene.colours(inner["albedo"]))


def test_black_behind_leaves_colours_that_alpha_has_multiplied(options):
    """What six views with transparency rely on."""
    scene = latent(options()).eval()
    with torch.no_grad():
        scene.colours.weight *= 0.1  # nothing is clamped
    on = {name: scene.show(camera(), torch.full((3,), v), 0) for name, v in {"black": 0.0, "white": 1.0}.items()}
    difference = on["white"].image - on["black"].image
    assert torch.allclose(difference, (1 - on["black"].alpha).expand(-1, -1, -1, 3), atol=1e-4)


class StandIn:
    """A prior whose decoder doubles the size twice over, and whose latents' first three channels are the colours."""

    image_size, latent_size = 32, 8

    def __init__(self):
        self.decoded = []

    def encode(self, image, generator):
        small = F.avg_pool2d(image, 4)
        edge = F.pad(small[..., 2:-2, 2:-2], (2, 2, 2, 2), value=7.0)  # an encoder is different at the border
        return torch.cat([edge, torch.full_like(edge[:, :1], 5.0)], 1)

    def decode(self, latents):
        self.decoded.append(latents)
        return F.interpolate(latents[:, :3], scale_factor=4).clamp(0, 1)


def test_is_shown_through_the_decoder(options):
    scene, prior = latent(options()).eval(), StandIn()
    decode_with(Particles([scene]), prior)
    shown = scene.show(camera(24), torch.tensor([0.2, 0.5, 0.7]), 0)
    assert shown.image.shape == (1, 24, 24, 3) and shown.normal.shape == (1, 24, 24, 3)
    assert prior.decoded[0].shape == (1, 4, 16, 16)  # twice as fine as a training picture, not 24
    corner = prior.decoded[0][0, :, 0, 0]
    assert torch.allclose(corner, torch.tensor([0.2, 0.5, 0.7, 5.0]), atol=1e-5)  # the encoder's own, from the inside
    assert torch.allclose(shown.image[0, 0, 0], torch.tensor([0.2, 0.5, 0.7]), atol=1e-5)
    scene.show(camera(12), torch.ones(3), 0)
    assert prior.decoded[1].shape == (1, 4, 12, 12)  # nothing to gain from enlarging
    assert scene.render(camera(), background=torch.ones(3)).image.shape[-1] == 3 and len(prior.decoded) == 2
    assert not any("prior" in name for name in scene.state_dict())


def test_results_need_not_know(options):
    """Pictures, meshes and particles of latents go the way of all others."""
    opt = options("--cuda_ray", "--blob_radius", 0.5)
    one = Latent(build_field(opt, 4), Colours()).eval()
    shown = [scene.show(camera(), plain_background(opt), 0).image for scene, _ in each(Particles([one]))]
    assert shown[0].shape == (1, 16, 16, 3)
    one.update_occupancy(0, seeded())
    mesh, _ = extract_mesh(one, opt, 0, print)
    assert len(mesh.faces) > 100
    regularise_gradients(options("--lambda_tv", 1), 0, one)
    assert one.field.encoder.embeddings.grad.abs().max() > 0


# ---- the second stage ---------------------------------------------------------------------------------------------------------


def test_map_and_field_must_fit(options):
    opt = options()
    for kind in Latent, lambda *parts: Adapter(opt, *parts):
        with pytest.raises(ValueError, match="channels"):
            kind(build_field(opt, 3), Colours())


@pytest.mark.parametrize("marching", [(), ("--cuda_ray",)])
def test_adapter_begins_as_the_latents_were_shown(options, tmp_path, marching):
    first = latent(options("--latent", "--background", "mlp", *marching), 5)
    opt = options("--background", "mlp", *marching)
    second = continued(opt, first.state_dict(), tmp_path)
    assert isinstance(second, Adapter) and second.channels == 3
    x = points(60)
    for mine, theirs in zip(second.query(x, normals=True), first.field.query(x, normals=True), strict=True):
        theirs = first.colours(theirs) if theirs.shape[-1] == 5 else theirs
        assert torch.allclose(mine, theirs, atol=1e-6)
    assert torch.equal(second.density(x)["albedo"], first.density(x)["albedo"])
    assert torch.equal(second.colour(x)[0], second.density(x)["albedo"])
    assert torch.equal(second.sigma(x), first.sigma(x)) and torch.equal(second.normal(x), first.normal(x))
    assert second.background(x).shape == (60, 3) and not any("field.background" in k for k in second.state_dict())
    second.update_occupancy(0, seeded())
    image = second.eval().render(camera(), background=torch.ones(3)).image
    assert image.shape[-1] == 3 and 0 <= image.min() and image.max() <= 1.0001


def test_adapter_learns_everything(options, tmp_path):
    opt = options("--background", "mlp", "--lambda_tv", 1)
    scene = continued(opt, latent(options("--latent")).state_dict(), tmp_path).train()
    groups = {group["name"]: group["params"] for group in scene.parameter_groups(0.01)}
    assert set(groups) == {"encoder", "trunk", "material", "background"}
    assert all(group["lr"] == 0.01 for group in scene.parameter_groups(0.01))
    given = [id(p) for group in groups.values() for p in group]
    assert sorted(given) == sorted(id(p) for p in scene.parameters())
    scene.render(camera(), generator=seeded()).image.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in [*groups["material"], *groups["trunk"]])
    assert groups["background"][0].grad is not None
    regularise_gradients(opt, 0, scene)  # finds the grid


def test_a_checkpoint_tells_what_goes_on_from_it(options, tmp_path):
    """Latents again with --latent; an adapter's own goes on with its background; what does not fit is said."""
    start, opt = latent(options("--latent", "--cuda_ray")), options("--background", "mlp")
    assert holds_latents(start.state_dict()) and not holds_latents(build_field(opt).state_dict())
    again = continued(options("--latent"), start.state_dict(), tmp_path)  # without the marcher's grid this time
    assert isinstance(again, Latent)
    assert torch.equal(again.density(points(9))["albedo"], start.density(points(9))["albedo"])
    adapter = continued(opt, start.state_dict(), tmp_path)
    with torch.no_grad():
        adapter.colours.bias += 0.05
    further = continued(opt, adapter.state_dict(), tmp_path)
    assert all(torch.equal(v, further.state_dict()[k]) for k, v in adapter.state_dict().items())
    with pytest.raises(UserError, match=f"{tmp_path}.*does not fit"):
        continued(options("--num_levels", 6), start.state_dict(), tmp_path)
