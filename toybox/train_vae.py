"""Train the autoencoder of tiny-sd: 64x64 pictures to 16x16x4 latents and back."""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from toybox import data
from toybox.models import build_autoencoder
from toybox.training import Progress, psnr, save_state


def loss(vae: torch.nn.Module, image: torch.Tensor) -> torch.Tensor:
    """L1 of colors and of their differences; noise on the latents keeps them smooth, a weak pull keeps them small."""
    latents = vae.encode(image).latents
    result = vae.decode(latents + 0.1 * torch.randn_like(latents)).sample.float()
    edges = sum(F.l1_loss(result.diff(dim=d), image.diff(dim=d)) for d in (2, 3))
    return F.l1_loss(result, image) + 0.5 * edges + 1e-3 * latents.float().square().mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="file for the weights and the latents' scale")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--per_kind", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = data.load(args.per_kind)

    def batch(count: int) -> torch.Tensor:
        index = torch.randint(len(pictures.kind), (count,), generator=generator)
        color = torch.randint(len(data.PALETTE), (count,), generator=generator)
        image = data.paint(pictures, index, color, generator) * 2 - 1
        return image.to(device).contiguous(memory_format=torch.channels_last)

    vae = build_autoencoder().to(device, memory_format=torch.channels_last).train()
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.lr, weight_decay=1e-3, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, args.steps, pct_start=0.1)
    progress = Progress("autoencoder", args.steps)
    for _ in range(args.steps):
        with torch.autocast(device, torch.bfloat16):
            value = loss(vae, batch(args.batch))
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.update(value)

    vae.eval()
    with torch.no_grad():
        image = batch(256)
        latents = vae.encode(image).latents
        quality = psnr(vae.decode(latents).sample.clamp(-1, 1), image, 2.0)
    scale = 1 / latents.std().item()
    save_state(
        args.out, vae.state_dict(), {"scaling_factor": scale, "psnr": quality, "seconds": time.time() - progress.start}
    )
    print(f"scaling_factor {scale:.4f}, PSNR {quality:.1f} dB")


if __name__ == "__main__":
    main()
