"""The switches that save memory or time: each is in force, the result stays what it was, and what cannot be had is said in one line.

torch.compile is tested with stand-ins for its back end: the real one takes minutes of a CPU.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
from switches import assert_same, loader, predict, refusal, sizes_seen, step
from tiny_models import autoencoder_of

from flags import GROUPS
from guidance import memory
from guidance.memory import apply, precision, tiny_autoencoder


@pytest.fixture(scope="session")
def load(tmp_path_factory):
    return loader(tmp_path_factory.mktemp("memory"))


@pytest.fixture
def said(monkeypatch):
    """The lines that the user is told."""
    lines = []
    monkeypatch.setattr(memory, "say", lines.append)
    return lines


# -- the table ---------------------------------------------------------------------------------------------------------


def test_every_flag_does_something():
    elsewhere = {"vram_O", "precision", "taesd", "taesd_key"}
    group = {flag.name for flag in GROUPS["Memory and speed of the prior"]}
    assert {measure.flag for measure in memory.MEASURES if measure.flag} == group - elsewhere


def test_nothing_happens_unasked(load, options, said):
    prior = load()
    assert apply(prior, options()) == {}
    assert prior.max_batch == 0 and not prior.autoencoder.use_slicing and not said


@pytest.mark.parametrize("kind", ("eps-kl", "v-tiny", "xl-eps", "sd3", "if"))
@pytest.mark.parametrize("switch", ("--vram_O", "--channels_last", "--vae_slicing", "--attention_slicing"))
def test_the_result_stays_the_same(switch, kind, load, options):
    prior = load(kind)
    if (kind, switch) in (("if", "--vae_slicing"), ("sd3", "--attention_slicing")):
        assert refusal(apply, prior, options(switch)).startswith(f"{switch}: ")
        return
    apply(prior, options(switch))
    assert_same(prior, load(kind))


def test_vram_O_takes_all_that_can_be_taken_and_says_so(load, options, said):
    prior = load()
    answers = apply(prior, options("--vram_O"))
    assert [name for name, problem in answers.items() if problem] == ["offload"]
    assert said == [
        "--vram_O: split batches, checkpoint encoder, slice autoencoder, channels last",
        "--vram_O: no offload: there is no GPU to relieve",
    ]
    calls, pictures = sizes_seen(prior.denoiser, 0), sizes_seen(prior.autoencoder.encoder, 0)
    step(prior)
    assert calls == [(1,)] * 4 and pictures == [(1,)] * 2
    for network in (prior.denoiser, prior.autoencoder.encoder):
        assert network.conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    apply(load("if"), options("--vram_O"))
    assert "--vram_O: no slice autoencoder: there is no autoencoder" in said
    apply(load("eps-tiny"), options("--vram_O"))
    assert "--vram_O: no checkpoint encoder: the tiny autoencoder has little to save" in said


def saved(prior):
    """How many numbers autograd keeps of an encoded picture."""
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: (sizes.append(x.numel()), x)[1], lambda x: x):
        prior.encode(torch.rand(2, 3, 32, 32, requires_grad=True))
    return sum(sizes)


@pytest.mark.parametrize("switch", ("--vram_O", "--vae_slicing", "--vae_tiling"))
def test_the_encoder_s_activations_are_not_kept(switch, load, options):
    plain, saving = load(), load()
    apply(saving, options(switch))
    assert saved(saving) < 0.7 * saved(plain)


def test_every_block_is_computed_twice_and_no_more(load, options):
    """Once forward and once in the backward pass, however many switches ask for it."""
    prior, calls = load(), {}
    apply(prior, options("--vram_O", "--vae_slicing"))
    prior.autoencoder.use_slicing = False
    for name, module in prior.autoencoder.encoder.named_modules():
        if type(module).__name__ in ("ResnetBlock2D", "Attention"):
            calls[name] = seen = []
            inner = next(child for child in module.modules() if isinstance(child, torch.nn.Linear | torch.nn.Conv2d))
            inner.register_forward_hook(lambda *_, seen=seen: seen.append(1))
            assert not hasattr(module.forward.args[0], "args")  # wrapped once
    step(prior)
    assert len(calls) == 6 and {len(seen) for seen in calls.values()} == {2}


def test_attention_goes_head_by_head(load, options, monkeypatch):
    from diffusers.models.attention_processor import Attention

    prior, scores, whole = load(), [], Attention.get_attention_scores
    apply(prior, options("--attention_slicing"))
    monkeypatch.setattr(
        Attention, "get_attention_scores", lambda self, q, *rest: (scores.append(len(q)), whole(self, q, *rest))[1]
    )
    predict(prior)
    assert scores and set(scores) == {1}
    many = load("if")
    apply(many, options("--attention_slicing"))
    assert {processor.slice_size for processor in many.denoiser.attn_processors.values()} == {1}


def test_large_pictures_go_through_the_encoder_in_tiles(load, options):
    prior = load()
    apply(prior, options("--vae_tiling"))
    tiles = sizes_seen(prior.autoencoder.encoder, 2, 3)
    latents, _, gradient = step(prior)
    assert len(tiles) == 9 and max(tiles) == (16, 16)
    plain = step(load())
    assert latents.shape == plain[0].shape and not torch.allclose(latents, plain[0], atol=1e-3)
    assert torch.isfinite(gradient).all() and (gradient.abs() > 0).float().mean() > 0.95
    picture = prior.decode(latents)
    assert picture.shape == (2, 3, 32, 32) and torch.isfinite(picture).all()
    assert "tiny autoencoder" in refusal(apply, load("eps-tiny"), options("--vae_tiling"))


@pytest.mark.parametrize("kind", ("eps-kl", "xl-eps"))
def test_merged_tokens_are_fewer(kind, load, options):
    plain, prior = load(kind), load(kind)
    apply(prior, options("--tomesd", 0.5))
    tokens = []
    for name, module in prior.denoiser.named_modules():
        if name.endswith("attn1"):
            module.register_forward_pre_hook(lambda module, args: tokens.append(args[0].shape[1]))
    before = torch.get_rng_state()
    merged = predict(prior)
    assert set(tokens) == {8}  # of 4 x 4
    assert torch.equal(before, torch.get_rng_state()) and torch.equal(merged, predict(prior))
    assert not torch.allclose(merged, predict(plain), atol=1e-3)
    prior.max_batch = 1  # how the samples are spread over calls makes no difference
    torch.testing.assert_close(predict(prior), merged, rtol=1e-4, atol=1e-4)


def test_no_merged_tokens_is_the_plain_network(load):
    prior = load()
    assert memory.merge_tokens(prior, SimpleNamespace(tomesd=0.0)) == ""
    assert type(prior.denoiser.mid_block.attentions[0].transformer_blocks[0]).__name__ == "ToMeBlock"
    assert_same(prior, load())


@pytest.mark.parametrize("kind", ("sd3", "if"))
def test_tokens_of_other_networks_are_not_merged(kind, load, options):
    text = refusal(apply, load(kind), options("--tomesd", 0.5))
    assert text.startswith("--tomesd 0.5: ") and type(load(kind).denoiser).__name__ in text


def test_a_missing_package_is_named(load, options, monkeypatch):
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: None)
    assert "--xformers: the package is not installed" in refusal(apply, load(), options("--xformers"))
    monkeypatch.setattr(memory.importlib.util, "find_spec", lambda name: object())
    assert "--xformers: the package works on a GPU alone" in refusal(apply, load(), options("--xformers"))
    assert "exclude each other" in refusal(apply, load(), options("--xformers", "--attention_slicing"))
    monkeypatch.setitem(sys.modules, "tomesd", None)
    assert "needs the package tomesd" in refusal(apply, load(), options("--tomesd", 0.3))


# -- precision ---------------------------------------------------------------------------------------------------------


def test_precision_follows_the_flags_and_the_device(options, monkeypatch, said):
    single, half = torch.float32, torch.float16
    for device, typed, wanted in (
        ("cpu", (), single), ("cpu", ("-O",), single), ("cpu", ("--precision", "fp32"), single),
        ("cuda", (), half), ("cuda", ("-O",), half), ("cuda", ("--no_fp16",), single),
        ("cuda", ("-O", "--no_fp16"), single), ("cuda", ("--precision", "fp32"), single),
        ("cuda", ("--no_fp16", "--precision", "fp16"), half),
    ):  # fmt: skip
        assert precision(options(*typed), torch.device(device)) == wanted, (device, typed)
    assert refusal(precision, options("--precision", "fp16"), "cpu").startswith("--precision fp16: a CPU")
    for able in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda able=able: able)
        assert precision(options("--precision", "bf16"), "cpu") == torch.bfloat16
        assert len(said) == (0 if able else 1)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True, able=able: able)
        if able:
            assert precision(options("--precision", "bf16"), "cuda") == torch.bfloat16
        else:
            assert "use fp16" in refusal(precision, options("--precision", "bf16"), "cuda")


@pytest.mark.parametrize("switch", (None, "--vram_O"))
def test_bfloat16_says_about_the_same(switch, load, options):
    prior = load(dtype=torch.bfloat16)
    if switch:
        apply(prior, options(switch))
    for one, other in zip(step(prior), step(load()), strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() < 0.05 * other.norm()


# -- the tiny autoencoder ----------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_folder(tmp_path):
    autoencoder_of("tiny").save_pretrained(tmp_path / "tiny")
    return tmp_path / "tiny"


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_the_tiny_autoencoder_takes_the_place_of_the_large_one(dtype, load, options, tiny_folder):
    from diffusers import AutoencoderTiny

    prior = load(dtype=dtype)
    tiny_autoencoder(options("--taesd", "--taesd_key", tiny_folder), prior)
    own = AutoencoderTiny.from_pretrained(tiny_folder, dtype=dtype)
    image = torch.rand(2, 3, 32, 32)
    expected = own.encode((2 * image - 1).to(dtype)).latents.float() * 0.84
    torch.testing.assert_close(prior.encode(image), expected)
    assert prior.autoencoder.dtype == dtype and not any(p.requires_grad for p in prior.autoencoder.parameters())
    apply(prior, options("--vram_O"))
    step(prior)


def test_the_published_one_is_found_by_the_latents(load, options, monkeypatch, tmp_path, tiny_folder):
    from diffusers import AutoencoderKL, AutoencoderTiny

    asked, tiny = [], AutoencoderTiny.from_pretrained(tiny_folder)
    monkeypatch.setattr("guidance.parts.read_part", lambda kind, source, dtype: (asked.append(source), tiny)[1])

    def with_factor(factor):
        prior = load()
        autoencoder_of("kl", scaling_factor=factor).save_pretrained(tmp_path / str(factor))
        prior.use_autoencoder(AutoencoderKL.from_pretrained(tmp_path / str(factor)))
        return prior

    for factor, name in ((0.18215, "madebyollin/taesd"), (0.13025, "madebyollin/taesdxl")):
        prior = with_factor(factor)
        tiny_autoencoder(options("--taesd"), prior)
        assert (asked[-1].path_or_id, asked[-1].flag) == (name, "--taesd") and prior.scaling == 0.84
    assert "--taesd: none is published" in refusal(tiny_autoencoder, options("--taesd"), with_factor(0.5))


def test_an_autoencoder_that_does_not_fit_is_refused(load, options, tmp_path, tiny_folder):
    from diffusers import AutoencoderTiny

    assert "works on pixels" in refusal(tiny_autoencoder, options("--taesd"), load("if"))
    assert "tiny one already" in refusal(tiny_autoencoder, options("--taesd"), load("eps-tiny"))
    tiny_autoencoder(options("--taesd", "--taesd_key", tiny_folder), load("eps-tiny"))
    blocks = {"encoder_block_out_channels": (8,) * 3, "decoder_block_out_channels": (8,) * 3}
    counts = {"num_encoder_blocks": (1,) * 3, "num_decoder_blocks": (1,) * 3}
    wrong = {"channels": AutoencoderTiny(latent_channels=16, **blocks, **counts), "factor": AutoencoderTiny()}
    for name, network in (wrong | {"kind": autoencoder_of("kl")}).items():
        network.save_pretrained(tmp_path / name)
        prior = load()
        before = prior.autoencoder
        text = refusal(tiny_autoencoder, options("--taesd", "--taesd_key", tmp_path / name), prior)
        assert text.startswith(f"--taesd_key {tmp_path / name}: ") and prior.autoencoder is before
        assert {"channels": "16 channels", "factor": "8 times", "kind": "AutoencoderTiny"}[name] in text
    assert "--taesd: madebyollin/taesd cannot be read" in refusal(tiny_autoencoder, options("--taesd"), load())
    assert "no such folder" in refusal(tiny_autoencoder, options("--taesd", "--taesd_key", "./nowhere"), load())
