"""CLIP's opinion beside the diffusion model's: how well a picture and the prompt go together (CLIP guidance, as in Dream Fields).

The processor's work (resizing, normalising) is done in torch, so that a gradient reaches the picture.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say
from guidance.parts import part_source, read_part
from guidance.views import view_weights
from guidance.weights import Source, check_vocabulary, clip_words, quiet, read_json

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
