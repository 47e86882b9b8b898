"""Real diffusers pipelines, tiny and random: eps and v prediction, AutoencoderKL and AutoencoderTiny, all through the real loading."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import KINDS, build_folder

from guidance import build_guidance
from guidance.memory import save_memory
from guidance.stable_diffusion import StableDiffusion, to_epsilon
from guidance.weights import Source


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: build_folder(root / kind, kind) for kind in KINDS}


def pipeline(folder):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def load(folder):
    return StableDiffusion.load(Source(str(folder), True, folder.name, f"--hf_key {folder}"), "cpu")


def options(folder, **values):
    defaults = {
        "hf_key": str(folder), "sd_version": "embedded", "text": "a red chair", "negative": "blue", "seed": 1, "vram_O": False, "fp16": True,
        "view_words": 8, "view_blend": True, "angle_front": 60.0, "angle_overhead": 30.0,
        "guidance_scale": lambda step: 7.5, "t_range": (lambda step: 0.02, lambda step: 0.98),
    }  # fmt: skip
    return SimpleNamespace(**(defaults | values))


VIEW = torch.tensor([80.0, 20.0]), torch.tensor([10.0, -100.0]), 0


@pytest.mark.parametrize("kind", KINDS)
def test_ddim_over_our_prior_draws_the_pipeline_s_picture(kind, folders):
    """Scaling, prediction type, timesteps, prompts or guidance: a slip in any of them changes the picture."""
    pipe, prior = pipeline(folders[kind]), load(folders[kind])
    prompt, negative, scale, count = "a red chair", "blue view", 5.0, 8
    expected = pipe(
        prompt, negative_prompt=negative, guidance_scale=scale, num_inference_steps=count, output_type="np",
        generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip

    latents = torch.randn(1, 4, prior.latent_size, prior.latent_size, generator=torch.Generator().manual_seed(3))
    text = prior.embed([prompt, negative])
    pipe.scheduler.set_timesteps(count)
    for t in pipe.scheduler.timesteps.tolist():
        eps_text, eps_negative = prior.predict(latents.repeat(2, 1, 1, 1), torch.tensor([t, t]), text).chunk(2)
        eps = eps_negative + scale * (eps_text - eps_negative)
        earlier = t - prior.num_timesteps // count
        here, there = prior.alphas_cumprod[t], prior.alphas_cumprod[max(earlier, 0)]
        clean = (latents - (1 - here).sqrt() * eps) / here.sqrt()
        latents = there.sqrt() * clean + (1 - there).sqrt() * eps
    image = prior.decode(latents).permute(0, 2, 3, 1).detach().numpy()
    assert np.abs(image - expected).max() < 2e-4
    assert image.std() > 0.01 and 0 < image.mean() < 1  # not a flat picture that would agree with anything


@pytest.mark.parametrize("kind", KINDS)
def test_embeddings_are_the_pipeline_s(kind, folders):
    prior = load(folders[kind])
    expected = pipeline(folders[kind]).encode_prompt("a red chair", "cpu", 1, True, negative_prompt="blue")
    torch.testing.assert_close(prior.embed(["a red chair", "blue"]), torch.cat(expected))
    cut = prior.embed(["red " * 40])
    torch.testing.assert_close(cut, prior.embed(["red " * 14]))  # with both ends of the text 16 tokens
    assert prior.excess("red " * 14) == 0 and prior.excess("red " * 15) == 1
    prior.free_text_encoder()
    with pytest.raises(RuntimeError, match="freed"):
        prior.embed(["a"])


@pytest.mark.parametrize("kind", KINDS)
def test_encoding_is_the_training_s_encoding(kind, folders):
    """What diffusers' own training scripts feed the denoiser: vae.encode(2 x - 1) times the configured factor."""
    prior, vae = load(folders[kind]), pipeline(folders[kind]).vae
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = prior.encode(image, torch.Generator().manual_seed(4))
    with torch.no_grad():
        encoded = vae.encode(2 * image - 1)
    if kind.endswith("kl"):
        expected = encoded.latent_dist.sample(torch.Generator().manual_seed(4)) * 0.18215
        assert not torch.allclose(latents, prior.encode(image, torch.Generator().manual_seed(5)))
    else:
        expected = encoded.latents * 0.84
    assert latents.shape == (2, 4, 8, 8)
    torch.testing.assert_close(latents.detach(), expected)
    with torch.no_grad():
        decoded = (vae.decode(latents / vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
        torch.testing.assert_close(prior.decode(latents), decoded)


def test_a_shift_is_taken_off_before_scaling_and_put_back(folders):
    prior = load(folders["eps-tiny"])
    image = torch.rand(1, 3, 32, 32)
    plain, picture = prior.encode(image), prior.decode(prior.encode(image))
    prior.shift = 0.7
    torch.testing.assert_close(prior.encode(image), plain - 0.7 * 0.84)
    torch.testing.assert_close(prior.decode(prior.encode(image)), picture)


def test_other_sizes_are_resized_smoothly(folders):
    prior = load(folders["eps-tiny"])
    for height, width in ((16, 16), (128, 128), (20, 44)):
        image = torch.rand(1, 3, height, width, requires_grad=True)
        latents = prior.encode(image)
        assert latents.shape == (1, 4, 8, 8)
        latents.square().sum().backward()
        assert (image.grad.abs() > 0).float().mean() > 0.95  # no pixel of a larger picture is left out


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "sample"))
def test_every_prediction_gives_the_noise_back(kind):
    noise, clean = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    abar = torch.tensor([0.99, 0.5, 0.01])
    a, s = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    noisy = a * clean + s * noise
    output = {"epsilon": noise, "v_prediction": a * noise - s * clean, "sample": clean}[kind]
    torch.testing.assert_close(to_epsilon(output, noisy, abar, kind), noise, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_one_step_puts_a_gradient_on_the_picture(kind, folders):
    guidance = build_guidance(options(folders[kind]), "cpu")
    assert guidance.prior.text_encoder is None
    image = torch.rand(2, 24, 24, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, log = guidance(image, *VIEW)
    loss.backward()
    assert torch.isfinite(image.grad).all() and (image.grad.flatten(1).norm(dim=1) > 0).all()
    assert loss > 0 and log["grad_norm"] > 0 and 20 <= log["t"] <= 980 and log["nonfinite"] == 0
    for network in (guidance.prior.unet, guidance.prior.vae):
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    latents = torch.rand(2, 8, 8, 4, requires_grad=True)
    guidance(latents, *VIEW, as_latent=True)[0].backward()
    assert latents.grad.abs().sum() > 0
    picture = guidance.debug_images(image, *VIEW)
    assert picture.shape == (2, 32, 96, 3) and not picture.requires_grad


def test_the_seed_decides_and_the_prompt_matters(folders):
    def gradient(**values):
        image = torch.full((2, 32, 32, 3), 0.4, requires_grad=True)
        build_guidance(options(folders["v-tiny"], **values), "cpu")(image, *VIEW)[0].backward()
        return image.grad

    first = gradient()
    assert torch.equal(first, gradient())
    assert not torch.equal(first, gradient(seed=2))
    assert not torch.allclose(first, gradient(text="a blue teddy"))
    assert not torch.allclose(first, gradient(negative=""))
    assert not torch.allclose(first, gradient(view_words=0))


def test_samples_of_a_batch_do_not_mix(folders):
    prior = load(folders["v-kl"])
    noisy, t = torch.randn(3, 4, 8, 8), torch.tensor([5, 500, 999])
    text = prior.embed(["a red chair", "blue teddy", ""])
    together = prior.predict(noisy, t, text)
    for i in range(3):
        torch.testing.assert_close(
            together[i : i + 1], prior.predict(noisy[i : i + 1], t[i : i + 1], text[i : i + 1]), rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("kind", ("eps-kl", "v-tiny"))
def test_saving_memory_changes_nothing_else(kind, folders, capsys):
    plain, saving = (build_guidance(options(folders[kind], vram_O=on), "cpu") for on in (False, True))
    said = capsys.readouterr().err
    assert "--vram_O: split batches, slice autoencoder" in said and "no offload denoiser: there is no GPU" in said
    assert saving.prior.unet.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    calls = []
    saving.prior.unet.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    gradients = []
    for guidance in (plain, saving):
        image = torch.full((2, 32, 32, 3), 0.4, requires_grad=True)
        guidance(image, *VIEW)[0].backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())
    assert calls == [1, 1, 1, 1]


def test_the_large_encoder_s_activations_are_not_kept(folders):
    """Counts what autograd saves while encoding, with and without the checkpoints."""

    def saved(prior):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
            prior.encode(torch.rand(1, 3, 32, 32, requires_grad=True))
        return sum(sizes)

    plain, saving = load(folders["eps-kl"]), load(folders["eps-kl"])
    answers = save_memory(saving)
    assert answers["checkpoint encoder"] == ""
    assert saved(saving) < 0.7 * saved(plain)


@pytest.mark.cuda
def test_half_precision_on_a_gpu_agrees_with_the_cpu(folders):
    pictures = []
    for device in ("cpu", "cuda"):
        prior = StableDiffusion.load(Source(str(folders["v-kl"]), True, "tiny", "--hf_key"), device)
        latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).to(device)
        eps = prior.predict(latents, torch.tensor([20, 700], device=device), prior.embed(["a red chair", "blue"]))
        assert eps.dtype == torch.float32
        pictures.append(eps.cpu())
    torch.testing.assert_close(*pictures, rtol=0.02, atol=0.02)
