"""Prompts: every wording is embedded once, each camera gets its mixture, and Perp-Neg pushes away from the other views' words alone."""

import pytest
import torch

from errors import UserError
from guidance.perpneg import PerpNeg, aggregate, perp_neg_weights, perpendicular
from guidance.prompt import Condition, PromptBank, with_view
from guidance.views import WORDS, view_weights

POLAR = torch.tensor([90.0, 10.0, 45.0, 70.0, 100.0, 85.0])
AZIMUTH = torch.tensor([0.0, 180.0, -70.0, 30.0, 135.0, 250.0])


class Encoder:
    """Random numbers that belong to the text; texts of more than `room` words do not fit."""

    def __init__(self, room=1000, device="cpu"):
        self.room, self.device, self.asked = room, device, []

    def embed(self, texts):
        self.asked.append(list(texts))
        return torch.stack([self.one(text) for text in texts]).to(self.device)

    def one(self, text):
        seed = sum(ord(letter) * 31**place for place, letter in enumerate(text)) % 2**31
        return torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))

    def excess(self, text):
        return len(text.split()) - self.room


def rows_of(condition):
    """The fields with one row per sample, the sample first."""
    fields = {name: value for name, value in vars(condition).items() if name != "hints" and value is not None}
    return {name: value.transpose(0, 1) if name.startswith("perp") else value for name, value in fields.items()}


# -- wordings ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", (0, 4, 8))
def test_every_wording_is_embedded_once_and_mixed_per_camera(count):
    encoder = Encoder()
    bank = PromptBank(encoder, "a chair", "bad", count)
    texts = [with_view("a chair", words) for words in WORDS[count]]
    assert encoder.asked == [[*texts, "bad", "", *(["a chair"] if count else [])]]
    assert bank.texts == tuple(texts)
    condition = bank.condition(POLAR, AZIMUTH)
    shares = view_weights(POLAR, AZIMUTH, count)
    for i in range(len(POLAR)):
        expected = sum(share * encoder.one(text) for share, text in zip(shares[i], texts, strict=True))
        torch.testing.assert_close(condition.text[i], expected)
        for field, text in (("negative", "bad"), ("null", ""), ("source", ""), ("plain", "a chair")):
            assert torch.equal(getattr(condition, field)[i], encoder.one(text))
    assert condition.perp is None and condition.perp_weight is None
    if count:
        torch.testing.assert_close(condition.text[0], encoder.one("a chair, front view"))
        assert not torch.allclose(condition.text[1], condition.text[0])


def test_what_is_asked_twice_is_embedded_once():
    encoder = Encoder()
    bank = PromptBank(encoder, "a chair", "a chair", 4, source="{text}")
    assert len(encoder.asked) == 1 and len(encoder.asked[0]) == len(set(encoder.asked[0])) == 6
    condition = bank.condition(POLAR, AZIMUTH)
    assert torch.equal(condition.source, condition.text) and torch.equal(condition.negative, condition.plain)


def test_sharp_views_take_one_wording():
    bank = PromptBank(Encoder(), "a chair", "", 4, view_blend=False, angle_front=60.0, angle_overhead=30.0)
    text = bank.condition(torch.tensor([90.0, 90.0, 29.0]), torch.tensor([29.0, 31.0, 0.0])).text
    for row, words in zip(text, ("front view", "side view", "overhead view"), strict=True):
        assert torch.equal(row, Encoder().one(f"a chair, {words}"))


@pytest.mark.parametrize("count", (0, 4, 8))
def test_the_source_has_the_same_view_words_as_the_prompt(count):
    encoder = Encoder()
    bank = PromptBank(encoder, "a chair", "bad", count, source="blurry {text}, {text} in fog")
    condition, shares = bank.condition(POLAR, AZIMUTH), view_weights(POLAR, AZIMUTH, count)
    texts = [with_view("blurry a chair, a chair in fog", words) for words in WORDS[count]]
    for i in range(len(POLAR)):
        expected = sum(share * encoder.one(text) for share, text in zip(shares[i], texts, strict=True))
        torch.testing.assert_close(condition.source[i], expected)
    assert not torch.allclose(condition.source, condition.text)
    assert encoder.asked[0][: len(WORDS[count])] == list(
        bank.texts
    )  # the order of the others goes on: negative, null, source
    assert encoder.asked[0][len(WORDS[count]) :][: 2 + len(texts)] == ["bad", "", *texts]


def test_hints_are_handed_on():
    bank, hint = PromptBank(Encoder(), "a chair"), {"alpha": torch.rand(6, 2, 2, 1)}
    assert bank.condition(POLAR, AZIMUTH, hint).hints["alpha"] is hint["alpha"]
    assert bank.condition(POLAR, AZIMUTH).hints == {}
    assert Condition(torch.zeros(1, 3, 4), torch.zeros(1, 3, 4)).hints == {}


def test_long_prompts_lose_their_end_but_not_the_view(capsys):
    encoder = Encoder(room=6)
    bank = PromptBank(encoder, "a very long story, about a chair", "short", 4)
    assert bank.texts[0] == "a very long story, front view"
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--text" in said and '"a very long story"' in said

    PromptBank(encoder, "a chair", "one two three four five six seven", 4, source="{text}, dull and grey and foggy")
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and '"one two three four five six"' in said[0] and "--negative" in said[0]
    assert '"{text}, dull and"' in said[1] and "--source" in said[1]
    assert "a chair, dull and, front view" in encoder.asked[-1]
    assert max(len(text.split()) for text in encoder.asked[-1]) <= 6

    PromptBank(encoder, "a chair", None, 4)
    assert encoder.asked[-1].count("") == 1 and not capsys.readouterr().err


def test_debiased_prompts_go_to_their_views():
    encoder, asked = Encoder(), []

    def debias(text, views):
        asked.append((text, views))
        return [text.replace("smiling ", "") if "back" in view else text for view in views]

    bank = PromptBank(encoder, "a smiling bear", "", 4, source="{text}, foggy", perpneg=PerpNeg(), debias=debias)
    assert asked == [("a smiling bear", WORDS[4])]
    words = ("a smiling bear, front view", "a smiling bear, side view", "a bear, back view")
    assert bank.texts == (*words, "a smiling bear, overhead view")
    condition = bank.condition(torch.tensor([90.0]), torch.tensor([180.0]))
    torch.testing.assert_close(condition.text[0], encoder.one("a bear, back view"))
    torch.testing.assert_close(condition.source[0], encoder.one("a bear, foggy, back view"))
    assert torch.equal(condition.plain[0], encoder.one("a smiling bear"))
    assert torch.equal(condition.perp[:, 0], torch.stack([encoder.one(text) for text in words[:2]]))


@pytest.mark.parametrize("given", ({"perpneg": PerpNeg()}, {"debias": lambda text, views: [text] * len(views)}))
def test_what_needs_view_words_says_so(given):
    with pytest.raises(UserError, match="needs view words") as caught:
        PromptBank(Encoder(), "a chair", "", 0, **given)
    assert str(caught.value).startswith("--perpneg" if "perpneg" in given else "--debias_prompt")


# -- Perp-Neg: weights -------------------------------------------------------------------------------------------------

# stable-dreamfusion's defaults (-2, 2, 10): angle from the front: weight of the front's words, of the side's
GOLDEN = {
    0: (0, -2.0),
    15: (0, -0.378),
    30: (-0.527, -0.071),
    45: (-0.736, -0.0135),
    60: (-1.027, -0.0025),
    75: (-1.433, 0),
    89: (-1.956, 0),
    90: (-2, 0),
    107: (-2, 0),
    120: (-2, -0.0013),
    150: (-2, -0.036),
    165: (-2, -0.189),
    180: (-2, -1.0),
}


@pytest.mark.parametrize("turn", (lambda a: a, lambda a: -a, lambda a: a - 360, lambda a: 720 - a))
def test_perp_neg_weights_are_the_published_ones(turn):
    angles = turn(torch.tensor(list(GOLDEN), dtype=torch.float32))
    expected = torch.tensor(list(GOLDEN.values())).T
    torch.testing.assert_close(perp_neg_weights(angles, PerpNeg()), expected, atol=6e-4, rtol=0)
    exact = perp_neg_weights(angles, PerpNeg())
    assert torch.equal(exact == 0, expected == 0)


def test_each_factor_has_its_own_part():
    angles = torch.tensor([40.0, 140.0])  # r = 5/9 in front, 4/9 behind
    r, q = torch.tensor(5 / 9), torch.tensor(4 / 9)
    weights = perp_neg_weights(angles, PerpNeg(-3.0, 0.7, 4.0))
    expected = -3 * torch.stack([(-0.7 * r).exp(), torch.tensor(1.0), (-4 * (1 - r)).exp(), 0.5 * (-4 * q).exp()])
    torch.testing.assert_close(weights.flatten(), expected)


def test_perp_neg_weights_fade_as_the_view_goes_overhead():
    bank = PromptBank(Encoder(), "a chair", "", 4, angle_overhead=45.0, perpneg=PerpNeg())
    polar = torch.tensor([90.0, 67.5, 45.0, 22.5, 0.0])
    weights = bank.condition(polar, torch.full((5,), 150.0)).perp_weight
    share = torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0])
    torch.testing.assert_close(weights, perp_neg_weights(torch.full((5,), 150.0), PerpNeg()) * share)
    sharp = PromptBank(Encoder(), "a chair", "", 8, view_blend=False, angle_overhead=45.0, perpneg=PerpNeg())
    weights = sharp.condition(polar, torch.full((5,), 150.0)).perp_weight
    assert weights[0].tolist() == [-2, -2, -2, 0, 0]


# -- Perp-Neg: words ---------------------------------------------------------------------------------------------------


def test_perp_neg_s_words_are_those_of_the_camera_s_own_side():
    encoder, azimuth = Encoder(), torch.tensor([30.0, 150.0, -30.0, 210.0, 390.0])
    sides = {8: ["left side view"] * 2 + ["right side view"] * 2 + ["left side view"], 4: ["side view"] * 5}
    for count, words in sides.items():
        bank = PromptBank(encoder, "a chair", "", count, perpneg=PerpNeg())
        perp = bank.condition(torch.full((5,), 90.0), azimuth).perp
        assert torch.equal(perp[0], encoder.one("a chair, front view").expand(5, 3, 4))
        assert torch.equal(perp[1], torch.stack([encoder.one(f"a chair, {side}") for side in words]))
        assert len(encoder.asked[-1]) == len(WORDS[count]) + 2  # no wording of its own


def test_the_positive_words_are_the_usual_ones():
    plain, pushed = (PromptBank(Encoder(), "a chair", "", 8, perpneg=given) for given in (None, PerpNeg()))
    assert torch.equal(plain.condition(POLAR, AZIMUTH).text, pushed.condition(POLAR, AZIMUTH).text)


@pytest.mark.parametrize("count", (4, 8))
def test_each_camera_is_by_itself(count):
    """A batch is what its members are alone, in any order and company."""
    bank = PromptBank(Encoder(), "a chair", "bad", count, source="{text}, foggy", perpneg=PerpNeg())
    together = rows_of(bank.condition(POLAR, AZIMUTH))
    assert set(together) == {"text", "negative", "null", "source", "plain", "perp", "perp_weight"}
    for i in range(len(POLAR)):
        alone = rows_of(bank.condition(POLAR[i : i + 1], AZIMUTH[i : i + 1]))
        for name, rows in together.items():
            torch.testing.assert_close(rows[i : i + 1], alone[name])
    assert not torch.allclose(together["perp_weight"][0], together["perp_weight"][4])


# -- Perp-Neg: directions ----------------------------------------------------------------------------------------------


def some(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_perpendicular_part():
    x, y = torch.tensor([[[[3.0, 4.0]]]]), torch.tensor([[[[2.0, 0.0]]]])
    assert torch.equal(perpendicular(x, y), torch.tensor([[[[0.0, 4.0]]]]))
    x, y = some(3, 4, 5, 5), some(3, 4, 5, 5, seed=1)
    part = perpendicular(x, y)
    assert (part * y).flatten(1).sum(1).abs().max() < 1e-4  # over channels and pixels together,
    assert (part * y).sum(1).abs().min() > 1e-4  # not pixel by pixel
    along = x - part
    torch.testing.assert_close(along / y, (along / y)[:, :1, :1, :1].expand_as(y))
    torch.testing.assert_close(perpendicular(2.5 * y, y), torch.zeros_like(y), atol=1e-5, rtol=0)
    assert torch.equal(perpendicular(x, torch.zeros_like(x)), x)
    tiny = torch.full((1, 1, 1, 1), 1e-4)
    torch.testing.assert_close(perpendicular(torch.ones_like(tiny), tiny), torch.full_like(tiny, 1 - 0.01))


def test_directions_are_added_by_hand():
    main = torch.tensor([[[[1.0, 0.0, 0.0]]], [[[0.0, 0.0, 2.0]]]])
    deltas = torch.tensor([[[[[5.0, 1.0, 0.0]]], [[[7.0, 0.0, 5.0]]]], [[[[5.0, 0.0, 3.0]]], [[[0.0, 1.0, -9.0]]]]])
    weights = torch.tensor([[-2.0, -0.5], [0.0, -1.0]])
    expected = torch.tensor([[[[1.0, -2.0, 0.0]]], [[[-3.5, -1.0, 2.0]]]])
    assert torch.equal(aggregate(main, deltas, weights), expected)


def test_each_sample_s_direction_is_by_itself():
    main, deltas, weights = some(5, 4, 3, 3), some(2, 5, 4, 3, 3, seed=1), -some(2, 5, seed=2).abs()
    together = aggregate(main, deltas, weights)
    for i in range(5):
        alone = aggregate(main[i : i + 1], deltas[:, i : i + 1], weights[:, i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone)
    shown = [(together - main)[i].norm() for i in range(5)]
    assert min(shown) > 0.1


def test_what_has_no_weight_is_ignored():
    main, deltas = some(2, 4, 3, 3), some(2, 2, 4, 3, 3, seed=1)
    deltas[1, 0] = float("nan")
    weights = torch.tensor([[0.0, 0.0], [0.0, -1.0]])
    together = aggregate(main, deltas, weights)
    assert torch.equal(together[0], main[0])
    torch.testing.assert_close(together[1], (main - perpendicular(deltas[1], main))[1])


def test_a_negative_weight_pushes_away():
    main, delta = some(1, 4, 3, 3), some(1, 4, 3, 3, seed=1)
    pushed = aggregate(main, delta[None], torch.tensor([[-1.0]]))
    assert (pushed * delta).sum() < (main * delta).sum()
    torch.testing.assert_close((pushed * main).sum(), (main * main).sum())  # and no less towards the view's own words


def test_no_value_is_asked_for():
    """On `meta` tensors there are none: a branch on a value, or a mask as an index, would raise."""
    for count in (0, 4, 8):
        perpneg = PerpNeg() if count else None
        bank = PromptBank(Encoder(device="meta"), "a chair", "", count, source="{text}, foggy", perpneg=perpneg)
        condition = bank.condition(POLAR.to("meta"), AZIMUTH.to("meta"))
        assert condition.text.shape == (6, 3, 4) and condition.text.is_meta
    deltas = torch.zeros(2, 6, 4, 3, 3, device="meta")
    assert aggregate(deltas[0], deltas, condition.perp_weight).shape == (6, 4, 3, 3)


@pytest.mark.cuda
def test_a_condition_waits_for_nothing():
    bank = PromptBank(Encoder(device="cuda"), "a chair", "", 8, source="{text}, foggy", perpneg=PerpNeg())
    polar, azimuth, deltas = POLAR.cuda(), AZIMUTH.cuda(), some(2, 6, 4, 3, 3).cuda()
    bank.condition(polar, azimuth)
    torch.cuda.set_sync_debug_mode("error")
    try:
        aggregate(deltas[0], deltas, bank.condition(polar, azimuth).perp_weight)
    finally:
        torch.cuda.set_sync_debug_mode("default")
