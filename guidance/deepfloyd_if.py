"""DeepFloyd IF as a prior (after Saharia et al. 2022): diffusion of the pixels themselves, with a T5 text encoder.

Stage I draws small pictures (64 x 64; tiny-if 32 x 32). Stage II is told a small picture and draws it four times as large. Both predict the
noise and its variance; the variance is of no use here.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from guidance.prior import Hints, Prior, noise_levels, resize
from guidance.weights import Source, load_pipeline


class DeepFloydIF(Prior):
    """A frozen stage I; see `Prior`."""

    @classmethod
    def load(cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "DeepFloydIF":
        """Reads a model from where `weights.resolve` found it. Raises UserError if it cannot be read or is of another kind."""
        pipe, folder = load_pipeline("IFPipeline", source, dtype, text_encoder=None, tokenizer=None)
        levels = noise_levels(pipe.scheduler, f"{source.flag}: {folder}")
        return cls(pipe.unet, None, *levels, device, source.name)

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        output = self.denoiser(noisy.to(self.dtype), t, embedding.to(self.dtype)).sample
        return output[:, : self.latent_channels]


class DeepFloydIFUpscaler(Prior):
    """A frozen stage II; see `Prior`.

    It knows the render itself (the hint `picture`) at a quarter of its own size, with some noise on it: noise level `LEVEL`, the noise
    always the same, so that all wordings of one question, and a question asked again, get the same picture.
    """

    wants = ("picture",)
    LEVEL = 250  # as DeepFloyd's own pipeline

    def __init__(self, *args, augmentation: tuple[float, float] = (1.0, 0.0)):
        """augmentation: (signal, sigma) of the known picture; the rest as `Prior`."""
        super().__init__(*args)
        self.latent_channels = 3  # the denoiser's other three are the known picture's
        self.augmentation = augmentation
        size = self.image_size
        self.grain = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(self.device)

    @classmethod
    def load(
        cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32
    ) -> "DeepFloydIFUpscaler":
        """Reads a model from where `weights.resolve` found it. Raises UserError if it cannot be read or is of another kind."""
        pipe, folder = load_pipeline("IFSuperResolutionPipeline", source, dtype, text_encoder=None, tokenizer=None)
        place = f"{source.flag}: {folder}"
        signal, sigma, _ = noise_levels(pipe.image_noising_scheduler, place)
        augmentation = float(signal[cls.LEVEL]), float(sigma[cls.LEVEL])
        levels = noise_levels(pipe.scheduler, place)
        return cls(pipe.unet, None, *levels, device, source.name, augmentation=augmentation)

    def known(self, picture: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B 3 k k"]:
        """What the denoiser is told of the render: a quarter of the size, enlarged again, with noise; in about [-1, 1]."""
        size = self.image_size
        small = resize(picture.permute(0, 3, 1, 2).float(), size // 4)
        large = F.interpolate(2 * small - 1, (size, size), mode="bilinear", align_corners=True)
        signal, sigma = self.augmentation
        return signal * large + sigma * self.grain

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        if "picture" not in hints:
            raise ValueError("stage II of DeepFloyd IF enlarges a picture: it needs the hint `picture`")
        both = torch.cat([noisy, self.known(hints["picture"])], 1).to(self.dtype)
        level = torch.full_like(t, self.LEVEL)
        output = self.denoiser(both, t, embedding.to(self.dtype), class_labels=level).sample
        return output[:, : self.latent_channels]
