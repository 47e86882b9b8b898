"""Ctrl-C and SIGTERM: what a run does when it is asked to stop."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from errors import INTERRUPTED

TERMINATED = 128 + signal.SIGTERM  # 143


class Interrupts:
    """Counts the wishes to stop.

    While training (`with interrupts.watch(training=True)`): the first Ctrl-C asks for a stop after the step under way (`stop` becomes true: the
    trainer saves a checkpoint and goes on to the results), the second leaves at once with status 130; SIGTERM sets `terminate`: the trainer
    saves a checkpoint and leaves with status 143. While results are written (`training=False`) every signal leaves at once: files are atomic
    and the checkpoint is already on the disk.
    """

    def __init__(self) -> None:
        self.interrupts = 0
        self.terminate = False

    @property
    def stop(self) -> bool:
        """Whether training should end after this step."""
        return self.interrupts > 0 or self.terminate

    @contextmanager
    def watch(self, training: bool) -> Iterator["Interrupts"]:
        """Handle both signals inside the block, restore the former handlers after it. Outside the main thread it does nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return

        def interrupt(signum, frame):
            self.interrupts += 1
            if not training or self.interrupts > 1:
                _tell("interrupted: leaving at once")
                raise SystemExit(INTERRUPTED)
            _tell("interrupted: finishing this step, then a checkpoint and the results; Ctrl-C again leaves at once")

        def terminate(signum, frame):
            self.terminate = True
            if not training:
                raise SystemExit(TERMINATED)
            _tell("asked to terminate: a checkpoint, then leaving")

        former = {signal.SIGINT: interrupt, signal.SIGTERM: terminate}
        former = {number: signal.signal(number, handler) for number, handler in former.items()}
        try:
            yield self
        finally:
            for number, handler in former.items():
                signal.signal(number, handler)


def _tell(text: str) -> None:
    # os.write, because a signal can arrive in the middle of another write to sys.stderr, which is not re-entrant.
    os.write(2, f"\nsomnium: {text}\n".encode())
