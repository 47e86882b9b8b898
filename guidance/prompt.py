"""View-dependent prompts: every wording of the prompt is embedded once, and each camera gets its own mixture of them."""

from bisect import bisect_left
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say
from guidance.perpneg import PerpNeg, perp_neg_weights
from guidance.views import WORDS, view_weights


@dataclass(frozen=True)
class Condition:
    """What the denoiser is told, one row per sample.

    `text`: the prompt as seen from the camera; `negative`: what to steer away from; `null`: the empty prompt; `source`: what the pictures
    look like now, as seen from the camera (Bridge), the empty prompt if nothing is said of it; `plain`: the prompt without view
    words; `perp` and `perp_weight`: the words of other views and their signed weights, 0 for those to ignore (Perp-Neg); `hints`: what
    else is known of the pictures (see prior.py).
    """

    text: Float[Tensor, "B L D"]
    negative: Float[Tensor, "B L D"]
    null: Float[Tensor, "B L D"] | None = None
    source: Float[Tensor, "B L D"] | None = None
    plain: Float[Tensor, "B L D"] | None = None
    perp: Float[Tensor, "K B L D"] | None = None
    perp_weight: Float[Tensor, "K B"] | None = None
    hints: dict[str, Tensor] = field(default_factory=dict)


class PromptBank:
    """The embeddings of a prompt in all its wordings; the text encoder is not needed afterwards.

    `texts`: the prompt with every entry of `WORDS[view_words]`; `text` [N, L, D], `negative`, `null`, `plain` [L, D], `source` [N, L, D] or
    None: their embeddings.
    """

    def __init__(
        self,
        encoder,
        text: str | None,
        negative: str | None = "",
        view_words: int = 4,
        view_blend: bool = True,
        angle_front: float = 60.0,
        angle_overhead: float = 30.0,
        source: str = "",
        perpneg: PerpNeg | None = None,
        debias: Callable[[str, tuple[str, ...]], list[str]] | None = None,
        blend: tuple[str | None, float] = (None, 0.0),
    ):
        """encoder: has `embed(list[str]) -> [n, L, D]` and `excess(str) -> int`, the tokens that do not fit; angles in degrees.

        source: Bridge's wording of what the pictures look like now, {text} standing for the prompt; "" for none. debias: given the prompt
        and the view words, answers with a prompt for each of them (see debias.py). blend: another prompt and its share w of every
        wording, (1 - w) text + w other. Raises UserError if Perp-Neg or debiasing is asked for
        without view words.
        """
        for flag, given in (("--perpneg", perpneg), ("--debias_prompt", debias)):
            if given is not None and view_words == 0:
                raise UserError(f"{flag}: needs view words; use --view_words 4 or 8")
        self.view_words, self.view_blend, self.perpneg = view_words, view_blend, perpneg
        self.angle_front, self.angle_overhead = angle_front, angle_overhead
        views = WORDS[view_words]

        text = _fitting(encoder, text, "--text", lambda text: [with_view(text, words) for words in views])
        prompts = debias(text, views) if debias else [text] * len(views)
        self.texts = tuple(with_view(*pair) for pair in zip(prompts, views, strict=True))
        self.negative_text = _fitting(encoder, negative, "--negative", lambda text: [text])

        def sources(template: str) -> list[str]:
            each = zip(prompts, views, strict=True)
            return [with_view(template.replace("{text}", prompt), words) for prompt, words in each]

        source = _fitting(encoder, source, "--source", sources)
        source_texts = sources(source) if source else []

        wordings = [*self.texts, self.negative_text, "", *source_texts, text]
        place = {wording: row for row, wording in enumerate(dict.fromkeys(wordings))}
        embeddings = encoder.embed(list(place))
        self.text: Float[Tensor, "N L D"] = embeddings[[place[wording] for wording in self.texts]]
        self.negative: Float[Tensor, "L D"] = embeddings[place[self.negative_text]]
        self.null: Float[Tensor, "L D"] = embeddings[place[""]]
        self.plain: Float[Tensor, "L D"] = embeddings[place[text]]
        other, share = blend
        if other and share:
            other = _fitting(encoder, other, "--blend", lambda text: [with_view(text, words) for words in views])
            wordings = encoder.embed([*(with_view(other, words) for words in views), other]).to(self.text)
            self.text = torch.lerp(self.text, wordings[:-1], share)
            self.plain = torch.lerp(self.plain, wordings[-1], share)
        self.source: Float[Tensor, "N L D"] | None = None
        if source_texts:
            self.source = embeddings[[place[wording] for wording in source_texts]]

    def condition(
        self, polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"], hints: dict[str, Tensor] | None = None
    ) -> Condition:
        """The prompt as seen from each camera (degrees): text_b = sum_n weight_bn text_n, and the source in the same way; the negative,
        the empty and the plain prompt are the same for all."""
        polar, azimuth = polar.to(self.text), azimuth.to(self.text)
        weights = view_weights(polar, azimuth, self.view_words, self.view_blend, self.angle_overhead, self.angle_front)
        text = torch.einsum("bn,nld->bld", weights, self.text)
        negative, null, plain = (one.expand_as(text) for one in (self.negative, self.null, self.plain))
        source = null if self.source is None else torch.einsum("bn,nld->bld", weights, self.source)
        perp, perp_weight = (None, None) if self.perpneg is None else self._other_views(azimuth, weights)
        return Condition(text, negative, null, source, plain, perp, perp_weight, dict(hints or {}))

    def _other_views(
        self, azimuth: Float[Tensor, "B"], weights: Float[Tensor, "B N"]
    ) -> tuple[Float[Tensor, "2 B L D"], Float[Tensor, "2 B"]]:
        """Perp-Neg's negatives, the front's words and the side's, and their weights, which fade as the view words become "overhead"."""
        views = WORDS[self.view_words]
        sides = ("left side view", "right side view") if "left side view" in views else ("side view", "side view")
        front, left, right = (self.text[views.index(words)] for words in ("front view", *sides))
        on_the_left = (torch.remainder(azimuth, 360.0) <= 180)[:, None, None]
        perp = torch.stack([front.expand(len(azimuth), -1, -1), torch.where(on_the_left, left, right)])
        around = sum(not words.startswith("overhead") for words in views)
        return perp, perp_neg_weights(azimuth, self.perpneg) * weights[:, :around].sum(1)


def with_view(text: str, words: str) -> str:
    """The wording that the models were trained on: "a chair, side view"; just the one of them if the other is empty."""
    return ", ".join(part for part in (text, words) if part)


def _fitting(encoder, text: str | None, flag: str, wordings: Callable[[str], list[str]]) -> str:
    """Drops words from the end until all wordings of the text fit into the text encoder: the view words come last and must not be cut."""
    text = (text or "").strip()
    words = text.split()

    def cut(count: int) -> str:
        return " ".join(words[:count]).rstrip(",;")

    def too_long(text: str) -> bool:
        return any(encoder.excess(wording) > 0 for wording in wordings(text))

    if not text or not too_long(text):
        return text
    count = bisect_left(range(len(words)), True, key=lambda count: too_long(cut(count))) - 1
    short = cut(max(count, 0))
    say(f'{flag}: too long for the text encoder; used as "{short}"')
    return short


def blend_of(opt) -> tuple[str | None, float]:
    """What `--blend "PROMPT:share"` names: the other prompt and its share of the mixture. Raises UserError."""
    typed = opt.blend if hasattr(opt, "blend") else None  # who asks for a model alone has no such option
    if not typed:
        return None, 0.0
    text, _, share = typed.rpartition(":")
    try:
        value = float(share)
    except ValueError:
        value = -1.0
    if not text.strip() or not 0 <= value <= 1:
        raise UserError(f'--blend {typed}: write PROMPT:SHARE, the share in [0, 1], as in "a green teddy:0.3"')
    return text.strip(), value
