"""InstructPix2Pix as a prior: what a picture should look like after an instruction ("make it snow") has been followed.

Its denoiser sees the picture to edit beside the noisy latents, and is guided twice (Brooks et al. 2023, equation 3):

    eps = e(0, null) + s_I (e(I, null) - e(0, null)) + s_T (e(I, text) - e(I, null))

`predict` gives e(I, c) + (s_I - 1) (e(I, null) - e(0, null)) for a wording c, so that the ordinary guidance of every method,
eps(null) + s_T (eps(text) - eps(null)), is this formula.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError
from guidance.prior import Hints, noise_levels, resize
from guidance.stable_diffusion import StableDiffusion
from guidance.weights import Source, load_pipeline
from schedule import Schedule, value_at


class InstructPix2Pix(StableDiffusion):
    """A frozen InstructPix2Pix. Needs the hints `original` [B, H, W, 3] (the picture to edit, in [0, 1]) and `null`.

    `edit_scale`: s_I, how closely the picture to edit is kept, a number or a schedule; may be set at any time. At 1 each wording is one
    sample of the denoiser's; otherwise each `ask` takes two samples more (one where the empty prompt is among its wordings).
    """

    wants = ("original", "null")
    edit_scale: float | Schedule = 1.5

    @classmethod
    def load(
        cls,
        source: Source,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        edit_scale: float | Schedule = 1.5,
    ) -> "InstructPix2Pix":
        """Reads a StableDiffusionInstructPix2PixPipeline. Raises UserError if it cannot be read or is of another kind."""
        parts = dict.fromkeys(("text_encoder", "tokenizer"))
        pipe, folder = load_pipeline("StableDiffusionInstructPix2PixPipeline", source, dtype, **parts)
        place = f"{source.flag}: {folder}"
        channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        if channels != 2 * latents:
            raise UserError(
                f"{place}: not an InstructPix2Pix: its denoiser takes {channels} channels, not twice the {latents} of its autoencoder"
            )
        prior = cls(pipe.unet, pipe.vae, *noise_levels(pipe.scheduler, place), device, source.name)
        prior.edit_scale = edit_scale
        return prior

    def predict(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
        hints: Hints | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """See `Prior.predict`, and above for what it gives. Raises ValueError if a hint is missing."""
        return self.ask(noisy, t, [embedding], hints)[0]

    @torch.no_grad()
    def ask(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        wordings: list[Float[Tensor, "B L D"]],
        hints: Hints | None = None,
    ) -> list[Float[Tensor, "B C h w"]]:
        """`predict` for several wordings, in one call of the denoiser; what the empty prompt says is asked once for all of them."""
        hints, scale = hints or {}, value_at(self.edit_scale, self.step)
        wanted = ("original",) if scale == 1 else ("original", "null")
        if missing := [name for name in wanted if name not in hints]:
            raise ValueError(f"InstructPix2Pix needs the picture to edit: the hints lack {' and '.join(missing)}")
        picture = self.encode_original(hints["original"])
        asked, pictures = list(wordings), [picture] * len(wordings)
        if scale != 1:
            null = hints["null"].to(wordings[0])
            same = [i for i, wording in enumerate(wordings) if torch.equal(wording, null)]
            at = same[0] if same else len(wordings)  # of e(I, null)
            asked += [null] * (1 if same else 2)
            pictures += [picture] * (0 if same else 1) + [torch.zeros_like(picture)]
        count = len(asked)
        rows = torch.cat([noisy] * count), torch.cat([t] * count), torch.cat(asked)
        eps = super().predict(*rows, {"picture_latents": torch.cat(pictures)}).chunk(count)
        if scale == 1:
            return list(eps)
        kept = (scale - 1) * (eps[at] - eps[-1])
        return [each + kept for each in eps[: len(wordings)]]

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        if "picture_latents" not in hints:
            hints = {"picture_latents": self.encode_original(hints["original"])}
        both = torch.cat([noisy, hints["picture_latents"]], dim=1).to(self.dtype)
        return self.denoiser(both, t, embedding.to(self.dtype)).sample

    @torch.no_grad()
    def encode_original(self, picture: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B C k k"]:
        """What the denoiser sees of the picture to edit: the mode of its latents, not scaled."""
        picture = 2 * resize(picture.float().permute(0, 3, 1, 2), self.image_size) - 1
        with torch.autocast(self.device.type, enabled=False):
            encoded = self.autoencoder.encode(picture.to(self.autoencoder.dtype))
        posterior = getattr(encoded, "latent_dist", None)
        return (encoded.latents if posterior is None else posterior.mode()).float()
