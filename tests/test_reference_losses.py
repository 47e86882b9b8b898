"""Each loss on known views against its formula, and a scene that learns a photograph from them."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from nerf.photos import References, known_background, known_view
from nerf.provider import orbit
from nerf.reference_losses import (
    axial_depth,
    depth_loss,
    depth_rank_loss,
    mask_loss,
    normal_loss,
    reference_terms,
    rgb_loss,
    wants_normals,
)
from nerf.renderer import Render
from schedule import Schedule
from toybox.objects import OBJECTS
from toybox.render import trace

SIZE, FOVY = 32, 24.0
BLUE = torch.tensor([[0.1, 0.2, 0.9], [0.8, 0.1, 0.3]])


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def truth():
    """Two views of a teddy, far from the front: what the photographs say, and the exact render, with its background BLUE."""
    cameras = orbit(torch.tensor([70.0, 110.0]), torch.tensor([125.0, -60.0]), 3.2, FOVY, SIZE, SIZE)
    teddy = OBJECTS["teddy"]
    layers = trace(teddy, cameras.c2w, FOVY, SIZE, cameras.c2w[:, :3, 2], torch.ones(2))
    alpha = layers.alpha[..., None]
    colour = layers.fixed + layers.main[..., None] * torch.tensor(teddy.default)
    local = torch.einsum("bhwi,bij->bhwj", layers.normal, cameras.c2w[:, :3, :3])
    depth = layers.depth[..., None]
    render = Render(colour + (1 - alpha) * BLUE[:, None, None], alpha, depth * alpha, layers.normal * alpha, cameras, 0)
    references = References(
        cameras,
        colour / alpha.clamp(min=1e-4),
        alpha,
        torch.ones_like(alpha),
        torch.ones(2),
        axial_depth(render) * 0.3 - 0.2,
        local,
    )
    return references, render


def changed(render, **values):
    return Render(**{**vars(render), **values})


def test_the_truth_costs_nothing(truth):
    references, render = truth
    assert rgb_loss(references, render, BLUE) < 1e-8
    assert mask_loss(references, render) == 0
    assert depth_loss(references, render) < 1e-4
    assert depth_rank_loss(references, render) < 1e-5
    assert normal_loss(references, render) < 1e-4


def test_colour_is_compared_in_front_of_the_renders_own_background(truth):
    references, render = truth
    other = 1 - BLUE
    expected = ((1 - references.mask) * (BLUE - other)[:, None, None]).square().mean()
    assert torch.allclose(rgb_loss(references, render, other), expected)
    per_pixel = known_background(references, torch.Generator().manual_seed(1))
    image = references.rgb * references.mask + per_pixel * (1 - references.mask)
    assert rgb_loss(references, changed(render, image=image), per_pixel) < 1e-10
    lighter = changed(render, image=render.image + 0.1)
    assert rgb_loss(references, lighter, BLUE).item() == pytest.approx(0.01, rel=1e-3)
    assert rgb_loss(references, changed(render, image=image), torch.zeros(3)) > 0.01  # one colour for all


def test_mask_is_a_mean_square(truth):
    references, render = truth
    off = changed(render, alpha=(render.alpha * 0.5))
    assert torch.allclose(mask_loss(references, off), (0.5 * references.mask).square().mean())


def test_what_the_photograph_does_not_reach_does_not_count(truth):
    references, render = truth
    seen = torch.ones_like(references.seen)
    seen[:, :16] = 0
    part = References(**{**vars(references), "seen": seen})
    wrong = render.image.clone()
    wrong[:, :16] = 9
    spoilt = changed(render, image=wrong, alpha=render.alpha * seen)
    assert rgb_loss(part, spoilt, BLUE) < 1e-8 and mask_loss(part, spoilt) == 0
    assert rgb_loss(references, spoilt, BLUE) > 1 and mask_loss(references, spoilt) > 0.01
    flipped = changed(render, normal=torch.where(seen > 0, render.normal, -render.normal))
    assert normal_loss(part, flipped) < 1e-4 and normal_loss(references, flipped) > 0.1


def with_depth(references, depth):
    return References(**{**vars(references), "depth": depth})


def test_depth_is_one_minus_pearson(truth):
    """Whatever scale and shift; each view by itself."""
    references, render = truth
    scaled = references.depth * torch.tensor([3.0, 0.01])[:, None, None, None] + 5
    assert depth_loss(with_depth(references, scaled), render) < 1e-3
    assert depth_loss(with_depth(references, -references.depth), render).item() == pytest.approx(2, abs=1e-3)
    noise = uniform(*references.depth.shape)
    inside = (references.mask > 0.5) & (render.alpha > 0.5)
    expected = []
    for i in range(2):
        pair = torch.stack([noise[i][inside[i]], axial_depth(render)[i][inside[i]]])
        expected.append(1 - torch.corrcoef(pair)[0, 1])
    assert torch.allclose(depth_loss(with_depth(references, noise), render), torch.stack(expected).mean(), atol=1e-5)
    flat = torch.full_like(references.depth, 0.4)
    assert depth_loss(with_depth(references, flat), render) == 0


def test_axial_depth_of_a_wall_is_flat():
    """A wall across the optical axis: farther along slanted rays, at one distance along the axis."""
    cameras = orbit(80.0, 33.0, 3.0, 60.0, 9, 9)
    _, directions = cameras.rays()
    cosine = -(directions * cameras.c2w[:, None, None, :3, 2]).sum(-1, keepdim=True)
    half = torch.full((1, 9, 9, 1), 0.5)
    render = Render(torch.zeros(1, 9, 9, 3), half, half * 2.5 / cosine, None, cameras, 0)
    assert torch.allclose(axial_depth(render), torch.full((1, 9, 9, 1), 2.5), atol=1e-5)


def test_ranking_wants_the_order_alone(truth):
    references, render = truth
    assert depth_rank_loss(with_depth(references, references.depth**3), render) < 1e-5  # not linear, the same order
    z = axial_depth(render)
    reverse = depth_rank_loss(with_depth(references, -references.depth), render)
    inside = (references.mask > 0.5) & (render.alpha > 0.5)
    spread = torch.stack([(z[i][inside[i]][:, None] - z[i][inside[i]]).abs().mean() for i in range(2)]).mean()
    assert reverse.item() == pytest.approx(spread.item(), rel=0.25)  # the mean distance of two pixels
    depth = render.depth.clone().requires_grad_()
    depth_rank_loss(with_depth(references, -references.depth), changed(render, depth=depth)).backward()
    assert torch.isfinite(depth.grad).all() and depth.grad.abs().max() > 0


def test_normals_are_compared_in_the_cameras_frame(truth):
    """The world's normals against the photograph's: nonsense away from the front, where upstream compares them."""
    references, render = truth
    world = References(**{**vars(references), "normal": F.normalize(render.normal, dim=-1)})
    assert normal_loss(world, render) > 0.3
    tilted = F.normalize(references.normal + torch.tensor([0.0, 0, 0.5]), dim=-1)
    inside = references.mask * (render.alpha > 0.5)
    expected = ((1 - (tilted * references.normal).sum(-1, keepdim=True)) * inside).sum() / inside.sum()
    found = normal_loss(References(**{**vars(references), "normal": tilted}), render)
    assert torch.allclose(found, expected, atol=1e-4) and expected > 0.01


def test_nothing_in_common_costs_nothing(truth):
    references, render = truth
    depth = render.depth.clone().requires_grad_()
    empty = changed(render, alpha=torch.zeros_like(render.alpha), depth=depth)
    for loss in (depth_loss, depth_rank_loss):
        value = loss(references, empty)
        value.backward()
        assert value == 0 and torch.isfinite(depth.grad).all()
    assert normal_loss(references, empty) == 0


def make_options(**weights):
    names = ("lambda_rgb", "lambda_mask", "lambda_depth", "lambda_depth_rank", "lambda_normal")
    return SimpleNamespace(iters=100, **{name: Schedule(weights.get(name, 0.0)) for name in names})


def test_terms_follow_the_weights_and_the_step(truth):
    references, render = truth
    off = changed(render, image=render.image + 0.1, alpha=render.alpha * 0.9)
    opt = make_options(lambda_rgb=1000, lambda_mask=500, lambda_depth=10, lambda_normal=2)
    flat = with_depth(references, -references.depth)
    terms = reference_terms(opt, 50, flat, off, BLUE)
    assert set(terms) == {"rgb", "mask", "depth", "normal"}
    assert terms["rgb"].item() == pytest.approx(10.0, rel=1e-2)
    assert terms["mask"].item() == pytest.approx(500 * mask_loss(flat, off).item())
    assert terms["depth"].item() == pytest.approx(10 * 0.5 * depth_loss(flat, off).item())
    assert set(reference_terms(opt, 0, flat, off, BLUE)) == {"rgb", "mask"}  # the guesses come later
    bare = References(references.cameras, references.rgb, references.mask, references.seen, references.weight)
    assert set(reference_terms(opt, 50, bare, off, BLUE)) == {"rgb", "mask"}
    assert "normal" not in reference_terms(opt, 50, references, changed(render, normal=None), BLUE)
    assert wants_normals(opt, 0, references) and not wants_normals(opt, 0, bare)
    assert not wants_normals(make_options(), 0, references)
    assert set(reference_terms(make_options(lambda_depth_rank=1), 50, references, off, BLUE)) == {"depth_rank"}


def test_a_scene_learns_its_photographs(truth, options):
    """Through the renderer, the known view's own cameras and a background of noise: colour and mask come to agree."""
    from standins import VoxelScene

    references, _ = truth
    opt = SimpleNamespace(
        batch_size=2,
        known_view_scale=1.0,
        known_view_noise_scale=2e-3,
        size_scale=Schedule(1.0),
        h=16,
        w=16,
        dmtet=False,
        dmtet_reso_scale=8,
        **vars(make_options(lambda_rgb=10, lambda_mask=5)),
    )
    torch.manual_seed(0)
    scene = VoxelScene(options(), size=16).train()
    optimizer = torch.optim.Adam(scene.parameters(), 0.3)
    draw, losses = torch.Generator().manual_seed(0), []
    for step in range(40):
        some, cameras = known_view(references, step, opt, draw)
        background = known_background(some, draw)
        render = scene.render(cameras, "albedo", background=background, generator=draw, normals=False)
        loss = sum(reference_terms(opt, step, some, render, background).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    inside, known = render.alpha > 0.5, some.mask > 0.5
    assert losses[-1] < 0.2 * losses[0]
    assert (inside & known).sum() / (inside | known).sum() > 0.85
