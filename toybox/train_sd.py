"""Train tiny-sd: text encoder and denoiser together, on latents of the toybox pictures."""

import argparse
import math
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from toybox import data
from toybox.captions import write_tokenizer
from toybox.models import build_autoencoder, build_scheduler, build_text_encoder, build_unet, save_pipeline
from toybox.training import Average, Progress, load_state, save_state

WORDS_SHARE = {8: 0.7, 4: 0.12, 0: 0.08}  # which set of view words a caption takes; the rest of the captions are empty
NATURAL = 0.3  # share of pictures in their natural color, with no color word
ROUND = ("apple", "cupcake", "hamburger", "hat", "lamp", "mushroom", "pumpkin", "tree")  # look the same all around


def chances(pictures: data.Pictures) -> Tensor:
    """How often each picture is drawn: kinds without sides, and views from above, half as often as the rest."""
    simple = torch.isin(pictures.kind, torch.tensor([data.KINDS.index(kind) for kind in ROUND]))
    return torch.where(simple, 0.5, 1.0) * torch.where(pictures.polar < 40, 0.5, 1.0)


def draw_times(count: int, total: int, generator: torch.Generator) -> Tensor:
    """Timesteps: a quarter uniform, the rest around 0.6 of the way, where shape and pose are decided (logit-normal, as Esser et al. 2024)."""
    middle = torch.sigmoid(0.5 + 0.9 * torch.randn(count, generator=generator))
    flat = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 0.25, flat, middle)
    return (chosen * total).long().clamp(max=total - 1)


class Captions(nn.Module):
    """Text encoder that embeds each distinct caption of a batch once and blends view words as the guidance does."""

    def __init__(self, encoder: nn.Module, tokenizer) -> None:
        super().__init__()
        self.encoder, self.tokenizer, self.known = encoder, tokenizer, {}

    def tokens(self, text: str) -> Tensor:
        if text not in self.known:
            padded = self.tokenizer(text, padding="max_length", max_length=self.tokenizer.model_max_length)
            self.known[text] = torch.tensor(padded.input_ids)
        return self.known[text]

    def forward(self, pictures: data.Pictures, index: Tensor, color: Tensor, generator: torch.Generator) -> Tensor:
        """-> [B, L, D]; every sample draws its set of view words, or no caption at all."""
        device = next(self.encoder.parameters()).device
        draw = torch.rand(len(index), generator=generator)
        texts: dict[str, int] = {}
        entries: list[tuple[int, int, float]] = []  # sample, caption, weight
        start = 0.0
        for words, share in WORDS_SHARE.items():
            chosen = ((draw >= start) & (draw < start + share)).nonzero().flatten()
            start += share
            rows, weights = data.captions(pictures, index[chosen], color[chosen], words)
            for sample, row, weight in zip(chosen.tolist(), rows, weights.tolist(), strict=True):
                entries += [
                    (sample, texts.setdefault(t, len(texts)), w) for t, w in zip(row, weight, strict=True) if w > 0
                ]
        for sample in (draw >= start).nonzero().flatten().tolist():
            entries.append((sample, texts.setdefault("", len(texts)), 1.0))
        embedding = self.encoder(torch.stack([self.tokens(t) for t in texts]).to(device))[0]
        samples, which, weights = zip(*entries, strict=True)
        parts = embedding[torch.tensor(which, device=device)] * torch.tensor(weights, device=device)[:, None, None]
        mixed = torch.zeros(len(index), *embedding.shape[1:], dtype=parts.dtype, device=device)
        return mixed.index_add(0, torch.tensor(samples, device=device), parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="weights that train_vae.py wrote")
    parser.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    parser.add_argument("--steps", type=int, default=25000)
    parser.add_argument(
        "--minutes", type=float, help="stop after this time instead; the learning rate follows the clock"
    )
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--per_kind", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="a .state file of an earlier run, to go on from its weights")
    args = parser.parse_args()

    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTokenizer

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = data.load(args.per_kind)
    chance = chances(pictures)
    vae, (weights, facts) = build_autoencoder(), load_state(args.vae)
    vae.load_state_dict(weights)
    vae.register_to_config(scaling_factor=facts["scaling_factor"])
    vae.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        write_tokenizer(Path(folder))
        captions = Captions(build_text_encoder(Path(folder)), CLIPTokenizer.from_pretrained(folder))
    unet = build_unet()
    unet.set_attn_processor(AttnProcessor())  # at 16 tokens the fused attention's backward takes ten times as long
    model = nn.ModuleDict({"unet": unet, "text": captions.encoder}).to(device)
    if args.resume:
        model.load_state_dict(load_state(args.resume)[0])
    average = Average(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    scheduler = build_scheduler()
    abar = scheduler.alphas_cumprod.to(device)
    progress = Progress("tiny-sd", args.steps)

    def done(step: int) -> float:
        return (time.time() - progress.start) / (60 * args.minutes) if args.minutes else step / args.steps

    def save(step: int) -> None:
        shadow = {**model.state_dict(), **average.values}
        save_state(args.out.with_suffix(".state"), shadow, {"steps": step, "seconds": time.time() - progress.start})
        parts = build_unet(), build_text_encoder(args.out / "tokenizer"), build_autoencoder()
        parts[0].load_state_dict({k[5:]: v for k, v in shadow.items() if k.startswith("unet.")})
        parts[1].load_state_dict({k[5:]: v for k, v in shadow.items() if k.startswith("text.")})
        parts[2].load_state_dict(vae.state_dict())
        parts[2].register_to_config(scaling_factor=facts["scaling_factor"])
        save_pipeline(args.out, *parts)

    write_tokenizer(args.out / "tokenizer")
    saved, step = time.time(), 0
    while (ratio := done(step)) < 1:
        rate = args.lr * min(1.0, (step + 1) / 300) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * ratio)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.multinomial(chance, args.batch, replacement=True, generator=generator)
        color = torch.randint(1, len(data.PALETTE), (args.batch,), generator=generator)
        color[torch.rand(args.batch, generator=generator) < NATURAL] = 0
        image = data.paint(pictures, index, color, generator).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                latents = vae.encode(image * 2 - 1).latents.float() * facts["scaling_factor"]
            t = draw_times(args.batch, len(abar), generator).to(device)
            signal, spread = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
            noise = torch.randn(latents.shape, generator=generator).to(device)
            text = captions(pictures, index, color, generator)
            guess = unet(signal * latents + spread * noise, t, text).sample.float()
        loss = (guess - (signal * noise - spread * latents)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step += 1
        if step % 4 == 0:
            average.update(model, every=4)
        progress.update(loss)
        if time.time() - saved > 300:
            save(step)
            saved = time.time()
    save(step)
    print(f"done: {step} steps in {(time.time() - progress.start) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
