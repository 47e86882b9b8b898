"""What the user sees while a run works: lines, which also go to log.txt, and progress bars with the time left."""

import sys
import time
from pathlib import Path
from typing import Any

from errors import leads, say


class Log:
    """Lines of notice on stderr and, with the time of day, in `path`."""

    def __init__(self, path: Path | None) -> None:
        self.path = path

    def __call__(self, text: str) -> None:
        """Show one line and keep it."""
        say(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Keep one line without showing it. A full disk must not end a run: then it is lost."""
        if self.path is None:
            return
        try:
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')}  {text}\n")
        except OSError:
            pass


class Bar:
    """`with Bar("training", 700) as bar: bar.update(7, "loss 0.1")`.

    On a terminal a bar with speed and time left (a bar inside another one's block becomes a second line below it); elsewhere (a log file, CI), for
    bars with `lines`, one line every tenth of the way.
    """

    _shown = None  # the rich display of the outermost bar

    def __init__(self, title: str, total: int, start: int = 0, lines: bool = False) -> None:
        self.title, self.total, self.start, self.done = title, max(total, 1), start, start
        self._lines, self._tenth, self._began = lines, 10 * start // self.total, time.perf_counter()
        self._task, self._outermost = None, False

    def __enter__(self) -> "Bar":
        self._began = time.perf_counter()
        if Bar._shown is None and sys.stderr.isatty() and leads():
            Bar._shown, self._outermost = _display(keep=self._lines), True
            Bar._shown.start()
        if Bar._shown is not None:
            self._task = Bar._shown.add_task(self.title, total=self.total, completed=self.start, speed="", text="")
        return self

    def __exit__(self, *reason) -> None:
        if self._outermost:
            Bar._shown.stop()
            Bar._shown = None
        elif self._task is not None:
            Bar._shown.remove_task(self._task)

    @property
    def speed(self) -> float:
        """Units per second since the beginning."""
        return (self.done - self.start) / max(time.perf_counter() - self._began, 1e-9)

    def update(self, done: int, text: str = "") -> None:
        """`done` of the total are done; `text` is shown behind the bar."""
        self.done = done
        if self._task is not None:
            Bar._shown.update(self._task, completed=done, speed=f"{self.speed:.1f}/s", text=text)
        elif self._lines and 10 * done // self.total > self._tenth:
            self._tenth = 10 * done // self.total
            left = (self.total - done) / max(self.speed, 1e-9)
            say(f"{self.title} {done}/{self.total}, {self.speed:.1f}/s, {left:.0f} s left  {text}")


def _display(keep: bool) -> Any:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[speed]}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    return Progress(*columns, console=Console(stderr=True), transient=not keep)
