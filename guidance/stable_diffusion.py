"""Stable Diffusion 1.x and 2.x as a prior: any diffusers StableDiffusionPipeline folder, predicting eps, v or the clean latents."""

import torch
from torch import Tensor, nn

from errors import UserError
from guidance.prior import Hints, Prior, noise_levels
from guidance.weights import Source, load_pipeline


class StableDiffusion(Prior):
    """A frozen text-to-image latent diffusion model; see `Prior`."""

    @classmethod
    def load(cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "StableDiffusion":
        """Reads a model from where `weights.resolve` found it. Raises UserError if it cannot be read or is of another kind."""
        parts = dict.fromkeys(("text_encoder", "tokenizer"))
        pipe, folder = load_pipeline("StableDiffusionPipeline", source, dtype, **parts)
        place = f"{source.flag}: {folder}"
        check_channels(pipe.unet, pipe.vae, place)
        return cls(pipe.unet, pipe.vae, *noise_levels(pipe.scheduler, place), device, source.name)

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        return self.denoiser(noisy.to(self.dtype), t, embedding.to(self.dtype)).sample


def check_channels(denoiser: nn.Module, autoencoder: nn.Module, place: str) -> None:
    """Raises UserError, beginning with `place`, if the denoiser takes more than noisy latents."""
    channels, latents = denoiser.config.in_channels, autoencoder.config.latent_channels
    if channels != latents:
        raise UserError(
            f"{place}: not a text-to-image model (its denoiser takes {channels} channels, its autoencoder gives {latents}); "
            "inpainting and depth models cannot be used here"
        )
