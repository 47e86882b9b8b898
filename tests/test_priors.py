"""Every family of priors against diffusers' own pipeline of the same random weights: embeddings, noise levels, whole pictures."""

import json
import shutil
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny_models import FAMILIES, KINDS, Folders

from errors import UserError
from guidance import weights
from guidance.priors import load_prior, text_encoder
from guidance.text import join_pooled, split_pooled

PRIORS = (*KINDS, *(kind for kind in FAMILIES if kind != "pix2pix"))
PROMPT, SCALE = "a red chair", 5.0
# what a pipeline makes of no negative prompt at all differs from one class to the other
NEGATIVE = dict.fromkeys(PRIORS, "blue view") | {"xl-eps": "", "sd3-no-t5": "", "if-v": ""}


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def source_of(folder):
    return weights.resolve(SimpleNamespace(hf_key=str(folder), IF=False))


def prior_of(folder, dtype=torch.float32):
    return load_prior(source_of(folder), "cpu", dtype)


def embeddings(folder, texts):
    return text_encoder(source_of(folder), "cpu").embed(texts)


def pipeline(folder, **parts):
    """The folder as diffusers itself reads it, with a sampler that draws no random numbers."""
    import diffusers

    index = json.loads((folder / "model_index.json").read_text())
    if index.get("text_encoder_3") == [None, None]:
        parts |= {"text_encoder_3": None, "tokenizer_3": None}
    with weights.quiet():
        pipe = getattr(diffusers, index["_class_name"]).from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    if "FlowMatch" not in type(pipe.scheduler).__name__:
        changes = {"clip_sample": False, "set_alpha_to_one": False, "timestep_spacing": "leading", "steps_offset": 1}
        config = {**pipe.scheduler.config, **changes, "variance_type": "fixed_small", "_class_name": "DDIMScheduler"}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    return pipe


def complaint(call, *args):
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hints_for(prior, count=1):
    generator = torch.Generator().manual_seed(1)
    return {"picture": torch.rand(count, prior.image_size // 4, prior.image_size // 4, 3, generator=generator)}


# -- whole pictures ----------------------------------------------------------------------------------------------------


def sample(prior, latents, texts, levels, last, hints):
    """Deterministic sampling in terms of eps alone: DDIM and Euler's method along a flow are the same.

    levels: timesteps, falling; last: (signal, sigma) at the end.
    """
    ends = [(prior.signal[t], prior.sigma[t]) for t in levels[1:]] + [last]
    for t, (signal, sigma) in zip(levels, ends, strict=True):
        eps_negative, eps_text = prior.ask(latents, torch.tensor([t]), [texts[1:], texts[:1]], hints)
        eps = eps_negative + SCALE * (eps_text - eps_negative)
        clean = (latents - prior.sigma[t] * eps) / prior.signal[t]
        latents = signal * clean + sigma * eps
    return prior.decode(latents).permute(0, 2, 3, 1).detach().numpy()


@pytest.mark.parametrize("kind", PRIORS)
def test_sampling_with_our_prior_draws_the_pipeline_s_picture(kind, folders):
    """Scaling, offset, prediction type, noise levels, sizes, prompts or guidance: a slip in any of them changes the picture."""
    pipe, prior = pipeline(folders[kind]), prior_of(folders[kind])
    hints, generator = hints_for(prior), torch.Generator().manual_seed(3)
    settings = {"guidance_scale": SCALE, "output_type": "np", "generator": torch.Generator().manual_seed(3)}
    settings["negative_prompt"] = NEGATIVE[kind] or None
    latents = torch.randn(1, prior.latent_channels, prior.latent_size, prior.latent_size, generator=generator)
    if kind.startswith("if"):
        settings["clean_caption"] = False
    if kind == "if-upscaler":
        settings["image"] = 2 * hints["picture"].permute(0, 3, 1, 2) - 1
        prior.grain = torch.randn(latents.shape, generator=generator)
    if kind.startswith("sd3"):
        steps = [950, 800, 600, 420, 250, 80]
        expected = pipe(PROMPT, sigmas=[step / 1000 for step in steps], **settings).images
        levels, last = [step - 1 for step in steps], (1.0, 0.0)
    else:
        expected = pipe(PROMPT, num_inference_steps=8, **settings).images
        levels, last = pipe.scheduler.timesteps.tolist(), (prior.signal[0], prior.sigma[0])
    image = sample(prior, latents, embeddings(folders[kind], [PROMPT, NEGATIVE[kind]]), levels, last, hints)
    assert np.abs(image - expected).max() < 2e-4
    inside = (image > 0.01) & (image < 0.99)
    assert image.std() > 0.01 and inside.mean() > 0.3  # no flat or blown-out picture that would agree with anything


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", (*PRIORS, "pix2pix"))
def test_embeddings_are_the_pipeline_s(kind, folders):
    pipe, words, negative = pipeline(folders[kind]), ["a Red chair ", "a teddy"], ["blue view", "back view"]
    ours = embeddings(folders[kind], words + negative)
    if kind.startswith("if"):
        expected = torch.cat(pipe.encode_prompt(words, True, negative_prompt=negative))
    elif kind.startswith(("xl", "sd3")):
        more = (None,) if kind.startswith("xl") else (None, None)
        text, negative, pooled, negative_pooled = pipe.encode_prompt(words, *more, negative_prompt=negative)
        tokens, ours = split_pooled(ours, pooled.shape[-1])
        torch.testing.assert_close(tokens, torch.cat([text, negative]))
        expected = torch.cat([pooled, negative_pooled])
    elif kind == "pix2pix":
        expected = pipe._encode_prompt(words, "cpu", 1, True, negative)[:4]  # text, negative, negative
        expected = torch.cat([expected[:2], pipe._encode_prompt(negative, "cpu", 1, False)])
    else:
        expected = torch.cat(pipe.encode_prompt(words, "cpu", 1, True, negative_prompt=negative))
    torch.testing.assert_close(ours, expected)
    assert (ours[0] - ours[1]).abs().max() > 0.05  # words make a difference


@pytest.mark.parametrize(("kind", "zeros"), [("xl-eps", True), ("xl-v", False)])
def test_the_empty_prompt_of_sdxl_is_zeros_where_the_pipeline_says_so(kind, zeros, folders, tmp_path):
    folder = shutil.copytree(folders[kind], tmp_path / kind)
    index = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": zeros}
    (folder / "model_index.json").write_text(json.dumps(index))
    _, empty, _, pooled = pipeline(folder).encode_prompt(PROMPT)
    ours = embeddings(folder, [PROMPT, ""])
    torch.testing.assert_close(ours[1:], join_pooled(empty, pooled))
    assert (not ours[1].any()) == zeros and ours[0].any()


@pytest.mark.parametrize(
    ("kind", "fits"), [("eps-kl", 14), ("xl-eps", 14), ("sd3", 255), ("sd3-no-t5", 14), ("if-v", 76)]
)
def test_what_does_not_fit_is_counted_and_cut(kind, fits, folders):
    encoder = text_encoder(source_of(folders[kind]), "cpu")
    assert encoder.excess("red " * fits) == 0 and encoder.excess("red " * (fits + 3)) == 3
    assert torch.equal(encoder.embed(["red " * fits]), encoder.embed(["red " * (fits + 3)]))


def test_a_closed_encoder_is_gone_and_can_be_read_again(folders):
    encoder = text_encoder(source_of(folders["if-v"]), "cpu")
    before = encoder.embed([PROMPT])
    network = weakref.ref(encoder.pipe.text_encoder)
    encoder.close()
    assert network() is None  # its memory is free at once
    assert torch.equal(encoder.embed([PROMPT]), before)
    assert encoder.pipe.unet is None


def test_stable_diffusion_3_without_the_files_of_its_t5(folders, tmp_path, capsys):
    folder = shutil.copytree(folders["sd3"], tmp_path / "sd3")
    shutil.rmtree(folder / "text_encoder_3")
    ours = embeddings(folder, [PROMPT])
    assert capsys.readouterr().err.count("there is no T5 text encoder") == 1
    text, _, pooled, _ = pipeline(folder, text_encoder_3=None, tokenizer_3=None).encode_prompt(PROMPT, None, None)
    torch.testing.assert_close(ours, join_pooled(text, pooled))
    prior_of(folder)
    assert "T5" not in capsys.readouterr().err  # the denoiser does not care


# -- noise and pictures ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", PRIORS)
def test_a_perfect_network_s_noise_comes_back(kind, folders):
    """The tables are the scheduler's own noising, and what the network was trained to predict of it turns into eps."""
    prior, pipe = prior_of(folders[kind]), pipeline(folders[kind])
    size = prior.latent_size
    clean, noise = normal(4, prior.latent_channels, size, size), normal(4, prior.latent_channels, size, size, seed=1)
    t = torch.tensor([0, 300, 700, 998])
    signal, sigma = (table[t][:, None, None, None] for table in (prior.signal, prior.sigma))
    noisy = signal * clean + sigma * noise
    if kind == "sd3":
        assert prior.prediction_type == "flow_prediction"
        output = noise - clean
        torch.testing.assert_close(noisy, pipe.scheduler.scale_noise(clean, pipe.scheduler.timesteps[999 - t], noise))
    elif kind == "sd3-no-t5":
        output = noise - clean
    else:
        config = json.loads((folders[kind] / "scheduler" / "scheduler_config.json").read_text())
        assert prior.prediction_type == config["prediction_type"] == ("v_prediction" if "v" in kind else "epsilon")
        torch.testing.assert_close(noisy, pipe.scheduler.add_noise(clean, noise, t))
        output = pipe.scheduler.get_velocity(clean, noise, t) if "v" in kind else noise
    assert (prior.sigma.diff() > 0).all() and len(prior.sigma) == prior.num_timesteps == 1000
    prior.denoise = lambda *_: output
    embedding = torch.zeros(4, 1, 1)
    torch.testing.assert_close(prior.predict(noisy, t, embedding), noise, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", PRIORS)
def test_encoding_is_what_the_denoiser_was_trained_on(kind, folders):
    prior, pipe = prior_of(folders[kind]), pipeline(folders[kind])
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(2, 3, prior.image_size, prior.image_size, generator=generator, requires_grad=True)
    latents = prior.encode(image, torch.Generator().manual_seed(4))
    assert latents.shape == (2, prior.latent_channels, prior.latent_size, prior.latent_size)
    latents.square().sum().backward()
    assert (image.grad.abs() > 0).float().mean() > 0.95  # every pixel has a say
    with torch.no_grad():
        expected = 2 * image - 1
        if prior.autoencoder is not None:
            encoded = pipe.vae.encode(expected)
            if kind.endswith("tiny"):
                expected = 0.84 * encoded.latents
            elif kind.startswith("sd3"):
                expected = (encoded.latent_dist.sample(torch.Generator().manual_seed(4)) - 0.0609) * 1.5305
            else:
                expected = encoded.latent_dist.sample(torch.Generator().manual_seed(4)) * 0.18215
    torch.testing.assert_close(latents.detach(), expected)


@pytest.mark.parametrize("kind", ("v-kl", *FAMILIES[:-1]))
def test_samples_of_a_batch_do_not_mix(kind, folders):
    prior = prior_of(folders[kind])
    noisy = normal(3, prior.latent_channels, prior.latent_size, prior.latent_size)
    t, text, hints = torch.tensor([5, 500, 990]), embeddings(folders[kind], [PROMPT, "blue", ""]), hints_for(prior, 3)
    together = prior.predict(noisy, t, text, hints)
    prior.max_batch = 1
    torch.testing.assert_close(together, prior.predict(noisy, t, text, hints), rtol=1e-4, atol=1e-5)
    other = prior.predict(noisy, t, text.roll(1, 0), hints)
    assert (other - together).flatten(1).abs().amax(1).min() > 1e-3  # and every sample reads its own text


@pytest.mark.parametrize("kind", ("xl-eps", "sd3", "if-v", "if-upscaler"))
def test_half_precision_inside_full_precision_outside(kind, folders):
    full, half = prior_of(folders[kind]), prior_of(folders[kind], torch.bfloat16)
    assert half.dtype == half.denoiser.dtype == torch.bfloat16
    noisy, hints = normal(1, half.latent_channels, half.latent_size, half.latent_size), hints_for(half)
    text = text_encoder(source_of(folders[kind]), "cpu", torch.bfloat16).embed([PROMPT])
    assert text.dtype == torch.float32
    eps, exact = (prior.predict(noisy, torch.tensor([400]), text, hints) for prior in (half, full))
    assert eps.dtype == torch.float32
    assert (eps - exact).norm() < 0.05 * exact.norm()


def test_sdxl_s_autoencoder_stays_in_full_precision(folders, tmp_path):
    assert prior_of(folders["xl-eps"], torch.float16).autoencoder.dtype == torch.float32
    folder = shutil.copytree(folders["xl-eps"], tmp_path / "fixed")
    config = folder / "vae" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
    prior = prior_of(folder, torch.float16)
    assert prior.autoencoder.dtype == prior.dtype == torch.float16


# -- DeepFloyd's second stage ------------------------------------------------------------------------------------------


def test_the_upscaler_sees_the_render_at_a_quarter_of_its_size(folders):
    prior = prior_of(folders["if-upscaler"])
    assert (prior.latent_channels, prior.image_size, prior.wants) == (3, 32, ("picture",))
    checks = (torch.arange(64) % 2).float()[None, :, None, None].expand(1, 64, 64, 3)
    flat = torch.full((1, 8, 8, 3), 0.5)
    torch.testing.assert_close(prior.known(checks), prior.known(flat), rtol=0, atol=0.1)  # its detail is not known
    noising = pipeline(folders["if-upscaler"]).image_noising_scheduler
    expected = noising.add_noise(torch.zeros(1, 3, 32, 32), prior.grain, torch.tensor([250]))
    torch.testing.assert_close(prior.known(flat), expected)


def test_the_upscaler_asks_the_same_question_twice(folders):
    prior, other = prior_of(folders["if-upscaler"]), prior_of(folders["if-upscaler"])
    noisy, text, hints = normal(2, 3, 32, 32), embeddings(folders["if-upscaler"], [PROMPT] * 2), hints_for(prior, 2)
    torch.manual_seed(0)
    first = prior.predict(noisy, torch.tensor([300, 300]), text, hints)
    assert torch.equal(first, other.predict(noisy, torch.tensor([300, 300]), text, hints))
    with pytest.raises(ValueError, match="needs the hint `picture`"):
        prior.predict(noisy, torch.tensor([300, 300]), text)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_schedulers_that_cannot_be_used_are_refused_in_one_line(folders, tmp_path):
    def with_scheduler(kind, name, **changes):
        folder = shutil.copytree(folders[kind], tmp_path / f"{kind}-{name}")
        index = json.loads((folder / "model_index.json").read_text()) | {"scheduler": ["diffusers", name]}
        (folder / "model_index.json").write_text(json.dumps(index))
        config = folder / "scheduler" / "scheduler_config.json"
        config.write_text(json.dumps(json.loads(config.read_text()) | {"_class_name": name} | changes))
        return folder

    for kind in ("eps-kl", "xl-eps", "if-eps"):
        folder = with_scheduler(kind, "FlowMatchEulerDiscreteScheduler")
        assert "FlowMatchEulerDiscreteScheduler" in complaint(prior_of, folder)
        assert "flow_prediction" in complaint(
            prior_of, with_scheduler(kind, "DPMSolverMultistepScheduler", prediction_type="flow_prediction")
        )
    folder = with_scheduler("sd3", "DDIMScheduler")
    text = complaint(prior_of, folder)
    assert text.startswith("--hf_key") and "DDIMScheduler" in text and "FlowMatchEulerDiscreteScheduler" in text


def options(**values):
    defaults = {"control": "none", "control_key": None, "view_group": 1}
    scales = dict.fromkeys(("control_scale", "edit_scale"), 0.7)
    return SimpleNamespace(**(defaults | scales | values))


def test_what_the_options_add_to_a_prior(folders, tmp_path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    plain = folders["eps-kl"]
    unet = UNet2DConditionModel.from_pretrained(plain / "unet")
    ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).save_pretrained(tmp_path / "control")
    control = options(control="normal", control_key=str(tmp_path / "control"))
    prior = load_prior(source_of(plain), "cpu", torch.float32, control)
    assert (type(prior).__name__, prior.which, prior.scale) == ("ControlNet", "normal", 0.7)
    assert type(load_prior(source_of(plain), "cpu", torch.float32, options())).__name__ == "StableDiffusion"
    assert "--control normal" in complaint(load_prior, source_of(folders["sd3"]), "cpu", torch.float32, control)
    edit = load_prior(source_of(folders["pix2pix"]), "cpu", torch.float32, options())
    assert (type(edit).__name__, edit.edit_scale) == ("InstructPix2Pix", 0.7)


def test_a_multi_view_model_is_known_by_its_denoiser(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    folder = shutil.copytree(folders["eps-kl"], tmp_path / "several")
    config = json.loads((folder / "unet" / "config.json").read_text())
    cameras = {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}
    UNet2DConditionModel.from_config(config | cameras).save_pretrained(folder / "unet")
    assert prior_of(folder).view_group == 4
    assert load_prior(source_of(folder), "cpu", torch.float32, options(view_group=4)).view_group == 4
    assert "use --view_group 4" in complaint(load_prior, source_of(folder), "cpu", torch.float32, options())
    index = folder / "model_index.json"  # as MVDream's own folder says
    index.write_text(index.read_text().replace("StableDiffusionPipeline", "MVDreamPipeline"))
    assert prior_of(folder).view_group == 4
    torch.testing.assert_close(embeddings(folder, [PROMPT]), embeddings(folders["eps-kl"], [PROMPT]))
