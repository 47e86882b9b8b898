"""The methods: rows of choices. A new one is a row of `METHODS`, with a function or two for what no other row does.

With eps(text) and so on for the prior's estimates about z_t, s for the scale of guidance and
guided = eps(base) + s (eps(text) - eps(base)), base being the negative prompt unless a row says otherwise.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.distillation import Draw, Method
from ranks import mine

# -- weights -----------------------------------------------------------------------------------------------------------


def variance(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = sigma^2 = 1 - abar: DreamFusion's."""
    return draw.sigma**2


def uniform(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = 1: Magic3D's, and SJC's."""
    return torch.ones_like(draw.sigma)


def middle(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = sqrt(abar) (1 - abar): Fantasia3D's; little at both ends."""
    return draw.signal * draw.sigma**2


def ratio(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = sigma / signal = sqrt((1 - abar) / abar): turns a difference of noises into one of clean latents."""
    return draw.sigma / draw.signal.clamp(min=1e-3)


def velocity(draw: Draw) -> Float[Tensor, "B 1 1 1"]:
    """w(t) = 1 / signal: turns a difference of noises into one of a flow model's velocities (RFDS, Yang et al. 2025)."""
    return 1 / draw.signal.clamp(min=1e-3)


WEIGHTS = {"sds": variance, "uniform": uniform, "fantasia3d": middle, "ism": ratio, "flow": velocity}

# -- noise -------------------------------------------------------------------------------------------------------------


def fresh_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """Independent standard normal noise."""
    latents = draw.latents
    shape, source = latents.shape[1:], {"generator": draw.generator, "device": latents.device}
    return mine(lambda count: torch.randn(count, *shape, **source), len(latents))


def fixed_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The same noise for every view and step of a run; it follows from the seed."""
    latents = draw.latents
    seed = draw.generator.initial_seed() + 1 if draw.generator is not None else 0
    generator = torch.Generator(latents.device).manual_seed(seed)
    return torch.randn(latents.shape[1:], generator=generator, device=latents.device).expand_as(latents)


def inverted_noise(draw: Draw, last: Tensor | None = None) -> Float[Tensor, "B C h w"]:
    """The noise that DDIM inversion leads to, in `inversion_steps` steps from the clean latents; fresh noise if there are none.

    The steps go from timestep 0 to `last` evenly and then to t (to t evenly if `last` is not given), under guidance of
    `inversion_scale`. With eta > 0 a part of the noise of every step is drawn anew, its level kept (Song et al. 2021, equation 16).
    """
    settings, t = draw.settings, draw.t
    if not settings.inversion_steps:
        return fresh_noise(draw)
    even = settings.inversion_steps if last is None else settings.inversion_steps - 1
    times = [((t if last is None else last) * i) // max(even, 1) for i in range(even + 1)]
    times = times if last is None else [*times, t]
    z = draw.latents
    for now, then in zip(times[:-1], times[1:], strict=True):
        wordings = (draw.base, "text") if settings.inversion_scale else (draw.base,)
        eps = draw.ask(wordings, z, now)
        draw.earlier = draw.guided(eps, settings.inversion_scale) if settings.inversion_scale else eps[draw.base]
        step = draw.earlier
        if settings.inversion_eta:
            (a, s), (b, r) = draw.level(now), draw.level(then)
            fresh = settings.inversion_eta**2 * (s / r) ** 2 * (1 - (b * s / (a * r)) ** 2)  # of the noise at `then`
            step = (1 - fresh).sqrt() * step + fresh.sqrt() * fresh_noise(draw)
        z = draw.noised(draw.clean(z, draw.earlier, now), step, then)
    signal, sigma = draw.level(t)
    return (z - signal * draw.latents) / sigma


def interval_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """Inversion whose last step goes from s = t - interval to t, so that the estimate at s is at hand (LucidDreamer)."""
    return inverted_noise(draw, draw.shifted(-draw.settings.interval))


# -- targets and references --------------------------------------------------------------------------------------------


def guided(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The prior's opinion: eps_base + s (eps_text - eps_base)."""
    return draw.guided()


def added_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The noise that was really added."""
    return draw.noise


def base(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The prior's opinion without the prompt."""
    return draw.eps[draw.base]


def earlier(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The estimate one step before z_t on the way of the inversion; the added noise if nothing was inverted."""
    return draw.noise if draw.earlier is None else draw.earlier


def unless_little_noise(draw: Draw) -> Float[Tensor, "B C h w"]:
    """eps(negative), which stands for what is wrong with the picture; nothing below t = 0.2 T, where eps(null) itself has no such
    part (NFSD, equation 8)."""
    noisy = draw.t >= 0.2 * draw.prior.num_timesteps
    return draw.eps["negative"] * noisy[:, None, None, None]


def added_noise_then_source(draw: Draw) -> Float[Tensor, "B C h w"]:
    """SDS's reference; late in the run the prior's opinion about the source prompt."""
    return draw.eps["source"] if _late(draw) else draw.noise


def _late(draw: Draw) -> bool:
    return draw.progress >= draw.settings.bridge_from


def adapted(draw: Draw) -> Float[Tensor, "B C h w"]:
    """What an adaptation of the prior to the scene's own pictures thinks."""
    condition, scale = draw.condition, draw.settings.lora_scale
    return draw.adaptation.guided(draw.noisy, draw.t, condition.plain, condition.hints, scale)


def noisier(draw: Draw) -> Float[Tensor, "B C h w"]:
    """The prompt's estimate for the same noise at the noisier timestep t + interval."""
    t = draw.shifted(draw.settings.interval)
    return draw.ask(("text",), draw.noised(draw.latents, draw.noise, t), t)["text"]


def consistency(draw: Draw) -> Float[Tensor, "B C h w"]:
    """(x0(z_t', t') - x0(z_t, t)) signal' / sigma', with guided estimates, where z_t' is one step along the prior's own flow (its
    unguided estimate) from z_t to t' = t - interval: the less noisy estimate is to follow the noisier one (Consistent3D)."""
    t = draw.shifted(-draw.settings.interval)
    flow, now = draw.eps["text"], draw.guided()
    z = draw.noised(draw.clean(draw.noisy, flow, draw.t), flow, t)
    then = draw.guided(draw.ask((draw.base, "text"), z, t))
    signal, sigma = draw.level(t)
    return ratio(draw) * signal / sigma * (now - flow) - (then - flow)


def nothing(draw: Draw) -> Float[Tensor, "B C h w"]:
    """0: the target says it all."""
    return torch.zeros_like(draw.latents)


# -- wordings: what the prior is asked ---------------------------------------------------------------------------------


def negative_and_text(draw: Draw) -> tuple[str, ...]:
    """Classifier-free guidance away from the negative prompt."""
    return "negative", "text"


def null_too(draw: Draw) -> tuple[str, ...]:
    """Guidance away from the empty prompt; the negative prompt has a part of its own."""
    return "null", "text", "negative"


def negative_then_source(draw: Draw) -> tuple[str, ...]:
    """Late in the run guidance goes away from the source prompt."""
    return ("source", "text") if _late(draw) else ("negative", "text")


# -- the table ---------------------------------------------------------------------------------------------------------

_ASK = negative_and_text
METHODS: dict[str, Method] = {
    # Poole et al. 2023, DreamFusion, equation 3
    "sds": Method(guided, added_noise, variance, fresh_noise, _ASK),
    # Wang et al. 2023, Score Jacobian Chaining: -(D(z) - y) / sigma with the noise of variance-exploding z = y + sigma n, z's own noise taken off
    "sjc": Method(guided, added_noise, uniform, fresh_noise, _ASK),
    # Yu et al. 2024, Classifier Score Distillation: s (eps_text - eps_base)
    "csd": Method(guided, base, variance, fresh_noise, _ASK),
    # Katzir et al. 2024, Noise-Free Score Distillation: s (eps_text - eps_null) + eps_null [- eps_negative from t = 0.2 T on]
    "nfsd": Method(guided, unless_little_noise, variance, fresh_noise, null_too),
    # McAllister et al. 2024, Rethinking Score Distillation as a Bridge: SDS, then s (eps_text - eps_source)
    "bridge": Method(guided, added_noise_then_source, variance, fresh_noise, negative_then_source),
    # Wang et al. 2023, ProlificDreamer: guided - eps_phi, phi learning the scene's own pictures
    "vsd": Method(guided, adapted, variance, fresh_noise, _ASK, learns=True),
    # Liang et al. 2024, LucidDreamer's Interval Score Matching: guided(z_t) - eps_base(z_s), both on the way of an inversion
    "ism": Method(guided, earlier, ratio, interval_noise, _ASK),
    # Lukoianov et al. 2024, Score Distillation via Inversion: z_0 - x0(z_t), the noise of z_t from an inversion
    "sdi": Method(guided, added_noise, ratio, inverted_noise, _ASK, t_schedule="linear"),
    # Zhu et al. 2024, HiFA: SDS whose noise falls with the square root of the run; --lambda_image and --lambda_zvar belong to it
    "hifa": Method(guided, added_noise, variance, fresh_noise, _ASK, t_schedule="sqrt"),
    # Wu et al. 2024, Consistent3D's Consistency Distillation Sampling, with one noise for the whole run
    "cds": Method(consistency, nothing, variance, fixed_noise, _ASK),
    # Ma et al. 2024, ScaleDreamer's Asynchronous Score Distillation: guided(t) - eps_text(t + interval)
    "asd": Method(guided, noisier, variance, fresh_noise, _ASK),
}
