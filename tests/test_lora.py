"""VSD's adaptation: it starts as the prior and leaves the prior alone, learns what it is shown and from where, and can be resumed."""

import copy
from pathlib import Path

import pytest
import torch
from adapted import LEVELS, MODELS, STEPS, adapt, latent_model, question, taught, unet
from torch.nn import functional as F

import guidance.lora
from errors import UserError
from guidance.lora import Adaptation, from_epsilon
from guidance.prior import to_epsilon
from guidance.stable_diffusion import StableDiffusion
from guidance.weights import Source

TINY_SD = Path(__file__).resolve().parent.parent / "toybox" / "models" / "tiny-sd"


# ---- the prior stays what it is ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_it_starts_as_the_prior_and_leaves_the_prior_as_it_is(kind):
    prior = MODELS[kind]()
    noisy, t, embedding, hints = question(prior)
    frozen = prior.predict(noisy, t, embedding)
    weights = copy.deepcopy(dict(prior.denoiser.named_parameters()))
    adaptation = adapt(prior)
    for camera in (True, False):
        assert torch.equal(adaptation.predict(noisy, t, embedding, hints, camera), frozen)
    assert torch.equal(prior.predict(noisy, t, embedding), frozen)
    for _ in range(3):
        loss = adaptation.learn(noisy, embedding, hints)
        assert loss.isfinite() and not loss.requires_grad
    seen = adaptation.predict(noisy, t, embedding, hints)
    assert seen.dtype == torch.float32 and (seen - frozen).abs().max() > 1e-3
    assert not torch.equal(adaptation.predict(noisy, t, embedding, hints, camera=False), seen)
    assert torch.equal(prior.predict(noisy, t, embedding), frozen)
    assert {p.dtype for p in adaptation.trained.values()} == {torch.float32}
    now = {name.replace(".base_layer", ""): p for name, p in prior.denoiser.named_parameters()}
    assert all(torch.equal(now[name], before) for name, before in weights.items())


def test_it_is_off_again_after_an_accident(monkeypatch):
    prior = latent_model()
    adaptation = taught(prior)
    noisy, t, embedding, hints = question(prior)
    frozen = prior.predict(noisy, t, embedding)

    def fail(*arguments):
        raise RuntimeError("no memory")

    for name in ("predict", "denoise"):
        with monkeypatch.context() as patch, pytest.raises(RuntimeError):
            patch.setattr(prior, name, fail)
            asked = (noisy, t, embedding, hints) if name == "predict" else (noisy, embedding, hints)
            getattr(adaptation, "predict" if name == "predict" else "learn")(*asked)
    assert torch.equal(prior.predict(noisy, t, embedding), frozen)


def test_it_computes_in_its_own_precision_whatever_surrounds_it():
    answers = []
    for half in (False, True):
        prior = latent_model()
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            answers.append(taught(prior).guided(*question(prior), 0.5))
    assert torch.equal(*answers)


def test_nobody_elses_random_numbers_move_and_a_seed_decides_everything():
    learnt = []
    for elsewhere, seed in ((1, 0), (2, 0), (2, 1)):
        prior = latent_model()
        torch.manual_seed(elsewhere)
        before = torch.get_rng_state()
        learnt.append(taught(prior, seed=seed).predict(*question(prior)))
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(*learnt[:2]) and not torch.equal(*learnt[1:])
    prior = latent_model()
    before = torch.get_rng_state()
    Adaptation(prior, 4, 1e-2)  # without a generator: the global one's numbers, on a fork
    assert torch.equal(torch.get_rng_state(), before)


def test_a_compiled_denoiser_stays_the_frozen_one():
    prior = latent_model()
    adaptation = taught(prior)
    noisy, t, embedding, hints = question(prior)
    seen, frozen = adaptation.predict(noisy, t, embedding, hints), prior.predict(noisy, t, embedding)
    raw, calls = prior.denoiser, []

    def compiled(*arguments):
        calls.append(1)
        return raw(*arguments)

    prior.denoiser = compiled
    assert torch.equal(prior.predict(noisy, t, embedding), frozen) and len(calls) == 1
    assert torch.equal(adaptation.predict(noisy, t, embedding, hints), seen)
    adaptation.learn(noisy, embedding, hints)
    assert len(calls) == 1 and prior.denoiser is compiled


# ---- what is trained --------------------------------------------------------------------------------------------------------


def test_how_much_is_trained():
    adaptation = adapt(latent_model(), rank=3)
    blocks = 3 + 1  # one of the way down, one of the middle, two of the way up
    attention = 2 * 4 * 3 * (16 + 16)  # to itself and to the text: four layers of 16 x 16 (the text's width is 16 too)
    camera = 16 * 64 + 64 + 64 * 64 + 64  # the time embedding has 4 x 16 numbers
    assert sum(p.numel() for p in adaptation.trained.values()) == blocks * attention + camera
    assert not any(p.requires_grad for name, p in adaptation.network.named_parameters() if "lora" not in name)
    assert adaptation._layers[0].scaling == {"scene": 1.0}  # B A x, whatever the rank


def test_a_unet_that_attends_in_its_middle_alone_has_its_convolutions_adapted():
    names = set(adapt(latent_model(attends="")).trained)
    assert any("down_blocks.0.resnets.0.conv1" in name for name in names) and any("to_q" in name for name in names)
    assert not any("conv" in name for name in adapt(latent_model()).trained)


def test_what_cannot_be_adapted_is_a_users_error():
    bare = unet(attends="", mid_block_type=None)
    with pytest.raises(UserError, match="--distill vsd: this model's denoiser has no attention"):
        adapt(StableDiffusion(bare, None, *LEVELS, "epsilon", "cpu"))


def test_the_embedded_model_can_be_adapted():
    prior = StableDiffusion.load(Source(str(TINY_SD), True, "tiny-sd", "--sd_version embedded"), "cpu", torch.float32)
    adaptation = adapt(prior, lr=1e-3)
    draw = {"generator": torch.Generator().manual_seed(0)}
    latents = torch.randn(1, prior.latent_channels, prior.latent_size, prior.latent_size, **draw)
    embedding = torch.randn(1, 8, prior.denoiser.config.cross_attention_dim, **draw)
    hints = question(prior, 1)[3]
    before = {name: p.detach().clone() for name, p in adaptation.trained.items()}
    assert adaptation.learn(latents, embedding, hints).isfinite()
    still = [name for name, p in adaptation.trained.items() if torch.equal(p, before[name])]
    assert {name.split(".")[-2] for name in still} <= {"scene", "0"}  # A waits for B, the first layer for the last
    assert any(name.startswith("mid_block.attentions") for name in before)


# ---- learning ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "flow_prediction", "sample"])
def test_what_a_network_should_answer_is_the_inverse_of_epsilon(kind):
    draw = torch.Generator().manual_seed(0)
    noise, clean = torch.randn(2, 3, 4, 5, 5, generator=draw)
    angle = torch.tensor([0.2, 0.9, 1.4])[:, None, None, None]
    signal, sigma = (1 - angle / 2, angle / 2) if kind == "flow_prediction" else (angle.cos(), angle.sin())
    answer = from_epsilon(noise, clean, signal, sigma, kind)
    assert torch.allclose(to_epsilon(answer, signal * clean + sigma * noise, signal, sigma, kind), noise, atol=1e-5)


def test_answers_by_hand():
    one = [torch.full((1, 1, 1, 1), value) for value in (2.0, 3.0, 0.8, 0.6)]  # noise, clean, signal, sigma
    kinds = ("epsilon", "v_prediction", "flow_prediction", "sample")
    assert [from_epsilon(*one, kind).item() for kind in kinds] == pytest.approx([2, 1.6 - 1.8, -1, 3])


@pytest.mark.parametrize("kind", ["eps", "v", "sample", "flow", "pixels"])
def test_the_loss_is_the_denoising_loss_of_the_networks_own_answer(kind, monkeypatch):
    prior = MODELS[kind]()
    latents, _, embedding, hints = question(prior)
    adaptation = adapt(prior, seed=5)
    draw = {"generator": torch.Generator().manual_seed(5)}
    t = torch.randint(STEPS, (2,), **draw)
    seen = (torch.rand(2, **draw) >= 0.1).float()
    noise = torch.randn(latents.shape, **draw)
    signal, sigma = prior.signal[t][:, None, None, None], prior.sigma[t][:, None, None, None]
    wanted = {
        "eps": noise,
        "pixels": noise,
        "v": signal * noise - sigma * latents,
        "sample": latents,
        "flow": noise - latents,
    }
    with adaptation._switched_on():
        adaptation._embedding = adaptation._camera_of(hints, seen)
        answer = prior.denoise(signal * latents + sigma * noise, t, embedding, hints)
    expected = F.mse_loss(answer, wanted[kind])
    slopes = torch.autograd.grad(expected, adaptation.trained.values())
    found = []
    monkeypatch.setattr(
        adaptation.optimizer, "step", lambda: found.extend(p.grad.clone() for p in adaptation.trained.values())
    )
    assert adaptation.learn(latents, embedding, hints).item() == pytest.approx(expected.item(), rel=1e-5)
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-7) for a, b in zip(found, slopes, strict=True))
    assert max(slope.abs().max() for slope in slopes) > 1e-4


def test_it_learns_what_each_camera_sees():
    prior = latent_model()
    _, _, embedding, hints = question(prior)
    draw = {"generator": torch.Generator().manual_seed(3)}
    latents = torch.randn(2, 4, 1, 1, **draw).expand(2, 4, 8, 8)
    t = torch.randint(STEPS, (2, 12), **draw)
    noise = torch.randn(12, *latents.shape, **draw)

    def lost(predict):
        """The mean squared error of the clean estimate."""
        total = 0.0
        for i in range(12):
            signal, sigma = prior.signal[t[:, i]][:, None, None, None], prior.sigma[t[:, i]][:, None, None, None]
            eps = predict(signal * latents + sigma * noise[i], t[:, i], embedding)
            total += F.mse_loss(eps * sigma / signal, noise[i] * sigma / signal).item() / 12
        return total

    before = lost(prior.predict)
    adaptation = adapt(prior)
    for _ in range(50):
        adaptation.learn(latents, embedding, hints)
    right = lost(lambda *rest: adaptation.predict(*rest, hints))
    wrong = lost(lambda *rest: adaptation.predict(*rest, {"c2w": hints["c2w"].flip(0)}))
    unknown = lost(lambda *rest: adaptation.predict(*rest, hints, camera=False))
    assert right < 0.75 * before and lost(prior.predict) == before
    assert wrong > 1.5 * right and right < unknown < wrong


def test_the_learning_rate_rises():
    def first_change(warm_up, steps=1):
        adaptation = taught(latent_model(), steps, lr=1e-2, warm_up=warm_up)
        return adaptation.trained["camera.2.bias"].detach().abs().max().item()

    assert first_change(1) == pytest.approx(1e-2, rel=1e-3)  # AdamW's first step has the length of its rate
    assert first_change(500) == pytest.approx(1e-2 / 500, rel=1e-2)
    adaptation = taught(latent_model(), steps=3, warm_up=10)
    assert adaptation.optimizer.param_groups[0]["lr"] == pytest.approx(3e-3)
    assert taught(latent_model(), steps=3, warm_up=2).optimizer.param_groups[0]["lr"] == 1e-2
    assert Adaptation(latent_model(), 4, 1e-2).warm_up == guidance.lora.WARM_UP == 500
    group = adaptation.optimizer.param_groups[0]
    assert group["betas"] == (0.9, 0.999) and group["weight_decay"] == 0.01


def test_all_timesteps_are_learnt_and_a_tenth_without_a_camera(monkeypatch):
    prior = latent_model()
    adaptation = adapt(prior)
    seen = []
    inner = adaptation._camera_of

    def camera_of(hints, wanted):
        seen.append(wanted)
        return inner(hints, wanted)

    monkeypatch.setattr(adaptation, "_camera_of", camera_of)
    times = []

    def denoise(noisy, t, *rest):
        times.append(t)
        return noisy * adaptation.camera[2].bias.sum()

    monkeypatch.setattr(prior, "denoise", denoise)
    latents, _, embedding, hints = question(prior, 8)
    for _ in range(100):
        adaptation.learn(latents, embedding, hints)
    seen = torch.cat(seen)
    assert set(seen.tolist()) == {0.0, 1.0} and 0.06 < 1 - seen.mean() < 0.14  # 800 of them: 0.1 +- 0.011
    assert 0 < seen.reshape(-1, 8).std(1).max()  # by sample, not by batch
    assert torch.cat(times).bincount().tolist() == pytest.approx([16] * STEPS, abs=14)  # all timesteps, 16 +- 4 of each


def test_without_cameras_there_is_no_embedding():
    prior = latent_model()
    adaptation = taught(prior)
    noisy, t, embedding, hints = question(prior)
    nobody = adaptation.predict(noisy, t, embedding, {})
    assert torch.equal(nobody, adaptation.predict(noisy, t, embedding, hints, camera=False))
    assert adaptation.learn(noisy, embedding, {}).isfinite()


def test_a_step_that_is_not_finite_is_not_taken():
    prior = latent_model()
    adaptation = taught(prior)
    latents, _, embedding, hints = question(prior)
    before = {name: p.detach().clone() for name, p in adaptation.trained.items()}
    assert not adaptation.learn(latents * float("nan"), embedding, hints).isfinite()
    assert all(torch.equal(p, before[name]) for name, p in adaptation.trained.items())
    assert adaptation.learn(latents, embedding, hints).isfinite()
