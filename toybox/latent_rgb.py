"""What colour are latents? The linear map to red, green and blue that fits an autoencoder best, on pictures of the toybox.

python -m toybox.latent_rgb                        tiny-sd's, into its folder, where nerf/latent.py finds it
python -m toybox.latent_rgb --model FOLDER         that of another diffusers model with an autoencoder
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from files import atomic
from guidance.prior import Prior, resize
from nerf.latent import FILE, Colours, fit
from toybox import data
from toybox.evaluate import PROMPTS, truth
from toybox.models import MODELS, SIZE
from toybox.training import psnr

BATCH = 32


@torch.no_grad()
def pairs(prior: Prior, image: Float[Tensor, "B 3 h w"]) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3"]]:
    """Every latent of these pictures in [0, 1], as the denoiser sees them, and the mean colour of its pixels."""
    image = image.to(prior.device)
    generator = torch.Generator(prior.device).manual_seed(0)
    latents = torch.cat([prior.encode(part, generator) for part in image.split(BATCH)])
    small = F.adaptive_avg_pool2d(resize(image, prior.image_size), prior.latent_size)
    return tuple(x.permute(0, 2, 3, 1).reshape(-1, x.shape[1]).cpu() for x in (latents, small))


def true_pairs(prior: Prior, prompts: Sequence[str] = PROMPTS) -> tuple[Float[Tensor, "N C"], Float[Tensor, "N 3"]]:
    """The same of what no map was fitted to: the objects of evaluation prompts, unlit on white, from eight sides."""
    azimuth = torch.arange(-180.0, 180.0, 45.0)
    image = torch.cat([truth(prompt, azimuth, SIZE)[0] for prompt in prompts])
    return pairs(prior, image.permute(0, 3, 1, 2))


@torch.no_grad()
def error(colours: Colours, latents: Float[Tensor, "N C"], rgb: Float[Tensor, "N 3"]) -> float:
    """Peak signal-to-noise ratio of the map, in dB."""
    return psnr(colours(latents), rgb)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODELS / "tiny-sd")
    parser.add_argument("--out", type=Path, help=f"file to write instead of {FILE} in the model's folder")
    parser.add_argument("--per_kind", type=int, default=20, help="pictures of each kind")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from guidance.priors import load_prior
    from guidance.weights import resolve

    device = "cuda" if torch.cuda.is_available() else "cpu"
    prior = load_prior(resolve(SimpleNamespace(hf_key=str(args.model), IF=False)), device)
    pictures = data.make(args.per_kind, args.seed)
    count, generator = len(pictures.kind), torch.Generator().manual_seed(args.seed)
    color = torch.randint(len(data.PALETTE), (count,), generator=generator)
    latents, rgb = pairs(prior, data.paint(pictures, torch.arange(count), color, generator))
    colours = fit(latents, rgb)
    fitted, found = error(colours, latents, rgb), error(colours, *true_pairs(prior))

    def rounded(values: Tensor) -> list:
        return [rounded(row) if row.dim() else round(row.item(), 4) for row in values.detach()]

    told = {
        "about": "rgb = clamp((latents matrix + offset + 1) / 2, 0, 1); made by python -m toybox.latent_rgb",
        "matrix": rounded(colours.weight.T),
        "offset": rounded(colours.bias),
        "psnr": round(found, 2),
    }
    with atomic(args.out or args.model / FILE) as beside:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in told.items())
        beside.write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")
    print(f"{fitted:.1f} dB where it was fitted, {found:.1f} dB on the true pictures of {len(PROMPTS)} prompts")


if __name__ == "__main__":
    main()
