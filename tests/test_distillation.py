"""Every method against its formula, its documented limits and the place where theory says that it comes to rest."""

from dataclasses import replace

import pytest
import torch
from gaussian import MixturePrior, condition, gaussian, mixture, seeded

from guidance.distillation import Distillation, Settings
from guidance.methods import METHODS, WEIGHTS
from guidance.perpneg import aggregate

TEXT, NEGATIVE, NULL, SOURCE = gaussian(0.8, -0.5), gaussian(-0.3, 0.6), gaussian(0.1, 0.2), gaussian(0.4, 0.9)
BIMODAL = mixture(gaussian(1.0, 0.0, variance=0.1), gaussian(-1.0, 0.2, variance=0.1))
FAST = Settings(guidance_scale=7.5, inversion_steps=4, inversion_scale=-2.0, inversion_eta=0.3, interval=0.05)


class GaussianAdaptation:
    """The ideal one: it knows the mean and the variance of the samples that it is shown."""

    def __init__(self, prior):
        self.prior, self.learned, self.embedding = prior, 0, gaussian(0.0, 0.0, variance=1.0)

    def guided(self, noisy, t, embedding, hints, scale):
        assert scale == 1.0
        return self.prior.exact(noisy, t, self.embedding.expand(len(noisy), *self.embedding.shape))

    def learn(self, latents, embedding, hints):
        self.learned += 1
        points = latents[:, :, 0, 0]
        spread = points.var(0, unbiased=False).mean().clamp(min=1e-4)
        self.embedding = gaussian(*points.mean(0).tolist(), variance=spread.item())
        return torch.zeros(())


def make(name, settings=FAST, prior=None, seed=0, **prompts):
    prior = prior or MixturePrior()
    adaptation = GaussianAdaptation(prior) if METHODS[name].learns else None
    return Distillation(prior, settings, seeded(seed), METHODS[name], adaptation)


def prompts(batch, text=TEXT, negative=NEGATIVE, null=NULL, source=SOURCE):
    return condition(batch, text, negative, null, source, text)


def one(distillation, latents, told, step=0):
    return distillation.gradient(latents, told, step)[0] * len(latents)


# -- the formulas, written out sample by sample with the same random numbers ------------------------------------------------


def by_hand(name, prior, latents, told, step=0, settings=FAST, seed=0):
    """w (target - reference) in float64, from the papers; one sample at a time."""
    batch, T, generator = len(latents), 1000, seeded(seed)
    falling = {"sdi": lambda p: 980 - 960 * p, "hifa": lambda p: 980 - 960 * p**0.5}
    if name in falling:
        t = torch.full((batch,), round(falling[name](step / settings.iters)))
    else:
        t = torch.randint(20, 981, (batch,), generator=generator)
    steps = settings.inversion_steps
    count = {"sdi": steps}.get(name, 0 if name == "ism" else 1)
    noise = [torch.randn(latents.shape, generator=generator) for _ in range(steps if name == "ism" else count)]
    if name == "cds":
        noise = [torch.randn(latents.shape[1:], generator=seeded(seed + 1)).expand_as(latents)]
    rows = []
    for i in range(batch):
        x = latents[i : i + 1].double()

        def eps(z, when, which, i=i):
            answer = prior.exact(z.float(), torch.tensor([when]), getattr(told, which)[i : i + 1])
            return answer.double()

        def level(when):
            return prior.signal[when].double(), prior.sigma[when].double()

        def cfg(z, when, base="negative", s=settings.guidance_scale):
            return (1 - s) * eps(z, when, base) + s * eps(z, when, "text")

        now = int(t[i])
        a, r = level(now)
        if name in ("ism", "sdi"):
            before = max(now - 50, 0)
            grid = (
                [before * k // (steps - 1) for k in range(steps)] + [now]
                if name == "ism"
                else [now * k // steps for k in range(steps + 1)]
            )
            z = x
            for k in range(len(grid) - 1):
                (b, s), (c, u) = level(grid[k]), level(grid[k + 1])
                last = cfg(z, grid[k], s=settings.inversion_scale)
                clean = (z - s * last) / b
                # DDIM's variance of the step from the noisier level to this one, as a part of the noisier level's
                variance = settings.inversion_eta**2 * (s**2 / u**2) * (1 - (c**2 / b**2) * (s**2 / u**2))
                drawn = noise[k][i : i + 1].double()
                z = c * clean + u * ((1 - variance).sqrt() * last + variance.sqrt() * drawn)
            if name == "ism":
                rows.append(r / a * (cfg(z, now) - last))
            else:
                rows.append(x - (z - r * cfg(z, now)) / a)  # z_0 - x0(z_t)
            continue
        n = noise[0][i : i + 1].double()
        z = a * x + r * n
        if name in ("sds", "hifa"):
            row = r**2 * (cfg(z, now) - n)
        elif name == "sjc":  # variance-exploding: y + u n, the denoiser D, and the known noise taken off
            u = r / a
            exploding = x + u * n
            denoised = exploding - u * cfg(exploding / (1 + u**2).sqrt(), now)
            row = -(denoised - x) / u
        elif name == "csd":
            row = r**2 * 7.5 * (eps(z, now, "text") - eps(z, now, "negative"))
        elif name == "nfsd":
            part = eps(z, now, "null") if now < 200 else eps(z, now, "null") - eps(z, now, "negative")
            row = r**2 * (7.5 * (eps(z, now, "text") - eps(z, now, "null")) + part)
        elif name == "bridge":
            late = step / settings.iters >= settings.bridge_from
            row = r**2 * (7.5 * (eps(z, now, "text") - eps(z, now, "source")) if late else cfg(z, now) - n)
        elif name == "vsd":
            standard = gaussian(0.0, 0.0, variance=1.0)
            row = r**2 * (cfg(z, now) - prior.exact(z.float(), t[i : i + 1], standard[None]).double())
        elif name == "cds":
            then = max(now - 50, 0)
            b, s = level(then)
            flow = eps(z, now, "text")
            nearer = b * (z - r * flow) / a + s * flow
            clean_now, clean_then = (z - r * cfg(z, now)) / a, (nearer - s * cfg(nearer, then)) / b
            row = r**2 * (b / s) * (clean_then - clean_now)
        elif name == "asd":
            then = min(now + 50, T - 1)
            b, s = level(then)
            row = r**2 * (cfg(z, now) - eps(b * x + s * n, then, "text"))
        rows.append(row)
    return torch.cat(rows).float(), t


@pytest.mark.parametrize(
    ("name", "flow"), [*((name, False) for name in METHODS), *((name, True) for name in METHODS if name != "sjc")]
)  # SJC's own form is that of a variance-preserving model
@pytest.mark.parametrize("step", (0, 9000))
def test_every_gradient_is_its_formula(name, flow, step):
    prior = MixturePrior(flow)
    latents = torch.randn(5, 2, 3, 3, generator=seeded(9))
    told = prompts(5, text=BIMODAL)
    expected, t = by_hand(name, prior, latents, told, step)
    gradient, log, draw = make(name, prior=prior).gradient(latents, told, step)
    assert torch.equal(draw.t, t)
    size = expected.abs().amax()  # float32 carries seven digits of the largest
    torch.testing.assert_close(gradient / size, expected / size / 5, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(log["grad_norm"], expected.flatten(1).norm(dim=1).mean(), rtol=1e-4, atol=1e-4)


def test_every_method_differs_from_every_other():
    """Or the formulas above would agree with anything."""
    latents, told = torch.randn(4, 2, 2, 2, generator=seeded(9)), prompts(4, text=BIMODAL)
    seen = {name: one(make(name), latents, told, step=9000) for name in METHODS}
    for first in METHODS:
        for second in METHODS:
            if first < second:
                assert (seen[first] - seen[second]).abs().max() > 1e-3, (first, second)


@pytest.mark.parametrize(
    ("name", "calls", "rows"),
    [("sds", 1, 2), ("csd", 1, 2), ("nfsd", 1, 3), ("bridge", 1, 2), ("vsd", 1, 2), ("ism", 5, 10), ("sdi", 5, 10), ("cds", 2, 4), ("asd", 2, 3)],
)  # fmt: skip
def test_the_prior_is_asked_no_more_than_needed(name, calls, rows):
    prior, asked = MixturePrior(), []
    real = prior.predict
    prior.predict = lambda noisy, t, embedding, hints=None: (asked.append(len(noisy)), real(noisy, t, embedding))[1]
    make(name, prior=prior).gradient(torch.zeros(1, 2, 1, 1), prompts(1), 0)
    assert (len(asked), sum(asked)) == (calls, rows)


# -- documented limits --------------------------------------------------------------------------------------------------


LATENTS = torch.randn(4, 2, 2, 2, generator=seeded(9))


def same(first, second):
    torch.testing.assert_close(first, second, rtol=1e-5, atol=1e-5 * float(second.abs().max()))


def test_sds_is_csd_and_what_the_base_sees_in_the_noise():
    told = prompts(4)
    nothing = one(make("sds", replace(FAST, guidance_scale=0.0)), LATENTS, told)  # w (eps_base - n)
    same(one(make("csd"), LATENTS, told) + nothing, one(make("sds"), LATENTS, told))


def test_csd_is_sds_for_very_strong_guidance():
    told, strong = prompts(4), replace(FAST, guidance_scale=1e5)
    limit = one(make("csd", replace(FAST, guidance_scale=1.0)), LATENTS, told)
    torch.testing.assert_close(one(make("sds", strong), LATENTS, told) / 1e5, limit, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("ism", "sdi"))
def test_without_inversion_they_are_sds_with_another_weight(name):
    plain = replace(FAST, inversion_steps=0, t_schedule="random")
    same(
        one(make(name, plain), LATENTS, prompts(4)),
        one(make("sds", replace(plain, weighting="ism")), LATENTS, prompts(4)),
    )


def test_nfsd_is_csd_where_the_negative_prompt_is_empty_and_sds_without_its_noise_below():
    told = prompts(4, negative=NULL)
    for low, high, reference in ((0.2, 0.98, "csd"), (0.02, 0.199, "sds")):
        settings = replace(FAST, t_range=(low, high))
        expected, _, draw = make(reference, settings).gradient(LATENTS, told, 0)
        expected = expected * 4 + (draw.sigma**2 * draw.noise if reference == "sds" else 0)
        same(one(make("nfsd", settings), LATENTS, told), expected)


def test_bridge_is_sds_at_first_and_csd_for_an_empty_source():
    told = prompts(4, source=NEGATIVE)
    same(one(make("bridge"), LATENTS, told, 7999), one(make("sds"), LATENTS, told))
    same(one(make("bridge"), LATENTS, told, 8000), one(make("csd"), LATENTS, told))


def test_vsd_is_sds_less_noise_when_the_adaptation_is_still_the_prior():
    """eps_phi = eps_text: s - 1 times the classifier's score."""
    told, vsd = prompts(4), make("vsd")
    vsd.adaptation.embedding = TEXT
    same(one(vsd, LATENTS, told), one(make("csd", replace(FAST, guidance_scale=6.5)), LATENTS, told))


def test_asd_is_csd_when_the_timesteps_are_the_same():
    told = prompts(4)
    same(
        one(make("asd", replace(FAST, interval=0.0)), LATENTS, told),
        one(make("csd", replace(FAST, guidance_scale=6.5)), LATENTS, told),
    )


def test_cds_is_csd_when_the_less_noisy_picture_has_no_noise():
    """t' = 0: D(z_t', 0) is z_t' itself; the step along the flow leaves (s - 1) times the classifier's score."""
    prior, told = MixturePrior(), prompts(4)
    prior.sigma = prior.sigma.clone()
    prior.sigma[0], prior.signal = 1e-4, (1 - prior.sigma**2).sqrt()
    settings = replace(FAST, interval=1.0, weighting="uniform")
    gradient, _, draw = make("cds", settings, prior).gradient(LATENTS, told, 0)
    eps = draw.ask(("negative", "text"), draw.noisy, draw.t)
    score = 6.5 * (eps["text"] - eps["negative"])
    factor = (draw.sigma / draw.signal) * draw.level(draw.shifted(-1.0))[0] / draw.level(draw.shifted(-1.0))[1]
    torch.testing.assert_close(4 * gradient / factor, score, rtol=2e-3, atol=2e-3)


def test_hifa_and_sjc_are_sds_with_other_timesteps_and_weight():
    told = prompts(4)
    random = replace(FAST, t_schedule="random")
    same(one(make("hifa", random), LATENTS, told), one(make("sds"), LATENTS, told))
    same(one(make("sjc"), LATENTS, told), one(make("sds", replace(FAST, weighting="uniform")), LATENTS, told))


# -- where they come to rest ----------------------------------------------------------------------------------------------


def descend(distillation, told, start, steps=300, rate=0.3, step=0):
    points = start
    for _ in range(steps):
        points = points - rate * one(distillation, points, told, step)
    return points[:, :, 0, 0]


def resting_point(name, t, s, wide=0.3, narrow=0.1):
    """Expected over the noise, eps_k(x) = c_k (x - mean_k), c_k = a sigma / (a^2 V_k + sigma^2): where w (target - reference) vanishes."""
    prior = MixturePrior()
    a, r = prior.signal[t], prior.sigma[t]

    def c(v):
        return a * r / (a**2 * v + r**2)

    means = {"text": torch.tensor([0.8, -0.5]), "negative": torch.tensor([-0.3, 0.6])}
    null, source = torch.tensor([0.1, 0.2]), torch.tensor([0.4, 0.9])
    text, base = (c(narrow), means["text"]), (c(wide), means["negative"])
    if name == "csd":
        terms = [(1.0, *text), (-1.0, *base)]
    elif name == "nfsd":
        terms = [(s, *text), (1 - s, c(wide), null), (-1.0, *base)]
    elif name == "bridge":
        terms = [(1.0, *text), (-1.0, c(wide), source)]
    else:
        terms = [(s, *text), (1 - s, *base)]
    return sum(k * w * m for k, w, m in terms) / sum(k * w for k, w, _ in terms)


@pytest.mark.parametrize("name", ("sds", "sjc", "hifa", "csd", "nfsd", "bridge", "vsd"))
def test_they_rest_where_theory_says(name):
    s, t = 3.0, 400
    settings = Settings(guidance_scale=s, t_range=(t / 1000, t / 1000), iters=1)
    text = gaussian(0.8, -0.5, variance=0.1)
    told = prompts(512, text=text)
    points = descend(make(name, settings), told, 0.5 * torch.randn(512, 2, 1, 1, generator=seeded(3)), step=1)
    torch.testing.assert_close(points.mean(0), resting_point(name, t, s), atol=0.05, rtol=0)


@pytest.mark.parametrize("name", ("ism", "sdi", "asd"))
def test_methods_that_look_at_two_levels_rest_at_the_mean(name):
    """Prompts of one mean and different spreads: by symmetry nothing else can be the place of rest; and it is stable."""
    text, wide = gaussian(0.8, -0.5, variance=0.1), gaussian(0.8, -0.5, variance=0.3)
    settings = Settings(guidance_scale=3.0, t_range=(0.55, 0.6), inversion_steps=4, inversion_scale=1.0, interval=0.1)
    told = condition(256, text, wide, wide, wide, text)
    start = torch.tensor([-1.0, 1.0])[None, :, None, None] + 0.3 * torch.randn(256, 2, 1, 1, generator=seeded(3))
    points = descend(make(name, settings), told, start, steps=400, rate=0.4)
    torch.testing.assert_close(points.mean(0), torch.tensor([0.8, -0.5]), atol=0.08, rtol=0)


def test_cds_rests_where_its_one_noise_is_taken_for_the_mean():
    """At one noise level the estimates at both ends of the step agree where z_t = a x + sigma n is the noisy mean: x = mean - n sigma / a."""
    settings = Settings(guidance_scale=1.0, t_range=(0.3, 0.3), interval=0.2, weighting="ism")
    distillation, told = make("cds", settings), prompts(64, text=gaussian(0.8, -0.5, variance=0.3))
    points = descend(distillation, told, torch.randn(64, 2, 1, 1, generator=seeded(3)), steps=600, rate=1.0)
    draw = distillation.draw(torch.zeros(1, 2, 1, 1), prompts(1), 0)
    expected = torch.tensor([0.8, -0.5]) - (draw.noise * draw.sigma / draw.signal)[0, :, 0, 0]
    torch.testing.assert_close(points, expected.expand(64, 2), atol=0.01, rtol=0)


def test_sds_collapses_onto_modes_and_vsd_keeps_the_spread():
    """Mode seeking against sampling: 512 points under SDS gather in the two modes; under VSD with an ideal adaptation a Gaussian keeps
    its variance."""
    start = 1.5 * torch.randn(512, 2, 1, 1, generator=seeded(3))
    low = Settings(guidance_scale=1.0, t_range=(0.02, 0.3), weighting="uniform")
    gathered = descend(make("sds", low), prompts(512, text=BIMODAL), start, rate=0.05, steps=400)
    modes = torch.tensor([[1.0, 0.0], [-1.0, 0.2]])
    distance, which = torch.cdist(gathered, modes).min(1)
    assert distance.square().mean() < 0.08  # the data's own is 0.2
    assert 100 < (which == 0).sum() < 412

    whole = Settings(guidance_scale=1.0, t_range=(0.02, 0.98), weighting="uniform")
    text = gaussian(0.8, -0.5, variance=0.25)
    spread = descend(make("vsd", whole), prompts(512, text=text), start, rate=0.1, steps=400)
    torch.testing.assert_close(spread.mean(0), torch.tensor([0.8, -0.5]), atol=0.1, rtol=0)
    assert 0.18 < spread.var(0).mean() < 0.32
    lost = descend(make("sds", whole), prompts(512, text=text), start, rate=0.1, steps=400)
    assert lost.var(0).mean() < 0.09


# -- what composes with every row ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_weighting_replaces_the_method_s_own(name):
    told = prompts(4)
    for weighting in WEIGHTS:
        distillation = make(name, replace(FAST, weighting=weighting))
        gradient, _, draw = distillation.gradient(LATENTS, told, 0)
        raw = one(make(name, replace(FAST, weighting="uniform")), LATENTS, told)
        same(4 * gradient, WEIGHTS[weighting](draw) * raw)


def test_weights_at_the_middle():
    draw = make("sds", replace(FAST, t_range=(0.5, 0.5))).draw(torch.zeros(1, 2, 1, 1), prompts(1), 0)
    values = {name: weight(draw).item() for name, weight in WEIGHTS.items()}
    assert values == pytest.approx(
        {"sds": 0.72367, "uniform": 1.0, "fantasia3d": 0.38041, "ism": 1.6183, "flow": 1.9023}, rel=1e-4
    )


@pytest.mark.parametrize("name", METHODS)
def test_limits_of_the_gradient(name):
    told = prompts(4)
    free = one(make(name), LATENTS, told)
    element = one(make(name, replace(FAST, clip_latent=0.3)), LATENTS, told)
    torch.testing.assert_close(element, free.clamp(-0.3, 0.3))
    pixel = one(make(name, replace(FAST, clip_pixel=0.2)), LATENTS, told)
    torch.testing.assert_close(pixel, free * (0.2 / free.norm(dim=1, keepdim=True)).clamp(max=1))
    whole = one(make(name, replace(FAST, clip_norm=0.5)), LATENTS, told)
    torch.testing.assert_close(whole, free * (0.5 / free.flatten(1).norm(dim=1)).clamp(max=1)[:, None, None, None])
    later = one(make(name, replace(FAST, clip_latent=lambda step: 0.1 + step)), LATENTS, told, 100)
    torch.testing.assert_close(later, one(make(name), LATENTS, told, 100), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", METHODS)
def test_perp_neg_composes_and_no_sample_sees_another(name):
    """A batch of three equals its samples one by one, up to their random numbers, which are taken away by fixing noise and timestep."""
    other = torch.stack([gaussian(0.5, 0.1).expand(3, 2, 4), gaussian(-0.7, -0.9).expand(3, 2, 4)])
    weight = torch.tensor([[-1.0, 0.0, -2.0], [-0.3, -1.5, 0.0]])
    told = replace(prompts(3, text=BIMODAL), perp=other, perp_weight=weight)
    settings = replace(FAST, t_range=(0.5, 0.5), inversion_eta=0.0)
    still = replace(
        METHODS[name],
        noise=METHODS[name].noise if name in ("ism", "sdi", "cds") else lambda d: 0.3 * torch.ones_like(d.latents),
    )

    def run(latents, told):
        prior = MixturePrior()
        adaptation = GaussianAdaptation(prior) if still.learns else None
        return one(Distillation(prior, settings, seeded(), still, adaptation), latents, told)

    latents = LATENTS[:3]
    together = run(latents, told)
    rows = {key: getattr(told, key) for key in ("text", "negative", "null", "source", "plain")}
    for i in range(3):
        alone = replace(
            told,
            **{k: v[i : i + 1] for k, v in rows.items()},
            perp=other[:, i : i + 1],
            perp_weight=weight[:, i : i + 1],
        )
        same(together[i : i + 1], run(latents[i : i + 1], alone))
    without = run(latents, replace(told, perp=None, perp_weight=None))
    assert (without - together).abs().max() > 1e-3


def test_guided_with_perp_neg_is_its_formula():
    other = torch.stack([gaussian(0.5, 0.1).expand(2, 2, 4)])
    told = replace(prompts(2), perp=other, perp_weight=torch.tensor([[-1.5, -0.5]]))
    draw = make("sds").draw(LATENTS[:2], told, 0)
    prior, base = draw.prior, draw.eps["negative"]
    main = prior.exact(draw.noisy, draw.t, told.text) - base
    away = prior.exact(draw.noisy, draw.t, other[0]) - base
    along = (away * main).flatten(1).sum(1) / main.flatten(1).square().sum(1)
    across = away - along[:, None, None, None] * main
    expected = base + 7.5 * (main + told.perp_weight[0][:, None, None, None] * across)
    torch.testing.assert_close(draw.guided(), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        aggregate(main, away[None], told.perp_weight), (expected - base) / 7.5, rtol=1e-4, atol=1e-5
    )


def test_views_of_a_group_share_their_timestep():
    prior = MixturePrior()
    prior.view_group = 4
    draw = make("sds", prior=prior).draw(torch.zeros(12, 2, 1, 1), prompts(12), 0)
    groups = draw.t.view(3, 4)
    assert (groups == groups[:, :1]).all() and len(groups[:, 0].unique()) > 1


def test_the_fixed_noise_is_the_same_for_all_and_follows_the_seed():
    first, again, other = (make("cds", seed=seed).draw(LATENTS, prompts(4), 0).noise for seed in (0, 0, 1))
    assert torch.equal(first[0], first[3]) and torch.equal(first, again) and not torch.equal(first, other)
    cds = make("cds")
    cds.draw(LATENTS, prompts(4), 0)
    assert torch.equal(cds.draw(LATENTS, prompts(4), 5).noise, first)


def test_a_method_that_learns_is_taught_what_it_saw():
    vsd = make("vsd")
    log = vsd.gradient(LATENTS, prompts(4), 0)[1]
    assert vsd.adaptation.learned == 1 and "adaptation" in log
    assert "adaptation" not in make("sds").gradient(LATENTS, prompts(4), 0)[1]
