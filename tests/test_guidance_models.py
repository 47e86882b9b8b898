"""Real diffusers pipelines, tiny and random, as the trainer uses them: a step of guidance with every kind of prior.

Whether a prior says what its pipeline says is tested in test_priors.py.
"""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import FAMILIES, KINDS, Folders

from guidance import build_guidance
from guidance.prior import to_epsilon
from guidance.priors import load_prior, text_encoder
from guidance.weights import resolve

VIEW = torch.tensor([80.0, 20.0]), torch.tensor([10.0, -100.0]), 0
TEXT_TO_IMAGE = (*KINDS, *(kind for kind in FAMILIES if kind != "pix2pix"))


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Embeddings of an earlier test must not stand in for the encoder's."""
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def guidance(folders, options):
    """`guidance(kind, *typed)`: what the command line with these flags would get."""

    def build(kind, *typed):
        flags = ("--hf_key", folders[kind], "--text", "a red chair", "--negative", "blue", "--guidance_scale", 7.5)
        return build_guidance(options(*flags, "--latent_iter_ratio", 0, *typed), "cpu")

    return build


def load(folder):
    return load_prior(resolve(SimpleNamespace(hf_key=str(folder), IF=False)), "cpu")


@pytest.mark.parametrize("kind", TEXT_TO_IMAGE)
def test_one_step_puts_a_gradient_on_the_picture(kind, guidance):
    one = guidance(kind)
    prior = one.prior
    image = torch.rand(2, 24, 24, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss, log = one(image, *VIEW)
    loss.backward()
    assert torch.isfinite(image.grad).all() and (image.grad.flatten(1).norm(dim=1) > 0).all()
    assert loss > 0 and log["grad_norm"] > 0 and 20 <= log["t"] <= 980 and log["nonfinite"] == 0
    for network in filter(None, (prior.denoiser, prior.autoencoder)):
        assert not network.training
        assert all(not p.requires_grad and p.grad is None for p in network.parameters())
    size = prior.image_size
    picture = one.debug_images(image, *VIEW)
    assert picture.shape == (2, size, 3 * size, 3) and not picture.requires_grad
    if prior.autoencoder is not None:
        latents = torch.rand(2, 8, 8, 4, requires_grad=True)
        one(latents, *VIEW, as_latent=True)[0].backward()
        assert latents.grad.abs().sum() > 0


@pytest.mark.parametrize("kind", ("v-tiny", "xl-eps", "sd3", "if-v"))
def test_the_seed_decides_and_the_prompt_matters(kind, guidance):
    def gradient(*typed):
        image = torch.full((2, 32, 32, 3), 0.4, requires_grad=True)
        guidance(kind, *typed)(image, *VIEW)[0].backward()
        return image.grad

    first = gradient()
    assert torch.equal(first, gradient())
    assert not torch.equal(first, gradient("--seed", 2))
    assert not torch.allclose(first, gradient("--text", "a blue teddy"))
    assert not torch.allclose(first, gradient("--negative", ""))
    assert not torch.allclose(first, gradient("--view_words", 0))


@pytest.mark.parametrize("kind", ("eps-kl", "v-tiny", "sd3", "if-eps"))
def test_saving_memory_changes_nothing_else(kind, guidance, capsys):
    plain, saving = guidance(kind), guidance(kind, "--vram_O")
    assert "--vram_O: split batches" in capsys.readouterr().err
    calls, gradients = [], []
    noisy = "hidden_states" if kind == "sd3" else "sample"
    saving.prior.denoiser.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(len(args[0] if args else kwargs[noisy])), with_kwargs=True
    )
    for one in (plain, saving):
        image = torch.full((2, 32, 32, 3), 0.4, requires_grad=True)
        one(image, *VIEW)[0].backward()
        gradients.append(image.grad)
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4 * gradients[0].abs().max().item())
    assert calls == [1, 1, 1, 1]


# -- pictures ----------------------------------------------------------------------------------------------------------


def test_a_shift_is_taken_off_before_scaling_and_put_back(folders):
    prior = load(folders["eps-tiny"])
    image = torch.rand(1, 3, 32, 32)
    plain, picture = prior.encode(image), prior.decode(prior.encode(image))
    prior.shift = 0.7
    torch.testing.assert_close(prior.encode(image), plain - 0.7 * 0.84)
    torch.testing.assert_close(prior.decode(prior.encode(image)), picture)


@pytest.mark.parametrize("kind", ("eps-tiny", "if-upscaler"))
def test_other_sizes_are_resized_smoothly(kind, folders):
    prior = load(folders[kind])
    for height, width in ((16, 16), (128, 128), (20, 44)):
        image = torch.rand(1, 3, height, width, requires_grad=True)
        latents = prior.encode(image)
        assert latents.shape == (1, prior.latent_channels, prior.latent_size, prior.latent_size)
        latents.square().sum().backward()
        assert (image.grad.abs() > 0).float().mean() > 0.95  # no pixel of a larger picture is left out


@pytest.mark.parametrize("kind", ("epsilon", "v_prediction", "sample", "flow_prediction"))
def test_every_prediction_gives_the_noise_back(kind):
    noise, clean = torch.randn(3, 4, 8, 8), torch.randn(3, 4, 8, 8)
    s = torch.tensor([0.02, 0.5, 0.99])[:, None, None, None]
    a = 1 - s if kind == "flow_prediction" else (1 - s**2).sqrt()
    outputs = {
        "epsilon": noise,
        "v_prediction": a * noise - s * clean,
        "sample": clean,
        "flow_prediction": noise - clean,
    }
    eps = to_epsilon(outputs[kind], a * clean + s * noise, a, s, kind)
    torch.testing.assert_close(eps, noise, rtol=0, atol=3e-5 if kind == "sample" else 1e-6)  # 1 / s = 50 times rounding


@pytest.mark.cuda
@pytest.mark.parametrize("kind", ("v-kl", "xl-eps", "sd3", "if-eps"))
def test_half_precision_on_a_gpu_agrees_with_the_cpu(kind, folders):
    source = resolve(SimpleNamespace(hf_key=str(folders[kind]), IF=False))
    answers = []
    for device, dtype in (("cpu", torch.float32), ("cuda", torch.float16)):
        text = text_encoder(source, device, dtype).embed(["a red chair", "blue"])
        prior = load_prior(source, device, dtype)
        shape = 2, prior.latent_channels, prior.latent_size, prior.latent_size
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
        eps = prior.predict(latents, torch.tensor([20, 700], device=device), text)
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(device)
        mean = prior.encode(picture, None) if prior.autoencoder is None else prior.decode(latents)
        assert eps.dtype == mean.dtype == torch.float32
        answers.append((eps.cpu(), mean.detach().cpu()))
    for ours, theirs in zip(*answers, strict=True):
        assert (ours - theirs).norm() < 0.03 * ours.norm()
