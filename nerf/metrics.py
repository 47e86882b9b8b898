"""What a run measures of itself: collected where it is computed, read now and then, written to tensorboard and kept for the report."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Metrics:
    """Numbers per step, by name.

    Tensors stay on their device until `read`, which copies a whole window of steps at once: a CUDA device is never waited for in between.
    `history` maps each name to [[step, mean over the window], ...]: small enough for the checkpoint, so that the curves survive a resume.
    """

    def __init__(self, folder: Path | None, start: int = 0, window: int = 10) -> None:
        self.folder, self.window, self.start = folder, window, start
        self.history: dict[str, list[list[float]]] = {}
        self.rows: list[tuple[int, dict[str, float]]] = []  # read, not yet averaged
        self._waiting: list[tuple[int, list[str], Tensor, dict[str, float]]] = []
        self._writer = None

    def add(self, step: int, values: dict[str, Any]) -> None:
        """Take the values of one step: numbers, or tensors, of which the mean counts."""
        tensors = {k: v.detach().float().mean() for k, v in values.items() if isinstance(v, Tensor)}
        numbers = {k: float(v) for k, v in values.items() if not isinstance(v, Tensor)}
        stacked = torch.stack(list(tensors.values())) if tensors else torch.empty(0)
        self._waiting.append((step, list(tensors), stacked, numbers))

    @property
    def full(self) -> bool:
        """Whether a window of steps is complete."""
        return len(self.rows) + len(self._waiting) >= self.window

    def read(self) -> dict[str, float]:
        """Copy what waits on the device, write it to tensorboard; a complete window is averaged into `history` and returned."""
        if self._waiting:
            flat = torch.cat([stacked for _, _, stacked, _ in self._waiting]).cpu().tolist()
            for step, names, _, numbers in self._waiting:
                values = {**dict(zip(names, flat, strict=False)), **numbers}
                flat = flat[len(names) :]
                self.rows.append((step, values))
                self._write(step, values)
            self._waiting.clear()
        if len(self.rows) < self.window:
            return {}
        means = self._average()
        for name, mean in means.items():
            self.history.setdefault(name, []).append([self.rows[-1][0], mean])
        self.rows.clear()
        return means

    def record(self, step: int, values: dict[str, float]) -> None:
        """Numbers that come seldom (a validation, an export): straight into tensorboard and `history`."""
        for name, value in values.items():
            self.history.setdefault(name, []).append([step, value])
        self._write(step, values)

    def _average(self) -> dict[str, float]:
        sums: dict[str, list[float]] = {}
        for _, values in self.rows:
            for name, value in values.items():
                sums.setdefault(name, []).append(value)
        return {name: sum(values) / len(values) for name, values in sums.items()}

    def _write(self, step: int, values: dict[str, float]) -> None:
        if self.folder is None:
            return
        if self._writer is None:
            from tensorboardX import SummaryWriter

            self._writer = SummaryWriter(str(self.folder), purge_step=self.start)
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Read the rest and close the tensorboard file."""
        self.read()
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"history": self.history, "rows": [[step, values] for step, values in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        self.rows = [(step, values) for step, values in state["rows"]]
