"""The personalisation from its command line: photographs to adapters, words, mistakes, and a kill in the midst of it."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, write_photos
from safetensors.torch import load_file
from tiny_models import Folders

from dreambooth import read_snapshots, taught
from errors import UserError
from guidance.adapters import WEIGHTS
from guidance.draw import likeliest
from guidance.personalize import CHECKPOINT
from guidance.priors import load_prior, text_encoder
from guidance.weights import resolve

specification = importlib.util.spec_from_file_location("train_dreambooth", ROOT / "scripts" / "train_dreambooth.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return Folders(tmp_path_factory.mktemp("models"))


def differ(one, other):
    first, second = (load_file(folder / WEIGHTS) for folder in (one, other))
    return first.keys() != second.keys() or any(not torch.equal(first[key], second[key]) for key in first)


def refused(act, *arguments, **named):
    with pytest.raises(UserError) as caught:
        act(*arguments, **named)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def embedded():
    named = {"hf_key": None, "IF": False, "sd_version": "embedded", "text": "", "negative": "", "distill": "sds"}
    return resolve(SimpleNamespace(**named))


# -- words -------------------------------------------------------------------------------------------------------------


def test_a_word_that_means_nothing_yet():
    assert taught(embedded(), "a sks teddy", "a teddy") == ("a x teddy", {"sks": "x"})
    assert taught(embedded(), "a q teddy", "a teddy") == ("a q teddy", {"q": "q"})
    assert taught(embedded(), "a red teddy", None) == ("a red teddy", {})
    assert 'does not know "photo"' in refused(taught, embedded(), "a photo of sks teddy", None)
    assert "--class_prompt" in refused(taught, embedded(), "a sks teddy", "a dog")


def test_the_view_of_a_photograph_by_the_model_s_own_opinion():
    from toybox.render import orbit_cameras
    from toybox.subject import truth

    prior, encoder = load_prior(embedded(), "cpu"), text_encoder(embedded(), "cpu")
    pictures = truth(orbit_cameras(80.0, torch.tensor([0.0, 90.0, 180.0]), 3.2), 64)[0].permute(0, 3, 1, 2)
    texts = [f"a x teddy, {words}" for words in ("front view", "left side view", "back view", "right side view")]
    assert likeliest(prior, pictures, encoder.embed, texts) == [0, 1, 2]


def test_snapshots():
    assert read_snapshots(["partial:0.19", "full:1"], 800) == {"partial": 152, "full": 800}
    assert read_snapshots(["early:3", "full:10"], 10) == {"early": 3, "full": 10}
    for typed in (["full"], ["full:x"], ["a:5"], ["a:0", "full:1"], ["../a:1"], ["full:11"], ["a:1", "a:1"], []):
        assert "--snapshots" in refused(read_snapshots, typed, 10)


# -- the script --------------------------------------------------------------------------------------------------------


@pytest.fixture
def typed(tmp_path, folders, monkeypatch):
    """A command line for a tiny model."""
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "cache"))
    photos = write_photos(tmp_path / "photos")
    words = f"--instance_data_dir {photos} --output_dir {tmp_path / 'out'} --device cpu --pretrained_model_name_or_path {folders['v-tiny']}"
    numbers = "--max_train_steps 6 --rank 2 --num_class_images 2 --sample_steps 2 --checkpointing_steps 2 --num_validation_images 2"
    prompts = ["--instance_prompt", "a red chair", "--class_prompt", "a chair"]
    return [*words.split(), *numbers.split(), *prompts]


def test_the_script_from_photographs_to_adapters(typed, tmp_path, capsys):
    assert script.main(typed) == 0
    out = tmp_path / "out"
    names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()} - {".lock"}
    assert names == {f"partial/{WEIGHTS}", f"full/{WEIGHTS}", "class/0000.png", "class/0001.png", "samples.png"}
    assert f'--lora {out / "full"} --text "a red chair"' in capsys.readouterr().err
    before = (out / "full" / WEIGHTS).read_bytes()
    assert script.main([*typed, "--ckpt", "scratch"]) == 0 and (out / "full" / WEIGHTS).read_bytes() == before
    assert (
        script.main([*typed, "--seed", "1"]) == 2 and "of other pictures, texts or settings" in capsys.readouterr().err
    )
    assert (
        script.main([*typed, "--seed", "1", "--ckpt", "scratch"]) == 0
        and (out / "full" / WEIGHTS).read_bytes() != before
    )


def test_view_words_are_found_once(typed, tmp_path, monkeypatch, capsys):
    import dreambooth

    views = ["--instance_views", "4", "--num_validation_images", "0"]
    assert script.main([*typed, *views]) == 0 and '0.png: "a red chair, ' in capsys.readouterr().err
    stamp = (tmp_path / "out" / "full" / WEIGHTS).stat().st_mtime_ns
    monkeypatch.setattr(dreambooth, "likeliest", None)
    assert script.main([*typed, *views]) == 0
    assert (tmp_path / "out" / "full" / WEIGHTS).stat().st_mtime_ns == stamp


def test_a_killed_script_ends_the_same(typed, tmp_path):
    assert script.main(typed) == 0
    killed = [word if word != str(tmp_path / "out") else str(tmp_path / "killed") for word in typed]
    killed[killed.index("--checkpointing_steps") + 1] = "1"
    command = [sys.executable, str(ROOT / "scripts" / "train_dreambooth.py"), *killed]
    process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.DEVNULL)
    while process.poll() is None and not (tmp_path / "killed" / CHECKPOINT).exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (-signal.SIGKILL, 0)
    assert script.main(killed) == 0
    for name in ("partial", "full"):
        assert not differ(tmp_path / "out" / name, tmp_path / "killed" / name)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"--instance_data_dir": "absent"}, "--instance_data_dir absent: no such folder"),
        ({"--instance_data_dir": "empty"}, "there are no pictures in it"),
        ({"--instance_data_dir": "broken"}, "cannot be read as a picture"),
        ({"--instance_prompt": None}, "--instance_prompt is missing"),
        ({"--class_prompt": None}, "--class_prompt is missing"),
        ({"--rank": "0"}, "--rank 0: must be > 0"),
        ({"--snapshots": "full:9"}, "is not within the --max_train_steps 6"),
        ({"--resolution": "30"}, "--resolution 30: must be a multiple of 4"),
        ({"--mixed_precision": "fp16"}, "use bf16 or no"),
        ({"--pretrained_model_name_or_path": "absent"}, "no such folder, and not a hub id"),
        ({"--learning_rat": "1"}, "did you mean --learning_rate?"),
        ({"--start": "absent"}, "--start absent: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(change, words, typed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_photos(tmp_path / "broken", 3)
    (tmp_path / "broken" / "1.png").write_bytes(b"half a picture")
    for name, value in change.items():
        if name in typed:
            at = typed.index(name)
            del typed[at : at + 2]
        typed += [] if value is None else [name, value]
    assert script.main(typed) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and words in line


def test_one_photograph_is_enough_but_said(typed, tmp_path, capsys):
    for file in sorted((tmp_path / "photos").iterdir())[1:]:
        file.unlink()
    assert script.main(typed) == 0 and "one picture; with fewer than 3" in capsys.readouterr().err


def test_the_embedded_model_has_defaults_of_its_own(tmp_path):
    base = [
        "--instance_data_dir",
        "x",
        "--instance_prompt",
        "a sks teddy",
        "--class_prompt",
        "a teddy",
        "--output_dir",
        "y",
    ]
    assert script.read_options(base).class_views == 8
    assert script.read_options([*base, "--sd_version", "1.5"]).class_views == 0
    assert script.read_options([*base, "--rank", "3"]).rank == 3


def test_help_is_in_groups(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = capsys.readouterr().out
    assert all(f"{title}:" in text for title in script.GROUPS) and "[> 0, default 4]" in text
