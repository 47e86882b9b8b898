"""`--text lib:word_word`: which prompt that is, and what is said where it is none or several."""

import json

import pytest

import library
from errors import UserError
from guidance.weights import EMBEDDED, check_vocabulary, known_words
from options import ROOT

OWN = "data/prompts.json"
SOME = {
    "chair": "a chair",
    "red_chair": "a red chair",
    "royal_chair": "a red chair for a king",
    "cat": "a Siamese cat",
    "catapult": "a catapult, oak-built",
}


@pytest.fixture
def some(tmp_path):
    """A small library's path."""
    path = tmp_path / "some.json"
    path.write_text(json.dumps(SOME))
    return str(path)


def refused(text, path) -> str:
    with pytest.raises(UserError) as caught:
        library.resolve(text, path)
    line = str(caught.value)
    assert "\n" not in line and line.startswith(f"--text {text}")
    return line


def test_what_has_no_prefix_is_the_prompt_itself():
    assert library.resolve("a lib: of prompts", "absent.json") == "a lib: of prompts"


@pytest.mark.parametrize(
    ("words", "prompt"),
    [
        ("chair_king", "a red chair for a king"),  # in any order
        ("KING", "a red chair for a king"),
        ("red_chair", "a red chair"),  # the name, although a longer prompt has these words too
        ("a_red_chair", "a red chair"),  # so the whole prompt
        ("cat", "a Siamese cat"),  # a whole word, although another word begins with it
        ("siam", "a Siamese cat"),  # else a part of one
        ("oak-built", "a catapult, oak-built"),
        ("royal", "a red chair for a king"),  # of the name alone
    ],
)
def test_words_name_a_prompt(some, words, prompt):
    assert library.resolve(f"lib:{words}", some) == prompt


def test_several_or_none_are_listed(some):
    line = refused("lib:red", some)
    assert "2 prompts" in line and "red_chair, royal_chair" in line
    assert "near: red_chair" in refused("lib:red_chairs", some)
    assert "catapult" in refused("lib:catapulp", some)
    assert "lib:chair" in refused("lib:", some)
    many = refused("lib:a", OWN)
    assert "more" in many and len(many) < 250


def test_threestudios_own_file_and_a_plain_list_can_be_used(tmp_path):
    prompts = ["a typewriter", "a rabbit at a typewriter"]
    for i, content in enumerate(({"dreamfusion": prompts}, prompts)):
        path = tmp_path / f"{i}.json"
        path.write_text(json.dumps(content))
        assert library.resolve("lib:rabbit_typewriter", str(path)) == prompts[1]
        assert (
            library.resolve("lib:a_typewriter", str(path)) == prompts[0]
        )  # part of another prompt, but all of this one


@pytest.mark.parametrize(
    ("content", "words"), [("{", "JSON"), ("{}", "no prompt"), ('{"a": 1}', "expected"), ("[1]", "expected")]
)
def test_a_file_that_is_no_library_is_named(tmp_path, content, words):
    path = tmp_path / "x.json"
    path.write_text(content)
    with pytest.raises(UserError, match=words) as caught:
        library.resolve("lib:chair", str(path))
    assert f"--prompt_library {path}" in str(caught.value)
    with pytest.raises(UserError, match="no such file"):
        library.resolve("lib:chair", str(tmp_path / "absent.json"))


def test_every_prompt_of_our_own_can_be_reached_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    prompts = library.read(OWN)
    assert prompts == json.loads((ROOT / OWN).read_text()) and len(prompts) > 60
    assert len(set(prompts.values())) == len(prompts)
    for name, prompt in prompts.items():
        assert name == "_".join(library._words(name)), "names are words joined by _"
        assert library.resolve(f"lib:{name}", OWN) == prompt


def test_there_are_prompts_for_the_embedded_model_and_for_big_ones():
    vocabulary = known_words(EMBEDDED)
    known = []
    for prompt in library.read(OWN).values():
        try:
            check_vocabulary({"--text": prompt}, *vocabulary)
            known.append(prompt)
        except UserError:
            pass
    assert len(known) >= 32 and len(library.read(OWN)) - len(known) >= 30
