"""Prompt debiasing: the words that go are those whose mutual information with a view is too small, by hand and with a real model class."""

import json

import pytest
import torch

from errors import UserError
from guidance.debias import VIEWS, debiased, leave_out, main_word, masked_language_model
from guidance.views import WORDS
from guidance.weights import quiet

LETTERS = "[PAD] [UNK] [CLS] [SEP] [MASK] this image is depicting a view of , smiling bear red chair big".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return bert(tmp_path_factory.mktemp("bert"))


def bert(folder, vocabulary=(*LETTERS, *VIEWS), masked=True):
    """A random BertForMaskedLM (or, if not `masked`, a BertModel without the part that guesses words) with a word-level vocabulary."""
    from transformers import BertConfig, BertForMaskedLM, BertModel, BertTokenizer

    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    tokenizer = BertTokenizer.from_pretrained(str(folder), model_max_length=16)
    torch.manual_seed(0)
    settings = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=len(vocabulary), **settings, max_position_embeddings=16, initializer_range=0.6)
    with quiet():
        tokenizer.save_pretrained(folder)
        (BertForMaskedLM if masked else BertModel)(config).save_pretrained(folder)
    return folder


def judge(known):
    """A scorer: `known` gives the four probabilities (of `VIEWS`) by text, for all other texts they are equal."""
    return lambda texts: torch.tensor([known.get(text, (0.25, 0.25, 0.25, 0.25)) for text in texts])


FULL = "a smiling bear"


# -- the rule ----------------------------------------------------------------------------------------------------------


def test_the_word_that_contradicts_a_view_goes_for_that_view(capsys):
    stays = (0.3, 0.4, 0.1, 0.2)
    score = judge({FULL: stays, "smiling bear": stays, "a smiling": stays, "a bear": (0.3, 0.2, 0.3, 0.2)})
    assert leave_out(FULL, WORDS[4], score) == [FULL, FULL, "a bear", FULL]  # front, side, back, overhead
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--debias_prompt" in said and "smiling (back)" in said and "bear (" not in said


@pytest.mark.parametrize(("without", "goes"), ((0.44, False), (0.45, True), (0.05, False)))
def test_the_limit(without, goes):
    """0.4 / lerp(p, 0.4, 0.5) falls below 0.95 at p = 0.4421."""
    stays = (0.4, 0.3, 0.2, 0.1)
    score = judge({"red chair": stays, "chair": (without, 0.3, 0.2, 0.1), "red": stays})
    assert leave_out("red chair", ("side view",), score) == ["chair" if goes else "red chair"]


def test_every_word_is_judged_against_the_whole_text():
    stays = (0.25, 0.25, 0.25, 0.25)
    known = {"a big red chair": stays, "big red chair": stays, "a big red": stays}
    known |= {"a red chair": (0.2, 0.2, 0.3, 0.3), "a big chair": (0.2, 0.3, 0.3, 0.2)}
    asked = []

    def score(texts):
        asked.extend(texts)
        return judge(known)(texts)

    expected = {"front": "a big chair", "side": "a big red chair", "back": "a chair", "overhead": "a red chair"}
    assert leave_out("a big red chair", WORDS[8], score) == [expected[main_word(view)] for view in WORDS[8]]
    assert asked == list(known)[:1] + ["big red chair", "a red chair", "a big chair", "a big red"]


def test_the_same_word_twice_is_two_words():
    stays = (0.25, 0.25, 0.25, 0.25)
    known = {"a red chair, a red": stays, "red chair, a red": stays, "a chair, a red": (0.2, 0.2, 0.4, 0.2)}
    known |= {"a red a red": stays, "a red chair, red": stays, "a red chair, a": (0.4, 0.2, 0.2, 0.2)}
    texts = leave_out("a red chair, a red", ("front view", "back view", "side view"), judge(known))
    assert texts == ["a red chair, a red", "a chair, a red", "a red chair, a"]


def test_no_comma_is_left_at_the_end():
    score = judge({"bear, smiling": (0.1, 0.4, 0.1, 0.4), "smiling": (0.1, 0.4, 0.1, 0.4)})
    assert leave_out("bear, smiling", ("back view", "front view"), score) == ["bear", "bear, smiling"]


def test_the_whole_prompt_never_goes(capsys):
    """A view that every word contradicts keeps them all; so does a prompt of one word, or of none."""
    for text in ("red chair", "chair", ""):
        score = judge({text: (0.7, 0.1, 0.1, 0.1)} if text else {})
        assert leave_out(text, WORDS[4], score) == [text] * 4
        assert "every word" in capsys.readouterr().err


def test_only_views_that_are_asked_for_are_spoken_of(capsys):
    score = judge({"a bear": (0.3, 0.3, 0.3, 0.1), "bear": (0.25, 0.3, 0.3, 0.15), "a": (0.3, 0.3, 0.3, 0.1)})
    assert leave_out("a bear", ("front view",), score) == ["a bear"]
    assert "overhead" not in capsys.readouterr().err


def test_each_view_has_a_main_word():
    assert [main_word(view) for view in WORDS[4]] == ["front", "side", "back", "overhead"]
    around = ["front", "front", "side", "back", "back", "back", "side", "front"]
    assert [main_word(view) for view in WORDS[8]] == around + ["overhead"] * 8


# -- the model ---------------------------------------------------------------------------------------------------------


def by_hand(folder, text):
    """The shares of the four words in what the model puts for the mask, one text at a time."""
    from transformers import BertForMaskedLM, BertTokenizer

    with quiet():
        network, tokenizer = BertForMaskedLM.from_pretrained(folder).eval(), BertTokenizer.from_pretrained(folder)
    tokens = tokenizer(f"This image is depicting a [MASK] view of {text}", return_tensors="pt").input_ids
    assert tokens[0, 6] == tokenizer.mask_token_id  # [CLS] this image is depicting a [MASK]
    with torch.no_grad():
        answer = network(tokens).logits[0, 6].softmax(0)
    four = answer[[tokenizer.convert_tokens_to_ids(view) for view in VIEWS]]
    return four / four.sum()


def test_the_model_is_asked_for_the_masked_word(model):
    texts = ["a smiling bear", "bear", "red chair", "a big red chair", "", "big", "a", "chair", "smiling", "a bear"]
    shares = masked_language_model(str(model), "cpu")(texts)
    torch.testing.assert_close(shares, torch.stack([by_hand(model, text) for text in texts]), rtol=1e-4, atol=1e-6)
    assert (shares[0] - shares[2]).abs().max() > 0.01  # the text matters


def test_the_prompt_may_hold_a_mask_and_more_words_than_the_model_takes(model):
    score = masked_language_model(str(model), "cpu")
    torch.testing.assert_close(score(["a [MASK] bear"])[0], by_hand(model, "a [MASK] bear"))
    assert torch.isfinite(score(["red " * 40])).all()


def test_debiasing_with_a_real_model_class(model, capsys):
    text = "a big red smiling bear"
    words = text.split()
    full = by_hand(model, text)
    expected = []
    for view in WORDS[4]:
        column, kept = VIEWS.index(main_word(view)), []
        for i in range(len(words)):
            part = by_hand(model, " ".join(words[:i] + words[i + 1 :]))[column]
            kept += [words[i]] if full[column] / (0.5 * (part + full[column])) >= 0.95 else []
        expected.append(" ".join(kept))
    state = torch.get_rng_state()
    assert debiased(text, WORDS[4], str(model), "cpu") == expected
    assert torch.equal(torch.get_rng_state(), state)
    assert len(set(expected)) > 1 and all(expected)  # the random model does drop words, not the same for all views
    assert capsys.readouterr().err.count("\n") == 1


# -- mistakes ----------------------------------------------------------------------------------------------------------


def complaint(model_id):
    with pytest.raises(UserError) as caught:
        debiased("a bear", WORDS[4], str(model_id), "cpu")
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"--debias_model {model_id}: ")
    return str(caught.value)


def test_models_that_cannot_be_used(tmp_path):
    assert "no such folder" in complaint(tmp_path / "nowhere")
    assert "connect once" in complaint("nobody/has-this")  # the tests have no network
    assert "cannot be read" in complaint(tmp_path)  # nothing in it
    folders = [tmp_path / name for name in ("headless", "wordless", "cut", "maskless")]
    for folder in folders:
        folder.mkdir()
    assert "has no weights" in complaint(bert(folders[0], masked=False))
    assert "does not know side, front, back, overhead" in complaint(bert(folders[1], LETTERS))
    weights = bert(folders[2]) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    assert "cannot be read" in complaint(folders[2])
    (bert(folders[2]) / "tokenizer.json").write_text("{")
    assert "no tokenizer" in complaint(folders[2])
    settings = bert(folders[3]) / "tokenizer_config.json"
    keys = {key: value for key, value in json.loads(settings.read_text()).items() if key != "mask_token"}
    settings.write_text(json.dumps({**keys, "tokenizer_class": "PreTrainedTokenizerFast"}))
    assert "has no mask" in complaint(folders[3])
