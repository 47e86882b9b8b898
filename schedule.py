"""A number that may change while a run goes on: `0.1`, or `[step0, v0, v1, step1, v2, step2, ...]`.

The list reads along the line it draws: the value is v0 until step0, goes straight to v1 at step1, on to v2 at step2, and stays there.
Two equal steps make a jump. If no step is above 1 the steps are fractions of the run, which `resolved(iters)` turns into steps.
"""

from bisect import bisect_right
from math import isfinite


class Schedule:
    """A piecewise linear function of the training step; immutable, equal to another with the same points."""

    __slots__ = ("_iters", "_steps", "_values")

    def __init__(self, value, iters: int | None = None):
        """`value`: a number, a list as above, or another schedule. `iters`: what a fraction of 1 means, in steps.

        Raises ValueError, in words for the user, when the list is not of that form.
        """
        if isinstance(value, Schedule):
            value = value.to_yaml()
        if isinstance(value, (list, tuple)):
            if len(value) < 4 or len(value) % 2:
                raise ValueError("a schedule is [step0, value0, value1, step1, ...]: four numbers, or six, eight ...")
            numbers = [_number(item) for item in value]
            # After the first step the list goes value, value, step, value, step: steps stand at 0, 3, 5, 7 ...
            self._steps = (numbers[0], *numbers[3::2])
            self._values = (numbers[1], *numbers[2::2])
            if any(later < earlier for earlier, later in zip(self._steps, self._steps[1:], strict=False)):
                raise ValueError("the steps of a schedule must not go backwards")
            if self._steps[0] < 0:
                raise ValueError("the steps of a schedule must not be negative")
        else:
            self._steps, self._values = (), (_number(value),)
        self._iters = iters

    @classmethod
    def parse(cls, text: str) -> "Schedule":
        """From the command line: `0.1` or `"[0, 0.1, 1, 500]"`."""
        text = text.strip()
        if not text.startswith("["):
            return cls(text)
        if not text.endswith("]"):
            raise ValueError("a schedule ends with ]; put quotes around it on the command line")
        return cls([part.strip() for part in text[1:-1].split(",")])

    def resolved(self, iters: int) -> "Schedule":
        """The same schedule in a run of `iters` steps."""
        return Schedule(self, iters)

    @property
    def steps(self) -> tuple[float, ...]:
        """The steps at which the slope changes; empty for a constant."""
        unit = self._iters if self._iters is not None and self._steps and self._steps[-1] <= 1 else 1
        return tuple(step * unit for step in self._steps)

    @property
    def constant(self) -> bool:
        """Whether the value never changes."""
        return len(set(self._values)) == 1

    def __call__(self, step: float) -> float:
        """The value at `step`."""
        steps, values = self.steps, self._values
        after = bisect_right(steps, step)
        if not steps or after == 0:
            return values[0]
        if after == len(steps):
            return values[-1]
        along = (step - steps[after - 1]) / (steps[after] - steps[after - 1])
        return values[after - 1] * (1 - along) + values[after] * along

    def max(self) -> float:
        """The largest value it ever has."""
        return max(self._values)

    def min(self) -> float:
        """The smallest value it ever has."""
        return min(self._values)

    def to_yaml(self) -> float | list[float]:
        """The number or the list it was made from."""
        if not self._steps:
            return self._values[0]
        steps, values = self._steps, self._values
        return [steps[0], values[0], *(n for v, s in zip(values[1:], steps[1:], strict=True) for n in (v, s))]

    def __eq__(self, other) -> bool:
        if not isinstance(other, Schedule):
            return NotImplemented
        return self.steps == other.steps and self._values == other._values

    def __hash__(self) -> int:
        return hash((self.steps, self._values))

    def __repr__(self) -> str:
        value = self.to_yaml()
        return f"{value:g}" if isinstance(value, float) else "[" + ", ".join(f"{item:g}" for item in value) + "]"


def value_at(schedule, step: float) -> float:
    """A schedule's value at a step; plain numbers stay as they are."""
    return schedule(step) if callable(schedule) else float(schedule)


def _number(item) -> float:
    """A finite float, also from text such as `1e-3` (which YAML takes for a string)."""
    if isinstance(item, bool) or item is None:
        raise ValueError(f"{item!r} is not a number")
    try:
        number = float(item)
    except (TypeError, ValueError):
        raise ValueError(f"{item!r} is not a number") from None
    if not isfinite(number):
        raise ValueError(f"{item!r} is not a finite number")
    return number
