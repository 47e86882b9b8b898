"""Shading: the published formulas, by hand."""

import pytest
import torch

from nerf.shading import needs_normal, shade

ALBEDO = torch.tensor([[1.0, 0.5, 0.2], [0.4, 0.4, 0.4]])
NORMAL = torch.tensor([[0.0, 0.6, 0.8], [0.0, 0.0, -1.0]])
LIGHT = torch.tensor([[0.0, 0.0, 1.0]])
AMBIENT = torch.tensor([[0.1]])


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("albedo", [[1.0, 0.5, 0.2], [0.4, 0.4, 0.4]]),
        ("lambertian", [[0.82, 0.41, 0.164], [0.04, 0.04, 0.04]]),  # 0.1 + 0.9 * 0.8 = 0.82; facing away: ambient
        ("textureless", [[0.82] * 3, [0.1] * 3]),
        ("normal", [[0.5, 0.8, 0.9], [0.5, 0.5, 0.0]]),
    ],
)
def test_modes(mode, expected):
    assert torch.allclose(shade(ALBEDO, NORMAL, LIGHT, AMBIENT, mode), torch.tensor(expected), atol=1e-6)


def test_light_and_ambient_per_sample():
    light, ambient = torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, -1.0]]), torch.tensor([[0.0], [0.5]])
    got = shade(ALBEDO, NORMAL, light, ambient, "textureless")
    assert torch.allclose(got[:, 0], torch.tensor([0.6, 1.0]))


def test_four_channels():
    latents = torch.tensor([[-2.0, 1.0, 0.5, 3.0]])
    assert torch.equal(shade(latents, None, None, AMBIENT, "albedo"), latents)
    lit = shade(latents, NORMAL[:1], LIGHT, AMBIENT, "lambertian")
    assert torch.allclose(lit, latents * 0.82) and shade(latents, NORMAL[:1], LIGHT, AMBIENT, "textureless").shape == (
        1,
        4,
    )


def test_what_is_missing_is_said():
    assert [needs_normal(m) for m in ("albedo", "lambertian", "textureless", "normal")] == [False, True, True, True]
    with pytest.raises(ValueError, match="'lambertian' needs normals"):
        shade(ALBEDO, None, LIGHT, AMBIENT, "lambertian")
    with pytest.raises(ValueError, match="needs a light"):
        shade(ALBEDO, NORMAL, None, AMBIENT, "textureless")
