"""Rendering known things: a ball, a slab, nothing at all; with the occupancy grid and with stratified samples."""

import math

import pytest
import torch

from nerf import build_scene
from nerf.occupancy import OccupancyGrid, pool
from nerf.provider import orbit
from nerf.renderer import NeRFRenderer
from nerf.sampling import importance, transmittance_weights, visible

BOTH = pytest.mark.parametrize("marching", [True, False], ids=["marched", "stratified"])
FINE = (
    "--max_steps",
    256,
    "--num_steps",
    48,
    "--upsample_steps",
    64,
    "--grid_size",
    32,
    "--bg_radius",
    -1,
    "--background",
    "white",
)


class Solid(NeRFRenderer):
    """A renderer of `density(x)`, with the position as colour and the direction from `centre` as normal."""

    def __init__(self, opt, density, channels=3, centre=(0.0, 0.0, 0.0)):
        super().__init__(opt, channels)
        self.centre, self.solid = torch.tensor(centre), density

    def query(self, x, normals=False):
        offset = x - self.centre
        colour = torch.cat([x, x], -1)[:, : self.channels]
        return self.solid(x), colour, torch.nn.functional.normalize(offset, dim=-1) if normals else None


def ball(radius=0.5, centre=(0.0, 0.0, 0.0), density=400.0):
    return lambda x: density * ((x - torch.tensor(centre)).norm(dim=-1) < radius).float()


def scene_of(options, density, marching, *flags, **kw):
    scene = Solid(options(*FINE, *(["--cuda_ray"] if marching else []), *flags), density, **kw).eval()
    for step in (0, 1):
        scene.update_occupancy(step, seeded(step))
    return scene


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def hit_sphere(cameras, radius, centre=(0.0, 0.0, 0.0)):
    """Closed form: distance to a sphere along each ray (inf: missed), its normal there, and how near the miss was."""
    origins, directions = cameras.rays()
    origins = origins - torch.tensor(centre)
    along = (origins * directions).sum(-1)
    gap = (origins.square().sum(-1) - along.square()).clamp(min=0)
    depth = -along - (radius**2 - gap).clamp(min=0).sqrt()
    normal = (origins + depth[..., None] * directions) / radius
    return torch.where(gap < radius**2, depth, math.inf), normal, gap.sqrt() - radius


CAMERAS = orbit(torch.tensor([80.0, 20.0]), torch.tensor([30.0, -100.0]), 3.0, 30.0, 24, 32)


@BOTH
@pytest.mark.parametrize("centre", [(0.0, 0.0, 0.0), (0.3, -0.2, 0.1)])
def test_ball(options, marching, centre):
    """Silhouette, depth, normal and colour of an opaque ball, off the axis too: mirrored cameras would miss it."""
    scene = scene_of(options, ball(centre=centre), marching, centre=centre)
    out = scene.render(CAMERAS, "normal", background=torch.zeros(3))
    depth, normal, miss = hit_sphere(CAMERAS, 0.5, centre)
    hit, clear = torch.isfinite(depth), miss.abs() > 0.03
    assert ((out.alpha[..., 0] > 0.5) == hit)[clear].all() and hit.sum() > 200
    inside = hit & clear
    assert (out.alpha[..., 0][inside] > 0.99).all() and (out.alpha[..., 0][~hit & clear] < 1e-3).all()
    assert (out.depth[..., 0] - depth)[inside].abs().max() < 0.05
    assert (out.normal - normal)[inside].abs().max() < 0.12
    assert torch.allclose(out.image, (out.normal + out.alpha) / 2, atol=5e-4)
    surface = scene.render(CAMERAS)  # colours are positions
    origins, directions = CAMERAS.rays()
    assert (surface.image - origins - depth[..., None] * directions)[inside].abs().max() < 0.05


def test_both_samplers_agree(options):
    """On a soft cloud, where both integrate the same thing."""

    def cloud(x):
        return 6 * torch.exp(-((x - torch.tensor([0.1, 0.2, -0.1])) ** 2).sum(-1) / 0.08)

    one, two = (scene_of(options, cloud, m, "--density_thresh", 1e-3).render(CAMERAS) for m in (True, False))
    assert (one.alpha - two.alpha).abs().max() < 0.01 and 0.3 < one.alpha.max() < 0.99
    assert (one.depth - two.depth).abs().max() < 0.03 and (one.image - two.image).abs().max() < 0.01
    # the integral itself: through the middle, alpha = 1 - exp(-6 sqrt(0.08 pi))
    through = orbit(90.0, 0.0, 3.0, 30.0, 1, 1)
    shifted = through.c2w.clone()
    shifted[0, :3, 3] += torch.tensor([0.1, 0.2, 0.0])
    through = type(through)(shifted, through.fovy, through.polar, through.azimuth, through.radius, 1, 1)
    scene = scene_of(options, cloud, True, "--density_thresh", 1e-3)
    assert math.isclose(float(scene.render(through).alpha), 1 - math.exp(-6 * math.sqrt(0.08 * math.pi)), abs_tol=5e-3)


@BOTH
def test_slab(options, marching):
    """A slab |z| < 0.1 of density s: alpha = 1 - exp(-0.2 s) head on; what is behind an opaque one is never seen."""
    head_on = orbit(90.0, 0.0, 3.0, 2.0, 4, 4)
    for strength in (0.0, 1.0, 5.0):
        scene = scene_of(
            options, lambda x, s=strength: s * (x[:, 2].abs() < 0.1).float(), marching, "--max_steps", 1024
        )
        alpha = scene.render(head_on).alpha
        assert torch.allclose(alpha, torch.full_like(alpha, 1 - math.exp(-0.2 * strength)), atol=0.04)
    wall = scene_of(options, lambda x: 1e4 * (x[:, 2] < 0.5).float(), marching)
    out = wall.render(head_on)
    assert (out.alpha > 0.999).all() and (out.image[..., 2] - 0.5).abs().max() < 0.03
    if marching:
        assert out.num_samples <= 16 * 17  # one burst and the sample that made sure; 111 lie behind the surface
        trained = wall.train().render(head_on, generator=seeded())
        assert trained.num_samples < 16 * 30  # less the core, two cells behind the surface and the few explored ones


@BOTH
def test_nothing(options, marching):
    """An empty scene shows its background and nothing is NaN, in training as well."""
    scene = scene_of(options, lambda x: torch.zeros_like(x[:, 0]), marching)
    out = scene.render(CAMERAS, "lambertian", background=torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(out.image, torch.tensor([0.2, 0.4, 0.6]).expand_as(out.image))
    assert (out.alpha == 0).all() and (out.depth == 0).all() and (out.normal == 0).all()
    trained = scene.train().render(CAMERAS, generator=seeded())
    assert (trained.image == 1).all() and torch.isfinite(trained.weights).all()
    away = orbit(90.0, 0.0, -3.0, 30.0, 8, 8)  # looks away from the box: no ray meets it
    assert torch.isfinite(scene.render(away, generator=seeded()).image).all()


def test_backgrounds(options):
    scene = scene_of(options, ball(), True)
    per_view = torch.tensor([[1.0, 0, 0], [0, 0, 1.0]])
    one = scene.render(CAMERAS, background=per_view)
    full = scene.render(CAMERAS, background=per_view[:, None, None].expand(2, 24, 32, 3).clone())
    assert torch.equal(one.image, full.image)
    assert torch.equal(one.image[0, 0, 0], per_view[0]) and torch.equal(one.image[1, 0, 0], per_view[1])
    assert (scene.render(CAMERAS).image[:, 0, 0] == 1).all()
    painted = build_scene(options("--cuda_ray", "--bg_radius", 1.4, "--background", "mlp")).eval()
    _, directions = CAMERAS.rays()
    assert torch.allclose(painted.render(CAMERAS).image[:, 0, 0], painted.background(directions[:, 0, 0]), atol=0.06)


@BOTH
def test_light_and_ambient_belong_to_their_view(options, marching):
    scene = scene_of(options, ball(), marching)
    cameras = orbit(torch.tensor([90.0, 90.0]), 0.0, 3.0, 30.0, 9, 9)
    light = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, -1.0]])
    out = scene.render(cameras, "textureless", light, torch.tensor([0.0, 0.25]), torch.zeros(3))
    assert out.image[0, 4, 4, 0] > 0.97 and math.isclose(float(out.image[1, 4, 4, 0]), 0.25, abs_tol=0.01)
    default = scene.render(cameras, "textureless", ambient=0.0)  # the light is at the camera
    assert (default.image[:, 4, 4] > 0.97).all()


@BOTH
def test_chunks_change_nothing(options, marching):
    scene = scene_of(options, ball(), marching)
    light = torch.nn.functional.normalize(torch.tensor([[1.0, 1, 0], [0, 1, 1]]), dim=-1)
    whole, parts = (scene.render(CAMERAS, "lambertian", light, torch.tensor([0.1, 0.6]), chunk=c) for c in (4096, 77))
    for name in "image", "alpha", "depth", "normal":
        assert torch.allclose(getattr(whole, name), getattr(parts, name), atol=1e-5), name


@BOTH
def test_training_is_jittered_and_repeats(options, marching):
    scene = scene_of(options, ball(density=20.0), marching).train()
    one, again, other = (scene.render(CAMERAS, generator=seeded(s)) for s in (1, 1, 2))
    assert torch.equal(one.image, again.image) and not torch.equal(one.image, other.image)
    assert (one.image - other.image).abs().mean() < 0.02
    scene.eval()
    first, second = scene.render(CAMERAS, generator=seeded(1)), scene.render(CAMERAS, generator=seeded(2))
    assert torch.equal(first.image, second.image) and first.weights is None


@BOTH
def test_training_record(options, marching):
    """What the losses get: every ray's slice of weights sums to its alpha; positions lie on their rays."""
    scene = scene_of(options, ball(density=20.0), marching).train()
    out = scene.render(CAMERAS, "lambertian", generator=seeded())
    offset, count = out.rays.long().unbind(-1)
    ray = torch.repeat_interleave(torch.arange(len(count)), count)
    assert len(out.weights) == out.num_samples == int(count.sum()) and torch.equal(
        offset, torch.cumsum(count, 0) - count
    )
    assert torch.allclose(torch.zeros(len(count)).index_add(0, ray, out.weights), out.alpha.flatten(), atol=1e-5)
    origins, directions = (r.reshape(-1, 3) for r in CAMERAS.rays())
    assert torch.equal(out.directions, directions[ray])
    inside = out.positions.abs().amax(-1) < 1.0001
    assert inside.all()
    if marching:
        assert torch.linalg.cross(out.positions - origins[ray], directions[ray]).norm(dim=-1).max() < 1e-5
    assert out.normals.shape == out.positions.shape


@BOTH
@pytest.mark.parametrize("shading", ["albedo", "lambertian", "normal"])
def test_gradients_reach_the_field(options, marching, shading):
    """Following the gradient a little changes the picture as it promised."""
    flags = ("--cuda_ray",) if marching else ()
    torch.manual_seed(0)
    scene = build_scene(
        options("--bg_radius", -1, "--blob_radius", 0.4, "--lambda_orient", 0, "--desired_resolution", 17, *flags)
    )
    with torch.no_grad():
        scene.encoder.embeddings.uniform_(-0.3, 0.3, generator=seeded())
    scene.update_occupancy(0, seeded())

    def loss():
        out = scene.render(CAMERAS.resized(10, 12), shading, ambient=0.3, background=torch.zeros(3), generator=seeded())
        return (out.image[..., 0] + out.alpha[..., 0] + 0.1 * out.depth[..., 0]).mean() * 100

    loss().backward()
    parameters = [p for p in scene.parameters() if p.grad is not None]
    assert len(parameters) == len(list(scene.parameters()))
    size = sum(p.grad.square().sum() for p in parameters)
    before = loss().item()
    with torch.no_grad():
        for p in parameters:
            p += 0.02 / size * p.grad
    assert math.isclose(loss().item() - before, 0.02, rel_tol=0.15)


def test_normals_only_when_needed(options):
    flags = (*FINE, "--cuda_ray", "--lambda_orient", "[10, 0, 1, 20]", "--lambda_2d_normal_smooth", 0)
    scene = Solid(options(*flags), ball()).train()
    assert scene.render(CAMERAS, generator=seeded(), step=5).normals is None
    assert scene.render(CAMERAS, generator=seeded(), step=15).normals is not None
    assert scene.render(CAMERAS, "lambertian", generator=seeded(), step=5).normals is not None
    assert scene.eval().render(CAMERAS, step=15).normal is None
    assert scene.render(CAMERAS, normals=True).normal is not None


@BOTH
def test_four_channels(options, marching):
    scene = scene_of(options, ball(), marching, channels=4)
    out = scene.render(CAMERAS, background=torch.full((4,), -2.0))
    assert out.image.shape == (2, 24, 32, 4) and (out.image[:, 0, 0] == -2).all()
    assert torch.allclose(out.image[0, 12, 16, 3], out.image[0, 12, 16, 0], atol=1e-5)  # both are x
    assert build_scene(options("--cuda_ray", "--bg_radius", -1), 4).eval().render(CAMERAS).image.shape[-1] == 4


@BOTH
def test_larger_bound(options, marching):
    """Two cascades: a small ball in the middle and one out in the corner that only the outer cascade holds."""

    def two_balls(x):
        return ball(0.4)(x) + ball(0.3, (1.5, 0.0, 0.0))(x)

    scene = scene_of(options, two_balls, marching, "--bound", 2, "--num_steps", 96)
    cameras = orbit(90.0, 0.0, 6.0, 40.0, 40, 40)
    alpha = scene.render(cameras).alpha[..., 0]
    for radius, centre in (0.4, (0.0, 0.0, 0.0)), (0.3, (1.5, 0.0, 0.0)):
        _, _, miss = hit_sphere(cameras, radius, centre)
        assert (alpha[miss < -0.1] > 0.95).all() and (miss < -0.1).sum() > 5
        alpha = torch.where(miss < 0.1, 0, alpha)
    assert alpha.max() < 1e-3
    if marching:
        assert scene.density_grid.shape == (2, 32**3)


def cell(x, size=32):
    """Index of the grid cell that holds a point of the box of half size 1."""
    from raymarching import morton3D

    return morton3D(((x + 1) / 2 * size).int()).long()


def bits(grid):
    return (grid.bitfield[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1 == 1


def test_occupancy_holds_the_object():
    grid = OccupancyGrid(32, 1.0, 10.0)
    assert (grid.bitfield == 255).all()
    for step in range(3):
        grid.update(ball(0.5, (0.2, 0.0, 0.0)), step, seeded(step))
    shell = torch.nn.functional.normalize(torch.randn(500, 3, generator=seeded()), dim=-1)
    occupied = bits(grid).reshape(-1)
    for radius in (0.1, 0.4, 0.5, 0.53):  # a cell is 1/16 wide; its neighbours are kept as well
        assert occupied[cell(shell * radius + torch.tensor([0.2, 0, 0]))].all()
    far = (torch.rand(3000, 3, generator=seeded()) * 2 - 1) * 0.99
    far = far[(far - torch.tensor([0.2, 0, 0])).norm(dim=-1) > 0.75]
    assert 0.02 < occupied[cell(far)].float().mean() < 0.09  # a few empty cells keep their chance
    solid = (grid.solid[:, None] >> torch.arange(8, dtype=torch.uint8) & 1 == 1).flatten()
    assert not solid[cell(far)].any() and (occupied | ~solid).all()  # but not when results are shown
    assert math.isclose(float(grid.mean), 400 * math.pi / 6 / 8, rel_tol=0.15)


def test_occupancy_forgets_slowly_and_finds_new_things():
    grid = OccupancyGrid(16, 1.0, 10.0)
    grid.update(ball(0.3), 0, seeded())
    peak = grid.density.max().item()
    moved = ball(0.3, (0.5, 0.5, 0.5))
    seen = []
    for step in range(300, 340):  # after the warm-up: a quarter of the cells, and the occupied ones
        grid.update(lambda x: seen.append(len(x)) or moved(x), step, seeded(step))
    middle = cell(torch.tensor([[0.0, 0.0, 0.0]]), 16)
    assert grid.density[0, middle].item() == pytest.approx(peak * 0.95**40, rel=1e-3)
    assert grid.density[0, cell(torch.tensor([[0.5, 0.5, 0.5]]), 16)] == 400
    assert sum(seen) / 40 < 0.5 * 16**3
    grid.reset()
    assert (grid.bitfield == 255).all()
    seen.clear()
    grid.update(lambda x: seen.append(len(x)) or moved(x), 400, seeded())
    assert sum(seen) == 16**3


def test_explored_cells_change():
    grid = OccupancyGrid(32, 1.0, 10.0)
    marked = torch.zeros(32**3, dtype=torch.bool)
    for step in range(300, 360):
        grid.update(lambda x: torch.zeros(len(x)), step, seeded(step))
        marked |= bits(grid).reshape(-1)
    assert 0.6 < marked.float().mean() < 0.8  # 1 - 0.98^60 = 0.70


def test_pool():
    cube = torch.zeros(1, 5, 5, 5, dtype=torch.bool)
    cube[0, 0, 2, 4] = True
    grown = pool(cube, torch.logical_or)
    assert grown.sum() == 2 * 3 * 2 and grown[0, 1, 3, 3] and not grown[0, 2].any()
    block = torch.zeros(2, 6, 6, 6)
    block[1, 1:5, 1:5, 1:4] = torch.arange(3.0) + 5
    least = pool(block, torch.minimum)
    assert least.count_nonzero() == 4 and (least[1, 2:4, 2:4, 2] == 5).all()


def test_core_is_the_inside():
    """Known to be dense: the ball less two cells; in both cascades; forgotten as soon as it is gone."""
    grid = OccupancyGrid(32, 2.0, 10.0)
    grid.update(ball(0.8), 0, seeded())
    x = points_at(torch.linspace(0, 1.9, 200))
    radius, core = x.norm(dim=-1), grid.core_density(x)
    assert (core[radius < 0.65] == 400).all() and (core[radius > 0.8] == 0).all()
    grid.update(ball(1.6), 0, seeded())
    assert (grid.core_density(x)[radius < 1.6 - 4 / 16] == 400).all() and (
        grid.core_density(x)[radius > 1.6] == 0
    ).all()
    grid.update(lambda x: torch.zeros(len(x)), 300, seeded())
    assert (grid.core == 0).all()


def points_at(radius):
    """A point in a random direction at each radius, inside the box of half size 2."""
    return torch.nn.functional.normalize(torch.randn(len(radius), 3, generator=seeded(9)), dim=-1) * radius[:, None]


def test_occupancy_is_kept_with_the_scene(options):
    one, two = (Solid(options(*FINE, "--cuda_ray"), ball()).eval() for _ in range(2))
    one.update_occupancy(0, seeded())
    two.load_state_dict(one.state_dict())
    assert torch.equal(one.density_bitfield, two.density_bitfield) and torch.equal(one.mean_density, two.mean_density)
    assert torch.equal(one.render(CAMERAS).image, two.render(CAMERAS).image)


def test_weights_by_hand():
    """sigma dt = ln 2 each: 1/2, 1/4, 1/8."""
    sigma, dt = torch.full((1, 3), math.log(2)), torch.ones(1, 3)
    assert torch.allclose(transmittance_weights(sigma, dt), torch.tensor([[0.5, 0.25, 0.125]]))


def test_importance():
    """All weight in the second of three intervals: quantiles spread over it evenly."""
    edges, weights = torch.tensor([[0.0, 1.0, 3.0, 4.0]]), torch.tensor([[0.0, 1.0, 0.0]])
    got = importance(edges, weights, torch.tensor([[0.1, 0.5, 0.9]]))
    assert torch.allclose(got, torch.tensor([[1.2, 2.0, 2.8]]), atol=1e-3)
    even = importance(edges, torch.zeros(1, 3), torch.tensor([[0.0, 0.5, 1.0]]))
    assert torch.allclose(even, torch.tensor([[0.0, 2.0, 4.0]]), atol=1e-4)


def test_visible():
    """Light before the samples of ray 0: 1, .5, .25, .125; ray 1 is empty; ray 2 stops after its opaque sample."""
    sigma = torch.tensor([math.log(2)] * 4 + [0.0, 1e9, 1.0])
    t = torch.ones(7, 2)
    rays = torch.tensor([[0, 4], [4, 0], [4, 3]], dtype=torch.int32)
    keep, left = visible(sigma, t, rays, 0.2)
    assert keep.tolist() == [True, True, True, False, True, True, False]
    assert left.tolist() == [[0, 3], [3, 0], [3, 2]] and left.dtype == torch.int32
    keep, left = visible(torch.zeros(0), torch.zeros(0, 2), rays * 0, 0.2)
    assert len(keep) == 0 and left.tolist() == [[0, 0]] * 3
