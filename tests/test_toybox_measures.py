"""The words of the toybox, and the measures that results are judged by: right for the truth, wrong for what is wrong."""

import pytest
import torch

from guidance.views import WORDS
from toybox import data, evaluate
from toybox.captions import CONTEXT, caption, vocabulary, write_tokenizer
from toybox.objects import COLORS, OBJECTS
from toybox.render import compose, orbit_cameras, trace

TWELVE = torch.arange(-150.0, 181.0, 30.0)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import CLIPTokenizer

    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder)


def test_every_word_is_one_token(tokenizer):
    ids = [tokenizer(word).input_ids for word in vocabulary()]
    assert all(len(row) == 3 for row in ids)
    assert len({row[1] for row in ids}) == len(ids)


def test_longest_caption_fits(tokenizer):
    longest = max((caption(k, c, v) for k in OBJECTS for c in COLORS for v in WORDS[8]), key=lambda t: len(t.split()))
    assert len(tokenizer(longest).input_ids) <= CONTEXT
    assert len(tokenizer.decode(tokenizer(longest).input_ids[1:-1]).split()) == len(longest.replace(",", " ,").split())


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("chair", "red", "left side view"), "a red chair, left side view"),
        (("apple",), "an apple"),
        (("hat", "orange"), "an orange hat"),
        (("hamburger", None, "back view"), "a hamburger, back view"),
    ],
)
def test_captions_are_english(words, text):
    assert caption(*words) == text


@pytest.fixture(scope="module")
def pictures():
    return data.make(2, seed=3)


def test_paint_is_compose_on_bytes(pictures, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    index = torch.tensor([5, 20])
    image = data.paint(pictures, index, torch.tensor([0, 3]), generator)
    outside = pictures.alpha[index] == 0
    for picture, empty in zip(image, outside, strict=True):
        assert picture[:, empty].std(dim=1).max() < 1e-6  # plain background
    red = data.paint(pictures, index, torch.tensor([1, 1]), torch.Generator().manual_seed(0))
    solid = pictures.main[index] > 200
    assert (red[:, 0][solid] > red[:, 1][solid] + 0.3).all()


def test_pictures_match_their_angles(pictures):
    """The polar angle and azimuth that the captions are made from are those of the picture."""
    at = 2 * data.KINDS.index("mug")
    c2w = orbit_cameras(pictures.polar[at : at + 1], pictures.azimuth[at : at + 1], 3.2)
    alpha = trace(OBJECTS["mug"], c2w, data.FOVY, 64, c2w[:, :3, 2], torch.ones(1)).alpha
    assert evaluate.intersection_over_union(alpha, pictures.alpha[at : at + 1].float() / 255) > 0.85


def test_training_and_preset_agree_on_what_is_overhead():
    from options import parse

    opt = parse(["--text", "a hamburger"])
    assert opt.angle_overhead == data.ANGLE_OVERHEAD and opt.fovy_range == (data.FOVY, data.FOVY)
    assert (
        data.POLAR[0] <= opt.theta_range[0] and opt.theta_range[1] <= data.POLAR[1] and opt.radius_range == data.RADIUS
    )


@pytest.mark.parametrize("words", [0, 4, 8])
def test_caption_weights_sum_to_one(pictures, words):
    rows, weights = data.captions(pictures, torch.arange(6), torch.zeros(6, dtype=torch.long), words)
    assert len(rows[0]) == weights.shape[1] == len(WORDS[words])
    assert torch.allclose(weights.sum(1), torch.ones(6))


@pytest.mark.parametrize("prompt", evaluate.PROMPTS)
def test_prompts_name_objects(prompt):
    kind, color = evaluate.split_prompt(prompt)
    assert caption(kind, color) == prompt and kind in OBJECTS


def test_there_are_as_many_prompts_as_promised():
    assert len(set(evaluate.PROMPTS)) == 25 and evaluate.PROMPTS[0] == "a hamburger" and len(set(evaluate.JANUS)) == 12


def test_truth_measures_perfectly():
    image, alpha = evaluate.truth("a red chair", TWELVE)
    assert evaluate.intersection_over_union(alpha, alpha) == 1
    assert evaluate.color_error(image, alpha, image, alpha) == 0
    assert (torch.remainder(evaluate.nearest_view(image, "a red chair") - TWELVE, 360) < 20).all()


def test_a_turned_object_measures_badly():
    _, alpha = evaluate.truth("a green car", TWELVE)
    _, turned = evaluate.truth("a green car", TWELVE + 90)
    assert evaluate.intersection_over_union(alpha, turned) < 0.8


@pytest.mark.parametrize("prompt", evaluate.JANUS)
def test_a_face_in_front_passes_and_a_second_one_fails(prompt):
    image, _ = evaluate.truth(prompt, TWELVE, 64)
    assert evaluate.face_in_front_only(image, TWELVE, prompt)
    two_faced, _ = evaluate.truth(prompt, torch.where(TWELVE.abs() > 90, TWELVE + 180, TWELVE), 64)
    assert not evaluate.face_in_front_only(two_faced, TWELVE, prompt)
    backwards, _ = evaluate.truth(prompt, TWELVE + 180, 64)
    assert not evaluate.face_in_front_only(backwards, TWELVE, prompt)


def test_color_error_sees_another_color():
    red, blue = (evaluate.truth(f"a {color} mug", TWELVE[:4]) for color in ("red", "blue"))
    assert evaluate.color_error(*red, *blue) > 0.2


def test_compose_of_empty_layers_is_the_background():
    c2w = orbit_cameras(90.0, 0.0, 40.0)  # from far away
    layers = trace(OBJECTS["mug"], c2w, 5.0, 32, c2w[:, :3, 2], torch.ones(1))
    image = compose(layers, torch.ones(3), torch.tensor([0.2, 0.4, 0.6]))
    assert torch.allclose(image[0, 0, 0], torch.tensor([0.2, 0.4, 0.6]))
