"""The score-distillation family: from latents and a prompt to the direction in which the latents should move.

Every method is gradient = w(t) (target - reference) on latents noised to timestep t, and differs from the others in five choices:
timesteps, noise, target, reference, weight. A method is a row (`Method`) of such choices; each choice is a function of the state of one
step (`Draw`). All predictions are estimates of the noise (eps), whatever the model predicts itself.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass
class Draw:
    """One step's state, filled in from top to bottom; all tensors float32, one row per sample."""

    prior: object
    condition: object
    latents: Float[Tensor, "B C h w"]
    scale: float  # of classifier-free guidance
    bounds: tuple[int, int]  # first and last timestep, both included
    generator: torch.Generator | None
    t: Int[Tensor, "B"] = field(init=False)
    signal: Float[Tensor, "B 1 1 1"] = field(init=False)  # sqrt(abar_t)
    sigma: Float[Tensor, "B 1 1 1"] = field(init=False)  # sqrt(1 - abar_t)
    noise: Float[Tensor, "B C h w"] = field(init=False)
    noisy: Float[Tensor, "B C h w"] = field(init=False)
    eps_negative: Float[Tensor, "B C h w"] = field(init=False)
    eps_text: Float[Tensor, "B C h w"] = field(init=False)


Choice = Callable[[Draw], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the family."""

    timesteps: Choice
    noise: Choice
    target: Choice
    reference: Choice
    weight: Choice


def uniform_timesteps(draw: Draw) -> Int[Tensor, "B"]:
    """t uniform over the whole numbers of the bounds, one per sample."""
    first, last = draw.bounds
    latents = draw.latents
    return torch.randint(first, last + 1, (len(latents),), generator=draw.generator, device=latents.device)


def fresh_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """Independent standard normal noise."""
    latents = draw.latents
    return torch.randn(latents.shape, generator=draw.generator, device=latents.device)


def guided(draw: Draw) -> Float[Tensor, "B C h w"]:
    """Classifier-free guidance: eps_u + s (eps_c - eps_u)."""
    return draw.eps_negative + draw.scale * (draw.eps_text - draw.eps_negative)


def added_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The noise that was really added."""
    return draw.noise


def variance(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = sigma_t^2 = 1 - abar_t."""
    return draw.sigma**2


SDS = Method(uniform_timesteps, fresh_noise, guided, added_noise, variance)  # DreamFusion, equation 3


class Distillation:
    """A method applied to a prior, with the schedules of the options."""

    def __init__(self, prior, opt, generator: torch.Generator | None = None, method: Method = SDS):
        """prior: `alphas_cumprod`, `num_timesteps`, `predict`; opt: `guidance_scale` and `t_range` (schedules or plain numbers);
        generator: source of timesteps and noise, on the prior's device."""
        self.prior, self.method, self.generator = prior, method, generator
        self.guidance_scale, self.t_range = opt.guidance_scale, opt.t_range

    def bounds(self, step: int) -> tuple[int, int]:
        """First and last timestep, both included: floor(T t_min), floor(T t_max), kept inside 0 .. T - 1."""
        count = self.prior.num_timesteps
        ends = [min(max(int(value_at(end, step) * count + 1e-6), 0), count - 1) for end in self.t_range]
        return min(ends), max(ends)

    @torch.no_grad()
    def draw(self, latents: Float[Tensor, "B C h w"], condition, step: int) -> Draw:
        """Noises the latents by the method's choice and asks the prior, once, about both prompts."""
        prior, method = self.prior, self.method
        scale = value_at(self.guidance_scale, step)
        draw = Draw(prior, condition, latents.detach().float(), scale, self.bounds(step), self.generator)
        draw.t = method.timesteps(draw)
        abar = prior.alphas_cumprod[draw.t].float()[:, None, None, None]
        draw.signal, draw.sigma = abar.sqrt(), (1 - abar).sqrt()
        draw.noise = method.noise(draw)
        draw.noisy = draw.signal * draw.latents + draw.sigma * draw.noise
        both = torch.cat([condition.negative, condition.text])
        eps = prior.predict(torch.cat([draw.noisy] * 2), torch.cat([draw.t] * 2), both)
        draw.eps_negative, draw.eps_text = eps.float().chunk(2)
        return draw

    @torch.no_grad()
    def gradient(
        self, latents: Float[Tensor, "B C h w"], condition, step: int
    ) -> tuple[Float[Tensor, "B C h w"], dict[str, Tensor]]:
        """The gradient of the loss with respect to the latents: w(t) (target - reference) / B, a sum over each sample and a mean over
        the batch. Values that are not finite become 0 and are counted.

        Returns (gradient, log); the log's values are scalars on the device: grad_norm (of one sample, averaged), t, nonfinite.
        """
        draw = self.draw(latents, condition, step)
        method = self.method
        gradient = method.weight(draw) * (method.target(draw) - method.reference(draw))
        nonfinite = (~torch.isfinite(gradient)).sum()
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        norm = gradient.flatten(1).norm(dim=1).mean()
        return gradient / len(gradient), {"grad_norm": norm, "t": draw.t.float().mean(), "nonfinite": nonfinite}


class SpecifyGradient(torch.autograd.Function):
    """`SpecifyGradient.apply(tensor, gradient, value)` is the scalar `value`, whose gradient with respect to `tensor` is `gradient`."""

    @staticmethod
    def forward(ctx, tensor: Tensor, gradient: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(gradient.to(tensor.dtype))
        return value.detach().clone()

    @staticmethod
    def backward(ctx, scale: Tensor):
        (gradient,) = ctx.saved_tensors
        return gradient * scale, None, None  # the incoming scale is the loss weight, or a gradient scaler's factor


def value_at(schedule, step: int) -> float:
    """A schedule's value at a step; plain numbers stay as they are."""
    return schedule(step) if callable(schedule) else float(schedule)
