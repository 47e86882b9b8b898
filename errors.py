"""What a user sees when something is wrong: one line, and the exit status that scripts can test."""

import os
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent
MISTAKE = 2  # the exit status of a user's mistake
INTERRUPTED = 130  # what a shell expects after Ctrl-C


class UserError(Exception):
    """A mistake of the user's: one line that names the flag or file, what is wrong with it and what to do."""


def leads() -> bool:
    """Whether this process is the only one or the first of those that torchrun started: the one that says lines and writes files."""
    return os.environ.get("RANK", "0") == "0" or os.environ.get("WORLD_SIZE", "1") == "1"


def say(text: str) -> None:
    """Print one line of notice on stderr, where it does not disturb what a script reads from stdout."""
    if not leads():
        return
    try:
        print(f"somnium: {text}", file=sys.stderr, flush=True)
    except OSError:  # its terminal has gone, or it is a file on a full disk: a run does not end for that
        pass


def status_of(work: Callable[[], int | None]) -> int:
    """Do `work` and return the exit status of the program: what it returns (None: 0), 2 for a user's mistake, which is one line on stderr, 130
    after Ctrl-C. A bug keeps its traceback."""
    try:
        return work() or 0
    except UserError as error:
        return _complain(str(error))
    except KeyboardInterrupt:
        return INTERRUPTED
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if not package or (ROOT / package).exists() or (ROOT / f"{package}.py").exists():
            raise
        return _complain(
            f"the package {package} is not installed: run scripts/setup.sh, then start me with .venv/bin/python"
        )


def _complain(text: str) -> int:
    print("error: " + " ".join(text.split()), file=sys.stderr, flush=True)
    return MISTAKE
