"""The cache of embeddings: the encoder is asked for what is new, and never opened when nothing is."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from guidance.embeddings import CachedEncoder
from guidance.prompt import PromptBank

FILES = "*.safetensors"


class Encoder:
    """Numbers that follow from name and text; texts of more than `room` words do not fit. Counts what it is asked."""

    device, room = torch.device("cpu"), 6

    def __init__(self, name="tiny"):
        self.name, self.asked, self.measured, self.closed = name, [], [], 0

    def embed(self, texts):
        self.asked += texts
        return torch.stack([self.one(text) for text in texts])

    def one(self, text):
        letters = [ord(letter) for letter in f"{self.name} {text}".ljust(12)]
        return torch.tensor(letters[:12]).reshape(3, 4) / 7 + len(text)

    def excess(self, text):
        self.measured.append(text)
        return len(text.split()) - self.room

    def close(self):
        self.closed += 1


class Shut(Encoder):
    """An encoder that must not be needed."""

    def embed(self, texts):
        raise AssertionError(f"asked to embed {texts}")

    def excess(self, text):
        raise AssertionError(f"asked to measure {text!r}")


def files(folder):
    return sorted(folder.glob(FILES))


def test_what_was_embedded_once_never_is_again(tmp_path):
    encoder = Encoder()
    first = CachedEncoder(encoder, tmp_path).embed(["b", "a", "b", ""])
    assert encoder.asked == ["b", "a", ""]  # each once, in order
    assert torch.equal(first, torch.stack([encoder.one(text) for text in ("b", "a", "b", "")]))
    cached = CachedEncoder(Shut(), tmp_path)
    assert torch.equal(cached.embed(["", "a", "b"]), torch.stack([encoder.one(text) for text in ("", "a", "b")]))
    assert [cached.excess(text) for text in ("", "a")] == [-6, -5]
    assert cached.embed(["a"]).dtype == torch.float32 and cached.name == "tiny"


def test_only_what_is_missing_is_asked_for(tmp_path):
    CachedEncoder(Encoder(), tmp_path).embed(["a", "b"])
    encoder = Encoder()
    both = CachedEncoder(encoder, tmp_path).embed(["b", "c", "a"])
    assert encoder.asked == ["c"] and encoder.measured == ["c"]
    assert torch.equal(both, torch.stack([encoder.one(text) for text in "bca"]))
    assert len(files(tmp_path)) == 3


def test_each_model_has_its_own(tmp_path):
    CachedEncoder(Encoder("one"), tmp_path).embed(["a"])
    other = Encoder("other")
    assert torch.equal(CachedEncoder(other, tmp_path).embed(["a"])[0], other.one("a"))
    assert len(files(tmp_path)) == 2
    paths = {
        CachedEncoder(Encoder(name), tmp_path).path(text) for name, text in (("x", "y z"), ("x y", "z"), ("x", "yz"))
    }
    assert len(paths) == 3


@pytest.mark.parametrize("text", ("a chair", "a very very long story about a chair"))
def test_a_known_prompt_opens_no_encoder(tmp_path, text, capsys):
    """Not even one that had to be shortened, whose too long wordings were measured but never embedded."""
    given = {"negative": "bad", "view_words": 4, "source": "{text}, dull and grey and foggy"}
    fresh = Encoder()
    cached = CachedEncoder(fresh, tmp_path)
    bank = PromptBank(cached, text, **given)
    cached.close()
    assert fresh.closed == 1 and len(fresh.asked) == len(set(fresh.asked)) and fresh.measured
    assert len(fresh.measured) == len(
        set(fresh.measured)
    )  # measured once, although PromptBank and the file both want to know
    said = capsys.readouterr().err
    again = PromptBank(CachedEncoder(Shut(), tmp_path), text, **given)
    assert capsys.readouterr().err == said and again.texts == bank.texts
    for name in ("text", "negative", "null", "plain", "source"):
        assert torch.equal(getattr(again, name), getattr(bank, name))


def test_a_measured_text_can_be_embedded_later(tmp_path):
    cached = CachedEncoder(Encoder(), tmp_path)
    assert cached.excess("one two three four five six seven") == 1
    cached.close()
    assert len(files(tmp_path)) == 1
    encoder = Encoder()
    CachedEncoder(encoder, tmp_path).embed(["one two three four five six seven"])
    assert len(encoder.asked) == 1 and encoder.measured == []
    CachedEncoder(Shut(), tmp_path).embed(["one two three four five six seven"])


def cut(path):
    path.write_bytes(path.read_bytes()[:-5])


def empty(path):
    path.write_bytes(b"")


def garble(path):
    path.write_bytes(b"\xff" * path.stat().st_size)


def flip(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 64
    path.write_bytes(content)


def foreign(path):
    save_file(load_file(path), path)  # the right numbers, nothing about them


@pytest.mark.parametrize("damage", (cut, empty, garble, flip, foreign))
@pytest.mark.parametrize("first", ("embed", "excess"))
def test_damaged_files_are_made_anew_and_said_once(tmp_path, damage, first, capsys):
    CachedEncoder(Encoder(), tmp_path).embed(["a", "b"])
    path = CachedEncoder(Encoder(), tmp_path).path("a")
    damage(path)
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path)
    if first == "excess":
        assert cached.excess("a") == -5
    assert torch.equal(cached.embed(["a", "b"]), torch.stack([encoder.one("a"), encoder.one("b")]))
    assert encoder.asked == ["a"]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and path.name in said and "damaged" in said
    CachedEncoder(Shut(), tmp_path).embed(["a", "b"])
    assert not capsys.readouterr().err


def test_a_file_is_whole_or_absent(tmp_path, monkeypatch, capsys):
    def full(self, content):
        with open(self, "wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path)
    assert torch.equal(cached.embed(["a", "b"]), torch.stack([encoder.one("a"), encoder.one("b")]))
    assert list(tmp_path.iterdir()) == []
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "SOMNIUM_CACHE" in said and str(tmp_path) in said


def test_a_folder_that_cannot_be_written_costs_time_not_the_run(tmp_path, capsys):
    (tmp_path / "file").write_text("in the way")
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path / "file" / "embeddings")
    assert torch.equal(cached.embed(["a"])[0], encoder.one("a"))
    assert cached.embed(["a"]).shape == (1, 3, 4) and encoder.asked == ["a"]
    cached.embed(["b"])
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "cannot be written" in said


def test_where_the_files_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "cache"))
    CachedEncoder(Encoder()).embed(["a"])
    assert len(files(tmp_path / "cache" / "embeddings")) == 1
    monkeypatch.delenv("SOMNIUM_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert CachedEncoder(Encoder()).folder == tmp_path / "home" / ".cache" / "somnium" / "embeddings"


def test_closing_forgets_and_a_closed_one_goes_on(tmp_path):
    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path)
    cached.embed(["a"])
    cached.close()
    assert not cached.known and encoder.closed == 1
    assert torch.equal(cached.embed(["a"])[0], encoder.one("a")) and encoder.asked == ["a"]


def work(folder, texts, repeats):
    for _ in range(repeats):
        cached = CachedEncoder(Encoder(), folder)
        if not torch.equal(cached.embed(texts), torch.stack([Encoder().one(text) for text in texts])):
            os._exit(1)
        for path in files(folder)[::2]:
            path.unlink(missing_ok=True)


def test_two_processes_at_once_do_no_harm(tmp_path, capfd):
    texts = [f"text {i}" for i in range(6)]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=work, args=(tmp_path, texts, 10)) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert "damaged" not in capfd.readouterr().err
    assert not list(tmp_path.glob(".*"))


def test_a_file_that_vanishes_while_it_is_opened_is_simply_not_there(tmp_path, monkeypatch):
    """Another process may throw it away at any moment: no error, and no word of damage."""
    CachedEncoder(Encoder(), tmp_path).embed(["a"])
    real = Path.read_bytes

    def vanishing(path):
        path.unlink()
        return real(path)

    encoder = Encoder()
    cached = CachedEncoder(encoder, tmp_path)
    monkeypatch.setattr(Path, "read_bytes", vanishing)
    assert torch.equal(cached.embed(["a"])[0], encoder.one("a")) and encoder.asked == ["a"]
