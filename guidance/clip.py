"""CLIP's opinion beside the diffusion model's: how well a picture and the prompt go together (CLIP guidance, as in Dream Fields), and how
much it resembles a photograph of the object.

The processor's work (resizing, normalising) is done in torch, so that a gradient reaches the picture.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError, say
from guidance.parts import part_source, read_part
from guidance.views import view_weights
from guidance.weights import Source, check_vocabulary, clip_words, quiet, read_json
from schedule import value_at

EMBEDDED = Path(__file__).resolve().parent.parent / "toybox" / "models" / "tiny-clip"
LARGE = "openai/clip-vit-large-patch14"
# What OpenAI's models were trained with; a model's preprocessor_config.json may say otherwise.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def build_clip(opt, prompts, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "PromptOpinion":
    """CLIP for the wordings of a `PromptBank`: the model that `--clip_model` names, else the embedded one where the prior is embedded,
    else `LARGE`. Raises UserError if it cannot be had or does not know a word.
    """
    embedded = not opt.hf_key and opt.sd_version == "embedded"
    clip = Clip(opt.clip_model or (EMBEDDED if embedded else LARGE), device, dtype)
    return PromptOpinion(clip, prompts)


def build_picture_opinion(
    opt, views, device: torch.device | str, dtype: torch.dtype = torch.float32, clip: "Clip | None" = None
) -> "PictureOpinion":
    """CLIP for known pictures (each with `picture` [3, S, S] on white in [0, 1] and `azimuth`, degrees), weighted by `lambda_clip`.

    clip: the one that reads the prompt, if there is a prompt. Else the model that `--clip_model` names, or the embedded one where the
    novel-view prior is embedded, or `LARGE`. Raises UserError if it cannot be had.
    """
    if clip is None:
        clip = Clip(opt.clip_model or (EMBEDDED if opt.zero123 is None else LARGE), device, dtype)
    return PictureOpinion(clip, [view.picture for view in views], [view.azimuth for view in views], opt.lambda_clip)


class Clip:
    """A frozen CLIPModel with its tokenizer, from a folder or a hub id; everything that goes in or comes out is float32."""

    def __init__(
        self,
        model: str | Path = EMBEDDED,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        flag: str = "",
    ):
        """flag: what the user typed to get it. Raises UserError if the model cannot be had or read."""
        with quiet():
            from transformers import CLIPModel, CLIPTokenizer

        self.device, self.dtype = torch.device(device), dtype
        self.source = part_source(model, EMBEDDED, flag or f"--clip_model {model}")
        self.model = read_part(CLIPModel, self.source, dtype).requires_grad_(False).eval().to(self.device)
        try:
            with quiet():
                self.tokenizer = CLIPTokenizer.from_pretrained(
                    self.source.path_or_id, local_files_only=self.source.local
                )
        except Exception as error:  # broken or missing files fail in many ways
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"{self.source.flag}: no tokenizer can be read from {self.source.path_or_id}: {reason}"
            ) from error
        self.image_size = self.model.config.vision_config.image_size
        self.context = self.model.config.text_config.max_position_embeddings
        mean, std = _normalisation(self.source)
        self.mean, self.std = (torch.tensor(x, device=self.device)[:, None, None] for x in (mean, std))

    def excess(self, text: str) -> int:
        """How many tokens of a text do not fit; 0 or less if all do."""
        return len(self.tokenizer(text, verbose=False).input_ids) - self.context

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Float[Tensor, "n D"]:
        """Unit features of texts; what is too long is cut and said. Raises UserError if the embedded model does not know a word."""
        if Path(self.source.path_or_id) == EMBEDDED:
            check_vocabulary({"--text": " ".join(texts)}, *clip_words(self.tokenizer.get_vocab()))
        for text in texts:
            if self.excess(text) > 0:
                say(f'{self.source.flag}: CLIP reads {self.context} tokens; it does not see the end of "{text}"')
        padded = {"padding": "max_length", "max_length": self.context, "truncation": True}
        tokens = self.tokenizer(texts, return_tensors="pt", **padded).input_ids.to(self.device)
        with torch.autocast(self.device.type, enabled=False):
            seen = self.model.text_model(tokens)
            return F.normalize(self.model.text_projection(seen.pooler_output).float(), dim=-1)

    def embed_images(self, image: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
        """Unit features of pictures in [0, 1]; differentiable. The whole picture is resized (bicubic, averaged where it shrinks)."""
        with torch.autocast(self.device.type, enabled=False):
            size = (self.image_size, self.image_size)
            picture = image.float().permute(0, 3, 1, 2)
            if picture.shape[-2:] != size:  # antialias: also the kernel that the processor enlarges with
                picture = F.interpolate(picture, size, mode="bicubic", align_corners=False, antialias=True).clamp(0, 1)
            seen = self.model.vision_model(((picture - self.mean) / self.std).to(self.dtype))
            return F.normalize(self.model.visual_projection(seen.pooler_output).float(), dim=-1)

    def loss(self, image: Float[Tensor, "B H W 3"], text: Float[Tensor, "b D"]) -> Float[Tensor, ""]:
        """-<image, text> of unit features, averaged over the batch; one text for all pictures or one for each."""
        return -(self.embed_images(image) * text).sum(-1).mean()

    @staticmethod
    def text_for(weights: Float[Tensor, "B N"], features: Float[Tensor, "N D"]) -> Float[Tensor, "B D"]:
        """The unit blend of several wordings' features, with the weights of `views.view_weights`."""
        return F.normalize(weights.to(features) @ features, dim=-1)


class PromptOpinion:
    """CLIP's loss for pictures of a prompt, each view with its own words. Call it: (image, polar, azimuth) -> scalar."""

    def __init__(self, clip: Clip, prompts):
        """prompts: a `PromptBank`, whose wordings and way of choosing among them are used."""
        self.clip, self.prompts, self.features = clip, prompts, clip.embed(list(prompts.texts))

    def __call__(
        self, image: Float[Tensor, "B H W 3"], polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"]
    ) -> Float[Tensor, ""]:
        """The loss of a batch of pictures in [0, 1], seen from polar and azimuth (degrees)."""
        bank = self.prompts
        weights = view_weights(polar, azimuth, bank.view_words, bank.view_blend, bank.angle_overhead, bank.angle_front)
        return self.clip.loss(image, self.clip.text_for(weights, self.features))


class PictureOpinion:
    """CLIP's loss for how much views resemble known pictures, the nearest counting for each; to `several.Several` a guidance among others.

    L = -lambda mean_b s_b <f_b, f>, unit features f_b of the view and f of the picture whose azimuth is nearest to the view's, and
    s = 1 - |difference of the azimuths| / 180: all of it in front of the picture, nothing behind (stable-dreamfusion, lambda = 10).
    """

    wants = ()  # no hints

    def __init__(self, clip: Clip, pictures: Sequence[Float[Tensor, "3 _ _"]], azimuths: Sequence[float], weight):
        """pictures: on a plain background, in [0, 1], with their azimuths in degrees; weight: lambda, a number or a schedule."""
        if not pictures:
            raise ValueError("no picture to compare with")
        self.clip, self.weight = clip, weight
        self.pictures = [picture.permute(1, 2, 0)[None].to(clip.device) for picture in pictures]
        self.azimuths = torch.tensor([float(azimuth) for azimuth in azimuths], device=clip.device)
        with torch.no_grad():
            self.features = torch.cat([clip.embed_images(picture) for picture in self.pictures])

    def __call__(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        **more: Any,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The weighted loss of a batch of pictures in [0, 1], and for the log what it is without its weight; nothing of latents."""
        weight = value_at(self.weight, step)
        if as_latent or weight == 0:
            return 0 * image.sum(), {}
        nearest, share = self.nearest(azimuth)
        opinion = -(share * (self.clip.embed_images(image) * self.features[nearest]).sum(-1)).mean()
        return weight * opinion, {"clip": opinion.detach()}

    def nearest(self, azimuth: Float[Tensor, "B"]) -> tuple[Int[Tensor, "B"], Float[Tensor, "B"]]:
        """For each view the place of its picture, and its share s."""
        away = (azimuth.to(self.azimuths)[:, None] - self.azimuths + 180).remainder(360) - 180
        away, place = away.abs().min(1)
        return place, 1 - away / 180

    @torch.no_grad()
    def debug_images(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        **more: Any,
    ) -> Float[Tensor, "B S W2 3"]:
        """Each view beside its picture; grey where the view is latents."""
        size = self.clip.image_size
        seen = torch.full_like(image[..., :3], 0.5) if as_latent else image
        chosen = torch.cat([self._sized(self.pictures[place], size) for place in self.nearest(azimuth)[0].tolist()])
        return torch.cat([self._sized(seen.float(), size), chosen], 2)

    @staticmethod
    def _sized(image: Float[Tensor, "B _ _ 3"], size: int) -> Float[Tensor, "B S S 3"]:
        shrunk = F.interpolate(image.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)
        return shrunk.permute(0, 2, 3, 1)

    def follow(self, opt) -> None:
        """The weight as these options say, model and pictures as they are."""
        self.weight = opt.lambda_clip

    def state(self) -> dict[str, Any]:
        """Nothing: it draws no random numbers."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on from a saved state."""


def _normalisation(source: Source) -> tuple[list[float], list[float]]:
    """(mean, standard deviation) of the red, green and blue that the model was trained with."""
    from transformers.utils import cached_file

    path = cached_file(
        source.path_or_id,
        "preprocessor_config.json",
        local_files_only=source.local,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    config = read_json(Path(path)) if path else {}
    return list(config.get("image_mean", _MEAN)), list(config.get("image_std", _STD))
