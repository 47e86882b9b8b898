"""Noise levels that fall with the run."""

import pytest
import torch
from gaussian import MixturePrior, condition, gaussian, seeded

from guidance.distillation import Distillation, Settings
from guidance.timesteps import falling_timestep

PRIOR = MixturePrior()


def at(name, progress, first=20, last=980):
    return falling_timestep(name, progress, first, last, PRIOR.signal, PRIOR.sigma)


def test_published_values():
    """HiFA from 0.98 to 0.3 in 25,000 steps; SDI from 0.98 to 0.25 in 10,000."""
    assert [at("sqrt", step / 25000, 300) for step in (0, 6250, 25000)] == [980, 640, 300]
    assert at("linear", 0.5, 250) == 615


@pytest.mark.parametrize("name", ("linear", "sqrt", "dreamtime"))
def test_they_fall_from_the_one_end_to_the_other(name):
    path = [at(name, step / 500) for step in range(501)]
    assert path[0] == 980 and path[-1] <= 25
    assert all(later <= earlier for earlier, later in zip(path[:-1], path[1:], strict=True))


def test_dreamtime_spends_its_time_where_the_mass_is():
    """The share of steps inside a band equals the band's share of W(t), summed by hand."""
    path = torch.tensor([at("dreamtime", step / 4000) for step in range(4000)])
    t = torch.arange(20, 981).double()
    a, s = PRIOR.signal[20:981].double(), PRIOR.sigma[20:981].double()
    prior = torch.where(t > 800, torch.exp(-((t - 800) ** 2) / (2 * 300**2)), torch.ones_like(t))
    prior = torch.where(t < 500, torch.exp(-((t - 500) ** 2) / (2 * 100**2)), prior)
    mass = s / a * prior
    for low, high in ((20, 400), (400, 500), (500, 800), (800, 900), (900, 981)):
        spent = ((path >= low) & (path < high)).double().mean()
        share = mass[(t >= low) & (t < high)].sum() / mass.sum()
        assert spent.item() == pytest.approx(share.item(), abs=0.005)


def test_the_flag_wins_over_the_method():
    told = condition(64, gaussian(0, 0), gaussian(1, 1))
    latents = torch.zeros(64, 2, 1, 1)
    for name, expected in (("linear", {500}), ("sqrt", {301})):
        settings = Settings(t_schedule=name, t_range=(0.02, 0.98), iters=100)
        draw = Distillation(PRIOR, settings, seeded()).draw(latents, told, 50)
        assert set(draw.t.tolist()) == expected
    assert len(Distillation(PRIOR, Settings(), seeded()).draw(latents, told, 50).t.unique()) > 20
    with pytest.raises(ValueError, match="no schedule"):
        at("sideways", 0.5)
