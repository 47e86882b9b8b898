"""Compositing: by hand, against its twin, by finite differences, and in pieces; and the rendering loop around it."""

import math

import pytest
import torch

import extension
import raymarching
from raymarching import reference


@pytest.fixture(params=["auto", "reference"], ids=["compiled", "twin"])
def backend(request, monkeypatch):
    """Runs a test on the compiled kernels and on their twins."""
    monkeypatch.setenv("SOMNIUM_KERNELS", request.param)
    if request.param == "auto" and extension.load(raymarching.FOLDER, "raymarching") is None:
        pytest.skip("no C++ compiler here")
    return request.param


@pytest.fixture
def compiled():
    if extension.load(raymarching.FOLDER, "raymarching") is None:
        pytest.skip("no C++ compiler here")


def make_samples(counts, channels, dtype=torch.float64, density=6.0, seed=0):
    """Random samples of rays with the given numbers of them: sigma, rgb, t, rays."""
    g = torch.Generator().manual_seed(seed)
    count = torch.tensor(counts)
    rays = torch.stack([count.cumsum(0) - count, count], 1).int()
    total = int(count.sum())
    sigma = torch.rand(total, generator=g, dtype=dtype) * density
    rgb = torch.rand(total, channels, generator=g, dtype=dtype)
    dt = 0.02 + 0.1 * torch.rand(total, generator=g, dtype=dtype)
    middle = torch.cat([d.cumsum(0) - d / 2 + 1.5 for d in dt.split(counts)]) if counts else dt
    return sigma, rgb, torch.stack([middle, dt], 1), rays


COUNTS = [0, 1, 7, 0, 70, 130, 2, 0]


def test_three_samples_by_hand(backend):
    ln2 = math.log(2)
    sigma = torch.tensor([ln2, 2 * ln2, 1e6])  # half, three quarters, all of the light is stopped
    rgb = torch.tensor([[1.0, 0], [0, 1], [1, 1]])
    t = torch.tensor([[2.0, 1], [3, 1], [4, 1]])
    weights, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, t, torch.tensor([[0, 3]]).int())
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.375, 0.125]))
    torch.testing.assert_close(alpha, torch.tensor([1.0]))
    torch.testing.assert_close(depth, torch.tensor([0.5 * 2 + 0.375 * 3 + 0.125 * 4]))
    torch.testing.assert_close(image, torch.tensor([[0.625, 0.5]]))


def test_rays_without_samples_are_transparent(backend):
    sigma, rgb, t, rays = make_samples([0, 3, 0], 3)
    sigma.requires_grad_()
    weights, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, t, rays)
    assert alpha[[0, 2]].tolist() == depth[[0, 2]].tolist() == [0, 0] and (image[[0, 2]] == 0).all()
    assert alpha[1] > 0
    (alpha[0] + image[2].sum()).backward()
    assert (sigma.grad == 0).all()


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_no_samples_at_all(backend, counts):
    sigma, rgb, t, rays = make_samples(counts, 3)
    sigma.requires_grad_()
    rays = torch.zeros(len(counts), 2, dtype=torch.int32)
    weights, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, t, rays)
    assert weights.shape == (0,) and image.shape == (len(counts), 3) and (image == 0).all()
    (alpha.sum() + depth.sum() + image.sum() + weights.sum()).backward()
    assert sigma.grad.shape == (0,)


def test_alpha_of_thin_matter_keeps_its_digits(backend):
    """1 - exp(-x) loses half of float32's digits at x = 1e-4; the single weight must not."""
    thickness = torch.tensor([1e-7, 1e-4, 3e-3, 0.2, 0.7, 3.0, 30.0, 1e3, 1e30])
    rays = torch.stack([torch.arange(9), torch.ones(9)], 1).int()
    t = torch.ones(9, 2)
    weights = raymarching.composite_rays_train(thickness, torch.ones(9, 1), t, rays)[0]
    torch.testing.assert_close(weights, -torch.expm1(-thickness.double()).float(), rtol=3e-7, atol=0)


def test_opaque_slab_stops_everything_behind_it(backend):
    sigma = torch.tensor([0.0, 0, 1e4, 5, 5])
    rgb = torch.tensor([[9.0], [9], [0.25], [9], [9]], requires_grad=True)
    t = torch.tensor([[1.0, 0.1], [1.1, 0.1], [1.2, 0.1], [1.3, 0.1], [1.4, 0.1]])
    sigma.requires_grad_()
    weights, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, t, torch.tensor([[0, 5]]).int())
    assert weights.tolist() == [0, 0, 1, 0, 0]
    torch.testing.assert_close(torch.cat([alpha, depth, image[0]]), torch.tensor([1, 1.2, 0.25]))
    image.sum().backward()
    torch.testing.assert_close(sigma.grad, torch.tensor([0.1 * (9 - 0.25), 0.1 * (9 - 0.25), 0, 0, 0]))
    assert rgb.grad[:, 0].tolist() == [0, 0, 1, 0, 0]


def test_threshold_ends_a_ray(backend):
    """With T = 1, 1/2, 1/4, 1/8 before the samples, a threshold of 0.2 lets three of them in, in both directions."""
    sigma = torch.full((6,), math.log(2), requires_grad=True)
    rgb = torch.ones(6, 1, requires_grad=True)
    rays = torch.tensor([[0, 4], [4, 2]]).int()
    weights, alpha, _, image = raymarching.composite_rays_train(sigma, rgb, torch.ones(6, 2), rays, T_thresh=0.2)
    torch.testing.assert_close(weights, torch.tensor([0.5, 0.25, 0.125, 0, 0.5, 0.25]))
    torch.testing.assert_close(alpha, torch.tensor([0.875, 0.75]))
    image[0].sum().backward()
    torch.testing.assert_close(rgb.grad[:, 0], torch.tensor([0.5, 0.25, 0.125, 0, 0, 0]))
    # d alpha / d sigma_i is the light behind the last sample that counts, times dt
    torch.testing.assert_close(sigma.grad, torch.tensor([0.125, 0.125, 0.125, 0, 0, 0]))


@pytest.mark.parametrize("channels", [1, 3, 4, 7])
@pytest.mark.parametrize("T_thresh", [0.0, 1e-4, 0.05])
def test_compiled_equals_its_twin(compiled, channels, T_thresh):
    g = torch.Generator().manual_seed(5)
    results = []
    for function in raymarching.composite_rays_train, reference.composite_rays_train:
        sigma, rgb, t, rays = make_samples(COUNTS, channels)
        sigma.requires_grad_(), rgb.requires_grad_()
        outputs = function(sigma, rgb, t, rays, T_thresh)
        g.manual_seed(5)
        weigh = [torch.randn(x.shape, generator=g, dtype=x.dtype) for x in outputs]
        grads = torch.autograd.grad(outputs, [sigma, rgb], weigh)
        some = torch.autograd.grad(function(sigma, rgb, t, rays, T_thresh)[1].sum(), [sigma])  # alpha alone
        results.append([*outputs, *grads, *some])
    for a, b in zip(*results, strict=True):
        assert a.abs().max() > 0
        torch.testing.assert_close(a, b)


def test_float32_is_accurate(backend):
    """Against float64; half precision colours, as under autocast, are widened."""
    sigma, rgb, t, rays = make_samples(COUNTS, 3, density=20)
    exact = reference.composite_rays_train(sigma, rgb, t, rays)
    single = raymarching.composite_rays_train(sigma.float(), rgb.float(), t.float(), rays)
    for a, b in zip(single, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2e-5, atol=1e-6)
    half = raymarching.composite_rays_train(sigma.half(), rgb.half(), t.float(), rays)
    assert half[3].dtype == torch.float32
    torch.testing.assert_close(half[3].double(), exact[3], rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("channels", [1, 3, 7])
def test_gradients_by_finite_differences(backend, channels):
    sigma, rgb, t, rays = make_samples([3, 0, 1, 9], channels)
    sigma.requires_grad_(), rgb.requires_grad_()
    assert torch.autograd.gradcheck(lambda s, c: raymarching.composite_rays_train(s, c, t, rays, 0.0), (sigma, rgb))


def test_gradient_of_single_weights(backend):
    """d/d sigma_i of sum_j g_j w_j is dt_i (g_i T_after_i - sum_{j>i} g_j w_j): every weight's own g matters.

    A common shortcut takes g_i in place of g_j in the sum. It agrees only if all g are equal, which is checked, too.
    """
    sigma, rgb, t, rays = make_samples([6], 3)
    sigma.requires_grad_()
    weights = raymarching.composite_rays_train(sigma, rgb, t, rays)[0]
    w, dt = weights.detach(), t[:, 1]
    after = torch.exp(-(sigma.detach() * dt).cumsum(0))

    def exact(g):
        return torch.stack([dt[i] * (g[i] * after[i] - (g * w)[i + 1 :].sum()) for i in range(6)])

    def shortcut(g):
        return torch.stack([dt[i] * g[i] * (after[i] - w[i + 1 :].sum()) for i in range(6)])

    for g, same in (torch.tensor([1.0, -2, 0.5, 3, -1, 2]).double(), False), (torch.full((6,), 0.7).double(), True):
        (gradient,) = torch.autograd.grad(weights, sigma, g, retain_graph=True)
        torch.testing.assert_close(gradient, exact(g))
        assert torch.allclose(gradient, shortcut(g), rtol=1e-3) == same


def test_a_nan_stays_in_its_ray(backend):
    sigma, rgb, t, rays = make_samples([3, 3], 3, torch.float32)
    sigma[4] = math.nan
    alpha = raymarching.composite_rays_train(sigma, rgb, t, rays)[1]
    assert alpha.isnan().tolist() == [False, True]


def test_wrong_rays_are_refused(compiled):
    sigma, rgb, t, rays = make_samples([3, 2], 3)
    with pytest.raises(RuntimeError, match="ray 1 wants samples 3 to 6 of 5"):
        raymarching.composite_rays_train(sigma, rgb, t, rays + torch.tensor([[0, 0], [0, 1]]).int())
    with pytest.raises(RuntimeError, match="count 3 of 5"):
        raymarching.composite_rays_train(sigma, rgb, t, rays[:1])


@pytest.mark.parametrize("T_thresh", [1e-4, 0.1])
def test_in_pieces(backend, T_thresh):
    """Two calls of the inference version give what one call of the training version gives."""
    sigma, rgb, t, rays = make_samples([4, 9, 0, 2], 5, density=30)
    _, alpha, depth, image = raymarching.composite_rays_train(sigma, rgb, t, rays, T_thresh)
    index = torch.arange(15)
    cut = torch.tensor([1, 5, 0, 2])
    sums = [torch.ones(4).double(), torch.zeros(4).double(), torch.zeros(4).double(), torch.zeros(4, 5).double()]
    ray = torch.repeat_interleave(torch.arange(4), rays[:, 1])
    early = index - rays[ray, 0] < cut[ray]
    for mask, count in (early, cut), (~early, rays[:, 1] - cut):
        part = torch.stack([count.cumsum(0) - count, count], 1).int()
        raymarching.composite_rays(sigma[mask], rgb[mask], t[mask], part, *sums, T_thresh)
    for a, b in zip(sums, (1 - alpha, alpha, depth, image), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("burst", [1, 8, 1000])
def test_render_rays_equals_training(backend, burst):
    """A soft ball behind a grid that knows where it is; most of what lies behind its surface is never asked for."""
    size = 16
    cells = raymarching.morton3D_invert(torch.arange(size**3)).float()
    inside = ((cells + 0.5) / size * 2 - 1).norm(dim=-1) < 0.75
    bitfield = raymarching.packbits(inside.float()[None], 0.5)
    asked = []

    def field(xyz, direction):
        asked.append(len(xyz))
        radius = xyz.norm(dim=-1)
        return 40.0 * (radius < 0.6), torch.cat([xyz.abs(), direction.abs(), radius[:, None]], 1)

    g = torch.Generator().manual_seed(0)
    origin = torch.nn.functional.normalize(torch.randn(200, 3, generator=g), dim=-1) * 3
    direction = torch.nn.functional.normalize(2 * torch.rand(200, 3, generator=g) - 1 - origin, dim=-1)
    near, far = raymarching.near_far_from_aabb(origin, direction, torch.tensor([-1.0] * 3 + [1.0] * 3), 0.1)
    grid = 1.0, bitfield, 1, size, near, far
    samples = raymarching.march_rays_train(origin, direction, *grid, max_steps=200)
    sigma, rgb = field(samples.xyz, samples.direction)
    asked.clear()
    expected = raymarching.composite_rays_train(sigma, rgb, samples.t, samples.rays)[1:]
    found = raymarching.render_rays(field, origin, direction, *grid, max_steps=200, channels=7, burst=burst)
    assert 0.3 < expected[0].mean() < 0.9
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    assert (sum(asked) < 0.7 * len(sigma)) == (burst < 1000)
