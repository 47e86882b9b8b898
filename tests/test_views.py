"""View words: which ones a camera gets, per sample, and how they fade into each other."""

import pytest
import torch

from guidance.views import WORDS, view_weights

WIDE = torch.linspace(-180, 540, 721)  # azimuths beyond one turn count as the same direction


def words_at(polar, azimuth, count=8, **settings):
    """The words that a camera gets, the heaviest first."""
    weights = view_weights(torch.tensor([float(polar)]), torch.tensor([float(azimuth)]), count, **settings)[0]
    return [WORDS[count][i] for i in weights.argsort(descending=True) if weights[i] > 0]


@pytest.mark.parametrize("count", (0, 4, 8))
@pytest.mark.parametrize("blend", (True, False))
def test_weights_are_shares(count, blend):
    polar = torch.rand(721, generator=torch.Generator().manual_seed(0)) * 180
    weights = view_weights(polar, WIDE, count, blend)
    assert weights.shape == (721, len(WORDS[count]))
    assert weights.min() >= 0
    torch.testing.assert_close(weights.sum(1), torch.ones(721))


@pytest.mark.parametrize("count", (4, 8))
@pytest.mark.parametrize("polar", (10.0, 30.0, 38.0, 90.0))
def test_blending_is_continuous_round_and_over_the_top(count, polar):
    turn = torch.arange(0, 360, 0.1)
    around = view_weights(torch.full_like(turn, polar), turn, count)
    assert (around - around.roll(1, 0)).abs().max() < 0.1 / 45 * 1.01  # the steepest fade takes 45 degrees
    rise = torch.arange(0, 180, 0.1)
    over = view_weights(rise, torch.full_like(rise, 77.0), count)
    assert over.diff(dim=0).abs().max() < 0.1 / 60 * 1.01  # from 0 to 60 degrees, twice the default angle


@pytest.mark.parametrize("count", (4, 8))
def test_the_blend_tells_the_elevation(count):
    """From straight above to twice `angle_overhead` the share of the overhead words falls linearly from 1 to 0."""
    polar = torch.tensor([0.0, 22.5, 45.0, 67.5, 90.0, 110.0])
    weights = view_weights(polar, torch.zeros(6), count, angle_overhead=45.0)
    above = torch.tensor([text.startswith("overhead") for text in WORDS[count]])
    torch.testing.assert_close(weights[:, above].sum(1), torch.tensor([1.0, 0.75, 0.5, 0.25, 0.0, 0.0]))


def test_the_object_has_its_own_left_and_right():
    assert words_at(90, 90) == ["left side view"]
    assert words_at(90, -90) == words_at(90, 270) == ["right side view"]
    assert words_at(90, 45) == ["front left view"]
    assert words_at(90, -135) == ["back right view"]
    assert words_at(0, 90) == ["overhead left side view"]


def test_four_words_do_not_tell_left_from_right():
    left = view_weights(torch.full((721,), 80.0), WIDE, 4)
    right = view_weights(torch.full((721,), 80.0), -WIDE, 4)
    torch.testing.assert_close(left, right)
    assert [words_at(90, a, 4) for a in (0, 90, 180, -90)] == [
        ["front view"],
        ["side view"],
        ["back view"],
        ["side view"],
    ]
    assert words_at(0, 123, 4) == ["overhead view"]


def test_halfway_between_two_views_both_count_half():
    weights = view_weights(torch.tensor([90.0, 90.0]), torch.tensor([45.0, 22.5]), 4)
    torch.testing.assert_close(weights[0], torch.tensor([0.5, 0.5, 0.0, 0.0]))
    weights = view_weights(torch.tensor([30.0]), torch.tensor([22.5]), 8, angle_overhead=30.0)
    shares = {words: share for words, share in zip(WORDS[8], weights[0].tolist(), strict=True) if share}
    assert shares == {
        "front view": 0.25,
        "front left view": 0.25,
        "overhead front view": 0.25,
        "overhead front left view": 0.25,
    }


def test_without_blending_the_thresholds_decide():
    sharp = {"blend": False, "angle_front": 60.0, "angle_overhead": 30.0}
    for azimuth, words in ((29.9, "front"), (-29.9, "front"), (30.1, "side"), (149.9, "side"), (150.1, "back")):
        assert words_at(90, azimuth, 4, **sharp) == [f"{words} view"]
    assert words_at(90, 44, 4, blend=False, angle_front=90.0) == ["front view"]
    assert words_at(29.9, 0, 4, **sharp) == ["overhead view"]
    assert words_at(30.0, 0, 4, **sharp) == ["front view"]
    assert words_at(90, 22, 8, **sharp) == ["front view"]
    assert words_at(90, 23, 8, **sharp) == ["front left view"]
    assert words_at(29, -23, 8, **sharp) == ["overhead front right view"]


@pytest.mark.parametrize("count", (4, 8))
@pytest.mark.parametrize("blend", (True, False))
def test_each_camera_for_itself(count, blend):
    polar, azimuth = torch.tensor([10.0, 95.0, 60.0, 31.0]), torch.tensor([0.0, 100.0, -170.0, -44.0])
    together = view_weights(polar, azimuth, count, blend)
    alone = [view_weights(polar[i : i + 1], azimuth[i : i + 1], count, blend) for i in range(4)]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together[0], together[1])


def test_no_words_means_the_plain_prompt():
    assert torch.equal(view_weights(torch.rand(5) * 90, torch.rand(5), 0), torch.ones(5, 1))
