"""Boxes, Morton order and the marcher: against hand-made values, a brute-force sampler and each other."""

import math

import pytest
import torch

import extension
import raymarching

INF = math.inf


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


def unit(x):
    return torch.nn.functional.normalize(x, dim=-1)


def make_rays(count, bound, dtype=torch.float64, seed=0):
    """Rays from outside towards the box, rays that start inside, and rays parallel to an axis or a plane."""
    g = torch.Generator().manual_seed(seed)
    origin = torch.randn(count, 3, generator=g, dtype=dtype) * bound
    toward = (torch.rand(count, 3, generator=g, dtype=dtype) - 0.5) * bound
    direction = toward - origin
    direction[: count // 4] = torch.randn(count // 4, 3, generator=g, dtype=dtype)
    direction[count // 4 : count // 3, 0] = 0
    direction[count // 3 : count // 2, 1:] = 0
    direction = unit(direction)
    return origin, direction


def make_grid(cascades, size, share, seed=0):
    """Random occupancy: `share` of the cells, in lumps, so that empty blocks of every size occur."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(cascades, size**3 // 64, generator=g) < share * 2
    fine = torch.rand(cascades, size**3, generator=g) < 0.5
    return raymarching.packbits((coarse.repeat_interleave(64, 1) & fine).float(), 0.5)


def march(origin, direction, bound, bitfield, cascades, size, min_near=0.05, **options):
    aabb = torch.tensor([-bound] * 3 + [bound] * 3)
    near, far = raymarching.near_far_from_aabb(origin, direction, aabb, min_near)
    return raymarching.march_rays_train(origin, direction, bound, bitfield, cascades, size, near, far, **options)


# --- boxes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin, direction, expected",
    [
        ([-3.0, 0, 0], [1.0, 0, 0], (2, 4)),  # head on, two zero components
        ([-3.0, 0, 0], [-1.0, 0, 0], (INF, INF)),  # the box is behind
        ([0.5, 0, 0], [1.0, 0, 0], (0.2, 0.5)),  # from inside: near is min_near
        ([0.9, 0, 0], [1.0, 0, 0], (INF, INF)),  # leaves before min_near
        ([-3.0, 1, 0], [1.0, 0, 0], (2, 4)),  # along a face, the origin on its plane
        ([-3.0, 1.01, 0], [1.0, 0, 0], (INF, INF)),
        ([-1.0, -1, -1], [3**-0.5] * 3, (0.2, 2 * 3**0.5)),  # from a corner along the diagonal
        ([1.0, 1, 1], [1.0, 0, 0], (INF, INF)),  # from a corner outwards
        ([-3.0, 0, 0], [0.0, 1, 0], (INF, INF)),
        ([-2.0, -2, 0], [0.5**0.5, 0.5**0.5, 0], (2**0.5, 3 * 2**0.5)),
        ([-3.0, 0, 0], [1.0, -0.0, 1e-42], (2, 4)),  # negative zero and a denormal
    ],
)
def test_near_far(backend, origin, direction, expected):
    aabb = torch.tensor([-1.0, -1, -1, 1, 1, 1])
    near, far = raymarching.near_far_from_aabb(torch.tensor([origin]), torch.tensor([direction]), aabb, 0.2)
    torch.testing.assert_close((near.item(), far.item()), tuple(map(float, expected)))


def test_near_far_of_a_box_off_centre(backend):
    aabb = torch.tensor([1.0, 2, 3, 2, 4, 6], dtype=torch.float64)
    origin, direction = make_rays(400, 2.0)
    origin = origin + torch.tensor([1.5, 3, 4.5])
    near, far = raymarching.near_far_from_aabb(origin, direction, aabb, 0.1)
    t = torch.linspace(0.1, 12, 500, dtype=torch.float64)
    points = origin[:, None] + t[:, None] * direction[:, None]
    inside = ((points >= aabb[:3]) & (points <= aabb[3:])).all(-1)
    assert 50 < inside.any(1).sum() < 350
    assert torch.equal(inside, (t >= near[:, None]) & (t <= far[:, None]))
    assert torch.equal(near.isinf(), far.isinf())


# --- Morton order, bits ------------------------------------------------------------------------------------------------


def test_morton_order(backend):
    coords = torch.tensor([[0, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 1], [3, 5, 6], [1023, 1023, 1023]])
    # 3, 5, 6 = 011, 101, 110: bits z y x from the top: 110 101 011
    assert raymarching.morton3D(coords).tolist() == [0, 1, 2, 4, 0b110101011, 2**30 - 1]
    everything = torch.cartesian_prod(*[torch.arange(16)] * 3)
    index = raymarching.morton3D(everything)
    assert torch.equal(index.sort()[0], torch.arange(16**3, dtype=torch.int32))
    assert torch.equal(raymarching.morton3D_invert(index), everything.int())
    assert raymarching.morton3D(coords[:0]).shape == (0,)


def test_packbits(backend):
    grid = torch.tensor([[0.0, 1, 0, 0, 0, 0, 0, 2], [0.5, 0.6, 0, 0, 0, 0, 0, 0]])
    assert raymarching.packbits(grid, 0.5).tolist() == [0b10000010, 0b00000010]


# --- the marcher ---------------------------------------------------------------------------------------------------------


def brute_force(origin, direction, bound, bitfield, cascades, size, near, far, noise, dt_gamma, max_steps):
    """One ray, one interval after the other, in Python: the recursion as the documentation states it."""
    dt_min = 2 * math.sqrt(3) / max_steps
    dt_max = max(dt_min, 2 * math.sqrt(3) * bound / size)

    def length(t):
        return min(max(dt_gamma * t, dt_min), dt_max)

    found, begin = [], near + (noise - 0.5) * length(near)
    while math.isfinite(far) and len(found) < max_steps:
        dt = length(begin)
        middle = begin + dt / 2
        if middle >= far:
            break
        begin += dt
        p = [min(max(o + middle * d, -bound), bound) for o, d in zip(origin, direction, strict=True)]
        level = 0
        while level < cascades - 1 and (max(map(abs, p)) >= 2**level or dt * size / 2 >= 2**level):
            level += 1
        box = min(2**level, bound)
        cell = [min(int((x / box + 1) / 2 * size), size - 1) for x in p]
        bit = sum(((cell[axis] >> b) & 1) << (3 * b + axis) for b in range(10) for axis in range(3))
        if bitfield[level * size**3 // 8 + bit // 8] >> (bit % 8) & 1:
            found.append((middle, dt))
    return found


@pytest.mark.parametrize(
    "cascades, bound, size, share, max_steps",
    [
        (1, 1.0, 8, 0.2, 64),
        (1, 1.0, 16, 0.02, 200),
        (1, 0.7, 32, 0.03, 256),
        (2, 2.0, 16, 0.05, 128),
        (2, 1.5, 16, 0.05, 128),  # cascades that are not aligned with each other
        (3, 4.0, 32, 0.03, 64),
        (3, 3.0, 8, 0.1, 256),
    ],
)
def test_marcher_against_brute_force(backend, cascades, bound, size, share, max_steps):
    origin, direction = make_rays(60, bound)
    noise = torch.rand(60, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bitfield = make_grid(cascades, size, share)
    aabb = torch.tensor([-bound] * 3 + [bound] * 3)
    near, far = raymarching.near_far_from_aabb(origin, direction, aabb, 0.05)
    samples = raymarching.march_rays_train(
        origin, direction, bound, bitfield, cascades, size, near, far, noise, 0.0, max_steps
    )
    expected, bits = [], bitfield.tolist()
    for i in range(60):
        ray = origin[i].tolist(), direction[i].tolist()
        rest = near[i].item(), far[i].item(), noise[i].item()
        expected.append(brute_force(*ray, bound, bits, cascades, size, *rest, 0.0, max_steps))
    assert sum(map(len, expected)) > 100
    assert samples.rays[:, 1].tolist() == [len(found) for found in expected]
    flat = torch.tensor([pair for found in expected for pair in found], dtype=torch.float64)
    torch.testing.assert_close(samples.t, flat)


@pytest.mark.parametrize("dt_gamma", [0.0, 1 / 128, 0.3])
@pytest.mark.parametrize("cascades, bound, size", [(1, 1.0, 32), (2, 1.5, 16), (3, 4.0, 16)])
def test_compiled_marcher_equals_its_twin(compiled, monkeypatch, dt_gamma, cascades, bound, size):
    origin, direction = make_rays(400, bound)
    noise = torch.rand(400, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    bitfield = make_grid(cascades, size, 0.05)
    options = {"noise": noise, "dt_gamma": dt_gamma, "max_steps": 128}
    fast = march(origin, direction, bound, bitfield, cascades, size, **options)
    again = march(origin, direction, bound, bitfield, cascades, size, **options)
    assert all(map(torch.equal, fast, again))
    monkeypatch.setenv("SOMNIUM_KERNELS", "reference")
    plain = march(origin, direction, bound, bitfield, cascades, size, **options)
    assert len(plain.xyz) > 150 and fast.rays.dtype == plain.rays.dtype == torch.int32
    assert torch.equal(fast.rays, plain.rays)
    for a, b in zip(fast[:3], plain[:3], strict=True):
        torch.testing.assert_close(a, b)


def test_compiled_marcher_equals_its_twin_in_float32(compiled, monkeypatch):
    """Up to rounding: a point within an ulp of a cell's face may fall on either side of it."""
    origin, direction = make_rays(1000, 1.0, torch.float32)
    bitfield = make_grid(1, 64, 0.05)
    fast = march(origin, direction, 1.0, bitfield, 1, 64, max_steps=256)
    monkeypatch.setenv("SOMNIUM_KERNELS", "reference")
    plain = march(origin, direction, 1.0, bitfield, 1, 64, max_steps=256)
    assert fast.xyz.dtype == torch.float32
    differing = (fast.rays[:, 1] != plain.rays[:, 1]).sum()
    assert differing <= 5 and len(plain.xyz) > 3000


@pytest.mark.parametrize("dt_gamma", [0.0, 0.05])
@pytest.mark.parametrize("noise", [None, 0.0, 0.25])
def test_a_full_grid_is_tiled(backend, dt_gamma, noise):
    origin, direction = make_rays(100, 2.0)
    offset = None if noise is None else torch.full((100,), noise, dtype=torch.float64)
    full = torch.full((2 * 16**3 // 8,), 255, dtype=torch.uint8)
    aabb = torch.tensor([-2.0] * 3 + [2.0] * 3)
    near, far = raymarching.near_far_from_aabb(origin, direction, aabb, 0.05)
    samples = march(origin, direction, 2.0, full, 2, 16, noise=offset, dt_gamma=dt_gamma, max_steps=500)
    dt_min, dt_max = 2 * math.sqrt(3) / 500, 4 * math.sqrt(3) / 16
    for i in near.isfinite().nonzero()[:, 0].tolist():
        first, count = samples.rays[i].tolist()
        middle, dt = samples.t[first : first + count].unbind(1)
        start = middle - dt / 2
        assert count > 0 and near[i] <= middle[0] + 1e-9 and middle[-1] < far[i]
        torch.testing.assert_close(start[1:], (middle + dt / 2)[:-1])  # no gap, no overlap
        wanted = (start * dt_gamma).clamp(dt_min, dt_max)
        torch.testing.assert_close(dt, wanted, rtol=0.03 if dt_gamma else 1e-9, atol=0)
        first_dt = (near[i] * dt_gamma).clamp(dt_min, dt_max).item()
        assert abs(start[0] - near[i] - ((noise if noise is not None else 0.5) - 0.5) * first_dt) < 0.05 * first_dt
        if count < 500:
            assert far[i] - (middle + dt / 2)[-1] <= dt[-1] * (1 + dt_gamma) / 2 + 1e-9
        torch.testing.assert_close(samples.xyz[first : first + count], origin[i] + middle[:, None] * direction[i])
        assert (samples.direction[first : first + count] == direction[i]).all()


def test_max_steps_limits_the_samples(backend):
    full = torch.full((2 * 8**3 // 8,), 255, dtype=torch.uint8)
    origin, direction = torch.tensor([[-3.0, 0, 0]]), torch.tensor([[1.0, 0, 0]])
    samples = march(origin, direction, 2.0, full, 2, 8, max_steps=40)
    # 4 / (2 sqrt(3) / 40) = 46.2 intervals cross the box; only 40 are allowed
    assert samples.rays.tolist() == [[0, 40]]
    assert march(origin, direction, 2.0, full, 2, 8, max_steps=40, dt_gamma=0.1).rays[0, 1] < 40


def test_one_occupied_cell(backend):
    grid = torch.zeros(1, 8**3)
    grid[0, raymarching.morton3D(torch.tensor([[4, 4, 4]])).long()] = 1  # the cube from 0 to 1/4
    bitfield = raymarching.packbits(grid, 0.5)
    origin = torch.tensor([[0.1, 0.1, 3.0], [0.1, -0.1, 3.0], [0.1, 0.1, 0.2]])
    direction = torch.tensor([[0.0, 0, -1]]).expand(3, 3)
    samples = march(origin, direction, 1.0, bitfield, 1, 8, max_steps=1000, min_near=0.0)
    dt = 2 * math.sqrt(3) / 1000
    assert samples.rays[:, 1].tolist() == [72, 0, 58]  # 0.25 / dt = 72.2, 0.2 / dt = 57.7
    assert samples.rays[:, 0].tolist() == [0, 72, 72]
    z = samples.xyz[:72, 2]
    assert z.max() < 0.25 and z.max() > 0.25 - dt and z.min() >= 0 and z.min() < dt
    torch.testing.assert_close(samples.t[:72, 0], 3 - z)


@pytest.mark.parametrize("size", [8, 16, 32])
def test_an_empty_cascade_is_left_where_it_ends(backend, size):
    """The way out of an empty inner box must not lead past the full shell around it."""
    bitfield = raymarching.packbits(torch.tensor([[0.0], [1.0]]).expand(2, size**3), 0.5)
    origin, direction = torch.zeros(2, 3), torch.tensor([[1.0, 0, 0], [0, 0.6, -0.8]])
    samples = march(origin, direction, 2.0, bitfield, 2, size, min_near=0.0, max_steps=400)
    # from |x| = 1 to 2 in steps of 2 sqrt(3) / 400 = 0.00866; the second ray is 1 / 0.8 times as long
    assert samples.rays[:, 1].tolist() == [116, 145]
    assert samples.xyz[:116, 0].min() >= 1 and samples.xyz[116:, 2].max() <= -1


def test_nothing_to_find(backend):
    origin, direction = make_rays(50, 1.0)
    empty = torch.zeros(8**3 // 8, dtype=torch.uint8)
    for samples in (
        march(origin, direction, 1.0, empty, 1, 8),
        march(origin + 10, direction.abs(), 1.0, ~empty, 1, 8),
        march(origin[:0], direction[:0], 1.0, ~empty, 1, 8),
    ):
        assert [x.shape[1] for x in samples] == [3, 3, 2, 2]
        assert [len(x) for x in samples[:3]] == [0, 0, 0] and (samples.rays == 0).all()


@pytest.mark.parametrize("dt_gamma, budget", [(0.0, 1), (0.0, 7), (0.02, 4), (0.0, 1000)])
def test_inference_finds_the_training_samples(backend, dt_gamma, budget):
    origin, direction = make_rays(150, 2.0, torch.float32)
    noise = torch.rand(150, generator=torch.Generator().manual_seed(3))
    grid = 2.0, make_grid(2, 16, 0.1), 2, 16
    near, far = raymarching.near_far_from_aabb(origin, direction, torch.tensor([-2.0] * 3 + [2.0] * 3), 0.05)
    options = {"dt_gamma": dt_gamma, "max_steps": 50}
    expected = raymarching.march_rays_train(origin, direction, *grid, near, far, noise, **options)
    pieces = [[] for _ in range(150)]
    alive, cursor = torch.arange(150), torch.zeros(150, 2, dtype=torch.int32)
    while len(alive):
        rest = near[alive], far[alive], cursor, budget, noise[alive]
        samples, cursor = raymarching.march_rays(origin[alive], direction[alive], *grid, *rest, **options)
        assert (samples.rays[:, 1] <= budget).all()
        for i, (first, count) in zip(alive.tolist(), samples.rays.tolist(), strict=True):
            pieces[i].append(torch.cat([x[first : first + count] for x in samples[:3]], 1))
        alive, cursor = alive[cursor[:, 0] >= 0], cursor[cursor[:, 0] >= 0]
    assert max(map(len, pieces)) > 1 or budget == 1000
    assert torch.equal(torch.cat([row for ray in pieces for row in ray]), torch.cat(expected[:3], 1))


def test_cursor_says_at_once_that_nothing_is_left(backend):
    grid = torch.zeros(1, 8**3)
    grid[0, 0] = 1
    origin, direction = torch.tensor([[-0.9, -0.9, -3.0]]), torch.tensor([[0.0, 0, 1]])
    common = origin, direction, 1.0, raymarching.packbits(grid, 0.5), 1, 8, torch.tensor([2.0]), torch.tensor([4.0])
    cursor = torch.zeros(1, 2, dtype=torch.int32)
    every, _ = raymarching.march_rays(*common, cursor, 100, max_steps=100)
    count = every.rays[0, 1].item()
    assert count == 7  # 0.25 / (2 sqrt(3) / 100) = 7.2
    _, after = raymarching.march_rays(*common, cursor, count - 1, max_steps=100)
    assert after.tolist() == [[6, 6]]
    _, after = raymarching.march_rays(*common, cursor, count, max_steps=100)
    assert after.tolist() == [[-1, 7]]


def test_wrong_arguments_are_named(compiled):
    origin, direction = make_rays(4, 1.0)
    bits = torch.zeros(8**3 // 8, dtype=torch.uint8)
    near, far = torch.zeros(4), torch.ones(4)
    with pytest.raises(RuntimeError, match="grid_size must be a power of two"):
        raymarching.march_rays_train(origin, direction, 1.0, bits, 1, 12, near, far)
    with pytest.raises(RuntimeError, match="bitfield must have shape .128."):
        raymarching.march_rays_train(origin, direction, 1.0, bits, 2, 8, near, far)
    with pytest.raises(RuntimeError, match="bitfield must be Byte"):
        extension.load(raymarching.FOLDER, "raymarching").ops.march_count(
            *(origin, direction, near.double(), far.double(), None, None, bits.int(), 1.0, 1, 8, 0.0, 10, 10)
        )


def test_rays_that_are_not_numbers_find_nothing(backend):
    origin, direction = make_rays(3, 1.0)
    direction[0], origin[1] = math.nan, math.inf
    full = torch.full((8**3 // 8,), 255, dtype=torch.uint8)
    samples = march(origin, direction, 1.0, full, 1, 8)
    assert samples.rays[:2, 1].tolist() == [0, 0]
