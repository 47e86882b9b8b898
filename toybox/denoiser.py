"""What training tiny-sd and training tiny-if have in common: captions, timesteps, and the loop."""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from toybox import data
from toybox.training import Keeper, descend, load_state

WORDS_SHARE = {8: 0.7, 4: 0.12, 0: 0.08}  # which set of view words a caption takes; the rest of the captions are empty
NATURAL = 0.3  # share of pictures in their natural color, with no color word
ROUND = ("apple", "cupcake", "hamburger", "hat", "lamp", "mushroom", "pumpkin", "tree")  # look the same all around


def chances(pictures: data.Pictures) -> Tensor:
    """How often each picture is drawn: kinds without sides, and views from above, half as often as the rest."""
    simple = torch.isin(pictures.kind, torch.tensor([data.KINDS.index(kind) for kind in ROUND]))
    return torch.where(simple, 0.5, 1.0) * torch.where(pictures.polar < 40, 0.5, 1.0)


def draw_times(count: int, total: int, generator: torch.Generator, middle: float = 0.5) -> Tensor:
    """Timesteps: a quarter uniform, the rest around sigmoid(`middle`) of the way, where shape and pose are decided
    (logit-normal, as Esser et al. 2024)."""
    around = torch.sigmoid(middle + 0.9 * torch.randn(count, generator=generator))
    flat = torch.rand(count, generator=generator)
    chosen = torch.where(torch.rand(count, generator=generator) < 0.25, flat, around)
    return (chosen * total).long().clamp(max=total - 1)


class Captions(nn.Module):
    """Text encoder that embeds each distinct caption of a batch once and blends view words as the guidance does."""

    def __init__(self, encoder: nn.Module, tokenizer, length: int) -> None:
        """length: tokens of a padded caption."""
        super().__init__()
        self.encoder, self.tokenizer, self.length, self.known = encoder, tokenizer, length, {}

    def tokens(self, text: str) -> Tensor:
        """-> [2, L]: the tokens, and which of them are no padding."""
        if text not in self.known:
            padded = self.tokenizer(text, padding="max_length", max_length=self.length)
            self.known[text] = torch.tensor([padded.input_ids, padded.attention_mask])
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
        tokens, mask = torch.stack([self.tokens(t) for t in texts], 1).to(device)
        causal = self.encoder.config.model_type.startswith("clip")  # never sees the padding, and was never told of it
        embedding = self.encoder(tokens, attention_mask=None if causal else mask)[0]
        samples, which, weights = zip(*entries, strict=True)
        parts = embedding[torch.tensor(which, device=device)] * torch.tensor(weights, device=device)[:, None, None]
        mixed = torch.zeros(len(index), *embedding.shape[1:], dtype=parts.dtype, device=device)
        return mixed.index_add(0, torch.tensor(samples, device=device), parts)


def parser(description: str) -> argparse.ArgumentParser:
    """The flags that both scripts have."""
    result = argparse.ArgumentParser(description=description)
    result.add_argument("--out", type=Path, required=True, help="pipeline folder to write")
    result.add_argument("--steps", type=int, default=25000)
    result.add_argument(
        "--minutes", type=float, help="stop after this time instead; the learning rate follows the clock"
    )
    result.add_argument("--batch", type=int, default=32)
    result.add_argument("--per_kind", type=int, default=1000)
    result.add_argument("--lr", type=float, default=1e-3)
    result.add_argument("--seed", type=int, default=0)
    result.add_argument("--resume", type=Path, help="a .state file of an earlier run, to go on from its weights")
    return result


def train(
    args: argparse.Namespace,
    unet: nn.Module,
    captions: Captions,
    abar: Tensor,
    encode: Callable[[Tensor], Tensor],
    loss: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    save: Callable[[dict[str, Tensor], dict[str, Tensor]], None],
    middle: float,
) -> None:
    """Trains denoiser and text encoder together.

    abar: [T], of the noise schedule; encode: pictures [B, 3, 64, 64] in [-1, 1] -> what is noised; loss: (network output, clean, noise,
    t) -> scalar; save: writes the folder from the averaged weights of the denoiser and of the text encoder; middle: of `draw_times`.
    """
    from diffusers.models.attention_processor import AttnProcessor

    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(args.seed)
    pictures = data.load(args.per_kind)
    chance = chances(pictures)
    unet.set_attn_processor(AttnProcessor())  # at 16 tokens the fused attention's backward takes ten times as long
    unet.to(memory_format=torch.channels_last)
    model = nn.ModuleDict({"unet": unet, "text": captions.encoder}).to(device)
    abar = abar.to(device)
    if args.resume:
        model.load_state_dict(load_state(args.resume)[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def value() -> Tensor:
        index = torch.multinomial(chance, args.batch, replacement=True, generator=generator)
        color = torch.randint(1, len(data.PALETTE), (args.batch,), generator=generator)
        color[torch.rand(args.batch, generator=generator) < NATURAL] = 0
        image = data.paint(pictures, index, color, generator).to(device).contiguous(memory_format=torch.channels_last)
        with torch.autocast(device, torch.bfloat16):
            with torch.no_grad():
                clean = encode(image * 2 - 1).float()
            t = draw_times(args.batch, len(abar), generator, middle).to(device)
            signal, spread = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
            noise = torch.randn(clean.shape, generator=generator).to(device)
            text = captions(pictures, index, color, generator)
            output = unet(signal * clean + spread * noise, t, text).sample.float()
        return loss(output, clean, noise, t)

    def parts(weights: dict[str, Tensor]) -> None:
        save(*({k[5:]: v for k, v in weights.items() if k.startswith(f"{part}.")} for part in ("unet", "text")))

    keeper = Keeper(model, args.out.with_suffix(".state"), parts)
    keeper.keep(descend(args.out.name, optimizer, value, args.steps, minutes=args.minutes, warm=300, after=keeper))
