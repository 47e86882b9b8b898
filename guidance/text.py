"""Text encoders, apart from the priors: they are read, used once and freed before the denoiser is read, for some are larger than it.

An embedding is one tensor [L, D] for a text, one row per token; a pooled vector, where the model wants one, is one row more.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from guidance.adapters import as_learned, put_on_text_encoders
from guidance.weights import Source, fingerprint, load_pipeline, read_json


class TextEncoder:
    """Reads the encoder at the first `embed`, and keeps it until `close`. `name` identifies the weights."""

    kind = "StableDiffusionPipeline"
    left_out: tuple[str, ...] = ("unet", "vae")  # components that are not wanted here
    encoders: tuple[str, ...] = ("text_encoder",)

    def __init__(self, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32):
        """dtype: of the weights; what comes out is float32."""
        self.source, self.device, self.dtype, self.pipe = source, torch.device(device), dtype, None

    @property
    def name(self) -> str:
        half = self.dtype != torch.float32
        return f"{fingerprint(self.source, half)} {self.dtype}"

    def open(self):
        """The pipeline with the text encoder alone."""
        if self.pipe is None:
            self.pipe, self.folder = load_pipeline(self.kind, self.source, self.dtype, **dict.fromkeys(self.left_out))
            if self.source.adapters:
                put_on_text_encoders(self.pipe, self.source.adapters, self.kind, self.encoders)
            for part in self.encoders:
                encoder = getattr(self.pipe, part)
                if encoder is not None:
                    encoder.requires_grad_(False).eval().to(self.device)
        return self.pipe

    def close(self) -> None:
        """Drops the encoder; the next `embed` would read it again."""
        self.pipe = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Float[Tensor, "n L D"]:
        """What the denoiser is told for each text, float32; longer texts are cut."""
        with torch.autocast(self.device.type, enabled=False):
            read = [as_learned(text, self.source.adapters) for text in texts]
            return self.encode(self.open(), read).float()

    def excess(self, text: str) -> int:
        """How many tokens of a text do not fit into the text encoder; 0 or less if all do."""
        tokenizer = self.open().tokenizer
        return _count(tokenizer, as_learned(text, self.source.adapters)) - tokenizer.model_max_length

    def encode(self, pipe, texts: list[str]) -> Float[Tensor, "n L D"]:
        """`embed` in the encoder's own precision."""
        raise NotImplementedError

    def states(self, tokenizer, encoder: nn.Module, texts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """(CLIP's hidden states before the last layer [n, L, D], its projected vector of the whole text or, without a projection, its
        last hidden states)."""
        output = encoder(_pad(tokenizer, texts, length)[0].to(self.device), output_hidden_states=True)
        return output.hidden_states[-2], output[0]


class ClipText(TextEncoder):
    """Stable Diffusion 1.x and 2.x: CLIP's last hidden states."""

    def encode(self, pipe, texts: list[str]) -> Float[Tensor, "n L D"]:
        ids, mask = _pad(pipe.tokenizer, texts, pipe.tokenizer.model_max_length)
        masked = getattr(pipe.text_encoder.config, "use_attention_mask", False)
        return pipe.text_encoder(ids.to(self.device), attention_mask=mask.to(self.device) if masked else None)[0]


class SDXLText(TextEncoder):
    """Stable Diffusion XL: two CLIPs side by side, each before its last layer, and the pooled vector of the second.

    The empty text is all zeros where the pipeline says so (`force_zeros_for_empty_prompt`): the denoiser was trained with that.
    """

    kind = "StableDiffusionXLPipeline"
    encoders = ("text_encoder", "text_encoder_2")

    def excess(self, text: str) -> int:
        pipe = self.open()
        return max(_count(each, text) - each.model_max_length for each in (pipe.tokenizer, pipe.tokenizer_2))

    def encode(self, pipe, texts: list[str]) -> Float[Tensor, "n L D"]:
        length = pipe.tokenizer.model_max_length
        first, _ = self.states(pipe.tokenizer, pipe.text_encoder, texts, length)
        second, pooled = self.states(pipe.tokenizer_2, pipe.text_encoder_2, texts, length)
        rows = join_pooled(torch.cat([first, second], -1), pooled)
        if pipe.config.force_zeros_for_empty_prompt:
            rows[[not text.strip() for text in texts]] = 0
        return rows


class SD3Text(TextEncoder):
    """Stable Diffusion 3: two CLIPs side by side, padded to T5's width; then T5's tokens; then the pooled vectors of both CLIPs.

    Where there is no T5 its tokens are zeros, which the denoiser was trained with as well.
    """

    kind = "StableDiffusion3Pipeline"
    left_out = ("transformer", "vae")
    encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    T5_LENGTH = 256  # as its own pipeline

    def excess(self, text: str) -> int:
        pipe = self.open()
        clip = super().excess(text)  # T5 reads on where the CLIPs have stopped
        return clip if pipe.text_encoder_3 is None else min(clip, _count(pipe.tokenizer_3, text) - self.T5_LENGTH)

    def encode(self, pipe, texts: list[str]) -> Float[Tensor, "n L D"]:
        length = pipe.tokenizer.model_max_length
        first, pooled = self.states(pipe.tokenizer, pipe.text_encoder, texts, length)
        second, pooled_2 = self.states(pipe.tokenizer_2, pipe.text_encoder_2, texts, length)
        clip = torch.cat([first, second], -1)
        width = read_json(self.folder / "transformer" / "config.json")["joint_attention_dim"]
        if pipe.text_encoder_3 is None:
            t5 = clip.new_zeros(len(texts), self.T5_LENGTH, width)
        else:
            ids, _ = _pad(pipe.tokenizer_3, texts, self.T5_LENGTH)  # padding is read as text: so it was trained
            t5 = pipe.text_encoder_3(ids.to(self.device))[0]
        rows = torch.cat([F.pad(clip, (0, width - clip.shape[-1])), t5], 1)
        return join_pooled(rows, torch.cat([pooled, pooled_2], -1))


class T5Text(TextEncoder):
    """DeepFloyd IF: T5's last hidden states, of the text in small letters."""

    kind = "IFPipeline"  # stage II's encoder is read the same way
    left_out = ("unet",)
    LENGTH = 77  # T5 takes any length; IF was trained with this one

    def excess(self, text: str) -> int:
        return _count(self.open().tokenizer, text.lower().strip()) - self.LENGTH

    def encode(self, pipe, texts: list[str]) -> Float[Tensor, "n L D"]:
        ids, mask = _pad(pipe.tokenizer, [text.lower().strip() for text in texts], self.LENGTH)
        return pipe.text_encoder(ids.to(self.device), attention_mask=mask.to(self.device))[0]


def join_pooled(tokens: Float[Tensor, "n L D"], pooled: Float[Tensor, "n P"]) -> Float[Tensor, "n L1 D"]:
    """One row more per text: the pooled vector (P <= D), filled up with zeros."""
    return torch.cat([tokens, F.pad(pooled, (0, tokens.shape[-1] - pooled.shape[-1]))[:, None]], 1)


def split_pooled(embedding: Float[Tensor, "n L1 D"], width: int) -> tuple[Float[Tensor, "n L D"], Float[Tensor, "n P"]]:
    """What `join_pooled` joined; width: P."""
    return embedding[:, :-1], embedding[:, -1, :width]


def _pad(tokenizer, texts: list[str], length: int) -> tuple[Int[Tensor, "n L"], Int[Tensor, "n L"]]:
    """(tokens, which of them are no padding), cut or filled up to `length`."""
    tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return tokens.input_ids, tokens.attention_mask


def _count(tokenizer, text: str) -> int:
    return len(tokenizer(text, verbose=False).input_ids)
