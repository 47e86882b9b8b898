"""Numbers that change with the step."""

import pickle

import pytest

from schedule import Schedule


def test_a_constant_is_the_same_everywhere():
    weight = Schedule(0.25)
    assert [weight(step) for step in (-5, 0, 7, 10**9)] == [0.25] * 4
    assert weight.constant and weight.steps == ()


def test_values_are_linear_between_the_steps_and_constant_outside():
    weight = Schedule([10, 1.0, 3.0, 20, -1.0, 60])
    expected = {0: 1.0, 10: 1.0, 15: 2.0, 20: 3.0, 30: 2.0, 40: 1.0, 50: 0.0, 60: -1.0, 1000: -1.0}
    assert {step: weight(step) for step in expected} == pytest.approx(expected)
    assert (weight.min(), weight.max()) == (-1.0, 3.0)


def test_equal_steps_jump():
    weight = Schedule([0, 1, 1, 50, 5, 50, 5, 100])
    assert weight(49.999) == pytest.approx(1) and weight(50) == 5 and weight(80) == 5


def test_steps_up_to_one_are_fractions_of_the_run():
    weight = Schedule([0, 0.98, 0.5, 0.5])
    assert weight.resolved(200)(50) == pytest.approx(0.74)
    assert weight.resolved(200).steps == (0, 100)
    assert weight.resolved(200).resolved(1000)(250) == pytest.approx(0.74)
    assert weight(0.25) == pytest.approx(0.74)  # before it is resolved a step is a fraction too
    assert Schedule([0, 0.98, 0.5, 100], iters=1000)(50) == pytest.approx(0.74)  # 100 > 1: steps as they are


@pytest.mark.parametrize("text", ["0.1", "1e-3", "-2", "[0, 0.1, 1, 500]", "[0,1e-3,.5,10,2,20]"])
def test_text_and_yaml_round_trip(text):
    schedule = Schedule.parse(text)
    assert Schedule.parse(str(schedule)) == schedule == Schedule(schedule.to_yaml())
    assert pickle.loads(pickle.dumps(schedule)) == schedule


def test_equality_looks_at_points():
    assert Schedule([0, 1, 2, 1]).resolved(10) == Schedule([0, 1, 2, 10])
    assert Schedule([0, 1, 2, 1]) != Schedule([0, 1, 2, 10])
    assert Schedule(1) != Schedule(2) and Schedule(1) == Schedule(1.0)
    assert Schedule(1) != 1
    assert len({Schedule(1), Schedule(1.0), Schedule(2)}) == 2


@pytest.mark.parametrize(
    "value", [[], [1], [0, 1, 2], [0, 1, 2, 3, 4], [5, 1, 2, 4], [-1, 1, 2, 4], "high", None, True, float("nan"), "inf"]
)
def test_nonsense_is_refused(value):
    with pytest.raises(ValueError):
        Schedule(value)


def test_an_unclosed_list_is_refused():
    with pytest.raises(ValueError, match="quotes"):
        Schedule.parse("[0,")
