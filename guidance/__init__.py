"""What a picture of the scene should have looked like, as a gradient on the picture: a frozen diffusion model's opinion."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError
from guidance.distillation import Distillation, Settings, SpecifyGradient
from guidance.prior import Hints, resize
from guidance.prompt import PromptBank, blend_of
from schedule import value_at

__all__ = ["Guidance", "build_guidance"]


def build_guidance(opt, device: torch.device | str) -> "Guidance":
    """The guidance that the options ask for. Raises UserError if the model cannot be had or does not know the prompt's words."""
    from guidance.embeddings import CachedEncoder
    from guidance.memory import apply, precision, tiny_autoencoder
    from guidance.methods import METHODS
    from guidance.priors import load_prior, text_encoder
    from guidance.weights import resolve

    source, dtype = resolve(opt), precision(opt, device)
    encoder = CachedEncoder(text_encoder(source, device, dtype))
    prompts = build_prompts(opt, encoder, device)
    encoder.close()  # every wording is embedded by now: the text encoder never meets the denoiser
    prior = load_prior(source, device, dtype, opt)
    if opt.latent_iter_ratio > 0 and prior.latent_channels != 4:
        raise UserError(
            f"--latent_iter_ratio {opt.latent_iter_ratio:g}: normals and opacity cannot stand for this model's "
            f"{prior.latent_channels} channels; use --latent_iter_ratio 0"
        )
    if opt.taesd:
        tiny_autoencoder(opt, prior)
    generator = torch.Generator(prior.device)
    if opt.seed is None:
        generator.seed()
    else:
        generator.manual_seed(int(opt.seed) + 7919)  # not the numbers that cameras or weights are drawn from
    method, adaptation = METHODS[opt.distill], None
    if method.learns and "original" in prior.wants:
        raise UserError(f"--distill {opt.distill}: cannot learn from a model that edits pictures; use another method")
    if method.learns:
        from guidance.lora import WARM_UP, Adaptation

        learning = torch.Generator(prior.device).manual_seed(generator.initial_seed() + 2)
        warm_up = min(WARM_UP, opt.iters // 50)  # the same share of a short run as of a published one
        adaptation = Adaptation(prior, opt.lora_rank, opt.lora_lr, learning, warm_up)
    apply(prior, opt)
    distillation = Distillation(prior, Settings.of(opt), generator, method, adaptation)
    clip = None
    if opt.lambda_clip.max() > 0:
        from guidance.clip import build_clip

        clip = build_clip(opt, prompts, device, dtype)
    return Guidance(prior, prompts, distillation, opt.lambda_image, clip, opt.lambda_clip, opt.lambda_guidance)


def build_prompts(opt, encoder, device: torch.device | str) -> PromptBank:
    """Every wording of the prompt that the options need, embedded."""
    from guidance.perpneg import PerpNeg

    perpneg = PerpNeg(opt.negative_w, opt.front_decay_factor, opt.side_decay_factor) if opt.perpneg else None
    debias = None
    if opt.debias_prompt:
        from guidance.debias import debiased

        def debias(text: str, views: tuple[str, ...]) -> list[str]:
            return debiased(text, views, opt.debias_model, device)

    return PromptBank(
        encoder,
        opt.text,
        opt.negative,
        opt.view_words,
        opt.view_blend,
        opt.angle_front,
        opt.angle_overhead,
        source=opt.source if opt.distill == "bridge" else "",
        perpneg=perpneg,
        debias=debias,
        blend=blend_of(opt),
    )


class Guidance:
    """Call it with a rendered picture; `loss.backward()` then puts the distillation gradient on the picture."""

    def __init__(
        self,
        prior,
        prompts: PromptBank,
        distillation: Distillation,
        lambda_image=0.0,
        clip=None,
        lambda_clip=0.0,
        weight=1.0,
    ):
        """lambda_image: weight of the image-space term; clip: a second opinion (clip.py) with weight lambda_clip; weight: of the distillation;
        numbers or schedules."""
        self.weight = weight
        self.prior, self.prompts, self.distillation = prior, prompts, distillation
        self.lambda_image, self.clip, self.lambda_clip = lambda_image, clip, lambda_clip

    def __call__(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        unit_range: bool = True,
        hints: Hints | None = None,
    ) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
        """The loss of a batch of pictures in [0, 1], seen from polar and azimuth (degrees); hints: what else is known of them (prior.py).

        With as_latent the picture has as many channels as the latents and stands for them directly, without the encoder: if unit_range it
        is a picture in [0, 1] (normals and mask), stretched to [-1, 1]; otherwise its values are latents already (a scene that renders
        latents). It is resized to the latents' size.

        The gradient is carried through the encoder here, so that the encoder's memory is free before the scene's own backward pass
        begins, and so that a gradient scaler's large factor never enters a half-precision encoder.

        Returns (loss, log): loss = 1/2 |g|^2 summed over a sample and averaged over the batch, g the gradient on the latents; it tells the
        gradient's size, not progress. It is multiplied by the weight. The log's values are scalars on the device.
        """
        weight = 0.0 if as_latent else value_at(self.lambda_image, step)
        with torch.enable_grad(), torch.autocast(image.device.type, enabled=False):
            leaf = image.detach().float().requires_grad_()
            latents = self._latents(leaf, as_latent, unit_range)
            picture = resize(leaf.permute(0, 3, 1, 2), self.prior.image_size) if weight > 0 else None
        condition = self._condition(image, polar, azimuth, as_latent, hints)
        gradient, log, draw = self.distillation.gradient(latents, condition, step)
        outputs, gradients = [latents], [gradient]
        if picture is not None:
            outputs.append(picture)
            gradients.append(weight * self._picture_gradient(picture.detach(), draw) / len(image))
        peak = (
            torch.stack([g.abs().amax() for g in gradients]).amax().clamp(min=1e-30)
        )  # a unit-sized gradient neither overflows nor vanishes in half precision
        (pulled,) = torch.autograd.grad(outputs, leaf, [g / peak for g in gradients])
        pulled = pulled * peak
        log["nonfinite"] = log["nonfinite"] + (~torch.isfinite(pulled)).sum()
        pulled = torch.nan_to_num(pulled, nan=0.0, posinf=0.0, neginf=0.0)
        value = 0.5 * len(image) * gradient.square().sum()
        share = value_at(self.weight, step)
        loss = SpecifyGradient.apply(image, share * pulled, share * value)
        if self.clip is not None and not as_latent and (share := value_at(self.lambda_clip, step)) > 0:
            opinion = self.clip(image, polar, azimuth)
            log["clip"] = opinion.detach()
            loss = loss + share * opinion
        return loss, log

    @torch.no_grad()
    def debug_images(
        self,
        image: Float[Tensor, "B H W C"],
        polar: Float[Tensor, "B"],
        azimuth: Float[Tensor, "B"],
        step: int,
        as_latent: bool = False,
        unit_range: bool = True,
        hints: Hints | None = None,
    ) -> Float[Tensor, "B S W3 3"]:
        """What the next call with this picture will do, for looking at, side by side: the render, its noised latents decoded, and
        the guided one-step estimate of the clean picture decoded, z_0 = (z_t - sigma eps) / signal. Leaves the random numbers as
        they were.
        """
        state = self.distillation.generator.get_state()
        try:
            latents = self._latents(image.float(), as_latent, unit_range)
            condition = self._condition(image, polar, azimuth, as_latent, hints)
            draw = self.distillation.draw(latents, condition, step)
        finally:
            self.distillation.generator.set_state(state)
        noised = self.prior.decode(draw.noisy)
        estimate = self.prior.decode(draw.clean(draw.noisy, draw.guided(), draw.t))
        render = self.prior.decode(draw.latents) if as_latent else resize(image.permute(0, 3, 1, 2), noised.shape[-1])
        return torch.cat([render, noised, estimate], dim=-1).permute(0, 2, 3, 1)

    def follow(self, opt) -> None:
        """Prompt and strengths as these options say, the model as it is. UserError if it does not know the words; then nothing has changed."""
        from guidance.embeddings import CachedEncoder
        from guidance.memory import precision
        from guidance.priors import text_encoder
        from guidance.weights import resolve

        encoder = CachedEncoder(text_encoder(resolve(opt), self.prior.device, precision(opt, self.prior.device)))
        prompts = build_prompts(opt, encoder, self.prior.device)
        encoder.close()
        if self.clip is not None:
            from guidance.clip import build_clip

            self.clip = build_clip(opt, prompts, self.prior.device, precision(opt, self.prior.device))
        self.prompts, self.distillation.settings, self.weight = prompts, Settings.of(opt), opt.lambda_guidance

    @property
    def wants(self) -> tuple[str, ...]:
        """The hints that the prior looks at: who renders can spare the others."""
        return self.prior.wants

    def state(self) -> dict[str, Any]:
        """What the future depends on, for the checkpoint: the generator of noise and timesteps, and what an adaptation has learned."""
        return self.distillation.state()

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        self.distillation.load_state(state)

    @torch.no_grad()
    def _picture_gradient(self, picture: Float[Tensor, "B 3 h w"], draw) -> Float[Tensor, "B 3 h w"]:
        """w(t) (x - D(z_0)) signal / sigma: the same opinion in terms of the decoded picture (HiFA, Zhu et al. 2024, equation 6)."""
        estimate = self.prior.decode(draw.clean(draw.noisy, draw.guided(), draw.t))
        return self.distillation.weight(draw) * draw.signal / draw.sigma * (picture - estimate)

    def _condition(self, image: Tensor, polar: Tensor, azimuth: Tensor, as_latent: bool, hints: Hints | None):
        known = {} if as_latent else {"picture": image.detach().float()}
        return self.prompts.condition(polar, azimuth, {**known, **(hints or {})})

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
