"""From material to colour: what the light does to a sample."""

from typing import Literal

from jaxtyping import Float
from torch import Tensor

Shading = Literal["albedo", "lambertian", "textureless", "normal", "pbr"]  # pbr: surfaces alone (mesh/material.py)


def needs_normal(mode: Shading) -> bool:
    return mode != "albedo"


def shade(
    albedo: Float[Tensor, "M C"],
    normal: Float[Tensor, "M 3"] | None,
    light: Float[Tensor, "#M 3"] | None,
    ambient: Float[Tensor, "#M 1"],
    mode: Shading,
) -> Float[Tensor, "M K"]:
    """The colour of each sample; C channels, or 3 in the mode `normal`.

    albedo       the albedo itself
    lambertian   albedo * s, with s = ambient + (1 - ambient) max(0, normal . light)
    textureless  s in every channel
    normal       (normal + 1) / 2
    `normal` and `light` (towards the light) are unit vectors in world space. ValueError if the mode needs one that is missing.
    """
    if mode == "albedo":
        return albedo
    if normal is None:
        raise ValueError(f"shading {mode!r} needs normals")
    if mode == "normal":
        return (normal + 1) / 2
    if light is None:
        raise ValueError(f"shading {mode!r} needs a light")
    lit = ambient + (1 - ambient) * (normal * light).sum(-1, keepdim=True).clamp(min=0)
    if mode == "lambertian":
        return albedo * lit
    if mode == "textureless":
        return lit.expand(-1, albedo.shape[1])
    raise ValueError(f"unknown shading {mode!r}: albedo, lambertian, textureless or normal")
