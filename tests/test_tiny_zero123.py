"""tiny-zero123, which ships: shown the front of an object of the toybox, it knows the other sides, and which is which."""

import pytest
import torch

from guidance.weights import EMBEDDED_ZERO123
from guidance.zero123 import EMBEDDED_SCALE, View, ViewBank, Zero123, sample_views
from guidance.zero123_reference import read_view_model, view_source
from toybox.objects import OBJECTS
from toybox.render import compose, orbit_cameras, trace

LEVEL, FAR = 80.0, 3.2  # the camera of the known picture: degrees, world units


def truth(kind, polar, azimuth):
    """Unlit pictures [B, 3, 64, 64] on white of an object in its own color."""
    c2w = orbit_cameras(torch.tensor(polar), torch.tensor(azimuth), FAR)
    layers = trace(OBJECTS[kind], c2w, 30.0, 64, c2w[:, :3, 2], torch.ones(len(c2w)))
    return compose(layers, torch.tensor(OBJECTS[kind].default), torch.ones(3)).permute(0, 3, 1, 2)


@pytest.fixture(scope="module")
def embedded():
    parts = read_view_model(view_source(None), "cpu")
    return parts, Zero123.of(parts, "cpu")


def seen(embedded, kind, polar, azimuth, count=3):
    """Means of `count` samples from each camera, of an object of which the front is known."""
    parts, prior = embedded
    bank = ViewBank(parts, prior, [View(truth(kind, [LEVEL], [0.0])[0], LEVEL, 0.0, FAR)])
    told = bank.condition(torch.tensor(polar).repeat(count), torch.tensor(azimuth).repeat(count)).text
    drawn = sample_views(prior, told, 10, EMBEDDED_SCALE, 0.0, torch.Generator().manual_seed(0))
    return drawn.unflatten(0, (count, -1)).mean(0)


def distances(drawn, true):
    return (drawn[:, None] - true[None]).square().mean((2, 3, 4))


# Strict: where better weights pass, the mark has to go.
NEITHER = pytest.mark.xfail(reason="tiny-zero123 draws the teapot's ends with neither spout nor handle", strict=True)


@pytest.mark.parametrize(
    "kind", ("mug", pytest.param("teapot", marks=NEITHER), "car", "duck", "elephant", "fish", "truck")
)
def test_a_quarter_turn_to_the_right_shows_the_object_s_side_at_plus_x(kind, embedded):
    azimuth = [90.0, -90.0]
    true = truth(kind, [LEVEL] * 2, azimuth)
    away = distances(seen(embedded, kind, [LEVEL] * 2, azimuth), true)
    assert away[0, 0] < 0.7 * away[0, 1] and away[1, 1] < 0.7 * away[1, 0], away


@pytest.mark.parametrize("kind", ("table", "hat", "lamp"))
def test_a_smaller_polar_angle_shows_it_from_higher_up(kind, embedded):
    polar = [LEVEL - 30, LEVEL + 30]
    true = truth(kind, polar, [0.0] * 2)
    away = distances(seen(embedded, kind, polar, [0.0] * 2), true)
    assert away[0, 0] < 0.7 * away[0, 1] and away[1, 1] < 0.7 * away[1, 0], away


def test_its_gradient_leads_a_picture_towards_the_view_that_was_asked_for(embedded):
    """The same noisy picture is understood better under its own angle than under the opposite one."""
    parts, prior = embedded
    bank = ViewBank(parts, prior, [View(truth("car", [LEVEL], [0.0])[0], LEVEL, 0.0, FAR)])
    azimuth, level = torch.tensor([90.0, -90.0]), torch.full((2,), LEVEL)
    clean = prior.encode(truth("car", [LEVEL] * 2, azimuth.tolist()))
    noise, t = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)), torch.full((2,), 700)
    noisy = prior.signal[700] * clean + prior.sigma[700] * noise
    right, wrong = prior.ask(noisy, t, [bank.condition(level, sign * azimuth).text for sign in (1, -1)])
    error = [(eps - noise).square().mean((1, 2, 3)) for eps in (right, wrong)]
    assert (error[0] < 0.7 * error[1]).all(), error


def test_it_ships_in_half_precision_and_small():
    files = [path for path in EMBEDDED_ZERO123.rglob("*") if path.is_file()]
    assert max(path.stat().st_size for path in files) < 20e6
    assert {path.suffix for path in files} == {".json", ".safetensors"}
