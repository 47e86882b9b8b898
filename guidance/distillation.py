"""Score distillation: from latents and a prompt to the direction in which the latents should move.

Every method is gradient = w(t) (target - reference) on latents noised to timestep t, and differs from the others in a few choices:
timesteps, noise, target, reference, weight. A method is a row (`Method`, see methods.py) of such choices; each choice is a function of the
state of one step (`Draw`). All predictions are estimates of the noise (eps), whatever the model predicts itself, and every formula is
written with signal and sigma (z_t = signal z_0 + sigma noise), so that it holds for flow models as well.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import say
from guidance.perpneg import aggregate
from guidance.timesteps import falling_timestep
from ranks import mine
from schedule import value_at


@dataclass(frozen=True)
class Settings:
    """What the options say about distillation; numbers, or schedules (functions of the step). See flags.py for meanings and units."""

    guidance_scale: Any = 100.0
    t_range: tuple[Any, Any] = (0.02, 0.98)
    t_schedule: str = "auto"
    weighting: str = "auto"
    iters: int = 10000
    clip_latent: Any = 0.0
    clip_pixel: Any = 0.0
    clip_norm: Any = 0.0
    bridge_from: float = 0.8
    inversion_steps: int = 5
    inversion_scale: float = 0.0
    inversion_eta: float = 0.0
    interval: float = 0.05
    lora_rank: int = 4
    lora_lr: float = 1e-4
    lora_scale: float = 1.0

    @classmethod
    def of(cls, opt) -> "Settings":
        """The part of the options that is meant here."""
        return cls(**{item.name: getattr(opt, item.name) for item in fields(cls)})


@dataclass
class Draw:
    """One step's state, filled in from top to bottom; all tensors float32, one row per sample."""

    prior: Any
    condition: Any
    latents: Float[Tensor, "B C h w"]
    settings: Settings
    step: int
    scale: float  # of classifier-free guidance
    bounds: tuple[int, int]  # first and last timestep, both included
    generator: torch.Generator | None
    adaptation: Any = (
        None  # a trained estimate of the scene's own distribution (lora.py), for the methods that learn one
    )
    t: Int[Tensor, "B"] = field(init=False)
    noise: Float[Tensor, "B C h w"] = field(init=False)
    noisy: Float[Tensor, "B C h w"] = field(init=False)
    eps: dict[str, Tensor] = field(init=False)  # the prior's answers about `noisy`, by wording
    base: str = field(init=False)  # the wording that guidance extrapolates from
    earlier: Tensor | None = field(init=False, default=None)  # inversion: the last estimate on the way to `noisy`

    @property
    def progress(self) -> float:
        """How much of the run is done, 0 .. 1."""
        return min(self.step / max(self.settings.iters, 1), 1.0)

    @property
    def signal(self) -> Float[Tensor, "B 1 1 1"]:
        """Of z_t = signal z_0 + sigma noise, at `t`."""
        return self.level(self.t)[0]

    @property
    def sigma(self) -> Float[Tensor, "B 1 1 1"]:
        """Of z_t = signal z_0 + sigma noise, at `t`."""
        return self.level(self.t)[1]

    def level(self, t: Int[Tensor, "B"]) -> tuple[Float[Tensor, "B 1 1 1"], Float[Tensor, "B 1 1 1"]]:
        """(signal, sigma) at a timestep."""
        return self.prior.signal[t][:, None, None, None], self.prior.sigma[t][:, None, None, None]

    def noised(self, clean: Tensor, noise: Tensor, t: Int[Tensor, "B"]) -> Float[Tensor, "B C h w"]:
        """signal clean + sigma noise; with an estimate of each, a step of DDIM (Song et al. 2021, equation 12) or of a flow."""
        signal, sigma = self.level(t)
        return signal * clean + sigma * noise

    def clean(self, noisy: Tensor, eps: Tensor, t: Int[Tensor, "B"]) -> Float[Tensor, "B C h w"]:
        """The clean latents that a noise estimate stands for."""
        signal, sigma = self.level(t)
        return (noisy - sigma * eps) / signal.clamp(min=1e-3)  # pure noise says nothing about the picture

    def shifted(self, fraction: float) -> Int[Tensor, "B"]:
        """The timesteps so far (a fraction of all; negative: less noisy) from `t`, kept inside 0 .. T - 1."""
        count = self.prior.num_timesteps
        return (self.t + round(fraction * count)).clamp(0, count - 1)

    def ask(self, wordings: tuple[str, ...], noisy: Tensor, t: Int[Tensor, "B"]) -> dict[str, Float[Tensor, "B C h w"]]:
        """The prior's noise estimates for several wordings, in one call; for guidance (`text` and
        another) Perp-Neg's are asked as well, as "perp"."""
        condition, prior = self.condition, self.prior
        texts = [getattr(condition, name) for name in wordings]
        extra = list(condition.perp) if condition.perp is not None and "text" in wordings[1:] else []
        known = {**condition.hints, "null": condition.null}
        hints = {name: known[name] for name in prior.wants if known.get(name) is not None}
        answers = [eps.float() for eps in prior.ask(noisy, t, texts + extra, hints)]
        eps = dict(zip(wordings, answers, strict=False))
        if extra:
            eps["perp"] = torch.stack(answers[len(texts) :])
        return eps

    def guided(self, eps: dict[str, Tensor] | None = None, scale: float | None = None) -> Float[Tensor, "B C h w"]:
        """Classifier-free guidance eps_base + s (eps_text - eps_base) (Ho and Salimans 2022); with Perp-Neg the direction is changed by
        what the other views' words would add at right angles to it (Armandpour et al. 2023)."""
        eps = self.eps if eps is None else eps
        direction = eps["text"] - eps[self.base]
        if "perp" in eps:
            direction = aggregate(direction, eps["perp"] - eps[self.base], self.condition.perp_weight)
        return eps[self.base] + (self.scale if scale is None else scale) * direction


Choice = Callable[[Draw], Tensor]


@dataclass(frozen=True)
class Method:
    """A row of the family: gradient = weight (target - reference)."""

    target: Choice
    reference: Choice
    weight: Choice
    noise: Choice
    wordings: Callable[
        [Draw], tuple[str, ...]
    ]  # what the prior is asked about z_t; the first is what guidance extrapolates from
    t_schedule: str = "random"
    learns: bool = False  # trains an adaptation of the prior to the scene, beside the scene


class Distillation:
    """A method applied to a prior, with the schedules of the options."""

    def __init__(
        self,
        prior,
        settings: Settings,
        generator: torch.Generator | None = None,
        method: Method | None = None,
        adaptation=None,
    ):
        """prior: see prior.py; generator: source of timesteps and noise, on the prior's device; method: SDS unless given; adaptation: for
        a method that learns."""
        from guidance.methods import METHODS, WEIGHTS

        self.prior, self.settings, self.generator = prior, settings, generator
        self.method = method or METHODS["sds"]
        self.weight = self.method.weight if settings.weighting == "auto" else WEIGHTS[settings.weighting]
        self.t_schedule = self.method.t_schedule if settings.t_schedule == "auto" else settings.t_schedule
        self.adaptation = adaptation
        self.masses = torch.stack(
            [prior.signal, prior.sigma]
        ).cpu()  # DreamTime looks at it without waiting for the device

    def bounds(self, step: int) -> tuple[int, int]:
        """First and last timestep, both included: floor(T t_min), floor(T t_max), kept inside 0 .. T - 1."""
        count = self.prior.num_timesteps
        ends = [min(max(int(value_at(end, step) * count + 1e-6), 0), count - 1) for end in self.settings.t_range]
        return min(ends), max(ends)

    def timesteps(self, draw: Draw) -> Int[Tensor, "B"]:
        """Uniform over the whole numbers of the bounds, one per sample (per view group of a multi-view prior); or the one that a falling
        schedule has come to."""
        batch, device, group = len(draw.latents), draw.latents.device, self.prior.view_group
        first, last = draw.bounds
        if self.t_schedule == "random":
            source = {"generator": draw.generator, "device": device}
            drawn = mine(lambda count: torch.randint(first, last + 1, (count,), **source), batch // group)
            return drawn.repeat_interleave(group)
        t = falling_timestep(self.t_schedule, draw.progress, first, last, *self.masses)
        return torch.full((batch,), t, device=device)

    @torch.no_grad()
    def draw(self, latents: Float[Tensor, "B C h w"], condition, step: int) -> Draw:
        """Noises the latents by the method's choice and asks the prior, once, about every wording that the method needs."""
        method, scale = self.method, value_at(self.settings.guidance_scale, step)
        self.prior.step = step
        latents = latents.detach().float()
        draw = Draw(
            self.prior,
            condition,
            latents,
            self.settings,
            step,
            scale,
            self.bounds(step),
            self.generator,
            self.adaptation,
        )
        wordings = method.wordings(draw)
        draw.t, draw.base = self.timesteps(draw), wordings[0]
        draw.noise = method.noise(draw)
        draw.noisy = draw.noised(draw.latents, draw.noise, draw.t)
        draw.eps = draw.ask(wordings, draw.noisy, draw.t)
        return draw

    @torch.no_grad()
    def gradient(
        self, latents: Float[Tensor, "B C h w"], condition, step: int
    ) -> tuple[Float[Tensor, "B C h w"], dict[str, Tensor], Draw]:
        """The gradient of the loss with respect to the latents: w(t) (target - reference) / B, a sum over each sample and a mean over
        the batch, limited as the options say. Values that are not finite become 0 and are counted.

        Returns (gradient, log, draw); the log's values are scalars on the device: grad_norm (of one sample, averaged, before the limits),
        t, nonfinite, and what an adaptation's training lost.
        """
        draw = self.draw(latents, condition, step)
        gradient = self.weight(draw) * (self.method.target(draw) - self.method.reference(draw))
        nonfinite = (~torch.isfinite(gradient)).sum()
        gradient = torch.nan_to_num(gradient, nan=0.0, posinf=0.0, neginf=0.0)
        log = {"grad_norm": gradient.flatten(1).norm(dim=1).mean(), "t": draw.t.float().mean(), "nonfinite": nonfinite}
        gradient = self._limited(gradient, step)
        if self.adaptation is not None:
            log["adaptation"] = self.adaptation.learn(draw.latents, condition.plain, condition.hints)
        return gradient / len(gradient), log, draw

    def _limited(self, gradient: Float[Tensor, "B C h w"], step: int) -> Float[Tensor, "B C h w"]:
        """Every element (Hong et al. 2023), the vector of channels at every pixel (Pan et al. 2024), the whole sample; 0: no limit."""
        element, pixel, whole = (
            value_at(limit, step)
            for limit in (self.settings.clip_latent, self.settings.clip_pixel, self.settings.clip_norm)
        )
        if element > 0:
            gradient = gradient.clamp(-element, element)
        for limit, dims in ((pixel, 1), (whole, (1, 2, 3))):
            if limit > 0:
                norm = gradient.square().sum(dims, keepdim=True).sqrt()
                gradient = gradient * (limit / norm.clamp(min=limit))
        return gradient

    def state(self) -> dict[str, Any]:
        """What the future depends on, for the checkpoint."""
        state: dict[str, Any] = {"generator": self.generator.get_state()}
        if self.adaptation is not None:
            state["adaptation"] = self.adaptation.state()
        return state

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from a saved state."""
        try:
            self.generator.set_state(state["generator"].cpu())
        except RuntimeError:  # from another kind of device: its random numbers cannot go on here
            say("the checkpoint's noise was drawn on another kind of device; it starts anew here")
        if self.adaptation is not None and "adaptation" in state:
            self.adaptation.load_state(state["adaptation"])
        elif self.adaptation is not None:
            say("the checkpoint is of a method that learned nothing: the adaptation starts anew")


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
