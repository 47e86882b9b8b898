"""What a picture of the scene should have looked like, as a gradient on the picture: a frozen diffusion model's opinion."""

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.distillation import Distillation, SpecifyGradient
from guidance.prompt import PromptBank
from guidance.stable_diffusion import StableDiffusion, resize

__all__ = ["Guidance", "build_guidance"]


def build_guidance(opt, device: torch.device | str) -> "Guidance":
    """The guidance that the options ask for. Raises UserError if the model cannot be had or does not know the prompt's words."""
    from guidance.memory import save_memory
    from guidance.weights import resolve

    prior = StableDiffusion.load(resolve(opt), device, half=opt.fp16)
    prompts = PromptBank(
        prior, opt.text, opt.negative, opt.view_words, opt.view_blend, opt.angle_front, opt.angle_overhead
    )
    prior.free_text_encoder()  # every wording is embedded by now
    if opt.vram_O:
        save_memory(prior)
    generator = torch.Generator(prior.device)
    if opt.seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(opt.seed) + 7919)  # not the numbers that cameras or weights are drawn from
    return Guidance(prior, prompts, Distillation(prior, opt, generator))


class Guidance:
    """Call it with a rendered picture; `loss.backward()` then puts the distillation gradient on the picture."""

    def __init__(self, prior, prompts: PromptBank, distillation: Distillation):
        self.prior, self.prompts, self.distillation = prior, prompts, distillation

    def __call__(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        unit_range: bool = True,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch of pictures in [0, 1], seen from polar and azimuth (degrees).

        With as_latent the picture has as many channels as the latents and stands for them directly, without the encoder: if unit_range it
        is a picture in [0, 1] (normals and mask), stretched to [-1, 1]; otherwise its values are latents already (a scene that renders
        latents). It is resized to the latents' size.

        The gradient is carried through the encoder here, so that the encoder's memory is free before the scene's own backward pass
        begins, and so that a gradient scaler's large factor never enters a half-precision encoder.

        Returns (loss, log): loss = 1/2 |g|^2 summed over a sample and averaged over the batch, g the gradient on the latents; it tells the
        gradient's size, not progress. The weight --lambda_guidance is the caller's. The log's values are scalars on the device.
        """
        with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
            leaf = image.detach().float().requires_grad_()
            latents = self._latents(leaf, as_latent, unit_range)
        condition = self.prompts.condition(polar, azimuth)
        gradient, log = self.distillation.gradient(latents, condition, step)
        peak = (
            gradient.abs().amax().clamp(min=1e-30)
        )  # a unit-sized gradient neither overflows nor vanishes in half precision
        (pulled,) = torch.autograd.grad(latents, leaf, gradient / peak)
        pulled = pulled * peak
        log["nonfinite"] = log["nonfinite"] + (~torch.isfinite(pulled)).sum()
        pulled = torch.nan_to_num(pulled, nan=0.0, posinf=0.0, neginf=0.0)
        value = 0.5 * len(image) * gradient.square().sum()
        return SpecifyGradient.apply(image, pulled, value), log

    @torch.no_grad()
    def debug_images(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        unit_range: bool = True,
    ) -> Float[Tensor, "B S W3 3"]:
        """What the next call with this picture will do, for looking at, side by side: the render, its noised latents decoded, and
        the method's one-step estimate of the clean picture decoded, z_0 = (z_t - sigma eps) / signal. Leaves the random numbers as
        they were.
        """
        state = self.generator_state()
        try:
            latents = self._latents(image.float(), as_latent, unit_range)
            draw = self.distillation.draw(latents, self.prompts.condition(polar, azimuth), step)
        finally:
            self.load_generator_state(state)
        eps = self.distillation.method.target(draw)
        clean = (draw.noisy - draw.sigma * eps) / draw.signal.clamp(
            min=1e-3
        )  # pure noise says nothing about the picture
        noised, estimate = self.prior.decode(draw.noisy), self.prior.decode(clean)
        render = self.prior.decode(draw.latents) if as_latent else resize(image.permute(0, 3, 1, 2), noised.shape[-1])
        return torch.cat([render, noised, estimate], dim=-1).permute(0, 2, 3, 1)

    def generator_state(self) -> Tensor:
        """The state of the generator of noise and timesteps, for the checkpoint."""
        return self.distillation.generator.get_state()

    def load_generator_state(self, state: Tensor) -> None:
        """Goes on from a saved state."""
        self.distillation.generator.set_state(state.cpu())

    def _latents(self, image: Float[Tensor, "B H W C"], as_latent: bool, unit_range: bool) -> Float[Tensor, "B c k k"]:
        picture = image.permute(0, 3, 1, 2)
        channels = self.prior.latent_channels if as_latent else 3
        if picture.shape[1] != channels:
            raise ValueError(
                f"a picture {'as latents' if as_latent else 'to encode'} has {channels} channels, not {picture.shape[1]}"
            )
        if as_latent:
            return resize(2 * picture - 1 if unit_range else picture, self.prior.latent_size)
        return self.prior.encode(picture, self.distillation.generator)
