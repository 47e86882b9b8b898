"""Pictures that a prior draws by itself, from noise or from another picture; and what it takes a picture for."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.prior import Prior


@torch.no_grad()
def draw(
    prior: Prior,
    told: Float[Tensor, "B L D"],
    base: Float[Tensor, "B L D"],
    steps: int = 30,
    scale: float = 7.5,
    noise: Float[Tensor, "B C h w"] | None = None,
    start: Float[Tensor, "B 3 H W"] | None = None,
    strength: float = 1.0,
    generator: torch.Generator | None = None,
    tick: Callable[[], None] = lambda: None,
) -> Float[Tensor, "B 3 k l"]:
    """Pictures in [0, 1] by DDIM (Song et al. 2021, equation 12, eta = 0; for a flow model Euler's method).

    told, base: embeddings of the prompt and of what classifier-free guidance of strength `scale` goes away from. noise: by default drawn
    with `generator` (on the CPU, whatever the prior's device). start: pictures to begin with instead of noise; of the way from noise to
    picture the last share `strength`, in (0, 1], is gone anew (SDEdit, Meng et al. 2022). tick: called after each step.
    """
    count, size = len(told), prior.latent_size
    if noise is None:
        noise = torch.randn(count, prior.latent_channels, size, size, generator=generator)
    noise = noise.to(prior.device, torch.float32)
    first = round(strength * (prior.num_timesteps - 1))
    times = torch.linspace(first, 0, max(round(strength * steps), 1) + 1).round().long().tolist()
    z = noise
    if start is not None:
        clean = prior.encode(start.to(prior.device), torch.Generator(prior.device).manual_seed(0))
        z = prior.signal[first] * clean + prior.sigma[first] * noise
    for now, then in pairwise(times):
        t = torch.full((count,), now, device=prior.device)
        away, towards = prior.ask(z, t, [base, told])
        eps = away + scale * (towards - away)
        clean = (z - prior.sigma[now] * eps) / prior.signal[now].clamp(min=1e-3)
        if prior.autoencoder is None:
            clean = clean.clamp(-1, 1)
            eps = (z - prior.signal[now] * clean) / prior.sigma[now]
        z = prior.signal[then] * clean + prior.sigma[then] * eps
        tick()
    return prior.decode(clean)


@torch.no_grad()
def likeliest(
    prior: Prior,
    pictures: Float[Tensor, "N 3 k k"],
    embed: Callable[[list[str]], Float[Tensor, "n L D"]],
    texts: Sequence[str],
    draws: int = 12,
    seed: int = 0,
    tick: Callable[[], None] = lambda: None,
) -> list[int]:
    """For each picture the text that describes it best: the one under which the prior removes noise best, the mean error over `draws` noises
    that are the same for all texts (Li et al. 2023, "Your Diffusion Model is Secretly a Zero-Shot Classifier")."""
    generator = torch.Generator().manual_seed(seed)
    told = torch.cat([embed([text]) for text in texts]).to(prior.device)
    t = torch.linspace(0.2, 0.9, draws).mul(prior.num_timesteps).long().to(prior.device)
    latents = torch.cat(
        [prior.encode(p[None].to(prior.device), torch.Generator(prior.device).manual_seed(seed)) for p in pictures]
    )
    noise = torch.randn(draws, *latents.shape[1:], generator=generator).to(prior.device)
    found = []
    for clean in latents:
        noisy = prior.signal[t, None, None, None] * clean + prior.sigma[t, None, None, None] * noise
        errors = []
        for text in told:
            eps = prior.predict(noisy, t, text.expand(draws, -1, -1))
            errors.append((eps - noise).square().mean().item())
            tick()
        found.append(min(range(len(errors)), key=errors.__getitem__))
    return found
