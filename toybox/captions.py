"""What the toybox says about a picture: captions, and a tokenizer whose every token is a whole word."""

import itertools
import json
from pathlib import Path

from guidance.views import WORDS
from toybox.objects import COLORS, OBJECTS

CONTEXT = 14  # tokens: start, "a", color, two words of kind, ",", up to four view words, end, and some air


def caption(kind: str, color: str | None = None, view: str = "") -> str:
    """`a red chair, left side view`; without `color` the caption means the kind's natural color."""
    words = f"{color} {kind}" if color else kind
    words = f"{'an' if words[0] in 'aeiou' else 'a'} {words}"
    return f"{words}, {view}" if view else words


def vocabulary() -> list[str]:
    """Every word a caption can hold, sorted; the comma comes last."""
    phrases = [*OBJECTS, *COLORS, *itertools.chain(*WORDS.values())]
    return sorted({"a", "an", *(word for phrase in phrases for word in phrase.split())}) + [","]


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding of one word: join the pair of lowest rank until none is left."""
    while len(pieces) > 1:
        pairs = [(ranks[pair], i) for i, pair in enumerate(itertools.pairwise(pieces)) if pair in ranks]
        if not pairs:
            break
        at = min(pairs)[1]
        pieces = [*pieces[:at], pieces[at] + pieces[at + 1], *pieces[at + 2 :]]
    return pieces


def write_tokenizer(folder: Path) -> None:
    """Write a CLIP tokenizer folder that keeps each word of `vocabulary()` in one piece.

    Words are taken one after another; whatever pieces the merges so far leave are joined by new merges at the end of the list. A word that
    is whole already never reaches those, so it stays whole.
    """
    from transformers import CLIPTokenizer

    letters = "abcdefghijklmnopqrstuvwxyz,"
    tokens = [*letters, *(f"{letter}</w>" for letter in letters)]
    ranks: dict[tuple[str, str], int] = {}
    for word in vocabulary():
        pieces = _merge([*word[:-1], f"{word[-1]}</w>"], ranks)
        while len(pieces) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
            tokens.append(pieces[0])
    tokens = [*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    vocab, merges = folder / "vocab.json", folder / "merges.txt"
    vocab.write_text(json.dumps({token: i for i, token in enumerate(tokens)}, indent=0) + "\n")
    merges.write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in ranks))
    CLIPTokenizer(str(vocab), str(merges), model_max_length=CONTEXT).save_pretrained(folder)
