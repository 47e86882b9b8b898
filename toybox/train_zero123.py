"""Train tiny-zero123: the object of one picture as seen from another camera (Zero-1-to-3, Liu et al. 2023), starting from tiny-sd.

The denoiser sees the reference picture's latents beside the noisy ones, and tokens: the image embedding of the reference and the relative
pose, projected. There are two legs. First the tokens alone are learned, without the denoiser: they shall be what tiny-sd's text would be for
the same object as the camera sees it ("a red chair, back view"), so that the denoiser, which understands that already, turns things from
the start. The image tower of tiny-clip, which was taught not to care for the view, is trained along in the end. Then everything together,
on pairs of pictures.
"""

import json
from copy import deepcopy
from dataclasses import dataclass

import torch
from jaxtyping import Float, UInt8
from safetensors.torch import load_file
from torch import Tensor, nn

from guidance.views import WORDS, view_weights
from guidance.weights import quiet
from guidance.zero123 import relative_pose
from toybox import data
from toybox.captions import CONTEXT, caption
from toybox.denoiser import NATURAL, draw_times, parser
from toybox.models import (
    MODELS,
    SIZE,
    WIDTH,
    build_autoencoder,
    build_image_encoder,
    build_projection,
    build_scheduler,
    build_unet,
    save_view_pipeline,
)
from toybox.objects import COLORS, OBJECTS
from toybox.render import compose, orbit_cameras, trace
from toybox.train_clip import MEAN, SPREAD
from toybox.training import Keeper, descend, load_state

REFERENCES, TARGETS = 3, 7  # views of a scene; the first of the references is from near the front
FRONT_SHARE = 0.6  # of the references that are asked about
WHITE, LIT = 0.65, 0.5  # share of the scenes on white, and of those that are lit
TOWER_SHARE = (
    0.15  # of the learning rate, for the image tower and the projection in the second leg, lest they forget the first
)
STORE = 24_000  # pictures that the projection learns from by itself
DROPPED = 0.1  # share of samples that are told nothing, for classifier-free guidance
POLAR, LEVEL = (15.0, 110.0), (60.0, 100.0)  # of targets and of references, degrees


@dataclass(frozen=True)
class Scenes:
    """Toybox objects from several cameras each: an object, a color, a background and a way of lighting are a scene."""

    latents: Float[Tensor, "N V 4 16 16"]  # half precision; as the autoencoder gives them; references first
    picture: UInt8[Tensor, "N R 3 64 64"]  # of the references
    camera: Float[Tensor, "N V 3"]  # polar, azimuth (degrees), radius


@torch.no_grad()
def make(per_kind: int, vae: nn.Module, seed: int = 0) -> Scenes:
    """Render and encode `per_kind` scenes of every kind."""
    generator = torch.Generator().manual_seed(seed)
    views = REFERENCES + TARGETS

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(*shape, generator=generator)

    palette = torch.tensor(list(COLORS.values()))
    rows = []
    for number, kind in enumerate(data.KINDS):
        azimuth = uniform(-180, 180, per_kind, views)
        azimuth[:, 0] = uniform(-20, 20, per_kind)
        level, any_polar = uniform(*LEVEL, per_kind, REFERENCES), uniform(*POLAR, per_kind, TARGETS)
        polar, radius = torch.cat([level, any_polar], 1), uniform(*data.RADIUS, per_kind, views)
        c2w = orbit_cameras(polar.flatten(), azimuth.flatten(), radius.flatten())
        light = c2w[:, :3, 2] + 0.3 * torch.randn(per_kind * views, 3, generator=generator)
        lit = uniform(0, 1, per_kind, 1) < LIT
        ambient = torch.where(lit, uniform(0.3, 0.9, per_kind, views), 1.0).flatten()
        layers = trace(OBJECTS[kind], c2w, data.FOVY, SIZE, light, ambient)

        draw = uniform(0, 1, per_kind, 1)
        named = palette[torch.randint(len(palette), (per_kind,), generator=generator)]
        color = torch.where(draw < 0.3, torch.tensor(OBJECTS[kind].default), named)
        color = (color + 0.03 * torch.randn(per_kind, 3, generator=generator)).clamp(0, 1)
        color = torch.where(draw > 0.75, uniform(0, 1, per_kind, 3), color)
        plain = torch.where(uniform(0, 1, per_kind, 1) < 0.3, uniform(0, 1, per_kind, 1), uniform(0, 1, per_kind, 3))
        background = torch.where(uniform(0, 1, per_kind, 1) < WHITE, 1.0, plain)
        each = (value.repeat_interleave(views, 0) for value in (color, background))
        image = compose(layers, *each).clamp(0, 1).permute(0, 3, 1, 2)
        parts = [vae.encode(2 * piece - 1).latents.half() for piece in image.split(100)]
        image = image.unflatten(0, (per_kind, views))
        rows.append(
            (
                torch.cat(parts).unflatten(0, (per_kind, views)),
                (image[:, :REFERENCES] * 255).round().byte(),
                torch.stack([polar, azimuth, radius], -1),
            )
        )
        print(f"{number + 1:3d}/{len(data.KINDS)} {kind}", flush=True)
    return Scenes(*(torch.cat(column) for column in zip(*rows, strict=True)))


def load(per_kind: int, vae: nn.Module, seed: int = 0) -> Scenes:
    """The scenes of `make`, kept in the cache folder."""
    file = data.CACHE / f"scenes-{per_kind}-{seed}.pt"
    if not file.exists():
        scenes = make(per_kind, vae, seed)
        data.CACHE.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".part")
        torch.save(vars(scenes), partial)
        partial.replace(file)
    return Scenes(**torch.load(file, weights_only=True))


def first_weights(model: nn.ModuleDict) -> None:
    """tiny-sd's denoiser, blind at first to the channels that are new to it, and tiny-clip's image tower."""
    known = load_file(MODELS / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors")
    known = {name: value.float() for name, value in known.items()}
    wide = torch.zeros_like(model["unet"].conv_in.weight)
    wide[:, : known["conv_in.weight"].shape[1]] = known["conv_in.weight"]
    model["unet"].load_state_dict({**known, "conv_in.weight": wide})
    seeing, tower = load_file(MODELS / "tiny-clip" / "model.safetensors"), model["image_encoder"]
    tower.load_state_dict({name: seeing[name].float() for name in tower.state_dict()})
    with torch.no_grad():
        model["cc_projection"][0].weight[:, WIDTH:] *= 4  # the pose's numbers are small beside those of the embedding


def build() -> nn.ModuleDict:
    """What is trained: denoiser, image tower, and the layers that make tokens of what it sees and of the pose."""
    parts = {"unet": build_unet(in_channels=8), "image_encoder": build_image_encoder()}
    return nn.ModuleDict({**parts, "cc_projection": build_projection()})


def tiny_autoencoder() -> nn.Module:
    """tiny-sd's autoencoder, frozen."""
    vae, folder = build_autoencoder(), MODELS / "tiny-sd" / "vae"
    weights = load_file(folder / "diffusion_pytorch_model.safetensors")
    vae.load_state_dict({name: value.float() for name, value in weights.items()})
    vae.register_to_config(scaling_factor=json.loads((folder / "config.json").read_text())["scaling_factor"])
    return vae.eval().requires_grad_(False)


def draw_pairs(scenes: Scenes, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """(scene, view that is known, view that is asked for) of each sample."""
    scene = torch.randint(len(scenes.camera), (count,), generator=generator)
    front = torch.rand(count, generator=generator) < FRONT_SHARE
    other = torch.randint(1, REFERENCES, (count,), generator=generator)
    target = torch.randint(REFERENCES + TARGETS, (count,), generator=generator)
    return scene, torch.where(front, 0, other), target


class Teacher:
    """What tiny-sd's text says of an object from a camera."""

    def __init__(self) -> None:
        from transformers import CLIPTextModel, CLIPTokenizer

        folder, unet = MODELS / "tiny-sd", build_unet()
        weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
        unet.load_state_dict({name: value.float() for name, value in weights.items()})
        self.pool = unet.add_embedding.requires_grad_(False)  # what changes the denoiser's time embedding
        with quiet():
            encoder = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

        def embed(kind: str, color: str) -> Tensor:
            texts = [caption(kind, color or None, view) for view in WORDS[8]]
            tokens = tokenizer(texts, padding="max_length", max_length=CONTEXT, return_tensors="pt").input_ids
            return encoder(tokens).last_hidden_state

        with torch.no_grad():  # kind, color, view words
            self.known = torch.stack(
                [torch.stack([embed(kind, color) for color in data.PALETTE]) for kind in data.KINDS]
            )
            one = self.known[:, :, :8]  # of the views around, each with its own kind and color
            self.spread = (one - one.mean(2, keepdim=True)).square().mean()
            pooled = self.pool(one.flatten(0, 2)).unflatten(0, one.shape[:3])
            self.pooled_spread = (pooled - pooled.mean(2, keepdim=True)).square().mean()

    @torch.no_grad()
    def __call__(self, kind: Tensor, color: Tensor, polar: Tensor, azimuth: Tensor) -> Float[Tensor, "B L D"]:
        """kind, color: indices as in data.py; angles in degrees."""
        weights = view_weights(polar, azimuth, 8, True, data.ANGLE_OVERHEAD)
        return torch.einsum("bn,bnld->bld", weights, self.known[kind, color])

    def error(self, tokens: Float[Tensor, "B L D"], wanted: Float[Tensor, "B L D"]) -> Float[Tensor, ""]:
        """Of the tokens, and of what the denoiser makes of them, as shares of what the view alone changes."""
        pooled = (self.pool(tokens) - self.pool(wanted)).square().mean() / self.pooled_spread
        return ((tokens - wanted).square().mean() / self.spread + pooled) / 2


def teach(model: nn.ModuleDict, args, generator: torch.Generator) -> None:
    """The first leg: tokens as the text would have been. The projection alone first, on what tiny-clip's tower makes of a store of
    pictures, at a tenth of the price; then the tower with it, for the sake of known views that are not the front."""
    teacher, pictures = Teacher(), data.load(seed=args.seed)
    tower, projection = model["image_encoder"], model["cc_projection"]
    level = (pictures.polar > LEVEL[0]).nonzero()[:, 0]
    ahead = level[pictures.azimuth[level].abs() < 20]

    def uniform(count: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    def one_of(pool: Tensor, count: int) -> Tensor:
        return pool[torch.randint(len(pool), (count,), generator=generator)]

    def draw(count: int) -> tuple[Tensor, Tensor]:
        """Pictures, and their colors."""
        index = torch.where(uniform(count) < FRONT_SHARE, one_of(ahead, count), one_of(level, count))
        color = torch.randint(1, len(data.PALETTE), (count,), generator=generator)
        color[uniform(count) < NATURAL] = 0
        return index, color

    def see(index: Tensor, color: Tensor) -> Tensor:
        picture = data.paint(pictures, index, color, generator, WHITE)
        with torch.autocast("cpu", torch.bfloat16):
            return tower((picture - MEAN) / SPREAD).image_embeds.float()

    def error(seen: Tensor, index: Tensor, color: Tensor) -> Tensor:
        count = len(index)
        there = torch.stack([uniform(count, *POLAR), uniform(count, -180, 180), uniform(count, -0.2, 0.2)], -1)
        here = torch.stack([pictures.polar[index], pictures.azimuth[index], torch.zeros(count)], -1)
        tokens = projection(torch.cat([seen, relative_pose(there, here)], 1))
        return teacher.error(tokens, teacher(pictures.kind[index], color, there[:, 0], there[:, 1]))

    def optimizer(*parts: nn.Module, lr: float) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            nn.ModuleList(parts).parameters(), lr=lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )

    index, color = draw(STORE)
    with torch.no_grad():
        store = torch.cat([see(*piece) for piece in zip(index.split(200), color.split(200), strict=True)])

    def stored() -> Tensor:
        chosen = torch.randint(STORE, (8 * args.batch,), generator=generator)
        return error(store[chosen], index[chosen], color[chosen])

    def fresh() -> Tensor:
        index, color = draw(2 * args.batch)
        return error(see(index, color).repeat(4, 1), index.repeat(4), color.repeat(4))  # four poses of each picture

    descend("the projection", optimizer(projection, lr=2 * args.lr), stored, 2 * args.teach_steps, warm=100)
    descend("the projection and the tower", optimizer(tower, projection, lr=args.lr), fresh, args.teach_steps, warm=100)


def main() -> None:
    flags = parser(__doc__)
    flags.add_argument("--teach_steps", type=int, default=2000, help="of the first leg; 0 leaves it out")
    flags.set_defaults(per_kind=100, steps=7000, lr=5e-4)
    args = flags.parse_args()

    from diffusers.models.attention_processor import AttnProcessor

    torch.manual_seed(args.seed)
    generator = torch.Generator().manual_seed(args.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    vae = tiny_autoencoder()
    scenes, scaling = load(args.per_kind, vae, args.seed), vae.config.scaling_factor
    model = build()
    if args.resume:
        model.load_state_dict(load_state(args.resume)[0])
    else:
        first_weights(model)
    if args.teach_steps:
        teach(model, args, generator)
    model.to(device)
    unet, tower, projection = model["unet"], model["image_encoder"], model["cc_projection"]
    unet.set_attn_processor(AttnProcessor())  # at 16 tokens the fused attention's backward takes ten times as long
    unet.to(memory_format=torch.channels_last)
    abar = build_scheduler().alphas_cumprod.to(device)
    groups = [{"params": list(unet.parameters())}]
    groups += [{"params": [*tower.parameters(), *projection.parameters()], "lr": TOWER_SHARE * args.lr}]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True)

    def loss() -> Tensor:
        scene, reference, target = draw_pairs(scenes, args.batch, generator)
        clean = scenes.latents[scene, target].float().to(device) * scaling
        beside = scenes.latents[scene, reference].float().to(device)
        picture = scenes.picture[scene, reference].to(device).float() / 255
        pose = relative_pose(scenes.camera[scene, target], scenes.camera[scene, reference]).to(device)
        told = (torch.rand(args.batch, generator=generator) >= DROPPED).float().to(device)
        t = draw_times(args.batch, len(abar), generator).to(device)
        noise = torch.randn(clean.shape, generator=generator).to(device)
        signal, spread = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        both = torch.cat([signal * clean + spread * noise, beside * told.view(-1, 1, 1, 1)], 1)
        with torch.autocast(device, torch.bfloat16):
            seen = tower((picture - MEAN) / SPREAD).image_embeds
            tokens = projection(torch.cat([seen, pose], 1)) * told.view(-1, 1, 1)
            output = unet(both.contiguous(memory_format=torch.channels_last), t, tokens).sample.float()
        return (output - (signal * noise - spread * clean)).square().mean()

    def save(weights: dict[str, Tensor]) -> None:
        fresh = build()
        fresh.load_state_dict(weights)
        save_view_pipeline(args.out, *fresh.values(), deepcopy(vae))

    keeper = Keeper(model, args.out.with_suffix(".state"), save)
    keeper.keep(0)
    keeper.keep(descend(args.out.name, optimizer, loss, args.steps, minutes=args.minutes, after=keeper))


if __name__ == "__main__":
    main()
