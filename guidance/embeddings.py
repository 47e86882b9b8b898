"""Embeddings of texts, kept on disk: a text encoder is read only for a text that it never saw, and the largest takes minutes."""

import hashlib
import json
import os
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from errors import UserError, say
from files import atomic

LAYOUT = "1"  # to be raised when what the encoders of text.py return changes for the same weights


class CachedEncoder:
    """A text encoder (see text.py) behind a folder with one file per text: its embedding, and how many of its tokens do not fit.

    A text that does not fit is never embedded, but has a file as well: otherwise its excess alone would call for the encoder every time.
    """

    def __init__(self, encoder, folder: Path | None = None):
        """folder: by default ~/.cache/somnium/embeddings; SOMNIUM_CACHE takes the place of ~/.cache/somnium."""
        cache = Path(os.environ.get("SOMNIUM_CACHE") or "~/.cache/somnium").expanduser()
        self.encoder, self.folder = encoder, folder or cache / "embeddings"
        # by text: excess and embedding, as far as they are known
        self.known: dict[str, tuple[int | None, Tensor | None]] = {}
        self.unsaved: set[str] = set()
        self.can_write = True

    @cached_property
    def name(self) -> str:
        """The encoder's own: it identifies the weights."""
        return self.encoder.name

    def embed(self, texts: list[str]) -> Float[Tensor, "n L D"]:
        """As the encoder's, on the encoder's device, float32; it is given the texts that the folder lacks, each of them once."""
        missing = [text for text in dict.fromkeys(texts) if self._recall(text)[1] is None]
        if missing:
            for text, embedding in zip(missing, self.encoder.embed(missing).float().cpu(), strict=True):
                self.known[text] = (self.excess(text), embedding)
                self.unsaved.add(text)
        self._save()
        device = getattr(self.encoder, "device", "cpu")
        return torch.stack([self.known[text][1] for text in texts]).to(device)

    def excess(self, text: str) -> int:
        """As the encoder's: how many tokens of the text do not fit, 0 or less if all do."""
        excess = self._recall(text)[0]
        if excess is None:
            excess = self.encoder.excess(text)
            self.known[text] = (excess, None)
            self.unsaved.add(text)
        return excess

    def close(self) -> None:
        """Writes what is new and drops the encoder and everything else that is held in memory."""
        self._save()
        self.known.clear()
        self.encoder.close()

    def path(self, text: str) -> Path:
        """Where a text's file lies."""
        key = hashlib.sha256("\0".join((LAYOUT, self.name, text)).encode())
        return self.folder / f"{key.hexdigest()}.safetensors"

    def _recall(self, text: str) -> tuple[int | None, Tensor | None]:
        """What is known of a text, from memory or else from its file."""
        if text not in self.known:
            path, self.known[text] = self.path(text), (None, None)
            try:
                self.known[text] = _read(path)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except (SafetensorError, OSError, KeyError, ValueError) as error:
                reason = (str(error) or type(error).__name__).splitlines()[0]
                say(f"{path}: a damaged embedding ({reason}); it is made anew")
        return self.known[text]

    def _save(self) -> None:
        """Writes what is new. A cache that cannot be written costs time, not the run: one line says so."""
        while self.unsaved:
            text = self.unsaved.pop()
            if not self.can_write:
                continue
            try:
                with atomic(self.path(text)) as beside:
                    beside.write_bytes(_packed(*self.known[text]))
            except UserError:
                self.can_write = False
                say(
                    f"{self.folder}: cannot be written, so embeddings are not kept; name another folder with SOMNIUM_CACHE"
                )


def _packed(excess: int, embedding: Tensor | None) -> bytes:
    """A file's content: the excess and a checksum of the embedding, if there is one, go into the header."""
    tensors = {} if embedding is None else {"embedding": embedding.contiguous()}
    return save(tensors, {"excess": str(excess), "checksum": _checksum(embedding)})


def _read(path: Path) -> tuple[int, Tensor | None]:
    """The inverse of `_packed`; one of several errors if the file is damaged."""
    data = path.read_bytes()  # at once: another process may take the file away
    embedding = load(data).get("embedding")
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})
    excess = int(header["excess"])
    if header["checksum"] != _checksum(embedding):
        raise ValueError("its numbers changed")
    return excess, embedding


def _checksum(embedding: Tensor | None) -> str:
    return "" if embedding is None else hashlib.sha256(embedding.contiguous().numpy().tobytes()).hexdigest()
