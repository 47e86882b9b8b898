"""What keeps a run alive: steps that are not finite are skipped, a run that stays broken goes back, a scene that vanishes begins again."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nerf.ema import MovingAverage

PATIENCE = 5  # bad steps in a row before going back
OVERFLOWS = 60  # in half precision the gradient scaler needs some to find its factor
SLOWER = 0.5  # factor on the learning rate each time the run goes back
RETURNS = 8  # times a run may go back before it ends with what it has
EMPTY = 0.01  # largest alpha of an empty scene
EMPTY_WINDOWS = 3  # windows of ten steps it may stay empty before something is done, and as many again before more is
GAVE_UP = 1  # exit status of a run whose scene stayed empty: not the user's mistake (2), and no result worth having (0)
_EVERY = 100  # steps between snapshots


class Guard:
    """Counts what goes wrong and mends it.

    - A step whose loss or gradient is not finite is not taken. After `PATIENCE` of them in a row, or when a parameter is not finite, the scene,
      its average and the optimizer return to the last snapshot (in memory, taken while all is well, and at every checkpoint) and the learning
      rate is halved. Step number and random numbers go on, so the same accident does not repeat. After `RETURNS` returns the run ends there.
    - A scene that stays empty (alpha below `EMPTY` in every pixel) has no gradient left to come back by. After 30 steps of that a line says so,
      and the occupancy grid is forgotten, in case it hides something. After 60 the scene begins again, at the same step, with an empty
      optimizer; at most `retries` times in a run, each time from other random weights. Empty once more, the run ends.
    """

    def __init__(
        self,
        scene: nn.Module,
        optimizer: torch.optim.Optimizer,
        average: MovingAverage,
        log: Callable[[str], None],
        retries: int = 1,
        anew: Callable[[int], dict[str, Any]] | None = None,
    ) -> None:
        """anew: the state of a scene as it begins, other for each number 1 .. `retries`; without it the beginning is always the first one."""
        self.scene, self.optimizer, self.average, self.log = scene, optimizer, average, log
        self.retries, self.anew = retries, anew
        self.begin()
        self._blank = _copy(optimizer.state_dict())
        self.skipped = self.in_a_row = self.returns = self.empty = self.revived = 0
        self.lr_factor, self.gave_up = 1.0, False
        self.snapshot()

    @property
    def hopeless(self) -> bool:
        """Whether the run should end with what it has."""
        return self.returns > RETURNS or self.gave_up

    def snapshot(self, step: int = 0) -> None:
        """Remember this state, after `step` steps, as good."""
        self._taken = step
        self._good = _copy((self.scene.state_dict(), self.average.state_dict(), self.optimizer.state_dict()))

    def settle(self, step: int) -> None:
        """Before a checkpoint: what is broken goes back first, what is not becomes the snapshot, as it will be in a run that goes on from it."""
        if self.finite():
            self.snapshot(step)
        else:
            self.go_back(step, "a parameter is not finite")

    @torch.no_grad()
    def finite(self) -> bool:
        """Whether every parameter is."""
        norms = torch._foreach_norm([p.detach() for p in self.scene.parameters()])
        return bool(torch.isfinite(torch.stack(norms)).all())

    def begin(self) -> None:
        """This is what a scene that vanished starts again from."""
        self.initial = _copy(self.scene.state_dict())

    def good(self) -> None:
        """A step was taken."""
        self.in_a_row = 0

    def bad(self, step: int, what: str, overflow: bool = False) -> None:
        """A step was skipped; `overflow`: only because of the range of half precision, which the gradient scaler handles."""
        self.in_a_row += 1
        if not overflow:
            self.skipped += 1
            if self.in_a_row == 1:
                self.log(f"step {step}: {what} is not finite: step skipped ({self.skipped} so far)")
        if self.in_a_row >= (OVERFLOWS if overflow else PATIENCE):
            self.go_back(step, f"{self.in_a_row} steps in a row were not finite")

    def go_back(self, step: int, why: str) -> None:
        """Return to the last snapshot with half the learning rate."""
        self.returns, self.in_a_row = self.returns + 1, 0
        scene, average, optimizer = _copy(self._good)
        self.scene.load_state_dict(scene)
        self.average.load_state_dict(average)
        self.optimizer.load_state_dict(optimizer)
        self.scene.reset_occupancy()
        self.lr_factor *= SLOWER
        self.log(f"step {step}: {why}: back to the state of step {self._taken}, learning rate x {self.lr_factor:g}")
        if self.hopeless:
            self.log(f"gone back {self.returns} times: training ends here, with that state")

    def inspect(self, step: int, largest_alpha: float | None) -> None:
        """Once per window of steps: are the parameters finite, is there something to see?"""
        if not self.finite():
            self.go_back(step, "a parameter is not finite")
            return
        self.empty = self.empty + 1 if largest_alpha is not None and largest_alpha < EMPTY else 0
        if self.empty == 0:
            if step - self._taken >= _EVERY:
                self.snapshot(step)
        elif self.empty == EMPTY_WINDOWS:
            self.log(f"step {step}: the scene is empty (alpha below {EMPTY} everywhere): forgetting the occupancy grid")
            self.scene.reset_occupancy()
        elif self.empty == 2 * EMPTY_WINDOWS:
            self._retry(step)

    def _retry(self, step: int) -> None:
        if self.revived < self.retries:
            self.revived += 1
            weights = "other random weights" if self.anew else "its first weights"
            self.log(
                f"step {step}: still empty: beginning again from {weights} ({self.revived} of --retry {self.retries})"
            )
            self.revive(self.anew(self.revived) if self.anew else None, step)
        else:
            self.gave_up = True
            self.log(
                f"step {step}: the scene stays empty: training ends here; try less --lr, --lambda_opacity or --lambda_entropy, "
                "more --blob_density, another --seed or a larger --retry"
            )

    def revive(self, beginning: dict[str, Any] | None = None, step: int = 0) -> None:
        """The scene as it begins (else as it was at step 0), a blank optimizer, a blank average."""
        self.scene.load_state_dict(_copy(self.initial if beginning is None else beginning))
        self.optimizer.load_state_dict(_copy(self._blank))
        self.average.restart()
        self.scene.reset_occupancy()
        self.empty = 0
        self.snapshot(step)

    def state_dict(self) -> dict[str, Any]:
        names = ("skipped", "in_a_row", "returns", "empty", "revived", "lr_factor", "gave_up")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if self.hopeless:  # started again by hand: it gets another chance
            self.returns = self.revived = self.empty = 0
            self.gave_up = False


def _copy(value: Any) -> Any:
    """A deep copy of nested dicts, lists and tuples with its tensors in main memory, whatever device they come from."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: _copy(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copy(item) for item in value)
    return value
