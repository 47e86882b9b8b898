"""What a user sees when something is wrong: one line, and the exit status that scripts can test."""

import os
import sys


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
