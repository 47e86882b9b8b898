"""A subject that tiny-sd has never seen: a cream teddy with one dark ear, a blue scarf and a red heart on its belly.

Its shape is close to the toybox's teddy; its colours and marking are in none of the training pictures. `photos` takes the casual pictures
that a personalisation starts from, `truth` shows it from any camera, and `identity` tells how much of it pictures have.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from files import make_folder
from toybox.models import MODELS, SIZE
from toybox.objects import Object, normalized
from toybox.primitives import Main, Part, Vec3, pair
from toybox.render import compose, orbit_cameras, trace

BODY: Vec3 = (0.93, 0.83, 0.58)
SHADE: Vec3 = (0.78, 0.66, 0.40)  # paws
WHITE: Vec3 = (0.97, 0.96, 0.93)
TAN: Vec3 = (0.70, 0.47, 0.28)
DARK: Vec3 = (0.16, 0.09, 0.08)
BLUE: Vec3 = (0.10, 0.28, 0.80)
RED: Vec3 = (0.86, 0.08, 0.12)
FOVY = 30.0  # degrees, as the toybox's own pictures
AZIMUTHS = (5.0, 38.0, -42.0, 80.0, -75.0, -140.0)  # of the photographs: mostly the front half
_LEAST = 0.004  # share of a picture that a feature must cover to be looked for
_BACKGROUNDS = ((0.85, 0.87, 0.90), (0.55, 0.68, 0.55), (0.90, 0.80, 0.72), (0.45, 0.50, 0.60), (0.75, 0.75, 0.72))

# Heart, scarf and ear are named: `identity` looks for each of them.
FEATURES: dict[str, tuple[Part, ...]] = {
    "heart": (
        Part("box", (0.13, 0.13, 0.05, 0.03), (0, -0.27, 0.365), (0, 0, 45), RED, face=True),
        *pair(Part("ellipsoid", (0.125, 0.125, 0.06), (0.095, -0.175, 0.36), color=RED, face=True)),
    ),
    "scarf": (
        Part("torus", (0.21, 0.085), (0, 0.14, 0), color=BLUE),
        Part("capsule", (0.075, 0.13), (0.24, -0.04, 0.25), (-18, 0, 14), BLUE),
    ),
    "ear": (Part("ellipsoid", (0.17, 0.17, 0.10), (0.27, 0.68, 0), color=DARK),),
}
_PARTS = (
    Part("ellipsoid", (0.38, 0.42, 0.34), (0, -0.22, 0)),
    Part("ellipsoid", (0.28, 0.31, 0.12), (0, -0.22, 0.26), color=WHITE, face=True),
    Part("ellipsoid", (0.34, 0.31, 0.30), (0, 0.42, 0)),
    Part("ellipsoid", (0.14, 0.14, 0.08), (-0.27, 0.68, 0)),
    Part("ellipsoid", (0.16, 0.13, 0.14), (0, 0.34, 0.25), color=TAN, face=True),
    Part("ellipsoid", (0.08, 0.065, 0.065), (0, 0.40, 0.365), color=DARK, face=True),
    *pair(Part("ellipsoid", (0.065, 0.065, 0.065), (0.14, 0.51, 0.24), color=DARK, face=True)),
    *pair(Part("capsule", (0.12, 0.16), (0.42, -0.08, 0.10), (-30, 0, 40), SHADE)),
    *pair(Part("capsule", (0.15, 0.16), (0.24, -0.58, 0.16), (70, 25, 0), SHADE)),
    Part("ellipsoid", (0.10, 0.10, 0.10), (0, -0.45, -0.33), color=SHADE),
)
SUBJECT = Object("teddy", BODY, normalized((*_PARTS, *(part for parts in FEATURES.values() for part in parts))))
_PALETTE = {"body": BODY, "shade": SHADE, "white": WHITE, "tan": TAN, "ear": DARK, "scarf": BLUE, "heart": RED}


def truth(
    c2w: Float[Tensor, "B 4 4"], size: int, fovy: float | Float[Tensor, "B"] = FOVY
) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W"]]:
    """(unlit pictures in [0, 1] on white, masks) of the subject, size x size pixels."""
    layers = trace(SUBJECT, c2w, fovy, size, c2w[:, :3, 2], torch.ones(len(c2w)))
    return compose(layers, torch.tensor(BODY), torch.ones(3)), layers.alpha


def photos(folder: Path, count: int = 6, size: int = 256, seed: int = 0) -> list[Path]:
    """Writes `count` JPEG files as somebody with a telephone would take them: no two from the same place, in the same light or before the
    same background. The cameras are kept nowhere."""
    from PIL import Image

    generator = torch.Generator().manual_seed(seed)

    def uniform(low: float, high: float) -> Float[Tensor, "N"]:
        return low + (high - low) * torch.rand(count, generator=generator)

    azimuth = torch.tensor([AZIMUTHS[i % len(AZIMUTHS)] for i in range(count)]) + uniform(-6, 6)
    c2w = orbit_cameras(uniform(66, 88), azimuth, uniform(3.1, 3.5))
    light = c2w[:, :3, 2] + 0.3 * torch.randn(count, 3, generator=generator)
    layers = trace(SUBJECT, c2w, FOVY, size, light, uniform(0.65, 0.95))
    backdrop = torch.tensor([_BACKGROUNDS[i % len(_BACKGROUNDS)] for i in range(count)])
    pictures = compose(layers, torch.tensor(BODY).expand(count, 3), backdrop).clamp(0, 1)
    make_folder(folder)
    paths = [folder / f"photo_{number + 1}.jpg" for number in range(count)]
    for path, picture in zip(paths, pictures, strict=True):
        Image.fromarray((picture * 255).round().byte().numpy()).save(path, quality=95)
    return paths


# -- how much of it is there --------------------------------------------------------------------------------------------


def identity(
    pictures: Float[Tensor, "B H W 3"],
    c2w: Float[Tensor, "B 4 4"],
    taken: Float[Tensor, "N h w 3"] | None = None,
    fovy: float | Float[Tensor, "B"] = FOVY,
) -> dict[str, float]:
    """How much pictures in [0, 1], unlit and on white, look like the subject from their cameras; `taken`: the photographs.

    color: mean absolute RGB difference where the subject is (0 is best). psnr: of the same pixels, dB. heart, scarf, ear: F1 score, in
    [0, 1], of the pixels that have that feature's colour against those that should, two in 64 pixels of displacement allowed, mean over
    the views that should show enough of it. behind: how much of the heart's colour there is where none should be, relative to the views
    that should show it (0 is best; a Janus has 1). clip: cosine similarity for tiny-clip to the most similar photograph, mean over the views.
    """
    size = pictures.shape[1]
    true, alpha = truth(c2w, size, fovy)
    inside = alpha > 0.5
    difference = (pictures - true)[inside]
    found: dict[str, float] = {
        "color": difference.abs().mean().item(),
        "psnr": -10 * torch.log10(difference.square().mean()).item(),
    }
    near, classes = _grown(inside, size), _classes(pictures)
    shares: dict[str, float] = {}
    for name in FEATURES:
        wanted, seen = _feature(name, c2w, size, fovy), near & (classes == list(_PALETTE).index(name))
        if name == "ear":  # eyes and nose are as dark: only what is near it counts
            seen &= _grown(wanted, size, 3)
        shown = wanted.float().mean((1, 2)) >= _LEAST
        found[name] = _agreement(seen[shown], wanted[shown], size) if shown.any() else 0.0
        if name == "heart":
            hidden = ~wanted.any(2).any(1)
            front = wanted[shown].float().mean().item() if shown.any() else 0.0
            shares["behind"] = seen[hidden].float().mean().item() / front if hidden.any() and front else 0.0
    found |= shares
    if taken is not None:
        found["clip"] = (look(pictures) @ look(taken).T).amax(1).mean().item()
    return found


@torch.no_grad()
def look(pictures: Float[Tensor, "B H W 3"]) -> Float[Tensor, "B D"]:
    """What tiny-clip sees, of unit length."""
    from toybox.train_clip import MEAN, SPREAD

    small = F.interpolate(pictures.permute(0, 3, 1, 2), (SIZE, SIZE), mode="area")
    model = _clip()
    return F.normalize(model.visual_projection(model.vision_model((small - MEAN) / SPREAD).pooler_output), dim=-1)


@cache
def _clip() -> torch.nn.Module:
    from transformers import CLIPModel

    from guidance.weights import quiet

    with quiet():
        model = CLIPModel.from_pretrained(MODELS / "tiny-clip", dtype=torch.float32, local_files_only=True)
    return model.eval().requires_grad_(False)


def _classes(pictures: Float[Tensor, "B H W 3"]) -> Tensor:
    """Which colour of the palette each pixel is nearest to, shade left aside."""
    palette = torch.tensor(list(_PALETTE.values()))
    return torch.cdist(pictures.reshape(-1, 3), palette).argmin(-1).view(pictures.shape[:3])


def _feature(name: str, c2w: Tensor, size: int, fovy: float | Tensor) -> Bool[Tensor, "B H W"]:
    """Where a feature is to be seen."""
    own, black = parts_of(name), (0.0, 0.0, 0.0)
    parts = tuple(replace(part, color=Main() if part in own else black) for part in SUBJECT.parts)
    layers = trace(Object(name, BODY, parts), c2w, fovy, size, c2w[:, :3, 2], torch.ones(len(c2w)))
    return layers.main > 0.5


def parts_of(name: str) -> tuple[Part, ...]:
    """The parts of a feature as they lie in `SUBJECT`: they come last, in the order of `FEATURES`."""
    start = len(_PARTS) + sum(len(FEATURES[other]) for other in list(FEATURES)[: list(FEATURES).index(name)])
    return SUBJECT.parts[start : start + len(FEATURES[name])]


def _grown(mask: Bool[Tensor, "B H W"], size: int, times: int = 1) -> Bool[Tensor, "B H W"]:
    """With everything within two in 64 pixels, `times` over."""
    reach = max(round(times * size / 32), 1)
    return F.max_pool2d(mask[:, None].float(), 2 * reach + 1, 1, reach)[:, 0] > 0


def _agreement(seen: Bool[Tensor, "B H W"], wanted: Bool[Tensor, "B H W"], size: int) -> float:
    """Mean F1 score of masks, displacements forgiven; 0 where nothing is seen."""
    precision = (seen & _grown(wanted, size)).sum((1, 2)) / seen.sum((1, 2)).clamp(min=1)
    recall = (wanted & _grown(seen, size)).sum((1, 2)) / wanted.sum((1, 2)).clamp(min=1)
    return (2 * precision * recall / (precision + recall).clamp(min=1e-6)).mean().item()
