"""One network by itself (a ControlNet, a CLIP model) from a folder or the hub: what weights.py does for whole pipelines."""

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from errors import UserError
from guidance.weights import Source, quiet


def part_source(key: str | Path | None, default: str | Path, flag: str) -> Source:
    """Where the network named by `key` (else by `default`) lies; touches no network. flag: what the user typed to get it.

    Raises UserError if it is neither a folder nor of the form of a hub id.
    """
    name = str(key or default)
    folder = Path(name).expanduser()
    if folder.is_dir():
        return Source(str(folder), True, folder.resolve().name, flag)
    if re.fullmatch(r"[\w\-]+[\w\-.]*/[\w\-.]+", name):
        return Source(name, False, name, flag)
    raise UserError(f"{flag}: {name}: no such folder, and not a hub id of the form owner/name; check the path")


def read_part(kind, source: Source, dtype):
    """Reads a network of class `kind` (of diffusers or transformers) with its weights in `dtype`; a hub id from the cache if it is there.

    Half-precision files are preferred if dtype is not float32. Draws no random number that anybody else would miss. Raises UserError if
    it cannot be had, or if the files lack some of the network's weights, which would then be random.
    """
    import torch

    variants = ("fp16", None) if dtype != torch.float32 else (None, "fp16")
    reason, where = "", source.path_or_id
    # initial weights, soon replaced, must not move the scene's numbers
    with quiet(), _silent(), torch.random.fork_rng([]):
        for cached in (True,) if source.local else (True, False):
            for variant in variants:
                try:
                    network, found = kind.from_pretrained(
                        where, variant=variant, dtype=dtype, local_files_only=cached, output_loading_info=True
                    )
                except Exception as error:  # broken or missing files fail in many ways
                    if variant is None:
                        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                    continue
                if lacking := sorted(found["missing_keys"]):
                    raise UserError(
                        f"{source.flag}: {where} is not a {kind.__name__}: it has no weights {', '.join(lacking[:3])}"
                    )
                return network
    advice = "" if source.local else "; check the id, connect once to download it, or name a local folder"
    raise UserError(f"{source.flag}: {where} cannot be read as a {kind.__name__}: {reason}{advice}")


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps warnings, and errors that the libraries log although they raise them too, from the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
