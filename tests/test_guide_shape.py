"""Sketch-Shape: distances to the guide, the loss by hand, and that a scene is drawn to it."""

import math

import pytest
import torch

from errors import UserError
from nerf.guide_shape import GuideShape, disagreement
from nerf.probes import probes
from nerf.provider import orbit
from nerf.renderer import Render

BOX = """v -1 -2 -1\nv 1 -2 -1\nv 1 2 -1\nv -1 2 -1\nv -1 -2 1\nv 1 -2 1\nv 1 2 1\nv -1 2 1
f 1 4 3 2\nf 5 6 7 8\nf 1 2 6 5\nf 4 8 7 3\nf 1 5 8 4\nf 2 3 7 6\n"""  # 2 x 4 x 2: its corners lie sqrt 6 from its middle
PYRAMID = "v -1 0 -1\nv 1 0 -1\nv 1 0 1\nv -1 0 1\nv 0 2 1\nf 1 2 3 4\nf 1 5 2\nf 2 5 3\nf 3 5 4\nf 4 5 1\n"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def written(folder, text, shift=(0, 0, 0)):
    """The OBJ text with all vertices moved, as a file."""
    lines = []
    for line in text.splitlines():
        if line.startswith("v "):
            line = "v " + " ".join(str(float(w) + s) for w, s in zip(line.split()[1:], shift, strict=True))
        lines.append(line)
    path = folder / "guide.obj"
    path.write_text("\n".join(lines) + "\n")
    return path


def sampled(x, seed=0):
    """A render that consists of these samples alone."""
    none = torch.zeros(1, 1, 1, 1)
    cameras = orbit(90.0, 0.0, 3.0, 30.0, 1, 1)
    return Render(none.expand(1, 1, 1, 3), none, none, None, cameras, len(x), positions=x, generator=seeded(seed))


class Density(torch.nn.Module):
    bound = 1.0

    def __init__(self, sigma):
        super().__init__()
        self.sigma = sigma


def box_distance(x, half):
    excess = x.abs() - torch.tensor(half)
    return excess.clamp(min=0).norm(dim=1) + excess.amax(1).clamp(max=0)


def test_disagreement_by_hand():
    """Cross-entropy ln(10^4) = 9.2103 where the scene says the opposite, weighted by 1 - exp(-1/2) at the tolerance, 0 on the surface."""
    sigma = torch.tensor([0.0, 1e4, 1e4, 0.0, 0.0, 5 * math.log(2)])
    distance = torch.tensor([-0.3, 0.3, -0.3, 0.3, 0.0, 9.0])
    weight, wrong, right = 1 - math.exp(-0.5), 9.21034, 1e-4
    expected = torch.tensor([weight * wrong, weight * wrong, weight * right, weight * right, 0, (wrong + right) / 2])
    assert torch.allclose(disagreement(sigma, distance), expected, atol=1e-4)


def test_distances(tmp_path):
    """The guide is centred, scaled to 0.7, neither turned nor mirrored; distances are negative inside."""
    guide = GuideShape(written(tmp_path, BOX, (5, -7, 3)), nodes=32)
    x = 0.99 * (2 * torch.rand(4000, 3, generator=seeded()) - 1)
    half = [0.7 / math.sqrt(6) * side for side in (1, 2, 1)]
    error = guide.sdf(x) - box_distance(x, half)
    assert error.abs().max() < 0.04 and error.abs().mean() < 0.003
    far = 3 * (2 * torch.rand(2000, 3, generator=seeded(1)) - 1)  # much of it beyond the grid
    true = box_distance(far, half)
    found = guide.sdf(far)
    assert (found < true + 0.04).all() and (found > (far - far.clamp(-1, 1)).norm(dim=-1) + 0.01)[
        far.abs().amax(-1) > 1
    ].all()


def test_the_files_axes_are_the_scenes(tmp_path):
    """A pyramid with its tip up and in front: y up, z front."""
    guide = GuideShape(written(tmp_path, PYRAMID), nodes=32)
    signs = guide.sdf(torch.tensor([[0, 0.2, 0.25], [0, -0.35, 0.25], [0, 0.2, -0.25], [0, -0.35, -0.25]])) < 0
    assert signs.tolist() == [True, True, False, True]


def test_a_scene_is_drawn_to_the_guide(tmp_path):
    """A field like the guide has the least loss; the gradient fills its inside and empties what is far away."""
    guide = GuideShape(written(tmp_path, BOX), nodes=32)
    half = torch.tensor([0.286, 0.572, 0.286])
    x = 2 * torch.rand(4000, 3, generator=seeded()) - 1

    def ball(x):
        return 50.0 * (x.norm(dim=-1) < 0.7)

    def lying(x):
        return 50.0 * (x.abs() < half.roll(1)).all(-1)

    def like(x):
        return 50.0 * (x.abs() < half).all(-1)

    losses = [guide.loss(sampled(x), Density(field)).item() for field in (like, ball, lying)]
    assert losses[0] < 0.1 * min(losses[1:]), losses

    raw = torch.zeros(3, requires_grad=True)  # the middle, far away, on the surface
    places = torch.tensor([[0.0, 0, 0], [0.9, 0.9, 0], [0.286, 0, 0]])
    disagreement(torch.exp(raw), guide.sdf(places)).sum().backward()
    assert raw.grad[0] < -0.1 and raw.grad[1] > 0.1 and raw.grad[2].abs() < 0.02


def test_probes():
    """All samples, or as many as allowed, drawn evenly; a quarter as many points all over the box; by the generator; never none."""
    x = torch.linspace(0, 1, 1000)[:, None].expand(1000, 3)
    all_of_them = probes(sampled(x), 2.0)
    assert torch.equal(all_of_them[:1000], x) and len(all_of_them) == 1250
    elsewhere = all_of_them[1000:]
    assert elsewhere.min() < -1.9 and elsewhere.max() > 1.9 and elsewhere.abs().max() <= 2
    some = probes(sampled(x), 2.0, most=400)
    assert len(some) == 500 and abs(some[:400, 0].mean() - 0.5) < 0.05 and some[:400, 0].max() > 0.98
    assert torch.equal(some, probes(sampled(x), 2.0, most=400)) and not torch.equal(
        some, probes(sampled(x, 1), 2.0, 400)
    )
    assert len(probes(sampled(x[:0]), 1.0)) == 64


@pytest.mark.parametrize("text", [None, "v 0 0 0\nv 1 0 0\nv 0 1 0\nf 1 2 3\n"], ids=["absent", "sheet"])
def test_what_cannot_guide_is_refused(tmp_path, text):
    path = tmp_path / "guide.obj"
    if text is not None:
        path.write_text(text)
    with pytest.raises(UserError, match="--guide_shape .*guide.obj"):
        GuideShape(path, nodes=16)
