"""Where to compute."""

import torch

from errors import UserError
from ranks import launched, local_rank


def choose_device(name: str) -> torch.device:
    """The torch device for `--device auto|cpu|cuda`; UserError if there is no GPU to take."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name == "cuda" and not torch.cuda.is_available():
        build = "no GPU answers" if torch.version.cuda else "this torch is a CPU build"
        raise UserError(f"--device cuda: {build}; leave the flag out, or run scripts/setup.sh on a machine with a GPU")
    if name == "cuda" and launched():
        torch.cuda.set_device(local_rank())
        return torch.device(name, local_rank())
    return torch.device(name)
