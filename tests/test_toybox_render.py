"""The toybox: its pictures against closed forms, its tracer against plain marching, its objects against their promises."""

import itertools
import math

import pytest
import torch

from toybox.objects import COLORS, OBJECTS, RADIUS, Object, bounding_radius
from toybox.primitives import SHAPES, Main, Part, distance, pair, rotation_matrix, support, thickness
from toybox.render import albedo, compose, orbit_cameras, sdf, trace

FOVY, DISTANCE = 30.0, 3.2
SIZES = {
    "ellipsoid": (0.3, 0.2, 0.4),
    "box": (0.3, 0.2, 0.4, 0.1),
    "cylinder": (0.3, 0.2, 0.05),
    "cone": (0.4, 0.1, 0.3),
    "torus": (0.3, 0.1),
    "capsule": (0.2, 0.3),
    "prism": (0.3, 0.25, 0.4),
}


def solid(*parts):
    return Object("test", (1.0, 0.0, 0.0), parts)


def look(obj, polar=90.0, azimuth=0.0, size=32, light=None, ambient=1.0, **kwargs):
    c2w = orbit_cameras(polar, azimuth, DISTANCE)
    light = c2w[:, :3, 2] if light is None else torch.tensor([light])
    return trace(obj, c2w, FOVY, size, light, torch.full((len(c2w),), ambient), **kwargs)


def pixel_rays(c2w, size):
    """Ray directions [size, size, 3] of one camera, written out pixel by pixel as the convention says."""
    focal = size / 2 / math.tan(math.radians(FOVY / 2))
    rows = [[((j + 0.5 - size / 2), -(i + 0.5 - size / 2), -focal) for j in range(size)] for i in range(size)]
    rays = torch.tensor(rows) @ c2w[:3, :3].T
    return rays / rays.norm(dim=-1, keepdim=True)


def sphere_points(count, seed=0):
    u = torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))
    return u / u.norm(dim=-1, keepdim=True)


# --- primitives ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
def test_support_points_lie_on_the_surface_and_inside_the_bounding_box(shape):
    u = sphere_points(500).double()
    p = SHAPES[shape].support(u, SIZES[shape])
    assert SHAPES[shape].distance(*p.unbind(-1), SIZES[shape]).abs().max() < 1e-6
    extent = torch.tensor(SHAPES[shape].extent(SIZES[shape]))
    assert (p.abs() <= extent + 1e-9).all()
    axes = SHAPES[shape].support(torch.eye(3, dtype=torch.float64), SIZES[shape]).diagonal()
    torch.testing.assert_close(axes, extent.double())


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_never_exceed_the_way_to_the_surface(shape):
    """Outside, a step of the given distance may not cross the surface: that is what sphere tracing lives on."""
    field, size = SHAPES[shape].distance, SIZES[shape]
    p, u = 1.2 * sphere_points(300).double(), sphere_points(300, 1).double()
    gap = field(*p.unbind(-1), size)
    # The ellipsoid's first-order bound is known to overshoot a little; the tracer intersects ellipsoids in closed form.
    reach = 0.8 if shape == "ellipsoid" else 0.999
    q = p + reach * gap[:, None] * u
    assert (gap > 0).all() and (field(*q.unbind(-1), size) > 0).all()


@pytest.mark.parametrize(
    "shape, point, expected",
    [
        ("ellipsoid", (0.0, 0.5, 0.0), 0.3),
        ("ellipsoid", (0.0, 0.0, 0.0), -0.2),
        ("box", (0.3 + 0.3, 0.2 + 0.4, 0.0), math.hypot(0.4, 0.5) - 0.1),
        ("box", (0.0, 0.15, 0.0), -0.05),
        ("cylinder", (0.0, 0.5, 0.1), 0.3),
        ("cylinder", (0.8, 0.1, 0.0), 0.5),
        ("cone", (0.0, 0.7, 0.0), 0.4),
        ("cone", (0.6, -0.4, 0.0), math.hypot(0.2, 0.1)),
        ("cone", (0.0, 0.0, 0.0), -0.25 * 0.6 / math.hypot(0.6, 0.3)),
        ("torus", (0.3, 0.0, 0.0), -0.1),
        ("torus", (0.0, 0.4, 0.0), 0.4),
        ("capsule", (0.0, 0.7, 0.0), 0.2),
        ("capsule", (0.5, -0.2, 0.0), 0.3),
        ("prism", (0.0, -0.35, 0.0), 0.1),
        ("prism", (0.0, 0.0, 0.6), 0.2),
    ],
)
def test_distances_by_hand(shape, point, expected):
    assert distance(Part(shape, SIZES[shape]), torch.tensor([point])).item() == pytest.approx(expected, abs=1e-6)


def test_rotation_turns_about_x_then_y_then_z():
    torch.testing.assert_close(rotation_matrix((90.0, 0, 0)) @ torch.eye(3).double()[1], torch.eye(3).double()[2])
    torch.testing.assert_close(rotation_matrix((0.0, 0, -90)) @ torch.eye(3).double()[1], torch.eye(3).double()[0])
    turned = rotation_matrix((90.0, 90.0, 0.0)) @ torch.eye(3).double()[1]  # y -> z -> x
    torch.testing.assert_close(turned, torch.eye(3).double()[0])
    # A placed part is found where its matrix puts it.
    part = Part("capsule", (0.1, 0.3), (1.0, 2.0, 3.0), (0.0, 0.0, -90.0))
    torch.testing.assert_close(support(part, torch.eye(3))[0], torch.tensor([1.4, 2.0, 3.0]))
    assert distance(part, torch.tensor([[1.5, 2.0, 3.0]])).item() == pytest.approx(0.1, abs=1e-6)


def test_a_pair_is_mirror_symmetric():
    parts = pair(Part("box", (0.1, 0.2, 0.3, 0.02), (0.4, 0.1, 0.2), (20.0, 30.0, 40.0)))
    p = sphere_points(200)
    mirrored = p * torch.tensor([-1.0, 1, 1])
    torch.testing.assert_close(distance(parts[0], p), distance(parts[1], mirrored))


def test_wrong_parts_are_refused():
    with pytest.raises(ValueError, match="unknown shape 'blob'"):
        Part("blob", (1.0,))
    with pytest.raises(ValueError, match="torus wants 2 sizes"):
        Part("torus", (1.0, 2.0, 3.0))


# --- cameras ------------------------------------------------------------------------------------------------------------


def test_cameras_look_at_the_origin_and_are_right_handed():
    polar = torch.tensor([0.0, 1e-4, 30, 60, 90, 120, 180])
    azimuth = torch.tensor([-90.0, 0, 30, 90, 135, 180, 10])
    c2w = orbit_cameras(polar, azimuth, 2.5)
    rotation, position = c2w[:, :3, :3], c2w[:, :3, 3]
    torch.testing.assert_close(torch.linalg.det(rotation), torch.ones(7))
    torch.testing.assert_close(rotation @ rotation.mT, torch.eye(3).repeat(7, 1, 1), atol=1e-6, rtol=0)
    torch.testing.assert_close(position, 2.5 * rotation[:, :, 2])
    assert (rotation[:, 1, 1] >= -1e-6).all()  # nothing stands on its head
    torch.testing.assert_close(c2w[:, 3], torch.tensor([[0.0, 0, 0, 1]]).repeat(7, 1))


@pytest.mark.parametrize(
    "polar, azimuth, position", [(90, 0, (0, 0, 1)), (90, 90, (1, 0, 0)), (90, 180, (0, 0, -1)), (0, 0, (0, 1, 0))]
)
def test_camera_positions(polar, azimuth, position):
    torch.testing.assert_close(
        orbit_cameras(polar, azimuth, 1.0)[0, :3, 3], torch.tensor(position).float(), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize(
    "axis, azimuth, polar, row, column",
    [
        ("+x", 0, 90, 0, 1),  # seen from the front, the object's own left (+x) is on the right
        ("+x", 180, 90, 0, -1),
        ("+z", 90, 90, 0, -1),  # seen from +x, looking along -x with y up: right is forward x up = (-x) x y = -z
        ("+z", -90, 90, 0, 1),
        ("+y", 0, 90, -1, 0),  # row 0 is at the top
        ("+y", 137, 90, -1, 0),
        ("+z", 0, 0, 1, 0),  # from straight above, the front points down the picture
        ("+x", 0, 0, 0, 1),
    ],
)
def test_where_a_ball_on_an_axis_appears(axis, azimuth, polar, row, column):
    position = tuple(0.5 * (axis[1] == name) for name in "xyz")
    alpha = look(solid(Part("ellipsoid", (0.1, 0.1, 0.1), position)), polar, azimuth).alpha[0]
    center = torch.arange(32.0) - 15.5
    found = [(alpha.sum(d) * center).sum().item() / alpha.sum().item() for d in (1, 0)]
    assert [round(v / 8) for v in found] == [row, column]


# --- pictures of a sphere against closed forms ---------------------------------------------------------------------------

BALL = solid(Part("ellipsoid", (0.5, 0.5, 0.5)))


def test_silhouette_of_a_sphere():
    """A sphere seen from d covers the directions within asin(r / d) of the axis."""
    alpha = look(BALL, 65.0, 30.0, size=64, supersample=4).alpha[0]
    rays = pixel_rays(torch.eye(4), 256)
    inside = (-rays[..., 2]).arccos() < math.asin(0.5 / DISTANCE)
    expected = inside.float().view(64, 4, 64, 4).mean((1, 3))
    assert (alpha - expected).abs().max() <= 1 / 16 + 1e-6  # a subsample on the very edge may fall either way
    assert (alpha - expected).abs().sum() < 0.5


@pytest.mark.parametrize("shape, size", [("ellipsoid", (0.5, 0.5, 0.5)), ("capsule", (0.5, 0.0))])
def test_depth_normal_and_shade_of_a_sphere(shape, size):
    """In closed form (ellipsoid) and by marching (a capsule of length 0)."""
    offset = torch.tensor([0.1, -0.05, 0.08])
    c2w = orbit_cameras(65.0, 30.0, DISTANCE)
    light = torch.nn.functional.normalize(torch.tensor([0.3, 0.9, -0.2]), dim=0)
    ball = solid(Part(shape, size, tuple(offset.tolist()), color=Main(0.8)))
    seen = trace(ball, c2w, FOVY, 64, light[None], torch.tensor([0.4]), supersample=1)
    rays, origin = pixel_rays(c2w[0], 64), c2w[0, :3, 3] - offset
    b = (rays * origin).sum(-1)
    disc = b**2 - (origin @ origin - 0.25)
    hit = disc > 5e-3  # a grazing ray turns a tolerance across the surface into a far longer one along the ray
    assert hit.sum() > 500 and (seen.alpha[0][disc < -1e-3] == 0).all() and (seen.alpha[0][disc > 1e-3] == 1).all()
    depth = -b - disc.clamp_min(0).sqrt()
    normal = (origin + depth[..., None] * rays) / 0.5
    shade = 0.8 * (0.4 + 0.6 * (normal @ light).clamp_min(0))
    torch.testing.assert_close(seen.depth[0][hit], depth[hit], atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.normal[0][hit], normal[hit], atol=5e-3, rtol=0)
    torch.testing.assert_close(seen.main[0][hit], shade[hit], atol=5e-3, rtol=0)
    assert (seen.depth[0][seen.alpha[0] == 0] == 0).all() and (seen.normal[0][seen.alpha[0] == 0] == 0).all()


# --- every object -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OBJECTS)
def test_first_hits_agree_with_the_distance_of_the_union(name):
    """Per-part tracing against the plain definition: free space before the hit, the surface at it."""
    obj, c2w = OBJECTS[name], orbit_cameras(60.0, 40.0, DISTANCE)
    seen = trace(obj, c2w, FOVY, 40, c2w[:, :3, 2], torch.ones(1), supersample=1)
    rays, origin, hit = pixel_rays(c2w[0], 40), c2w[0, :3, 3], seen.alpha[0] > 0
    assert hit.sum() > 100
    surface = origin + seen.depth[0][hit][:, None] * rays[hit]
    assert sdf(obj, surface).abs().max() < 2e-3
    # A whole ray is free where nothing was hit, up to the hit elsewhere; the object lies within 0.78 of the origin.
    far = torch.where(hit, seen.depth[0], 4.1)
    t = 2.3 + (far - 2.3)[..., None] * torch.linspace(0, 0.999, 60)
    free = sdf(obj, (origin + t[..., None] * rays[:, :, None]).reshape(-1, 3))
    assert free.min() > -5e-3
    # The shown colour is the colour of the nearest part.
    color = torch.tensor([0.2, 0.5, 0.9])
    shown = compose(seen, color, torch.zeros(3))[0][hit]
    wrong = (shown - albedo(obj, surface, color)).abs().amax(-1) > 1e-3
    assert wrong.float().mean() < 0.02  # where two parts cross, either is right


def test_objects_fill_the_same_sphere_and_are_chunky():
    p = sphere_points(4000)
    for obj in OBJECTS.values():
        assert bounding_radius(obj.parts) == pytest.approx(RADIUS, abs=1e-4), obj.name
        assert (sdf(obj, (RADIUS + 1e-3) * p) > 0).all(), obj.name
        assert min(map(thickness, obj.parts)) > 0.1, obj.name
        assert all(0 <= c <= 1 for c in obj.default), obj.name


def test_names_suit_a_word_tokenizer_and_colors_are_apart():
    assert len(OBJECTS) >= 26 and all(name.isalpha() and name.islower() for name in OBJECTS)
    assert not set(OBJECTS) & set(COLORS) and len(COLORS) == 10
    for (a, x), (b, y) in itertools.combinations(COLORS.items(), 2):
        assert math.dist(x, y) > 0.3, (a, b)


def test_the_main_colour_is_a_large_part_of_every_object():
    for obj in OBJECTS.values():
        seen = look(obj, torch.full((4,), 70.0), torch.tensor([0.0, 90, 180, -90]))
        tinted = (seen.main > 0).sum() / (seen.alpha > 0).sum()
        assert tinted > 0.35, (obj.name, tinted)


def test_faces_show_from_the_front_only():
    faces = [obj for obj in OBJECTS.values() if obj.has_face]
    assert {"teddy", "snowman", "car", "penguin", "robot"} <= {obj.name for obj in faces}
    azimuth = torch.tensor([0.0, 30, -30, 180, 150, -150])
    for obj in faces:
        for polar in (60.0, 90.0):
            seen = look(obj, torch.full((6,), polar), azimuth)
            share = (seen.face.sum((1, 2)) / seen.alpha.sum((1, 2))).tolist()
            assert min(share[:3]) > 0.01, (obj.name, share)
            # Nothing from behind; 30 degrees off, at most the edge of a bulging eye.
            assert share[3] == 0 and max(share[4:]) < 0.01, (obj.name, share)


def test_directional_objects_differ_between_front_and_back():
    for name in ("teddy", "snowman", "car", "penguin", "robot", "chair", "sofa", "bed", "duck", "house", "truck"):
        obj = OBJECTS[name]
        seen = look(obj, torch.full((2,), 75.0), torch.tensor([0.0, 180]))
        front, back = compose(seen, torch.tensor(obj.default), torch.ones(3))
        # Even mirrored, as a left-right symmetric silhouette would have it, the back is not the front.
        assert min((front - back).abs().mean(), (front - back.flip(1)).abs().mean()) > 0.01, name


def test_the_handle_of_the_mug_is_on_its_left():
    alpha = look(OBJECTS["mug"]).alpha[0]
    columns = alpha.sum(0).nonzero().squeeze(1)
    upper = alpha[:8].sum(0).nonzero().squeeze(1)  # the rim: the body alone
    assert columns.max() - upper.max() > 3 and (columns.min() - upper.min()).abs() <= 1


# --- layers -------------------------------------------------------------------------------------------------------------


def test_layers_have_their_shapes_and_a_batch_equals_its_cameras():
    obj = OBJECTS["robot"]
    c2w = orbit_cameras(torch.tensor([40.0, 90, 100]), torch.tensor([10.0, -80, 170]), torch.tensor([2.9, 3.2, 3.5]))
    fovy, ambient, light = torch.tensor([25.0, 29, 33]), torch.tensor([0.3, 0.6, 1.0]), sphere_points(3)
    seen = trace(obj, c2w, fovy, 24, light, ambient)
    shapes = {"main": (), "fixed": (3,), "alpha": (), "face": (), "depth": (), "normal": (3,)}
    for field, channels in shapes.items():
        value = getattr(seen, field)
        assert value.shape == (3, 24, 24, *channels) and value.dtype == torch.float32 and value.isfinite().all()
        for i in range(3):
            alone = trace(obj, c2w[i : i + 1], fovy[i].item(), 24, light[i : i + 1], ambient[i : i + 1])
            torch.testing.assert_close(getattr(alone, field)[0], value[i], atol=1e-5, rtol=1e-5)
    assert (seen.main + seen.fixed.amax(-1) <= seen.alpha + 1e-6).all() and (seen.face <= seen.alpha + 1e-6).all()
    assert seen.alpha.max() == 1 and seen.alpha.min() == 0
    length = seen.normal.norm(dim=-1)
    torch.testing.assert_close(length[seen.alpha > 0], torch.ones_like(length[seen.alpha > 0]))


def test_compose_is_linear_in_colour_and_background():
    seen = look(OBJECTS["car"], torch.tensor([60.0, 90]), torch.tensor([20.0, 100]), ambient=0.5)
    black, color, ground = torch.zeros(3), torch.tensor([0.2, 0.6, 0.4]), torch.tensor([0.9, 0.1, 0.3])
    torch.testing.assert_close(compose(seen, black, black), seen.fixed)
    expected = seen.fixed + seen.main[..., None] * color + (1 - seen.alpha[..., None]) * ground
    torch.testing.assert_close(compose(seen, color, ground), expected)
    both = compose(seen, torch.stack([color, ground]), torch.stack([ground, black]))
    torch.testing.assert_close(both[0], compose(seen, color, ground)[0])
    torch.testing.assert_close(both[1], compose(seen, ground, black)[1])
    assert both.min() >= 0 and both.max() <= 1 + 1e-6


def test_fully_ambient_light_shows_plain_colours():
    obj = solid(Part("box", (0.3, 0.3, 0.3, 0.0), color=(0.2, 0.4, 0.6)), Part("torus", (0.5, 0.1), color=Main(0.5)))
    seen = look(obj, light=(0.0, -1.0, 0.0))
    solid_pixels = seen.alpha[0] == 1
    shown = compose(seen, torch.tensor([1.0, 0.0, 0.0]), torch.zeros(3))[0][solid_pixels]
    choices = torch.tensor([[0.2, 0.4, 0.6], [0.5, 0.0, 0.0]])
    gaps = (shown[:, None] - choices).abs().amax(-1)
    assert (gaps < 1e-5).any(0).all()  # both are seen
    assert (gaps.amin(1) < 1e-5).float().mean() > 0.8  # the rest straddle the border


def test_an_empty_picture():
    seen = look(solid(Part("ellipsoid", (0.1, 0.1, 0.1), (0.0, 30.0, 0.0))))
    assert seen.alpha.sum() == 0 and torch.equal(compose(seen, torch.ones(3), torch.ones(3)), torch.ones(1, 32, 32, 3))
