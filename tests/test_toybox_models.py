"""The shipped models: whole, small, honest about where they come from, and good enough to make a recognisable object."""

import json
from types import SimpleNamespace

import pytest
import torch

from guidance.priors import load_prior, text_encoder
from guidance.prompt import PromptBank
from guidance.weights import known_words, resolve
from toybox import evaluate
from toybox.captions import vocabulary
from toybox.check import sample
from toybox.data import ANGLE_OVERHEAD
from toybox.models import MODELS

NAMES = ("tiny-sd", "tiny-if")


def source(name):
    return resolve(SimpleNamespace(hf_key=str(MODELS / name), IF=False))


@pytest.fixture(scope="module")
def prior():
    return load_prior(source("tiny-sd"), "cpu")


@pytest.fixture(scope="module")
def judge():
    return evaluate.Judge(evaluate.PROMPTS)


def test_files_are_small_halves():
    from safetensors import safe_open

    files = list(MODELS.rglob("*.safetensors"))
    assert (
        len(files) == 10
    )  # unet, text encoder, autoencoder; unet and T5; clip; unet, autoencoder, image encoder, projection
    for file in files:
        assert file.stat().st_size < 20 * 2**20
        with safe_open(file, "pt") as tensors:
            floats = {tensors.get_slice(name).get_dtype() for name in tensors.keys()} - {"I64"}
        assert floats == {"F16"}, file


def test_configs_do_not_tell_where_they_were_made():
    for file in MODELS.rglob("*.json"):
        assert not json.loads(file.read_text()).get("_name_or_path"), file


@pytest.mark.parametrize("name", NAMES)
def test_models_know_the_words_of_the_toybox(name):
    words, _ = known_words(MODELS / name)
    assert set(words) == set(vocabulary()) - {","}


def test_autoencoder_keeps_pictures(prior):
    image, _ = evaluate.truth("a green car", torch.tensor([30.0, -60.0]), 64)
    back = prior.decode(prior.encode(image.permute(0, 3, 1, 2)))
    assert (back - image.permute(0, 3, 1, 2)).abs().mean() < 0.03


def test_judge_knows_the_truth(judge):
    azimuth = torch.arange(8) * 45.0
    ranks = [judge.rank(evaluate.truth(prompt, azimuth, 64)[0], prompt) for prompt in evaluate.PROMPTS]
    assert sum(rank == 1 for rank in ranks) >= 24


@pytest.mark.parametrize("prompt", ["a hamburger", "a snowman", "a blue mug"])
@pytest.mark.parametrize("name", NAMES)
def test_samples_are_recognised(name, judge, prompt):
    azimuth, prior = torch.tensor([0.0, 120.0]), load_prior(source(name), "cpu")
    bank = PromptBank(text_encoder(source(name), "cpu"), prompt, "", 8, angle_overhead=ANGLE_OVERHEAD)
    condition = bank.condition(torch.full_like(azimuth, 80.0), azimuth)
    image = sample(prior, condition, 10, 4.0, torch.Generator().manual_seed(0)).permute(0, 2, 3, 1)
    assert judge.rank(image, prompt) == 1


@pytest.mark.slow
def test_a_hamburger_from_the_command_line(main, tmp_path, judge):
    """A short run of the demo's command, measured against the truth."""
    quick = (
        "--iters 200 --W 48 --H 48 --dataset_size_test 2 --dataset_size_valid 2 --eval_interval 0 --device cpu".split()
    )
    done = main("--text", "a hamburger", "--workspace", "trial", "-O", *quick)
    assert done.returncode == 0, done.stderr[-2000:]
    found = evaluate.measure("a hamburger", tmp_path / "trial", judge)
    assert found["iou"] > 0.75 and found["rank"] == 1, found
