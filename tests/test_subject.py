"""The unseen subject: its photographs, its truth, and measures that tell it from other teddies."""

import numpy as np
import pytest
import torch
from PIL import Image

from toybox.evaluate import intersection_over_union
from toybox.objects import COLORS, OBJECTS, RADIUS, bounding_radius
from toybox.render import compose, orbit_cameras, trace
from toybox.subject import BODY, FEATURES, SUBJECT, identity, parts_of, photos, truth

AZIMUTH = torch.arange(8) * 45.0
CAMERAS = orbit_cameras(80.0, AZIMUTH, 3.2)


@pytest.fixture(scope="module")
def true():
    return truth(CAMERAS, 64)


def test_it_is_a_teddy_by_its_shape_alone(true):
    teddy = trace(OBJECTS["teddy"], CAMERAS, 30.0, 64, CAMERAS[:, :3, 2], torch.ones(8))
    assert 0.9 < intersection_over_union(true[1], teddy.alpha) < 0.99
    assert bounding_radius(SUBJECT.parts) == pytest.approx(RADIUS, abs=1e-6)
    known = torch.tensor([*COLORS.values(), OBJECTS["teddy"].default])
    assert (known - torch.tensor(BODY)).norm(dim=-1).min() > 0.2


def test_the_marking_is_in_front_and_one_ear_is_dark(true):
    front, back = true[0][0], true[0][4]
    red = (front - torch.tensor([0.86, 0.08, 0.12])).norm(dim=-1) < 0.05
    assert red.sum() > 40 and red[:, 20:44].sum() == red.sum()
    assert ((back - torch.tensor([0.86, 0.08, 0.12])).norm(dim=-1) < 0.3).sum() == 0
    dark = (front[:12] - torch.tensor([0.16, 0.09, 0.08])).norm(dim=-1) < 0.1  # above the eyes
    assert dark[:, 32:].sum() > 20 and dark[:, :32].sum() == 0  # its own left


def test_photographs_differ_and_repeat(tmp_path):
    first, again = photos(tmp_path / "a", 6, 64), photos(tmp_path / "b", 6, 64)
    assert len(first) == 6 and [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    pictures = [np.asarray(Image.open(path)).astype(int) for path in first]
    assert all(picture.shape == (64, 64, 3) for picture in pictures)
    assert all(np.abs(a - b).mean() > 5 for i, a in enumerate(pictures) for b in pictures[:i])


def test_the_truth_is_the_subject(true, tmp_path):
    taken = torch.stack([torch.from_numpy(np.array(Image.open(p))).float() / 255 for p in photos(tmp_path, 6, 64)])
    found = identity(true[0], CAMERAS, taken)
    assert found["color"] == 0 and found["behind"] == 0 and found["clip"] > 0.8
    assert all(found[name] > 0.9 for name in FEATURES)
    plain = trace(OBJECTS["teddy"], CAMERAS, 30.0, 64, CAMERAS[:, :3, 2], torch.ones(8))
    for color in (OBJECTS["teddy"].default, BODY):
        other = identity(compose(plain, torch.tensor(color), torch.ones(3)), CAMERAS, taken)
        assert other["color"] > 0.1 and other["clip"] < found["clip"] - 0.1
        assert all(other[name] < 0.2 for name in FEATURES), color


def test_what_is_missing_or_misplaced_is_told_apart(true):
    pictures, _ = true
    without = pictures.clone()
    red = (pictures - torch.tensor([0.86, 0.08, 0.12])).norm(dim=-1) < 0.3
    without[red] = torch.tensor([0.97, 0.96, 0.93])
    found = identity(without, CAMERAS)
    assert found["heart"] == 0 and found["scarf"] > 0.9 and found["ear"] > 0.9
    assert identity(pictures.flip(2), CAMERAS)["ear"] < 0.5  # the other ear
    moved = pictures.roll(1, 2)
    assert identity(moved, CAMERAS)["heart"] > 0.9  # a pixel is forgiven
    janus = identity(pictures[[0] * 8], CAMERAS)
    assert janus["behind"] > 0.8 and janus["heart"] < 0.7


def test_features_are_parts_of_it():
    assert {name: len(parts_of(name)) for name in FEATURES} == {"heart": 3, "scarf": 2, "ear": 1}
    assert all(part in SUBJECT.parts for name in FEATURES for part in parts_of(name))
