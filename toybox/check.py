"""Sample tiny-sd for many prompts and views: is it the object, and is it turned the right way?

python -m toybox.check --out samples.png          a sheet to look at, and two figures
"""

import argparse
from pathlib import Path
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor

from guidance.prompt import PromptBank
from toybox.data import ANGLE_OVERHEAD
from toybox.evaluate import JANUS, PROMPTS, Judge, nearest_view, truth
from toybox.models import MODELS


@torch.no_grad()
def sample(prior, condition, steps: int, scale: float, generator: torch.Generator) -> Float[Tensor, "B 3 H W"]:
    """DDIM (Song et al. 2021, equation 12, eta = 0) over `prior.predict` with classifier-free guidance; pictures in [0, 1]."""
    count = len(condition.text)
    z = torch.randn(count, prior.latent_channels, prior.latent_size, prior.latent_size, generator=generator)
    times = torch.linspace(prior.num_timesteps - 1, 0, steps + 1).round().long()
    for now, then in zip(times[:-1], times[1:], strict=True):
        eps_negative, eps_text = prior.ask(z, now.expand(count), [condition.negative, condition.text])
        eps = eps_negative + scale * (eps_text - eps_negative)
        clean = (z - prior.sigma[now] * eps) / prior.signal[now].clamp(min=1e-3)
        if prior.autoencoder is None:  # else strong guidance burns the colors out
            clean = clean.clamp(-1, 1)
            eps = (z - prior.signal[now] * clean) / prior.sigma[now]
        z = prior.signal[then] * clean + prior.sigma[then] * eps
    return prior.decode(z)


def on_white(image: Float[Tensor, "B H W 3"], tolerance: float = 0.12) -> Float[Tensor, "B H W 3"]:
    """The pictures with their plain background, as the border shows it, made white."""
    border = torch.cat([image[:, 0], image[:, -1], image[:, :, 0], image[:, :, -1]], 1).median(1).values[:, None, None]
    plain = (image - border).abs().amax(-1, keepdim=True) < tolerance
    return torch.where(plain, torch.ones_like(image), image)


def turned_right(image: Float[Tensor, "B H W 3"], prompt: str, azimuth: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    """Whether the true view each picture looks most like is within 45 degrees of its azimuth, or looks the same as that one."""
    found = nearest_view(on_white(image), prompt)
    gap = torch.remainder(found - azimuth + 180, 360) - 180
    same = (truth(prompt, found)[0] - truth(prompt, azimuth)[0]).abs().mean((1, 2, 3)) < 0.02
    return ((gap.abs() <= 45) | same).float()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "tiny-sd")
    parser.add_argument("--out", type=Path, help="picture file: a row per prompt, a column per azimuth")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--scale", type=float, default=3.0, help="of classifier-free guidance")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help="how many of them")
    parser.add_argument("--view_words", type=int, default=8, choices=(0, 4, 8))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from guidance.priors import load_prior, text_encoder
    from guidance.weights import resolve

    source = resolve(SimpleNamespace(hf_key=str(args.model), IF=False))
    prior, encoder = load_prior(source, "cpu"), text_encoder(source, "cpu")
    generator = torch.Generator().manual_seed(args.seed)
    prompts = PROMPTS[: args.prompts]
    judge = Judge(list(dict.fromkeys([*PROMPTS, *JANUS]))) if (MODELS / "tiny-clip").exists() else None
    azimuth = torch.arange(-135.0, 181.0, 45.0)
    rows, right, known = [], [], []
    for prompt in prompts:
        bank = PromptBank(encoder, prompt, "", args.view_words, angle_overhead=ANGLE_OVERHEAD)
        image = sample(
            prior, bank.condition(torch.full_like(azimuth, 80.0), azimuth), args.steps, args.scale, generator
        )
        image = image.permute(0, 2, 3, 1)
        right.append(turned_right(image, prompt, azimuth))
        if judge:
            known.append(judge.rank(image, prompt) == 1)
        rows.append(torch.cat(list(image), 1))
        print(
            f"{prompt}: turned right {right[-1].mean():.2f}" + (f", recognised {known[-1]}" if judge else ""),
            flush=True,
        )
    print(f"turned right {torch.cat(right).mean():.3f} (chance about 0.35)")
    if judge:
        print(f"recognised {sum(known)} of {len(known)}")
    if args.out:
        from PIL import Image

        Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy()).save(args.out)


if __name__ == "__main__":
    main()
