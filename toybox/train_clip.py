"""Train tiny-clip: which caption does a picture show? It ranks prompts (R-Precision) for the evaluation."""

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from toybox import data
from toybox.captions import caption, write_tokenizer
from toybox.models import build_clip
from toybox.training import descend

MEAN, SPREAD = 0.5, 0.25  # of the pictures, for normalisation; written into the folder's preprocessor_config.json
CAPTIONS = [caption(kind, color or None) for kind in data.KINDS for color in data.PALETTE]


def augment(image: Tensor, generator: torch.Generator) -> Tensor:
    """What reconstructions suffer from: other sizes, shifts, blur, lower contrast."""
    count = len(image)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=generator)

    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = uniform(0.85, 1.2)
    theta[:, :, 2] = uniform(-0.1, 0.1, 2)
    image = F.grid_sample(
        image, F.affine_grid(theta, list(image.shape), False), padding_mode="border", align_corners=False
    )
    soft = F.avg_pool2d(F.pad(image, (2, 2, 2, 2), mode="replicate"), 5, 1)
    image = torch.lerp(image, soft, uniform(0, 1, 1, 1, 1))
    return (uniform(0.7, 1.1, 1, 1, 1) * image + uniform(0, 0.1, 1, 1, 1)).clamp(0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="CLIPModel folder to write")
    parser.add_argument("--steps", type=int, default=4000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--per_kind", type=int, default=1000)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    from transformers import CLIPImageProcessor, CLIPTokenizer

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pictures = data.load(args.per_kind)
    write_tokenizer(args.out)
    tokenizer = CLIPTokenizer.from_pretrained(args.out)
    tokens = tokenizer(CAPTIONS, padding="max_length", return_tensors="pt").input_ids.to(device)
    model = build_clip(args.out).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.05, fused=True)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        index = torch.randint(len(pictures.kind), (count,), generator=generator)
        color = torch.randint(len(data.PALETTE), (count,), generator=generator)
        color[torch.rand(count, generator=generator) < 0.3] = 0
        image = augment(data.paint(pictures, index, color, generator), generator)
        return ((image - MEAN) / SPREAD).to(device), (pictures.kind[index] * len(data.PALETTE) + color).to(device)

    def logits(image: Tensor, which: Tensor) -> Tensor:
        """Every picture against the captions `which`, all different: none can be a false negative of another."""
        seen = model.visual_projection(model.vision_model(image).pooler_output).float()
        said = model.text_projection(model.text_model(tokens[which]).pooler_output).float()
        return F.normalize(seen, dim=-1) @ F.normalize(said, dim=-1).T * model.logit_scale.exp().clamp(max=100)

    def loss() -> Tensor:
        image, target = batch(args.batch)
        strangers = torch.randint(len(CAPTIONS), (args.batch,), generator=generator).to(device)
        which, place = torch.cat([target, strangers]).unique(return_inverse=True)
        with torch.autocast(device, torch.bfloat16):
            scores = logits(image, which)
        return F.cross_entropy(scores, place[: args.batch], label_smoothing=0.05)

    descend("tiny-clip", optimizer, loss, args.steps)
    model.eval()
    with torch.no_grad():
        every = torch.arange(len(CAPTIONS), device=device)
        hits = torch.cat(
            [(logits(image, every).argmax(-1) == target) for image, target in (batch(200) for _ in range(5))]
        )
    print(f"right among {len(CAPTIONS)} captions: {100 * hits.float().mean():.1f} %")
    model.to(torch.float16).save_pretrained(args.out)
    CLIPImageProcessor(
        size={"height": 64, "width": 64},
        crop_size={"height": 64, "width": 64},
        image_mean=[MEAN] * 3,
        image_std=[SPREAD] * 3,
    ).save_pretrained(args.out)


if __name__ == "__main__":
    main()
