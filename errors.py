"""What a user sees when something is wrong: one line, and the exit status that scripts can test."""

import sys


class UserError(Exception):
    """A mistake of the user's: one line that names the flag or file, what is wrong with it and what to do."""


def say(text: str) -> None:
    """Print one line of notice on stderr, where it does not disturb what a script reads from stdout."""
    print(f"somnium: {text}", file=sys.stderr, flush=True)
