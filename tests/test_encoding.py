"""Every encoding by name: the width that is promised, the values of the module behind it, gradients."""

import pytest
import torch

from encoding import NAMES, get_encoder


@pytest.mark.parametrize(
    "name, arguments, width",
    [
        ("none", {}, 3),
        ("none", {"input_dim": 2}, 2),
        ("frequency", {}, 39),
        ("frequency", {"multires": 4, "input_dim": 2}, 18),
        ("sphere_harmonics", {}, 16),
        ("sphere_harmonics", {"degree": 2}, 4),
        ("hashgrid", {"log2_hashmap_size": 10}, 32),
        ("tiledgrid", {"num_levels": 3, "level_dim": 4, "log2_hashmap_size": 8, "desired_resolution": 64}, 12),
    ],
)
def test_width(name, arguments, width):
    encoder, promised = get_encoder(name, **arguments)
    x = torch.rand(5, arguments.get("input_dim", 3)) * 2 - 1
    assert promised == width and encoder(x).shape == (5, width)
    assert name in NAMES


def test_values():
    x = torch.tensor([[0.0, 0.6, -0.8]])
    assert torch.equal(get_encoder("none")[0](x, bound=2), x)
    waves = get_encoder("frequency", multires=2)[0](x)[0]
    torch.testing.assert_close(waves, torch.cat([x, x.sin(), x.cos(), (2 * x).sin(), (2 * x).cos()], 1)[0])
    torch.testing.assert_close(
        get_encoder("sphere_harmonics", degree=2)[0](x)[0, 1:],
        x[0, [1, 2, 0]] * 0.48860251 * torch.tensor([-1.0, 1, -1]),
    )


def test_grids_differ_and_learn():
    small = {"log2_hashmap_size": 6, "num_levels": 4, "desired_resolution": 64}
    x = torch.rand(64, 3) * 2 - 1
    outputs = []
    for name in "hashgrid", "tiledgrid":
        encoder, _ = get_encoder(name, **small)
        with torch.no_grad():
            encoder.embeddings.copy_(torch.arange(encoder.embeddings.numel()).view_as(encoder.embeddings))
        outputs.append(encoder(x))
        outputs[-1].sum().backward()
        assert encoder.embeddings.grad.abs().sum() > 0
    assert not torch.equal(*outputs)


def test_unknown_name_lists_the_names():
    with pytest.raises(
        ValueError, match="'hash': choose one of none, frequency, sphere_harmonics, hashgrid, tiledgrid"
    ):
        get_encoder("hash")
