"""Cameras: which way is right, what the pixels see, and where random cameras stand."""

import math
from types import SimpleNamespace

import pytest
import torch

from nerf.provider import orbit, random_cameras, random_light, six_views, sphere_angles, turntable, view_ranges


def options(**changes):
    values = {
        "radius_range": (3.0, 3.5),
        "theta_range": (45.0, 105.0),
        "phi_range": (-180.0, 180.0),
        "fovy_range": (10.0, 30.0),
        "default_radius": 3.2,
        "default_polar": 90.0,
        "default_azimuth": 0.0,
        "default_fovy": 20.0,
        "uniform_sphere_rate": 0.0,
        "jitter_pose": False,
        "jitter_center": 0.2,
        "jitter_target": 0.2,
        "jitter_up": 0.02,
        "progressive_view": False,
        "progressive_view_init_ratio": 0.2,
        "iters": 1000,
        "view_group": 1,
        "dmtet": False,
        "size_scale": lambda step: 1.0,
        "h": 48,
        "w": 64,
    }
    return SimpleNamespace(**values | changes)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def to_pixel(cameras, point):
    """Column and row of a world point in each camera, by its projection matrix."""
    clip = cameras.mvp(0.1, 100.0) @ torch.cat([point, point.new_ones(1)])
    ndc = clip[:, :3] / clip[:, 3:]
    return (1 + ndc[:, 0]) * cameras.width / 2, (1 - ndc[:, 1]) * cameras.height / 2


@pytest.mark.parametrize(
    ("polar", "azimuth", "expected"),
    [(90, 0, (0, 0, 2)), (90, 90, (2, 0, 0)), (90, -90, (-2, 0, 0)), (90, 180, (0, 0, -2)), (0, 0, (0, 2, 0))],
)
def test_position(polar, azimuth, expected):
    assert torch.allclose(orbit(polar, azimuth, 2.0, 30.0, 8, 8).position[0], torch.tensor(expected).float(), atol=1e-6)


def test_rotations_are_rotations():
    everywhere = orbit(torch.linspace(0, 180, 19), torch.linspace(-180, 180, 19), 3.0, 20.0, 4, 4)
    shaken = random_cameras(options(jitter_pose=True, jitter_up=0.3), 32, 0, seeded())
    for cameras in everywhere, shaken, six_views(options(), 4, 4):
        rotation = cameras.c2w[:, :3, :3]
        assert torch.allclose(torch.linalg.det(rotation), torch.ones(len(cameras)), atol=1e-5)
        assert torch.allclose(rotation @ rotation.mT, torch.eye(3).expand_as(rotation), atol=1e-5)
        assert torch.equal(cameras.c2w[:, 3], torch.tensor([0.0, 0, 0, 1]).expand(len(cameras), 4))


def test_right_is_right():
    """From the front +x is on the right; from behind, on the left; +y is up; from above, front of the object is down."""
    x, y, z = torch.eye(3) * 0.3
    views = six_views(options(), 40, 60)  # front, +x, back, -x, above, below
    column, _ = to_pixel(views, x)
    assert column[0] > 31 and column[2] < 29
    assert torch.allclose(column[[1, 3]], torch.tensor(30.0), atol=1e-3)
    column, _ = to_pixel(views, z)
    assert column[1] < 29 and column[3] > 31  # from its left side, the object looks left
    _, row = to_pixel(views, y)
    assert (row[:4] < 19).all()
    _, row = to_pixel(views, z)
    assert row[4] > 21 and row[5] < 19
    column, _ = to_pixel(views, x)
    assert column[4] > 31 and column[5] > 31


def test_above_is_the_limit_of_nearby_cameras():
    for azimuth in (0.0, 50.0, -120.0):
        near, at = orbit(1e-3, azimuth, 3.0, 20.0, 4, 4), orbit(0.0, azimuth, 3.0, 20.0, 4, 4)
        assert torch.allclose(near.c2w, at.c2w, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(6, 6), (5, 9), (8, 3)])
def test_rays_agree_with_the_projection(height, width):
    cameras = random_cameras(options(jitter_pose=True, h=height, w=width), 3, 0, seeded())
    origins, directions = cameras.rays()
    assert origins.shape == directions.shape == (3, height, width, 3)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(3, height, width), atol=1e-6)
    for b in range(3):
        for row in range(height):
            for column in range(width):
                point = origins[b, row, column] + 2.7 * directions[b, row, column]
                found = to_pixel(cameras[b : b + 1], point)
                assert abs(found[0].item() - column - 0.5) < 1e-3
                assert abs(found[1].item() - row - 0.5) < 1e-3


def test_field_of_view_is_vertical_and_centred():
    cameras = orbit(90.0, 0.0, 3.0, 40.0, 101, 201)
    _, directions = cameras.rays()
    assert torch.allclose(directions[0, 50, 100], torch.tensor([0.0, 0, -1]), atol=1e-6)
    top = directions[0, 0, 100]
    assert math.isclose(float(top[1] / -top[2]), math.tan(math.radians(20)) * 100 / 101, rel_tol=1e-5)


def test_depth_of_clip_space():
    cameras = orbit(90.0, 0.0, 3.0, 40.0, 8, 8)
    for depth, expected in (0.5, -1.0), (10.0, 1.0):
        clip = cameras.mvp(0.5, 10.0)[0] @ torch.tensor([0.0, 0, 3 - depth, 1])
        assert math.isclose(float(clip[2] / clip[3]), expected, abs_tol=1e-5)


def test_random_cameras_fill_their_ranges():
    cameras = random_cameras(options(), 400, 0, seeded())
    for name, low, high in ("radius", 3, 3.5), ("polar", 45, 105), ("azimuth", -180, 180), ("fovy", 10, 30):
        value = getattr(cameras, name)
        assert low <= value.min() < low + 0.05 * (high - low) and high - 0.05 * (high - low) < value.max() <= high, name
    assert torch.allclose(cameras.position.norm(dim=-1), cameras.radius, atol=1e-5)
    assert (cameras.height, cameras.width) == (48, 64)


def test_random_cameras_repeat():
    first, again = (random_cameras(options(jitter_pose=True), 4, 0, seeded(3)) for _ in range(2))
    assert torch.equal(first.c2w, again.c2w) and torch.equal(first.fovy, again.fovy)
    assert not torch.equal(first.c2w, random_cameras(options(jitter_pose=True), 4, 0, seeded(4)).c2w)


def test_jitter_is_in_the_angles():
    plain = random_cameras(options(), 64, 0, seeded(1))
    shaken = random_cameras(options(jitter_pose=True), 64, 0, seeded(1))
    polar, azimuth, radius = sphere_angles(shaken.position)
    assert torch.allclose(shaken.polar, polar) and torch.allclose(shaken.azimuth, azimuth)
    assert torch.allclose(shaken.radius, radius)
    moved = (shaken.position - plain.position).abs()
    assert 0.05 < moved.max() <= 0.1 + 1e-5
    misses = torch.linalg.cross(shaken.position, shaken.c2w[:, :3, 2]).norm(dim=-1)  # of the origin by the optical axis
    assert 0.1 < misses.mean() < 0.5


def test_uniform_sphere():
    cameras = random_cameras(options(uniform_sphere_rate=1.0, theta_range=(90, 90)), 2000, 0, seeded())
    height = torch.cos(torch.deg2rad(cameras.polar))
    assert height.min() >= 0 and abs(height.mean() - 0.5) < 0.03  # uniform on a half sphere: heights are uniform
    mixed = random_cameras(options(uniform_sphere_rate=0.25, theta_range=(90, 90)), 2000, 0, seeded())
    assert abs((mixed.polar != 90).float().mean() - 0.25) < 0.04


@pytest.mark.parametrize("jitter", (False, True))
@pytest.mark.parametrize("rate", (0.0, 0.5))
def test_without_groups_the_random_numbers_come_in_the_old_order(jitter, rate):
    """Radius, polar, azimuth, field of view, [direction, its lot], [shift, target, up]: the same cameras for a seed, for ever."""
    opt, again = options(jitter_pose=jitter, uniform_sphere_rate=rate), seeded(5)
    cameras = random_cameras(opt, 6, 0, seeded(5))
    ranges = opt.radius_range, opt.theta_range, opt.phi_range, opt.fovy_range
    radius, polar, azimuth, fovy = (low + (high - low) * torch.rand(6, generator=again) for low, high in ranges)
    if rate:
        anywhere = torch.randn(6, 3, generator=again)
        anywhere[:, 1] = anywhere[:, 1].abs()
        lot = torch.rand(6, generator=again) < rate
        polar = torch.where(lot, sphere_angles(anywhere)[0], polar)
        azimuth = torch.where(lot, sphere_angles(anywhere)[1], azimuth)
    plain = orbit(polar, azimuth, radius, fovy, 48, 64)
    assert torch.equal(cameras.fovy, fovy)
    if not jitter:
        assert torch.equal(cameras.c2w, plain.c2w) and torch.equal(cameras.azimuth, plain.azimuth)
        return
    shift = (torch.rand(6, 3, generator=again) - 0.5) * opt.jitter_center
    target, up = (torch.randn(6, 3, generator=again) * size for size in (opt.jitter_target, opt.jitter_up))
    assert torch.equal(cameras.position, plain.position + shift)
    sight = target - cameras.position
    assert torch.allclose(-cameras.c2w[:, :3, 2], sight / sight.norm(dim=-1, keepdim=True), atol=1e-6)
    right = torch.linalg.cross(sight, orbit(*sphere_angles(-sight)[:2], 1.0, 20.0, 4, 4).c2w[:, :3, 1] + up)
    assert torch.allclose(cameras.c2w[:, :3, 0], right / right.norm(dim=-1, keepdim=True), atol=1e-5)


@pytest.mark.parametrize("rate", (0.0, 1.0))
def test_the_views_of_a_group_stand_evenly_around(rate):
    opt = options(view_group=4, phi_range=(10.0, 20.0), uniform_sphere_rate=rate)
    cameras = random_cameras(opt, 12, 0, seeded(2))
    for name in ("polar", "radius", "fovy"):
        value = getattr(cameras, name).view(3, 4)
        assert torch.equal(value, value[:, :1].expand(3, 4)), name
        assert len(value[:, 0].unique()) == 3, name
    azimuth = cameras.azimuth.view(3, 4)
    assert torch.allclose(torch.remainder(azimuth.diff(dim=1), 360), torch.full((3, 3), 90.0), atol=1e-3)
    assert (cameras.azimuth > -180).all() and (cameras.azimuth <= 180).all()
    if not rate:
        assert (azimuth[:, 0] >= 10).all() and (azimuth[:, 0] <= 20).all()
    assert torch.allclose(sphere_angles(cameras.position)[1], cameras.azimuth, atol=1e-3)
    alone = random_cameras(options(phi_range=(10.0, 20.0), uniform_sphere_rate=rate), 3, 0, seeded(2))
    assert torch.equal(cameras.c2w[::4], alone.c2w)  # a group takes the random numbers of one camera


def test_jitter_moves_each_view_of_a_group_by_itself():
    plain, shaken = (random_cameras(options(view_group=2, jitter_pose=on), 4, 0, seeded(3)) for on in (False, True))
    moved = shaken.position - plain.position
    assert moved.abs().max() <= 0.1 + 1e-5 and (moved[0] - moved[1]).abs().max() > 0.01
    aimed = random_cameras(options(view_group=2, jitter_pose=True, jitter_center=0.0, jitter_up=0.0), 2, 0, seeded(3))
    (one, other), (sight, second) = aimed.position, aimed.c2w[:, :3, 2]
    across = torch.linalg.cross(sight, second)
    assert (
        (one - other) @ across
    ).abs() / across.norm() > 0.02  # the two lines of sight do not meet: each has its target
    with pytest.raises(ValueError, match="5 cameras are no whole groups of 2"):
        random_cameras(options(view_group=2), 5, 0, seeded())


def test_progressive_view():
    opt = options(progressive_view=True, default_polar=60.0)
    start = view_ranges(opt, 0)
    assert start["azimuth"] == pytest.approx((-36, 36)) and start["polar"] == pytest.approx((57, 69))
    assert view_ranges(opt, 200)["azimuth"] == pytest.approx((-108, 108))
    assert view_ranges(opt, 400)["polar"] == pytest.approx((45, 105)) == view_ranges(opt, 999)["polar"]
    assert random_cameras(opt, 100, 0, seeded()).azimuth.abs().max() < 36.01


def test_turntable():
    cameras = turntable(options(), 8, 10, 12)
    assert cameras.azimuth.tolist() == [0, 45, 90, 135, 180, -135, -90, -45]
    assert set(cameras.polar.tolist()) == {90.0} and (cameras.height, cameras.width) == (10, 12)
    assert turntable(options(default_azimuth=30.0), 4, 8, 8).azimuth.tolist() == [30, 120, -150, -60]


def test_light_follows_the_camera():
    cameras = orbit(torch.full((500,), 70.0), 40.0, 3.2, 20.0, 4, 4)
    light = random_light(cameras, seeded())
    assert torch.allclose(light.norm(dim=-1), torch.ones(500), atol=1e-6)
    angle = torch.rad2deg(torch.acos((light * cameras.position / 3.2).sum(-1).clamp(-1, 1)))
    assert 15 < angle.mean() < 30 and angle.std() > 3


def test_selection_and_size():
    cameras = random_cameras(options(), 5, 0, seeded())
    part = cameras[1:3].resized(7, 9)
    assert len(part) == 2 and torch.equal(part.c2w, cameras.c2w[1:3]) and part.rays()[0].shape == (2, 7, 9, 3)
