"""`--lora`: files of diffusers' and of peft's put on a prior's own networks, with a weight each, and VSD learning on top of them."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tiny_models import Folders

from errors import UserError
from guidance.adapters import Adapter, activate, add_to_denoiser, as_learned, put_on_denoiser, read, tuner_layers
from guidance.embeddings import CachedEncoder
from guidance.lora import Adaptation
from guidance.priors import load_prior, text_encoder
from guidance.weights import check_vocabulary, resolve

TEXTS = ["a red chair", "blue"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def source(folder, lora=None):
    return resolve(SimpleNamespace(hf_key=str(folder), IF=False, lora=lora))


def prior_of(folder, lora=None):
    return load_prior(source(folder, lora), "cpu")


def answer(prior, seed=0, width=16):
    generator = torch.Generator().manual_seed(seed)
    noisy = torch.randn(2, prior.latent_channels, prior.latent_size, prior.latent_size, generator=generator)
    return prior.predict(noisy, torch.tensor([100, 700]), torch.randn(2, 17, width, generator=generator))


def shake(network, seed=3):
    """Adapters as they are after a training: without this, B is 0."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in network.named_parameters():
        if "lora_" in name:
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)


def write_diffusers(folder, out, rank=2, text=False):
    """A LoRA that a plain diffusers pipeline saves; returns that pipeline with it on."""
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["to_q", "to_v"]))
    shake(pipe.unet)
    layers = {"unet_lora_layers": convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))}
    if text:
        pipe.text_encoder.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=["q_proj", "v_proj"]))
        shake(pipe.text_encoder)
        its = get_peft_model_state_dict(pipe.text_encoder)
        layers["text_encoder_lora_layers"] = convert_state_dict_to_diffusers(its)
    StableDiffusionPipeline.save_lora_weights(out, **layers)
    return pipe


def test_a_lora_of_diffusers_answers_as_in_its_own_pipeline(folders, tmp_path):
    pipe = write_diffusers(folders["eps-kl"], tmp_path / "lora", text=True)
    plain, adapted = prior_of(folders["eps-kl"]), prior_of(folders["eps-kl"], str(tmp_path / "lora"))
    noisy, told = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
    with torch.no_grad():
        wanted = pipe.unet(noisy, torch.tensor([300]), told).sample
    torch.testing.assert_close(adapted.predict(noisy, torch.tensor([300]), told), wanted)
    assert (answer(plain) - answer(adapted)).abs().max() > 0.01
    ids = pipe.tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            text_encoder(source(folders["eps-kl"], tmp_path / "lora"), "cpu").embed(TEXTS), pipe.text_encoder(ids)[0]
        )
    assert not any(p.requires_grad for p in adapted.denoiser.parameters()) and not adapted.denoiser.training


def test_the_weight_scales_it_and_several_add_up(folders, tmp_path):
    for name, seed in (("one", 3), ("two", 4)):
        pipe = write_diffusers(folders["v-tiny"], tmp_path / name)
        shake(pipe.unet, seed)
    base, lora = folders["v-tiny"], tmp_path / "one"
    plain, off = answer(prior_of(base)), answer(prior_of(base, f"{lora}:0"))
    torch.testing.assert_close(off, plain)
    torch.testing.assert_close(answer(prior_of(base, f"{lora}:0.5,{lora}:0.5")), answer(prior_of(base, f"{lora}:1")))
    assert (answer(prior_of(base, f"{lora}:0.5")) - answer(prior_of(base, lora))).abs().max() > 1e-3


def test_a_folder_that_peft_wrote(folders, tmp_path):
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(folders["eps-kl"] / "unet")
    model = get_peft_model(unet, LoraConfig(r=4, lora_alpha=8, target_modules=["to_k", "to_out.0", "conv1"]))
    shake(model)
    model.save_pretrained(tmp_path / "peft")
    noisy, told = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 16)
    with torch.no_grad():
        wanted = model(noisy, torch.tensor([300]), told).sample
    adapted = prior_of(folders["eps-kl"], tmp_path / "peft")
    torch.testing.assert_close(adapted.predict(noisy, torch.tensor([300]), told), wanted)


def test_a_text_encoder_of_peft_s(folders, tmp_path):
    from transformers import CLIPTextModel

    encoder = CLIPTextModel.from_pretrained(folders["eps-kl"] / "text_encoder")
    model = get_peft_model(encoder, LoraConfig(r=4, lora_alpha=2, target_modules=["q_proj", "v_proj"]))
    shake(model)
    model.save_pretrained(tmp_path / "peft")
    plain, adapted = (source(folders["eps-kl"], lora) for lora in (None, tmp_path / "peft"))
    ids = text_encoder(plain, "cpu").open().tokenizer(TEXTS, padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(text_encoder(adapted, "cpu").embed(TEXTS), model(ids)[0])


def test_one_network_holds_several_that_take_turns(folders, tmp_path):
    write_diffusers(folders["eps-kl"], tmp_path / "lora")
    prior = prior_of(folders["eps-kl"])
    plain, found = (
        answer(prior),
        read(tmp_path / "lora" / "pytorch_lora_weights.safetensors", "--lora", "StableDiffusionPipeline"),
    )
    for name in ("partial", "full"):
        add_to_denoiser(prior.denoiser, found, name, "--lora", "tiny")
    activate(prior.denoiser, {"partial": 0.5})
    half = answer(prior)
    activate(prior.denoiser, {"full": 0.5})
    torch.testing.assert_close(answer(prior), half)
    activate(prior.denoiser, {})
    assert torch.equal(answer(prior), plain) and (half - plain).abs().max() > 1e-3


def test_the_cache_tells_an_adapted_text_encoder_from_a_plain_one(folders, tmp_path):
    write_diffusers(folders["eps-kl"], tmp_path / "both", text=True)
    write_diffusers(folders["eps-kl"], tmp_path / "unet")
    names = {lora: source(folders["eps-kl"], lora and tmp_path / lora) for lora in (None, "unet", "both", "both:0.5")}
    cached = {lora: CachedEncoder(text_encoder(its, "cpu"), tmp_path / "cache") for lora, its in names.items()}
    assert cached[None].name == cached["unet"].name  # its text encoder is the plain one: nothing to embed anew
    assert len({cached[lora].name for lora in (None, "both", "both:0.5")}) == 3
    cached[None].embed(TEXTS)
    adapted = cached["both"].embed(TEXTS)
    assert (adapted - cached[None].embed(TEXTS)).abs().max() > 1e-3


def test_vsd_learns_on_top_of_a_lora_that_stays_on(folders, tmp_path):
    write_diffusers(folders["eps-tiny"], tmp_path / "lora")
    prior = prior_of(folders["eps-tiny"], f"{tmp_path / 'lora'}:0.8")
    plain, with_lora = answer(prior_of(folders["eps-tiny"])), answer(prior)
    before = {name: p.clone() for name, p in prior.denoiser.named_parameters() if ".lora_0." in name}
    adaptation = Adaptation(prior, 2, 1e-1, torch.Generator().manual_seed(0), warm_up=0)
    assert all(".scene." in name or name.startswith("camera.") for name in adaptation.trained)
    generator = torch.Generator().manual_seed(1)
    noisy, told = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 17, 16, generator=generator)
    t = torch.tensor([100, 700])
    torch.testing.assert_close(answer(prior), with_lora)
    with_lora = answer(prior)  # no longer one sum of weights: other roundings
    torch.testing.assert_close(adaptation.predict(noisy, t, told, {}), prior.predict(noisy, t, told))  # no effect yet
    for _ in range(3):
        adaptation.learn(noisy, told, {})
    assert torch.equal(answer(prior), with_lora) and not torch.equal(with_lora, plain)
    learnt = adaptation.predict(noisy, t, told, {})
    assert (learnt - prior.predict(noisy, t, told)).abs().max() > 1e-3
    put_off = [layer for layer in tuner_layers(prior.denoiser) if "lora_0" in layer.scaling]
    for layer in put_off:
        layer.set_scale("lora_0", 0.0)
    assert (adaptation.predict(noisy, t, told, {}) - learnt).abs().max() > 1e-3  # the LoRA is part of what VSD asks
    for name, parameter in prior.denoiser.named_parameters():
        if name in before:
            assert torch.equal(parameter, before[name]) and not parameter.requires_grad


def test_words_that_an_adapter_taught(folders):
    taught = (Adapter(Path("x"), 1.0, "--lora x", {"sks": "x"}),)
    assert as_learned("a SKS teddy, asks sks", taught) == "a x teddy, asks x"
    check_vocabulary({"--text": "a sks teddy"}, ["a", "teddy"], set(), {"sks"})
    with pytest.raises(UserError, match='does not know "sks"'):
        check_vocabulary({"--text": "a sks teddy"}, ["a", "teddy"], set())


@pytest.mark.parametrize(
    ("lora", "words"),
    [
        ("absent", "--lora absent: no such file or folder"),
        ("absent:0.5", "--lora absent: no such file or folder"),
        ("empty", "no pytorch_lora_weights.safetensors"),
        ("broken/pytorch_lora_weights.safetensors", "cannot be read as weights"),
        ("foreign", "holds no LoRA"),
        ("xl", "was made for another model than"),
        ("narrow", "was made for another model than"),
        ("half", "was made for another model than"),
        ("peft", "adapter_config.json is not of a LoRA"),
        ("good:inf", "the weight must be a finite number"),
        ("good,", "a path is missing"),
    ],
)
def test_a_mistake_is_one_line(lora, words, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "broken", "foreign", "narrow", "half", "peft", "good", "xl"):
        (tmp_path / name).mkdir()
    weights = "pytorch_lora_weights.safetensors"
    write_diffusers(folders["eps-kl"], tmp_path / "good")
    (tmp_path / "broken" / weights).write_bytes(b"no weights")
    save_file({"conv_in.weight": torch.zeros(2)}, tmp_path / "foreign" / weights)
    place = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    a, b = torch.zeros(2, 32), torch.zeros(32, 2)
    save_file({f"{place}.lora_A.weight": a[:, :24].clone(), f"{place}.lora_B.weight": b}, tmp_path / "narrow" / weights)
    far = place.replace("down_blocks.1", "down_blocks.7")
    pair = {f"{place}.lora_A.weight": a, f"{place}.lora_B.weight": b}
    save_file(
        pair | {f"{far}.lora_A.weight": a.clone(), f"{far}.lora_B.weight": b.clone()}, tmp_path / "half" / weights
    )
    deep = place.replace("transformer_blocks.0", "transformer_blocks.9")
    save_file({f"{deep}.lora_A.weight": a, f"{deep}.lora_B.weight": b}, tmp_path / "xl" / weights)
    save_file(pair, tmp_path / "peft" / "adapter_model.safetensors")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps({"peft_type": "IA3"}))
    with pytest.raises(UserError) as caught:
        prior_of(folders["eps-kl"], lora)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_file_for_nothing_here_is_refused(folders, tmp_path):
    save_file(
        {"transformer.a.lora_A.weight": torch.zeros(2, 2), "transformer.a.lora_B.weight": torch.zeros(2, 2)},
        tmp_path / "x.safetensors",
    )
    adapters = source(folders["eps-kl"], tmp_path / "x.safetensors").adapters
    with pytest.raises(UserError, match="nothing in it is for this model's denoiser"):
        put_on_denoiser(prior_of(folders["eps-kl"]).denoiser, adapters, "StableDiffusionPipeline", "tiny")
