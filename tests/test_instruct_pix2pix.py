"""InstructPix2Pix: the pipeline's own picture, and its two scales of guidance in terms of one."""

import json
from pathlib import Path

import pytest
import torch
from ddim import ddim, noise
from tiny_models import autoencoder_of, build_folder

from errors import UserError
from guidance.instruct_pix2pix import InstructPix2Pix
from guidance.text import ClipText
from guidance.weights import Source, quiet


def build(folder: Path, autoencoder: str) -> Path:
    """A random InstructPix2Pix: a Stable Diffusion whose denoiser takes eight channels."""
    from diffusers import DDIMScheduler, StableDiffusionInstructPix2PixPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    plain = build_folder(folder / "plain", f"eps-{autoencoder}")
    config = json.loads((plain / "unet" / "config.json").read_text())
    torch.manual_seed(2)
    unet = UNet2DConditionModel(**{**{k: v for k, v in config.items() if k[0] != "_"}, "in_channels": 8})
    pipe = StableDiffusionInstructPix2PixPipeline(
        autoencoder_of(autoencoder),
        CLIPTextModel.from_pretrained(plain / "text_encoder"),
        CLIPTokenizer.from_pretrained(plain / "tokenizer"),
        unet,
        DDIMScheduler.from_pretrained(plain / "scheduler"),
        None,
        None,
        requires_safety_checker=False,
    )
    with quiet():
        pipe.save_pretrained(folder / autoencoder)
    return folder / autoencoder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: build(root, kind) for kind in ("kl", "tiny")}


def source(folder):
    return Source(str(folder), True, folder.name, f"--hf_key {folder}")


@pytest.fixture(scope="module")
def texts(folders):
    return ClipText(source(folders["kl"]), "cpu").embed(["a red chair", "", "blue view"])


def picture(count=1, size=32):
    return torch.rand(count, size, size, 3, generator=torch.Generator().manual_seed(7))


def rows(text, count):
    return text.expand(count, -1, -1)


@pytest.mark.parametrize("kind", ("kl", "tiny"))
@pytest.mark.parametrize("negative", ("", "blue view"))
def test_ddim_over_our_prior_draws_the_pipeline_s_picture(kind, negative, folders, texts):
    from diffusers import StableDiffusionInstructPix2PixPipeline

    pipe = StableDiffusionInstructPix2PixPipeline.from_pretrained(folders[kind], safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    original = picture()
    expected = pipe(
        "a red chair", original.permute(0, 3, 1, 2), negative_prompt=negative, guidance_scale=6.0, image_guidance_scale=1.5,
        num_inference_steps=8, output_type="pt" if kind == "kl" else "latent", generator=torch.Generator().manual_seed(3),
    ).images  # fmt: skip

    prior = InstructPix2Pix.load(source(folders[kind]), "cpu", edit_scale=1.5)
    away = (
        texts[1:2] if not negative else texts[2:3]
    )  # the pipeline puts a negative prompt in the place of the empty one
    hints = {"original": original, "null": away}

    def guided(latents, t):
        base, text = prior.ask(latents, t, [away, texts[:1]], hints)
        return base + 6.0 * (text - base)

    def draw():
        latents = ddim(prior, noise(3, 1, 4, 8, 8), 8, guided)
        return prior.decode(latents) if kind == "kl" else latents

    error = (draw() - expected).abs().max()
    assert error < (
        2e-4 if kind == "kl" else 2e-4 * expected.abs().max()
    )  # the tiny autoencoder's pictures are too dark to tell
    assert expected.std() > 0.01
    prior.edit_scale = 1.2
    assert (draw() - expected).abs().max() > 10 * error


def test_it_is_the_formula(folders, texts):
    """Against the three predictions, asked one by one."""
    prior = InstructPix2Pix.load(source(folders["kl"]), "cpu", edit_scale=1.8)
    noisy, t, original = noise(0, 2, 4, 8, 8), torch.tensor([100, 800]), picture(2)
    text, null = rows(texts[0], 2), rows(texts[1], 2)
    with torch.no_grad():
        seen = prior.autoencoder.encode(2 * original.permute(0, 3, 1, 2) - 1).latent_dist.mode()

        def once(embedding, latents):
            return prior.denoiser(torch.cat([noisy, latents], 1), t, embedding).sample

        with_text, with_null, without = once(text, seen), once(null, seen), once(null, torch.zeros_like(seen))
    hints = {"original": original, "null": null}
    torch.testing.assert_close(prior.predict(noisy, t, text, hints), with_text + 0.8 * (with_null - without))
    torch.testing.assert_close(prior.predict(noisy, t, null, hints), with_null + 0.8 * (with_null - without))
    prior.edit_scale = 1.0
    torch.testing.assert_close(prior.predict(noisy, t, text, {"original": original}), with_text)
    torch.testing.assert_close(prior.denoise(noisy, t, text, {"original": original}), with_text)
    assert (with_null - without).abs().max() > 0.01 and (with_text - with_null).abs().max() > 0.01


@pytest.mark.parametrize(
    ("scale", "wordings", "samples"),
    (
        (1.5, "text", 3),
        (1.5, "null text", 3),
        (1.5, "text null other", 4),
        (1.5, "other text", 4),
        (1.0, "null text", 2),
    ),
)
def test_the_empty_prompt_is_asked_once(scale, wordings, samples, folders, texts):
    """However many wordings there are, and not at all where it has no say."""
    prior = InstructPix2Pix.load(source(folders["kl"]), "cpu", edit_scale=scale)
    known = {"text": rows(texts[0], 2), "null": rows(texts[1], 2), "other": rows(texts[2], 2)}
    question, hints = (noise(0, 2, 4, 8, 8), torch.tensor([100, 800])), {"original": picture(2), "null": known["null"]}
    asked = [known[name] for name in wordings.split()]
    expected = [prior.predict(*question, each, hints) for each in asked]
    calls, encodings = [], []
    prior.denoiser.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    prior.autoencoder.encoder.register_forward_pre_hook(lambda module, args: encodings.append(len(args[0])))
    found = prior.ask(*question, asked, hints)
    assert calls == [2 * samples] and encodings == [2]
    assert len(found) == len(asked)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-5)
    prior.max_batch = 1
    torch.testing.assert_close(
        torch.stack(prior.ask(*question, asked, hints)), torch.stack(expected), rtol=1e-4, atol=1e-5
    )


def test_each_sample_keeps_its_own_original(folders, texts):
    prior = InstructPix2Pix.load(source(folders["kl"]), "cpu")
    noisy, t = noise(0, 1, 4, 8, 8).repeat(2, 1, 1, 1), torch.tensor([400, 400])
    text, hints = rows(texts[0], 2), {"original": picture(2), "null": rows(texts[1], 2)}
    both = prior.predict(noisy, t, text, hints)
    swapped = prior.predict(noisy, t, text, {**hints, "original": hints["original"].flip(0)})
    assert not torch.allclose(both[0], both[1], atol=1e-4)
    torch.testing.assert_close(both, swapped.flip(0), rtol=1e-4, atol=1e-5)
    assert torch.equal(both, prior.predict(noisy, t, text, hints))  # no random number in the encoding


def test_originals_of_any_size(folders, texts):
    prior = InstructPix2Pix.load(source(folders["tiny"]), "cpu")
    assert prior.encode_original(picture(1, 128)).shape == (1, 4, 8, 8)
    assert prior.latent_channels == 4 and prior.image_size == 32
    flat = torch.full((1, 50, 70, 3), 0.25)
    torch.testing.assert_close(prior.encode_original(flat), prior.encode_original(flat[:, :32, :32]))


def test_the_render_gets_a_gradient(folders, texts):
    prior = InstructPix2Pix.load(source(folders["kl"]), "cpu")
    image = picture(2, 24).requires_grad_()
    latents = prior.encode(image.permute(0, 3, 1, 2), torch.Generator().manual_seed(0))
    hints = {"original": picture(2), "null": rows(texts[1], 2)}
    latents.backward(prior.predict(latents.detach(), torch.tensor([300, 700]), rows(texts[0], 2), hints))
    assert (image.grad.flatten(1).norm(dim=1) > 0).all()
    for network in (prior.denoiser, prior.autoencoder):
        assert not network.training and all(not p.requires_grad and p.grad is None for p in network.parameters())


def test_what_is_missing_is_said(folders, texts):
    prior = InstructPix2Pix.load(source(folders["kl"]), "cpu")
    question = noise(0, 1, 4, 8, 8), torch.tensor([100]), texts[:1]
    with pytest.raises(ValueError, match="the hints lack original and null"):
        prior.predict(*question)
    with pytest.raises(ValueError, match="the hints lack null"):
        prior.predict(*question, {"original": picture()})
    plain = folders["kl"].parent / "plain"
    with pytest.raises(
        UserError, match="plain: not an InstructPix2Pix: its denoiser takes 4 channels, not twice the 4"
    ):
        InstructPix2Pix.load(source(plain), "cpu")
