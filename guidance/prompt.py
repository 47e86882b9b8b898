"""View-dependent prompts: every wording of the prompt is embedded once, and each camera gets its own mixture of them."""

from bisect import bisect_left
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from errors import say
from guidance.views import WORDS, view_weights


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told, one row per sample: the prompt, and what to steer away from."""

    text: Float[Tensor, "B L D"]
    negative: Float[Tensor, "B L D"]


class PromptBank:
    """The embeddings of `text` with every view wording, and of the negative prompt; the text encoder is not needed afterwards."""

    def __init__(
        self,
        prior,
        text: str | None,
        negative: str | None = "",
        view_words: int = 4,
        view_blend: bool = True,
        angle_front: float = 60.0,
        angle_overhead: float = 30.0,
    ):
        """prior: has `embed(list[str]) -> [n, L, D]` and `excess(str) -> int`, the tokens that do not fit; angles in degrees."""
        self.view_words, self.view_blend = view_words, view_blend
        self.angle_front, self.angle_overhead = angle_front, angle_overhead
        text = _fitting(prior, (text or "").strip(), WORDS[view_words])
        self.texts = tuple(with_view(text, words) for words in WORDS[view_words])
        self.negative_text = _fitting(prior, (negative or "").strip(), ("",), "--negative")
        embeddings = prior.embed([*self.texts, self.negative_text])
        self.text: Float[Tensor, "N L D"] = embeddings[:-1]
        self.negative: Float[Tensor, "L D"] = embeddings[-1]

    def condition(self, polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"]) -> Condition:
        """The prompt as seen from each camera (degrees): text_b = sum_n weight_bn text_n; the negative prompt is the same for all."""
        weights = view_weights(
            polar.to(self.text),
            azimuth.to(self.text),
            self.view_words,
            self.view_blend,
            self.angle_overhead,
            self.angle_front,
        )
        text = torch.einsum("bn,nld->bld", weights, self.text)
        return Condition(text, self.negative.expand_as(text))


def with_view(text: str, words: str) -> str:
    """The wording that the models were trained on: "a chair, side view"; just the text if there are no words."""
    return f"{text}, {words}" if words else text


def _fitting(prior, text: str, views: tuple[str, ...], flag: str = "--text") -> str:
    """Drops words from the end until the longest wording fits into the text encoder: the view words come last and must not be cut."""
    words = text.split()

    def too_long(count: int) -> bool:
        return any(prior.excess(with_view(" ".join(words[:count]), view)) > 0 for view in views)

    if not too_long(len(words)):
        return text
    count = bisect_left(range(len(words)), True, key=too_long) - 1
    short = " ".join(words[: max(count, 0)])
    say(f'{flag}: too long for the text encoder; used as "{short}"')
    return short
