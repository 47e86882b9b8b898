"""Score distillation against closed forms: a prior whose noise estimate is known exactly."""

import subprocess
import sys

import pytest
import torch

from guidance import Guidance
from guidance.distillation import Distillation, Settings, SpecifyGradient
from guidance.prior import Prior, resize
from guidance.prompt import Condition, PromptBank

VARIANCE = 0.3  # of the clean data around the mean that a prompt stands for


class GaussianPrior:
    """Clean data of a prompt is normal around the prompt's mean (its embedding), so eps(z_t) = s (z_t - a mean) / (a^2 V + s^2)."""

    num_timesteps, latent_channels, latent_size, image_size, view_group, wants = 1000, 4, 4, 8, 1, ()
    ask = Prior.ask

    def __init__(self):
        self.alphas_cumprod = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
        self.signal, self.sigma = self.alphas_cumprod.sqrt(), (1 - self.alphas_cumprod).sqrt()
        self.calls, self.texts, self.room = 0, [], 1000
        self.mix = torch.randn(4, 3, generator=torch.Generator().manual_seed(1))

    def embed(self, texts):
        self.texts = list(texts)
        return torch.stack([self.mean(text) for text in texts])

    def mean(self, text):
        return torch.randn(1, 4, generator=torch.Generator().manual_seed(hash_of(text)))

    def excess(self, text):
        return len(text.split()) - self.room

    def encode(self, image, generator=None):
        small = torch.nn.functional.avg_pool2d(resize(image, 8), 2)
        return torch.einsum("dc,bchw->bdhw", self.mix, small).square() * 0.3 + 0.1

    def decode(self, latents):
        return torch.nn.functional.interpolate(latents[:, :3], scale_factor=2).sigmoid()

    def predict(self, noisy, t, embedding, hints=None):
        self.calls += 1
        return self.exact(noisy, t, embedding)

    def exact(self, noisy, t, embedding):
        abar = self.alphas_cumprod[t][:, None, None, None]
        mean = embedding[:, 0, :, None, None]
        return (1 - abar).sqrt() * (noisy - abar.sqrt() * mean) / (abar * VARIANCE + 1 - abar)


def hash_of(text):
    return sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**31


def settings(scale=7.5, low=0.02, high=0.98):
    return Settings(guidance_scale=lambda step: scale, t_range=(lambda step: low, lambda step: high))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def some_condition(prior, batch):
    texts = torch.stack([prior.mean(f"text {i}") for i in range(batch)])
    return Condition(texts, torch.stack([prior.mean(f"not {i}") for i in range(batch)]))


def by_hand(prior, latents, condition, scale, seed=0):
    """The formula, written out sample by sample with the same random numbers."""
    generator = seeded(seed)
    t = torch.randint(20, 981, (len(latents),), generator=generator)
    noise = torch.randn(latents.shape, generator=generator)
    rows = []
    for i in range(len(latents)):
        abar = prior.alphas_cumprod[t[i]]
        noisy = abar.sqrt() * latents[i : i + 1] + (1 - abar).sqrt() * noise[i : i + 1]
        with_text = prior.exact(noisy, t[i : i + 1], condition.text[i : i + 1])
        without = prior.exact(noisy, t[i : i + 1], condition.negative[i : i + 1])
        rows.append((1 - abar) * (without + scale * (with_text - without) - noise[i : i + 1]))
    return torch.cat(rows), t


# -- from the picture to the latents and back ----------------------------------------------------------------------------


def test_the_gradient_of_the_picture_is_the_formula_through_the_encoder():
    prior = GaussianPrior()
    prompts = PromptBank(prior, "a chair", "bad", 4)
    guidance = Guidance(prior, prompts, Distillation(prior, settings(), seeded()))
    image = torch.rand(3, 8, 8, 3, generator=seeded(4), requires_grad=True)
    polar, azimuth = torch.tensor([80.0, 20.0, 60.0]), torch.tensor([0.0, 50.0, -120.0])
    loss, log = guidance(image, polar, azimuth, 0)
    (2.0 * loss).backward()  # the caller's weight, or a gradient scaler's

    again = image.detach().requires_grad_()
    latents = prior.encode(again.permute(0, 3, 1, 2))
    expected, _ = by_hand(prior, latents.detach(), prompts.condition(polar, azimuth), 7.5)
    latents.backward(2.0 * expected / 3)
    torch.testing.assert_close(image.grad, again.grad, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.detach(), 0.5 * expected.square().sum() / 3, rtol=1e-4, atol=1e-5)
    assert all(value.ndim == 0 and not value.requires_grad for value in log.values())


@pytest.mark.parametrize("unit_range", (True, False))
def test_a_picture_can_stand_for_latents(unit_range):
    prior = GaussianPrior()
    prompts = PromptBank(prior, "a chair", "", 0)
    guidance = Guidance(prior, prompts, Distillation(prior, settings(), seeded()))
    image = torch.rand(2, 4, 4, 4, generator=seeded(4), requires_grad=True)
    angles = torch.full((2,), 90.0), torch.zeros(2)
    guidance(image, *angles, 0, as_latent=True, unit_range=unit_range)[0].backward()
    latents = image.detach().permute(0, 3, 1, 2)
    latents = 2 * latents - 1 if unit_range else latents
    expected, _ = by_hand(prior, latents, prompts.condition(*angles), 7.5)
    factor = 2 if unit_range else 1
    torch.testing.assert_close(image.grad.permute(0, 3, 1, 2), factor * expected / 2, rtol=1e-5, atol=1e-5)


def test_latents_are_resized_and_channels_checked():
    prior = GaussianPrior()
    guidance = Guidance(prior, PromptBank(prior, "a chair", "", 0), Distillation(prior, settings(), seeded()))
    angles = torch.full((1,), 90.0), torch.zeros(1)
    image = torch.rand(1, 12, 16, 4, requires_grad=True)
    guidance(image, *angles, 0, as_latent=True)[0].backward()
    assert image.grad.abs().sum() > 0
    with pytest.raises(ValueError, match="4 channels, not 3"):
        guidance(torch.rand(1, 8, 8, 3), *angles, 0, as_latent=True)
    with pytest.raises(ValueError, match="3 channels, not 4"):
        guidance(torch.rand(1, 8, 8, 4), *angles, 0)


def test_not_a_number_becomes_nothing_and_is_counted():
    prior = GaussianPrior()
    guidance = Guidance(prior, PromptBank(prior, "a chair", "", 0), Distillation(prior, settings(), seeded()))
    image = torch.rand(2, 8, 8, 3)
    image[1, 3, 3, 0] = float("nan")
    image.requires_grad_()
    loss, log = guidance(image, torch.full((2,), 90.0), torch.zeros(2), 0)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(image.grad).all() and torch.isfinite(log["grad_norm"])
    assert log["nonfinite"] > 0
    assert image.grad[0].abs().sum() > 0  # the other sample is not lost
    clean, log = guidance(torch.rand(2, 8, 8, 3), torch.full((2,), 90.0), torch.zeros(2), 0)
    assert log["nonfinite"] == 0


def test_specified_gradients_are_scaled_by_what_comes_in():
    x = torch.zeros(3, requires_grad=True)
    value = SpecifyGradient.apply(x, torch.tensor([1.0, 2.0, 3.0]), torch.tensor(42.0))
    assert value == 42
    (65536.0 * value).backward()
    assert torch.equal(x.grad, 65536 * torch.tensor([1.0, 2.0, 3.0]))


# -- timesteps ---------------------------------------------------------------------------------------------------------


def timesteps(distillation, step, batch=4096):
    latents = torch.zeros(batch, 4, 1, 1)
    return distillation.draw(latents, Condition(torch.zeros(batch, 1, 4), torch.zeros(batch, 1, 4)), step).t


def test_timesteps_reach_both_ends_and_go_no_further():
    narrow = timesteps(Distillation(GaussianPrior(), settings(low=0.5, high=0.503), seeded()), 0)
    assert narrow.unique().tolist() == [500, 501, 502, 503]
    wide = timesteps(Distillation(GaussianPrior(), settings(low=0.0, high=1.0), seeded()), 0, 60_000)
    assert (wide.min(), wide.max()) == (0, 999)
    single = timesteps(Distillation(GaussianPrior(), settings(low=1.0, high=1.0), seeded()), 0)
    assert single.unique().tolist() == [999]
    assert Distillation(GaussianPrior(), settings(low=0.02, high=0.57), seeded()).bounds(0) == (20, 570)


def test_schedules_follow_the_step():
    opt = Settings(
        guidance_scale=lambda step: 1.0 + step, t_range=(lambda step: 0.02, lambda step: 0.98 - 0.005 * step)
    )
    distillation = Distillation(GaussianPrior(), opt, seeded())
    assert distillation.bounds(0) == (20, 980) and distillation.bounds(96) == (20, 500)
    assert timesteps(distillation, 96).max() <= 500
    prior, latents = GaussianPrior(), torch.randn(2, 4, 4, 4, generator=seeded(9))
    assert distillation.draw(latents, some_condition(prior, 2), 4).scale == 5.0


def test_each_sample_has_its_own_timestep_and_noise():
    prior = GaussianPrior()
    draw = Distillation(prior, settings(), seeded()).draw(torch.zeros(8, 4, 4, 4), some_condition(prior, 8), 0)
    assert len(draw.t.unique()) > 4
    assert len({round(value, 5) for value in draw.noise[:, 0, 0, 0].tolist()}) == 8


# -- the picture's own term ------------------------------------------------------------------------------------------------


def test_the_image_space_term_is_hifa_s():
    """On top of the latents' gradient: lambda w(t) (x - D(z_0)) signal / sigma at the picture of the prior's size, a mean over the batch."""
    prior, weight = GaussianPrior(), 0.3
    prompts = PromptBank(prior, "a chair", "bad", 4)
    angles = torch.tensor([80.0, 60.0]), torch.tensor([0.0, -120.0])
    image = torch.rand(2, 16, 16, 3, generator=seeded(4))

    def pulled(lambda_image):
        leaf = image.clone().requires_grad_()
        Guidance(prior, prompts, Distillation(prior, settings(), seeded()), lambda_image)(leaf, *angles, 0)[
            0
        ].backward()
        return leaf.grad

    leaf = image.clone().requires_grad_()
    small = resize(leaf.permute(0, 3, 1, 2), 8)
    draw = Distillation(prior, settings(), seeded()).draw(prior.encode(small), prompts.condition(*angles), 0)
    a, s = draw.signal, draw.sigma
    clean = (draw.noisy - s * draw.guided()) / a
    small.backward(weight * s**2 * (small.detach() - prior.decode(clean)) * a / s / 2)
    torch.testing.assert_close(pulled(lambda step: weight) - pulled(0.0), leaf.grad, rtol=1e-3, atol=1e-5)
    assert leaf.grad.abs().max() > 1e-3


# -- the rest of the object --------------------------------------------------------------------------------------------


def test_the_random_state_can_be_saved_and_looking_does_not_disturb_it():
    prior = GaussianPrior()
    guidance = Guidance(prior, PromptBank(prior, "a chair", "", 4), Distillation(prior, settings(), seeded()))
    view = torch.rand(1, 8, 8, 3), torch.tensor([80.0]), torch.tensor([10.0]), 0
    state = guidance.state()
    first, second = guidance(*view)[0], guidance(*view)[0]
    assert first != second
    guidance.load_state(state)
    picture = guidance.debug_images(*view)
    assert picture.shape == (1, 8, 24, 3) and 0 <= picture.min() and picture.max() <= 1
    torch.testing.assert_close(picture[:, :, :8], view[0])
    assert (guidance(*view)[0], guidance(*view)[0]) == (first, second)


def test_the_estimate_that_is_shown_is_the_posterior_mean():
    """For Gaussian data and scale 1 the one-step estimate is E[z_0 | z_t], which has a closed form of its own."""
    prior = GaussianPrior()
    bank = PromptBank(prior, "a chair", "", 0)
    guidance = Guidance(prior, bank, Distillation(prior, settings(1.0), seeded()))
    image, angles = torch.rand(1, 8, 8, 3), (torch.tensor([80.0]), torch.tensor([10.0]))
    picture = guidance.debug_images(image, *angles, 0)
    generator = seeded()
    t = torch.randint(20, 981, (1,), generator=generator)
    latents = prior.encode(image.permute(0, 3, 1, 2))
    abar = prior.alphas_cumprod[t]
    noisy = abar.sqrt() * latents + (1 - abar).sqrt() * torch.randn(latents.shape, generator=generator)
    mean = bank.text[0, 0][None, :, None, None]
    gain = abar.sqrt() * VARIANCE / (abar * VARIANCE + 1 - abar)
    posterior = mean + gain * (noisy - abar.sqrt() * mean)
    expected = torch.cat([prior.decode(noisy), prior.decode(posterior)], -1).permute(0, 2, 3, 1)
    torch.testing.assert_close(picture[:, :, 8:], expected, rtol=1e-4, atol=1e-4)


def test_importing_guidance_is_light():
    code = (
        "import sys, guidance, guidance.priors, guidance.memory, guidance.methods; "
        "print([m for m in ('diffusers', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"


@pytest.mark.cuda
def test_a_step_waits_for_nothing():
    prior = GaussianPrior()
    for name in ("alphas_cumprod", "signal", "sigma", "mix"):
        setattr(prior, name, getattr(prior, name).cuda())
    embed = prior.embed
    prior.embed = lambda texts: embed(texts).cuda()
    generator = torch.Generator("cuda").manual_seed(0)
    guidance = Guidance(prior, PromptBank(prior, "a chair", "", 8), Distillation(prior, settings(), generator))
    view = torch.rand(2, 8, 8, 3, device="cuda", requires_grad=True), torch.rand(2).cuda(), torch.rand(2).cuda(), 0
    guidance(*view)
    torch.cuda.set_sync_debug_mode("error")
    try:
        guidance(*view)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
