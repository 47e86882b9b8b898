"""Stable Diffusion XL as a prior (Podell et al. 2023): two text encoders, and a denoiser that is told the size of the picture."""

import torch
from torch import Tensor

from guidance.prior import Hints, Prior, noise_levels
from guidance.stable_diffusion import check_channels
from guidance.text import split_pooled
from guidance.weights import Source, load_pipeline


class StableDiffusionXL(Prior):
    """A frozen SDXL base model; see `Prior`."""

    @classmethod
    def load(
        cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "StableDiffusionXL":
        """Reads a model from where `weights.resolve` found it. Raises UserError if it cannot be read or is of another kind."""
        parts = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
        pipe, folder = load_pipeline("StableDiffusionXLPipeline", source, dtype, **parts)
        place = f"{source.flag}: {folder}"
        check_channels(pipe.unet, pipe.vae, place)
        if dtype == torch.float16 and pipe.vae.config.force_upcast:
            pipe.vae.float()  # its activations pass 65504
        return cls(pipe.unet, pipe.vae, *noise_levels(pipe.scheduler, place), device, source.name)

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        config, size = self.denoiser.config, self.image_size
        # size of the original, corner and size of what was cut out of it: a picture as it was taken
        told = [size, size, 0, 0, size, size]
        pooled_width = config.projection_class_embeddings_input_dim - len(told) * config.addition_time_embed_dim
        tokens, pooled = split_pooled(embedding.to(self.dtype), pooled_width)
        added = {"text_embeds": pooled, "time_ids": noisy.new_tensor(told, dtype=self.dtype).expand(len(noisy), -1)}
        return self.denoiser(noisy.to(self.dtype), t, tokens, added_cond_kwargs=added).sample
