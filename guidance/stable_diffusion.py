"""Stable Diffusion as a prior: latents, text embeddings and noise estimates of any diffusers StableDiffusionPipeline folder.

Frozen networks, in half precision on CUDA (if wanted) and in float32 on a CPU; everything that goes in or comes out is float32.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError
from guidance.weights import Source, fetch, quiet, variant_of


def to_epsilon(
    output: Float[Tensor, "B C h w"],
    noisy: Float[Tensor, "B C h w"],
    abar: Float[Tensor, "B"],
    kind: str,
) -> Float[Tensor, "B C h w"]:
    """The noise estimate that a network's output stands for, given z_t = a z_0 + s eps with a = sqrt(abar), s = sqrt(1 - abar).

    kind: "epsilon" (eps itself), "v_prediction" (v = a eps - s z_0, so eps = a v + s z_t), "sample" (z_0, so eps = (z_t - a z_0) / s).
    """
    a, s = abar.sqrt()[:, None, None, None], (1 - abar).sqrt()[:, None, None, None]
    if kind == "v_prediction":
        return a * output + s * noisy
    if kind == "sample":
        return (noisy - a * output) / s
    return output


class StableDiffusion:
    """A frozen text-to-image latent diffusion model.

    Attributes: `image_size` (pixels), `latent_size`, `latent_channels`, `num_timesteps`, `alphas_cumprod` [T], `device`, `dtype`.
    """

    def __init__(self, unet, vae, text_encoder, tokenizer, scheduler, device: torch.device | str):
        self.device = torch.device(device)
        self.unet, self.vae, self.text_encoder = (
            module.requires_grad_(False).eval().to(self.device) for module in (unet, vae, text_encoder)
        )
        self.tokenizer = tokenizer
        self.dtype = unet.dtype
        self.max_batch = 0  # samples in one call of the denoiser; 0: all at once (see memory.py)
        self.alphas_cumprod: Float[Tensor, "T"] = scheduler.alphas_cumprod.to(self.device, torch.float32)
        self.num_timesteps = len(self.alphas_cumprod)
        self.prediction_type = scheduler.config.get("prediction_type", "epsilon")
        size = unet.config.sample_size
        self.latent_size = size if isinstance(size, int) else max(size)
        self.latent_channels = vae.config.latent_channels
        self.image_size = self.latent_size * 2 ** (len(vae.config.block_out_channels) - 1)
        # AutoencoderTiny has both factors as well; its own latents already have about unit spread, so its published factor is 1.
        self.scaling = float(vae.config.scaling_factor)
        self.shift = float(vae.config.get("shift_factor") or 0.0)

    @classmethod
    def load(cls, source: Source, device: torch.device | str, half: bool = True) -> "StableDiffusion":
        """Reads a model from where `weights.resolve` found it, in half precision on CUDA unless `half` is off.

        Raises UserError if it cannot be read or is of another kind.
        """
        half = half and torch.device(device).type == "cuda"
        folder = fetch(source, half)
        try:
            with quiet(), torch.random.fork_rng([]):  # initial weights, soon replaced, must not move the scene's
                from diffusers import StableDiffusionPipeline

                pipe = StableDiffusionPipeline.from_pretrained(
                    str(folder),
                    variant=variant_of(folder, half),
                    dtype=torch.float16 if half else torch.float32,
                    local_files_only=True,
                    safety_checker=None,
                    feature_extractor=None,
                    requires_safety_checker=False,
                )
        except Exception as error:  # broken files fail in many ways, all of them the files' fault
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"{source.flag}: {folder} cannot be read as a Stable Diffusion model: {reason}") from error
        channels, latents = pipe.unet.config.in_channels, pipe.vae.config.latent_channels
        kind = pipe.scheduler.config.get("prediction_type", "epsilon")
        known = kind in ("epsilon", "v_prediction", "sample") and hasattr(pipe.scheduler, "alphas_cumprod")
        if channels != latents or not known:
            raise UserError(
                f"{source.flag}: {folder} is not a text-to-image model ({kind}; its denoiser takes {channels} channels, its "
                f"autoencoder gives {latents}); inpainting, depth and flow models cannot be used here"
            )
        return cls(pipe.unet, pipe.vae, pipe.text_encoder, pipe.tokenizer, pipe.scheduler, device)

    # -- text ------------------------------------------------------------------------------------------------------

    def excess(self, text: str) -> int:
        """How many tokens of a text do not fit into the text encoder; 0 or less if all do."""
        return len(self.tokenizer(text, verbose=False).input_ids) - self.tokenizer.model_max_length

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Float[Tensor, "n L D"]:
        """The text encoder's last hidden states; longer texts are cut at its length."""
        if self.text_encoder is None:
            raise RuntimeError("the text encoder has been freed: embed all prompts before free_text_encoder()")
        length = self.tokenizer.model_max_length
        tokens = self.tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        masked = getattr(self.text_encoder.config, "use_attention_mask", False)
        mask = tokens.attention_mask.to(self.device) if masked else None
        with torch.autocast(self.device.type, enabled=False):
            return self.text_encoder(tokens.input_ids.to(self.device), attention_mask=mask)[0].float()

    def free_text_encoder(self) -> None:
        """Drops the text encoder, a third of a big model's weights; `embed` cannot be called afterwards."""
        self.text_encoder = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    # -- pictures --------------------------------------------------------------------------------------------------

    def encode(
        self, image: Float[Tensor, "B 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B C k k"]:
        """Latents of pictures in [0, 1], resized to `image_size`; differentiable with respect to the image.

        z = scaling (sample - shift), where the sample is drawn from AutoencoderKL's posterior (with `generator`) and is
        AutoencoderTiny's output itself: what the denoiser was trained on.
        """
        image = resize(image, self.image_size)
        with torch.autocast(self.device.type, enabled=False):
            encoded = self.vae.encode((2 * image - 1).to(self.vae.dtype))
            posterior = getattr(encoded, "latent_dist", None)
            latents = encoded.latents if posterior is None else posterior.sample(generator)
        return (latents.float() - self.shift) * self.scaling

    def decode(self, latents: Float[Tensor, "B C k l"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures in [0, 1] of latents: the inverse of `encode`'s scaling, then the decoder."""
        with torch.autocast(self.device.type, enabled=False):
            image = self.vae.decode((latents / self.scaling + self.shift).to(self.vae.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    # -- noise -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
    ) -> Float[Tensor, "B C h w"]:
        """The noise in latents at timestep t (0 .. T - 1), whatever the network was trained to predict."""
        count = self.max_batch or len(noisy)
        pieces = [slice(start, start + count) for start in range(0, len(noisy), count)]
        with torch.autocast(self.device.type, enabled=False):
            output = torch.cat(
                [self.unet(noisy[p].to(self.dtype), t[p], embedding[p].to(self.dtype)).sample.float() for p in pieces]
            )
        return to_epsilon(output, noisy.float(), self.alphas_cumprod[t], self.prediction_type)


def resize(image: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B C k k"]:
    """Bilinear resizing to a square of `size`; smaller pictures are averaged down, not sampled."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    shrinks = height > size or width > size
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)
