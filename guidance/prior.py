"""What every diffusion prior is: frozen networks that estimate the noise in a noisy picture (or its latents), told a prompt.

All priors speak one language, whatever their networks were trained to predict:

    z_t = signal[t] z_0 + sigma[t] noise          t = 0 .. T - 1, the more the noisier
    predict(z_t, t, embedding) -> eps             an estimate of the noise

Variance-preserving models have signal = sqrt(abar), sigma = sqrt(1 - abar); flow models signal = 1 - sigma. A prior of another family is
a subclass that says how to read it and how to call its network; stable_diffusion.py is the shortest. Text encoders are in text.py.
"""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from errors import UserError
from ranks import mine

Hints = dict[str, Tensor]
"""What a prior may know of the pictures besides the prompt, one row per sample: `c2w` [B, 4, 4], `normal` [B, H, W, 3] (world space, 0
where there is nothing), `depth` and `alpha` [B, H, W, 1], `picture` [B, H, W, 3] (the render itself), `original` [B, H, W, 3] (a
picture to edit), `control` [B, 3, k, k] (what a ControlNet is shown), `null` [B, L, D] (the embedding of the empty prompt)."""


class Prior:
    """A frozen diffusion model; everything that goes in or comes out is float32.

    Attributes: `image_size` (pixels a side of what `encode` takes), `latent_size`, `latent_channels`, `num_timesteps`, `signal` and `sigma`
    [T], `device`, `dtype` (of the networks); `denoiser` and `autoencoder` (None if the model works on pixels); `view_group`: how many
    consecutive samples of a batch are views of one scene that the denoiser sees together (1: each by itself).
    """

    view_group = 1
    wants: tuple[str, ...] = ()  # the hints that it looks at
    step = 0  # of the run, for settings of a prior that are schedules

    def __init__(
        self,
        denoiser: nn.Module,
        autoencoder: nn.Module | None,
        signal: Float[Tensor, "T"],
        sigma: Float[Tensor, "T"],
        prediction_type: str,
        device: torch.device | str,
        name: str = "",
    ):
        """prediction_type: see `to_epsilon`; name: identifies the weights, for the cache of embeddings."""
        self.device, self.name = torch.device(device), name
        self.denoiser = denoiser.requires_grad_(False).eval().to(self.device)
        self.autoencoder = None
        self.dtype = denoiser.dtype
        self.max_batch = 0  # samples in one call of the denoiser; 0: all at once (see memory.py)
        self.signal, self.sigma = (table.to(self.device, torch.float32) for table in (signal, sigma))
        self.num_timesteps, self.prediction_type = len(signal), prediction_type
        size = denoiser.config.sample_size
        self.latent_size = size if isinstance(size, int) else max(size)
        self.latent_channels, self.image_size = denoiser.config.in_channels, self.latent_size
        if autoencoder is not None:
            self.use_autoencoder(autoencoder)

    def use_autoencoder(self, autoencoder: nn.Module) -> None:
        """From now on pictures go through this one (AutoencoderKL or AutoencoderTiny)."""
        config = autoencoder.config
        self.autoencoder = autoencoder.requires_grad_(False).eval().to(self.device)
        self.latent_channels = config.latent_channels
        self.image_size = self.latent_size * 2 ** (len(_widths(config)) - 1)
        # AutoencoderTiny has both factors as well; its own latents already have about unit spread, so its published factor is 1.
        self.scaling = float(config.scaling_factor)
        self.shift = float(config.get("shift_factor") or 0.0)

    # -- pictures --------------------------------------------------------------------------------------------------

    def encode(
        self, image: Float[Tensor, "B 3 h w"], generator: torch.Generator | None = None
    ) -> Float[Tensor, "B C k k"]:
        """What is noised, of pictures in [0, 1] resized to `image_size`; differentiable with respect to the image.

        Latents z = scaling (sample - shift), where the sample is drawn from AutoencoderKL's posterior (with `generator`) and is
        AutoencoderTiny's output itself: what the denoiser was trained on. Without an autoencoder the picture itself, in [-1, 1].
        """
        image = 2 * resize(image, self.image_size) - 1
        if self.autoencoder is None:
            return image
        with torch.autocast(self.device.type, enabled=False):
            encoded = self.autoencoder.encode(image.to(self.autoencoder.dtype))
            posterior = getattr(encoded, "latent_dist", None)
            if posterior is None:
                latents = encoded.latents
            else:
                shape, source = posterior.mean.shape[1:], {"generator": generator, "device": image.device}
                noise = mine(lambda count: torch.randn(count, *shape, **source), len(image))
                latents = posterior.mean + posterior.std * noise.to(posterior.mean)
        return (latents.float() - self.shift) * self.scaling

    def decode(self, latents: Float[Tensor, "B C k l"]) -> Float[Tensor, "B 3 h w"]:
        """Pictures in [0, 1] of latents: the inverse of `encode`'s scaling, then the decoder."""
        if self.autoencoder is None:
            return (latents / 2 + 0.5).clamp(0, 1)
        with torch.autocast(self.device.type, enabled=False):
            image = self.autoencoder.decode((latents / self.scaling + self.shift).to(self.autoencoder.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    # -- noise -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predict(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        embedding: Float[Tensor, "B L D"],
        hints: Hints | None = None,
    ) -> Float[Tensor, "B C h w"]:
        """The noise in what `encode` gave, noised to timestep t (0 .. T - 1), whatever the network was trained to predict."""
        outputs = []
        with torch.autocast(self.device.type, enabled=False):
            for piece in self.pieces(len(noisy)):
                some = {name: hint[piece] for name, hint in hints.items()} if hints else {}
                outputs.append(self.denoise(noisy[piece], t[piece], embedding[piece], some).float())
        signal, sigma = (table[t][:, None, None, None] for table in (self.signal, self.sigma))
        return to_epsilon(torch.cat(outputs), noisy.float(), signal, sigma, self.prediction_type)

    def pieces(self, count: int) -> list[slice]:
        """The samples of one call of the denoiser each: `max_batch` at most, whole view groups."""
        group = self.view_group
        size = max(self.max_batch // group * group, group) if self.max_batch else count
        return [slice(start, start + size) for start in range(0, count, size)]

    def ask(
        self,
        noisy: Float[Tensor, "B C h w"],
        t: Int[Tensor, "B"],
        wordings: list[Float[Tensor, "B L D"]],
        hints: Hints | None = None,
    ) -> list[Float[Tensor, "B C h w"]]:
        """`predict` for several wordings of the prompt, in one call of the denoiser."""
        n = len(wordings)
        repeated = {name: torch.cat([hint] * n) for name, hint in hints.items()} if hints else None
        eps = self.predict(torch.cat([noisy] * n), torch.cat([t] * n), torch.cat(wordings), repeated)
        return list(eps.chunk(n))

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        """The network's own output [B, C, h, w]; everything comes in float32."""
        raise NotImplementedError


def noise_levels(scheduler, place: str) -> tuple[Float[Tensor, "T"], Float[Tensor, "T"], str]:
    """(signal, sigma, prediction type) of a variance-preserving model's scheduler: sqrt(abar), sqrt(1 - abar).

    Raises UserError, beginning with `place`, for a scheduler that tells no abar or a prediction that `to_epsilon` does not know.
    """
    kind = scheduler.config.get("prediction_type", "epsilon")
    abar = getattr(scheduler, "alphas_cumprod", None)
    if kind not in ("epsilon", "v_prediction", "sample") or abar is None:
        raise UserError(
            f"{place}: not a model that can be used ({type(scheduler).__name__}, {kind}): its noise must be variance-preserving and its "
            "prediction epsilon, v_prediction or sample"
        )
    return abar.sqrt(), (1 - abar).sqrt(), kind


def to_epsilon(
    output: Float[Tensor, "B C h w"],
    noisy: Float[Tensor, "B C h w"],
    signal: Float[Tensor, "B 1 1 1"],
    sigma: Float[Tensor, "B 1 1 1"],
    kind: str,
) -> Float[Tensor, "B C h w"]:
    """The noise estimate that a network's output stands for, given z_t = signal z_0 + sigma eps.

    kind: "epsilon" (eps itself); "v_prediction" (v = signal eps - sigma z_0 where signal^2 + sigma^2 = 1, so eps = signal v + sigma z_t);
    "sample" (z_0); "flow_prediction" (v = eps - z_0 where signal + sigma = 1, so eps = z_t + signal v).
    """
    if kind == "v_prediction":
        return signal * output + sigma * noisy
    if kind == "flow_prediction":
        return noisy + signal * output
    if kind == "sample":
        return (noisy - signal * output) / sigma
    return output


def resize(image: Float[Tensor, "B C h w"], size: int) -> Float[Tensor, "B C k k"]:
    """Bilinear resizing to a square of `size`; smaller pictures are averaged down, not sampled."""
    height, width = image.shape[-2:]
    if (height, width) == (size, size):
        return image
    shrinks = height > size or width > size
    return F.interpolate(image, (size, size), mode="bilinear", align_corners=False, antialias=shrinks)


def _widths(config) -> list[int]:
    return config.get("block_out_channels") or config.get("encoder_block_out_channels")
