"""What a run measures of itself: collected where it is computed, read now and then, written to tensorboard and kept for the report."""

import os
import socket
import struct
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import say


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
        self._writer: _Events | None = None

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
        try:
            self._writer = self._writer or _Events(self.folder, self.start)
            self._writer.write(step, values)
        except OSError as error:
            say(
                f"{self.folder}: no more curves for tensorboard ({error.strerror or error}); the report has them all the same"
            )
            self.folder = None

    def close(self) -> None:
        """Read the rest and close the tensorboard file."""
        self.read()
        self._writer = None

    def state_dict(self) -> dict[str, Any]:
        self.read()
        return {"history": self.history, "rows": [[step, values] for step, values in self.rows]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.history = state["history"]
        self.rows = [(step, values) for step, values in state["rows"]]


class _Events:
    """A tensorboard file. Written in this thread: SummaryWriter's own dies on a full disk, and whoever waits for it then waits for ever."""

    def __init__(self, folder: Path, start: int) -> None:
        """start: tensorboard forgets what an earlier file said about this step and later ones. OSError if it cannot be written."""
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}"
        self._file = open(folder / name, "ab", buffering=0)  # noqa: SIM115 - it lives as long as the run
        self._append(Event(wall_time=time.time(), file_version="brain.Event:2"))
        self._append(Event(wall_time=time.time(), step=start, session_log=SessionLog(status=SessionLog.START)))

    def write(self, step: int, values: dict[str, float]) -> None:
        """The numbers of a step. OSError if they cannot be written."""
        from tensorboardX.proto.event_pb2 import Event
        from tensorboardX.proto.summary_pb2 import Summary

        points = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._append(Event(wall_time=time.time(), step=step, summary=Summary(value=points)))

    def _append(self, event: Any) -> None:
        """A record: length, its checksum, the event, its checksum."""
        from tensorboardX.record_writer import masked_crc32c

        data = event.SerializeToString()
        length = struct.pack("<Q", len(data))
        record = length + struct.pack("<I", masked_crc32c(length)) + data + struct.pack("<I", masked_crc32c(data))
        while record:
            record = record[self._file.write(record) :]
