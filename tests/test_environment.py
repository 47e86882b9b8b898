"""Light from all around: where a picture's pixels shine from, what filtering keeps, and pictures that cannot be read."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

from errors import UserError
from mesh.environment import (
    BUILT_IN,
    equirectangular,
    load_environment,
    octahedral,
    prefilter,
    shrink,
    sky,
    sphere,
    studio,
)
from mesh.hdr import decode_rgbe, read_radiance

AXES = {
    "+x": torch.tensor([[1.0, 0, 0]]),
    "-x": torch.tensor([[-1.0, 0, 0]]),
    "+y": torch.tensor([[0.0, 1, 0]]),
    "+z": torch.tensor([[0.0, 0, 1]]),
    "-z": torch.tensor([[0.0, 0, -1]]),
}


def _directions(count=3000, seed=0):
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(seed)), dim=1)


def _pixel(row, column, height=32, width=64):
    """One pixel that sends out 1 in all, on black."""
    picture = torch.zeros(height, width, 3)
    picture[row, column] = 1 / sphere(height, width)[1][row, column]
    return picture


@pytest.fixture(scope="module")
def slope():
    """Light that grows along a slanted axis, 1 + d . axis: zonal filters only make it flatter."""
    axis = F.normalize(torch.tensor([0.5, 0.6, -0.4]), dim=0)
    directions, _ = sphere(64, 128)
    return axis, prefilter((1 + directions @ axis)[..., None].expand(-1, -1, 3).contiguous())


def test_pixels_and_directions():
    directions, solid = sphere(180, 360)
    assert float(solid.sum()) == pytest.approx(4 * math.pi, rel=1e-5)
    assert torch.allclose(directions.norm(dim=-1), torch.ones(()))
    # The middle of the picture lies at -z; looking there, +x is on the right; the top row is up.
    for (row, column), axis in {(90, 180): "-z", (90, 270): "+x", (90, 90): "-x", (90, 0): "+z", (0, 0): "+y"}.items():
        assert float((directions[row, column] * AXES[axis]).sum()) > 0.999
    picture = torch.rand(16, 32, 3, generator=torch.Generator().manual_seed(0))
    there = equirectangular(picture, sphere(16, 32)[0].reshape(-1, 3))
    assert torch.allclose(there.reshape(16, 32, 3), picture, atol=1e-4)


def test_the_seam_of_the_picture_joins():
    picture = torch.zeros(8, 16, 3)
    picture[:, -1], picture[:, 0] = 1.0, 3.0
    assert torch.allclose(equirectangular(picture, AXES["+z"]), torch.full((1, 3), 2.0), atol=1e-4)


def test_octahedral_square():
    spots = octahedral(torch.cat(list(AXES.values())))
    assert torch.equal(spots, torch.tensor([[1.0, 0], [-1, 0], [0, 0], [0, 1], [0, -1]]))
    assert torch.equal(octahedral(torch.tensor([[0.0, -1, 0], [0, 0, 0]])).abs(), torch.tensor([[1.0, 1], [0, 0]]))
    assert float(octahedral(_directions()).abs().max()) <= 1


def test_the_square_is_joined_along_its_edges(slope):
    """Around the lower half, where x or z changes sign."""
    axis, environment = slope
    angle = torch.linspace(0.02, math.pi - 0.02, 200)
    flat = torch.stack([angle.cos(), -angle.sin(), torch.full_like(angle, 1e-4)], 1)
    for side in (flat, flat[:, [2, 1, 0]]):
        there = torch.where(side == 1e-4, -1e-4, side)
        for roughness in (0.0, 0.125, 1.0):
            here, beyond = environment.specular(side, roughness), environment.specular(there, roughness)
            assert torch.allclose(here, beyond, atol=1e-3)
        assert torch.allclose(environment.specular(side)[:, 0], 1 + side @ axis, atol=0.01)
        assert torch.allclose(environment.irradiance(side), environment.irradiance(there), atol=1e-3)


def test_uniform_light_stays_uniform():
    white = load_environment("white", scale=2.5)
    directions = torch.cat([_directions(), *AXES.values(), -AXES["+y"]])
    roughness = torch.linspace(0, 1, len(directions))[:, None]
    for found in (white.irradiance(directions), white.specular(directions, roughness), white.specular(directions)):
        assert torch.allclose(found, torch.full_like(found, 2.5), atol=1e-5)


@pytest.mark.parametrize(("row", "column"), [(16, 5), (3, 40), (29, 60)])
def test_irradiance_of_one_pixel(row, column):
    """max(0, n . l) / pi."""
    environment = prefilter(_pixel(row, column))
    towards = sphere(32, 64)[0][row, column]
    normals = _directions()
    wanted = (normals @ towards).clamp(min=0) / math.pi
    found = environment.irradiance(normals)
    assert float((found - wanted[:, None]).abs().max()) < 0.012 and float((found[:, 0] - wanted).mean().abs()) < 2e-4


def test_light_from_the_right_shines_on_the_right():
    """A light at azimuth 90: +x. Turned by 90 degrees more it shines from the back, -z."""
    light = prefilter(_pixel(16, 48))
    for look in (light.irradiance, lambda d: light.specular(d, 0.3), light.specular):
        assert float(look(AXES["+x"])[0, 0]) > 0.2
        assert float(look(AXES["-x"]).abs().max()) < 1e-4
    turned = replace(light, rotation=90.0)
    assert torch.allclose(turned.specular(AXES["-z"], 0.3), light.specular(AXES["+x"], 0.3), rtol=1e-4)
    assert torch.allclose(turned.irradiance(AXES["+y"]), light.irradiance(AXES["+y"]), atol=1e-6)


@pytest.mark.parametrize("level", range(9))
def test_every_level_is_the_lobe_it_says(slope, level):
    """A zonal filter turns 1 + d . axis into 1 + k d . axis, k the mean cosine under its weights; GGX's is a 1-D integral."""
    axis, environment = slope
    alpha = (level / 8) ** 2
    k = 1.0
    if level:
        angle = (torch.arange(200000, dtype=torch.float64) + 0.5) * (math.pi / 2) / 200000
        half = torch.cos(angle / 2) ** 2
        weight = angle.cos() * angle.sin() / (half * (alpha**2 - 1) + 1) ** 2
        k = float((weight * angle.cos()).sum() / weight.sum())
    directions = _directions()
    found = environment.specular(directions, level / 8)[:, 0]
    assert torch.allclose(found, 1 + k * (directions @ axis), atol=0.017)
    assert float((found - 1 - k * (directions @ axis)).abs().mean()) < 0.001


def test_between_levels_it_is_interpolated(slope):
    _, environment = slope
    directions = _directions(50)
    low, high = environment.specular(directions, 0.5), environment.specular(directions, 0.625)
    assert torch.allclose(environment.specular(directions, 0.55), 0.6 * low + 0.4 * high, atol=1e-5)


def test_filtering_loses_no_light():
    picture = 20 * torch.rand(32, 64, 3, generator=torch.Generator().manual_seed(4)) ** 8
    environment = prefilter(picture)
    directions, solid = sphere(128, 256)
    share = (solid / solid.sum()).reshape(-1, 1)
    small = sphere(32, 64)[1]
    wanted = (picture * small).sum((0, 1)) / small.sum()
    for level in range(9):
        kept = (environment.specular(directions, level / 8).reshape(-1, 3) * share).sum(0)
        assert torch.allclose(kept, wanted, rtol=0.01)
    assert torch.allclose((environment.irradiance(directions).reshape(-1, 3) * share).sum(0), wanted, rtol=0.01)


def test_shrinking_keeps_the_power():
    picture = torch.rand(60, 120, 3, generator=torch.Generator().manual_seed(2))
    power = [(part * sphere(*part.shape[:2])[1]).sum((0, 1)) for part in (picture, shrink(picture, 12))]
    assert torch.allclose(*power, rtol=1e-3)
    assert shrink(picture, 64) is picture


def test_studio_and_sky():
    room, outside = prefilter(studio(24)), prefilter(sky(24))
    right, left = (F.normalize(torch.tensor([[x, 0.5, 1.0]]), dim=1) for x in (0.8, -0.8))
    assert float(room.irradiance(right).mean()) > 1.15 * float(room.irradiance(left).mean())
    up = outside.specular(AXES["+y"])[0]
    assert up[2] > 2 * up[0] and float(outside.specular(-AXES["+y"]).mean()) < 0.5
    for environment in (room, outside):  # a white surface is neither black nor blown out all over
        light = environment.irradiance(_directions()).mean(1)
        assert 0.1 < float(light.min()) and float(light.max()) < 1.3


# --- files ---


def _hdr(lines, height, width, head=b"FORMAT=32-bit_rle_rgbe\n", order=b"-Y %d +X %d"):
    return b"#?RADIANCE\n" + head + b"\n" + order % (height, width) + b"\n" + b"".join(lines)


def _rgbe(height, width):
    generator = np.random.default_rng(0)
    coded = generator.integers(0, 256, (height, width, 4), dtype=np.uint8)
    coded[..., 3] = generator.integers(120, 136, (height, width))
    coded[1, 2:7] = coded[1, 2]  # something to run over
    coded[0, 0] = 0
    coded[..., 0] = np.maximum(coded[..., 0], 2)  # no pixel looks like a mark
    values = coded[..., :3] / 256 * 2.0 ** (coded[..., 3:].astype(float) - 128) * (coded[..., 3:] > 0)
    return coded, values


def _runs(line):
    """A line component by component: runs of equal values, and stretches of at most 128."""
    out = b"\2\2" + bytes(divmod(len(line), 256))
    for component in line.T:
        x = 0
        while x < len(component):
            n = 1
            while x + n < len(component) and n < 127 and component[x + n] == component[x]:
                n += 1
            out += bytes([128 + n, component[x]]) if n > 1 else bytes([1, component[x]])
            x += n
    return out


def test_radiance_files():
    coded, values = _rgbe(4, 10)
    plain = [line.tobytes() for line in coded]
    assert np.allclose(decode_rgbe(_hdr(plain, 4, 10)), values)
    assert np.allclose(decode_rgbe(_hdr([_runs(line) for line in coded], 4, 10)), values)
    assert np.allclose(decode_rgbe(_hdr(plain, 4, 10, order=b"+Y %d +X %d")), values[::-1])
    assert np.allclose(decode_rgbe(_hdr(plain, 4, 10, order=b"-Y %d -X %d")), values[:, ::-1])
    assert np.allclose(decode_rgbe(_hdr(plain, 4, 10, b"EXPOSURE=2\nEXPOSURE=4\n")), values / 8)
    old = [*plain[:1], coded[1, :3].tobytes() + b"\1\1\1\4" + coded[1, 7:].tobytes(), *plain[2:]]
    assert np.allclose(decode_rgbe(_hdr(old, 4, 10)), values)
    long = np.repeat(coded[:1, 1:2], 600, 1)
    packed = long[0, :1].tobytes() + b"\1\1\1\x57\1\1\1\2"  # 0x57 + 2 * 256 = 599 times more
    assert np.allclose(decode_rgbe(_hdr([packed], 1, 600)), values[:1, 1:2])


def test_pictures_become_linear(tmp_path):
    Image.new("RGB", (8, 4), (255, 188, 0)).save(tmp_path / "room.png")
    assert np.allclose(read_radiance(tmp_path / "room.png")[2, 3], [1, 0.503, 0], atol=1e-3)
    coded, values = _rgbe(8, 16)
    (tmp_path / "room.hdr").write_bytes(_hdr([_runs(line) for line in coded], 8, 16))
    environment = load_environment(str(tmp_path / "room.hdr"))
    there = environment.specular(sphere(8, 16)[0])
    assert np.corrcoef(there.numpy().ravel(), values.ravel())[0, 1] > 0.99


def test_exr(tmp_path):
    exr = pytest.importorskip("OpenEXR")
    values = np.random.default_rng(0).random((4, 8, 3), np.float32) * 9
    exr.File({"type": exr.scanlineimage}, {"RGB": values}).write(str(tmp_path / "room.exr"))
    assert np.allclose(read_radiance(tmp_path / "room.exr"), values)


def test_what_is_no_environment(tmp_path):
    good = _hdr([_runs(line) for line in _rgbe(4, 10)[0]], 4, 10)
    files = {
        "text.hdr": b"hello",
        "short.hdr": good[:-9],
        "xyze.hdr": good.replace(b"32-bit_rle_rgbe", b"32-bit_rle_xyze"),
        "huge.hdr": good.replace(b"-Y 4 +X 10", b"-Y 40000000 +X 10"),
        "broken.png": b"\x89PNG\r\n\x1a\n",
        "broken.exr": b"nothing",
    }
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    Image.new("RGB", (8, 8)).save(tmp_path / "square.png")
    for name in (*map(str, (tmp_path / name for name in (*files, "square.png", "absent.hdr"))), "dungeon"):
        with pytest.raises(UserError, match="--environment") as error:
            load_environment(name)
        assert name in str(error.value) and "\n" not in str(error.value)
    assert all(word in str(error.value) for word in BUILT_IN)


def test_nonsense_in_a_picture_is_dropped(tmp_path):
    exr = pytest.importorskip("OpenEXR")
    values = np.ones((4, 8, 3), np.float32)
    values[0, 0], values[1, 1], values[2, 2] = np.nan, -5, np.inf
    exr.File({"type": exr.scanlineimage}, {"RGB": values}).write(str(tmp_path / "room.exr"))
    found = read_radiance(tmp_path / "room.exr")
    assert np.isfinite(found).all() and found.min() == 0 and found[0, 0, 0] == 0
