"""Prompt debiasing (Hong et al. 2023, D-SDS): words that contradict a view are left out of the prompt for that view.

"a smiling bear, back view" asks for a face on the back. How well a word and a view go together is asked of a masked language model.
"""

import re
from collections.abc import Callable
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say
from guidance.parts import read_part
from guidance.weights import Source, quiet

VIEWS = ("side", "front", "back", "overhead")
LEAST = 0.95  # a word stays for a view if their mutual information is at least this
Scorer = Callable[[list[str]], Float[Tensor, "n 4"]]
"""How likely each of `VIEWS` is for a picture of each text; every row sums to 1."""


def debiased(text: str, views: tuple[str, ...], model_id: str, device: torch.device | str) -> list[str]:
    """The prompt for each view's words, without what contradicts that view; says in one line which words go.

    model_id: a masked language model by its hub id or folder. Raises UserError if it cannot be had or is of another kind.
    """
    return leave_out(text, views, masked_language_model(model_id, device))


def leave_out(text: str, views: tuple[str, ...], score: Scorer) -> list[str]:
    """`debiased`, with the judge given: a word is left out for a view if pmi < `LEAST`, where

    pmi(word, view) = P(view | text) / lerp(P(view | text without the word), P(view | text), 0.5).

    Every word is judged against the whole text. A view for which no word would be left keeps them all.
    """
    words = text.split()
    shorter = [" ".join(words[:i] + words[i + 1 :]) for i in range(len(words))]
    probability = score([text, *shorter])
    full, without = probability[0], probability[1:]
    contradicts: Tensor = full / torch.lerp(without, full.expand_as(without), 0.5) < LEAST  # [words, VIEWS]
    goes = {view: column for view, column in zip(VIEWS, contradicts.T.tolist(), strict=True) if not all(column)}

    def what_stays(view: str) -> str:
        if not any(goes.get(view, ())):
            return text
        return " ".join(word for word, gone in zip(words, goes[view], strict=True) if not gone).rstrip(",;")

    mains = [main_word(view) for view in views]
    found = []
    for i, word in enumerate(words):
        where = [view for view, column in goes.items() if column[i] and view in mains]
        found += [f"{word} ({', '.join(where)})"] if where else []
    say("--debias_prompt: " + (f"left out {', '.join(found)}" if found else "every word of the prompt fits every view"))
    return [what_stays(main) for main in mains]


def main_word(view: str) -> str:
    """Which of `VIEWS` a view's words stand for: "front left view" front, "left side view" side, "overhead front view" overhead."""
    return next(word for word in ("overhead", "front", "back", "side") if word in view.split())


def masked_language_model(model_id: str, device: torch.device | str) -> Scorer:
    """P(view | text): what the model puts for [MASK] in "This image is depicting a [MASK] view of {text}", among the four views."""
    tokenizer, model = _load(model_id)
    ids = [tokenizer(f" {view}", add_special_tokens=False).input_ids for view in VIEWS]
    if any(len(pieces) != 1 or pieces[0] == tokenizer.unk_token_id for pieces in ids):
        known = f"--debias_model {model_id}: does not know {', '.join(VIEWS)} as words"
        raise UserError(f"{known}; use bert-base-uncased or another English model")
    columns = [pieces[0] for pieces in ids]
    length = min(tokenizer.model_max_length, model.config.max_position_embeddings)
    model = model.requires_grad_(False).eval().to(device)

    @torch.no_grad()
    def score(texts: list[str]) -> Float[Tensor, "n 4"]:
        rows = []
        for start in range(0, len(texts), 8):  # the answers about all tokens together would be large
            sentences = [
                f"This image is depicting a {tokenizer.mask_token} view of {t}" for t in texts[start : start + 8]
            ]
            tokens = tokenizer(sentences, padding=True, truncation=True, max_length=length, return_tensors="pt")
            tokens = tokens.to(device)
            mask = (tokens.input_ids == tokenizer.mask_token_id).int().argmax(1)  # ours is the first
            answer = model(**tokens).logits[torch.arange(len(mask)), mask].float()
            rows.append(answer[:, columns].softmax(-1).cpu())  # a share of the four is their softmax: the rest cancels
        return torch.cat(rows)

    return score


def _load(model_id: str):
    """(tokenizer, model), from a folder, the hub's cache or the hub."""
    flag, folder = f"--debias_model {model_id}", Path(model_id).expanduser()
    local = folder.is_dir()
    if not local and not re.fullmatch(r"\w[\w.\-]*(/\w[\w.\-]*)?", model_id):
        raise UserError(f"{flag}: no such folder, and not a hub id; check the path, or use bert-base-uncased")
    source = Source(str(folder) if local else model_id, local, model_id, flag)
    with quiet():
        from transformers import AutoModelForMaskedLM, AutoTokenizer

        model = read_part(AutoModelForMaskedLM, source, torch.float32)
        try:
            tokenizer = AutoTokenizer.from_pretrained(source.path_or_id, local_files_only=local)
        except Exception as error:  # broken or missing files fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{flag}: no tokenizer can be read from {source.path_or_id}: {reason}") from error
    if tokenizer.mask_token is None:
        raise UserError(f"{flag}: its tokenizer has no mask; use bert-base-uncased or another masked language model")
    return tokenizer, model
