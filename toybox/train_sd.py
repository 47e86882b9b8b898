"""Train tiny-sd: text encoder and denoiser together, on latents of the toybox pictures."""

import tempfile
from pathlib import Path

import torch
from torch import Tensor

from toybox.captions import CONTEXT, write_tokenizer
from toybox.denoiser import Captions, parser, train
from toybox.models import build_autoencoder, build_scheduler, build_text_encoder, build_unet, save_pipeline
from toybox.training import load_state


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--vae", type=Path, required=True, help="weights that train_vae.py wrote")
    args = flags.parse_args()

    from transformers import CLIPTokenizer

    torch.manual_seed(args.seed)
    vae, (weights, facts) = build_autoencoder(), load_state(args.vae)
    vae.load_state_dict(weights)
    vae.register_to_config(scaling_factor=facts["scaling_factor"])
    vae.to("cuda" if torch.cuda.is_available() else "cpu", memory_format=torch.channels_last).eval()
    vae.requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        captions = Captions(build_text_encoder(Path(folder)), CLIPTokenizer.from_pretrained(folder), CONTEXT)
    abar = build_scheduler().alphas_cumprod

    def encode(image: Tensor) -> Tensor:
        return vae.encode(image).latents * facts["scaling_factor"]

    def loss(output: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        at = abar.to(t.device)[t].view(-1, 1, 1, 1)
        return (output - (at.sqrt() * noise - (1 - at).sqrt() * clean)).square().mean()

    def save(unet_weights: dict[str, Tensor], text_weights: dict[str, Tensor]) -> None:
        parts = build_unet(), build_text_encoder(args.out / "tokenizer"), build_autoencoder()
        for part, values in zip(parts, (unet_weights, text_weights, vae.state_dict()), strict=True):
            part.load_state_dict(values)
        parts[2].register_to_config(scaling_factor=facts["scaling_factor"])
        save_pipeline(args.out, *parts)

    write_tokenizer(args.out / "tokenizer")
    train(args, build_unet(), captions, abar, encode, loss, save, middle=0.5)


if __name__ == "__main__":
    main()
