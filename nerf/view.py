"""What a training step looks at: cameras, light, shading, background."""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

import ranks
from nerf.background import training_background
from nerf.provider import Cameras, random_cameras, random_light
from nerf.shading import Shading


@dataclass(frozen=True)
class View:
    """One step's B cameras and how what they see is shown.

    `as_latent`: the picture stands for the prior's latents, alone or, `with_mask`, with the mask as a further channel.
    """

    cameras: Cameras
    light: Float[Tensor, "B 3"]
    shading: Shading
    ambient: Float[Tensor, "B"]
    background: Float[Tensor, "B C"] | None
    as_latent: bool = False
    with_mask: bool = False

    def to(self, device: torch.device | str) -> "View":
        names = ("cameras", "light", "ambient", "background")
        moved = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return replace(self, **{name: value.to(device) for name, value in moved.items()})


def draw_view(opt: Any, step: int, generators: dict[str, torch.Generator], channels: int, has_network: bool) -> View:
    """The view of a step, from the generators `cameras` (cameras and lights) and `shading` (the rest).

    A scene of latents shows itself as it is. Else the published schedule, with r = step / iters: while r < latent_iter_ratio normals
    and, as fourth channel, the mask stand for latents; while r < albedo_iter_ratio albedo alone; then ambient light uniform in
    [min_ambient_ratio, 1], textureless with probability `textureless_ratio`, else lambertian. A physical material has its own light
    instead. Every step draws the same numbers, so that no choice shifts the later ones. Of several processes each has its own views of
    a batch that is so many times larger.
    """
    ratio, draw = step / opt.iters, generators["shading"]
    batch, own = opt.batch_size * ranks.count(), ranks.part(opt.batch_size)
    cameras = random_cameras(opt, batch, step, generators["cameras"])
    light = random_light(cameras, generators["cameras"])[own]
    cameras = cameras[own]
    ambient = opt.min_ambient_ratio + (1 - opt.min_ambient_ratio) * torch.rand(batch, generator=draw)[own]
    bare = float(torch.rand(1, generator=draw)) < opt.textureless_ratio
    unlit = float(torch.rand(1, generator=draw)) < opt.albedo_ratio
    background = training_background(opt, batch, draw, channels, has_network)
    background = background if background is None else background[own]
    if ratio < opt.latent_iter_ratio:
        return View(cameras, light, "normal", torch.ones_like(ambient), None, as_latent=True, with_mask=True)
    if opt.latent:
        return View(cameras, light, "albedo", torch.ones_like(ambient), background, as_latent=True)
    if opt.train_shading == "normal":
        return View(cameras, light, "normal", torch.ones_like(ambient), background)
    if opt.material == "pbr":
        return View(cameras, light, "pbr", torch.ones_like(ambient), background)
    if ratio < opt.albedo_iter_ratio or unlit:
        return View(cameras, light, "albedo", torch.ones_like(ambient), background)
    return View(cameras, light, "textureless" if bare else "lambertian", ambient, background)
