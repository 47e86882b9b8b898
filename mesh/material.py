"""Physically based shading under an environment: matte light plus a GGX mirror, by the split-sum approximation (Karis 2013).

    colour = (1 - metallic) albedo (1 - E_0.04) irradiance(n) + E_F0 specular(r, roughness)

with F0 = 0.04 (1 - metallic) + metallic albedo, r the mirror direction, and E_F = (F A + B) (1 + F (1 / (A + B) - 1)) the share of light that a
mirror of head-on reflectance F sends on, from a table of A and B over (n . v, roughness). The last factor returns the light that bounces
more than once between the facets (Turquin 2019): rough metal is not dark, a white furnace stays white. The metallic-roughness model of glTF, so
exported textures look in a viewer as they did in training. alpha = roughness^2.
"""

import math
from functools import lru_cache

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from mesh.environment import Environment

ROUGHNESS = (0.08, 0.9)  # what Fantasia3D lets a texture choose from: no perfect mirror, whose highlights alias,
METALLIC = (0.0, 0.9)  # and no pure metal, which has no matte colour left to learn from
DIELECTRIC = 0.04  # head-on reflectance of glass and plastics
_TABLE = 64  # side of the table
_SAMPLES = 256


def shade_pbr(
    albedo: Float[Tensor, "*N 3"],
    roughness: Float[Tensor, "*N 1"],
    metallic: Float[Tensor, "*N 1"],
    normal: Float[Tensor, "*N 3"],
    view: Float[Tensor, "*N 3"],
    environment: Environment,
) -> Float[Tensor, "*N 3"]:
    """The colour of surface points, sRGB-coded and cut at 1 (no tone mapping); differentiable in all but the environment.

    `albedo` is sRGB-coded as everywhere here, in [0, 1]; roughness and metallic in [0, 1]; `normal` and `view` (towards the camera) of any
    length, world space. A normal that looks away from the camera is shaded as seen edge-on; a normal of length 0 gives some finite colour.
    """
    return linear_to_srgb(radiance(srgb_to_linear(albedo), roughness, metallic, normal, view, environment).clamp(0, 1))


def radiance(
    albedo: Float[Tensor, "*N 3"],
    roughness: Float[Tensor, "*N 1"],
    metallic: Float[Tensor, "*N 1"],
    normal: Float[Tensor, "*N 3"],
    view: Float[Tensor, "*N 3"],
    environment: Environment,
) -> Float[Tensor, "*N 3"]:
    """As `shade_pbr`, from linear albedo to linear light, not cut."""
    n, v = _unit(normal), _unit(view)
    cosine = (n * v).sum(-1, keepdim=True)
    mirror = 2 * cosine * n - v
    a, b = brdf(cosine.clamp(0, 1), roughness).split(1, -1)
    bounces = 1 / (a + b) - 1

    def reflected(f0):
        return (f0 * a + b) * (1 + f0 * bounces)

    f0 = DIELECTRIC * (1 - metallic) + metallic * albedo
    matte = (1 - metallic) * albedo * (1 - reflected(DIELECTRIC)) * environment.irradiance(n)
    return matte + reflected(f0) * environment.specular(mirror, roughness)


def perturb_normal(
    normal: Float[Tensor, "*N 3"], bump: Float[Tensor, "*N 3"], tangent: Float[Tensor, "*N 3"] | None = None
) -> Float[Tensor, "*N 3"]:
    """A unit normal tilted by a bump in [0, 1]; bump 1/2 (every component) leaves it as it is.

    With tangents (any length, any direction off the normal), as Fantasia3D: b = normalize(clamp(2 bump - 1 + (0, 0, 1), -1, 1)), then
    b_x t + b_y n x t + b_z n: glTF's tangent space, handedness 1. Without, in world space and without any frame: the normal plus
    the part of 2 bump - 1 that is across it. Neither can turn a normal by 90 degrees or more, but for b_z = 0.
    """
    n = _unit(normal)
    if tangent is None:
        tilt = 2 * bump - 1
        return _unit(n + tilt - (tilt * n).sum(-1, keepdim=True) * n)
    b = _unit((2 * bump - 1 + bump.new_tensor([0.0, 0.0, 1.0])).clamp(-1, 1))
    t, bitangent = _frame(n, tangent)
    return b[..., :1] * t + b[..., 1:2] * bitangent + b[..., 2:] * n


def in_tangent_space(
    shading: Float[Tensor, "*N 3"], normal: Float[Tensor, "*N 3"], tangent: Float[Tensor, "*N 3"]
) -> Float[Tensor, "*N 3"]:
    """A world-space normal as a normal map holds it, (n + 1) / 2 of its components along t, n x t and n: for export."""
    n = _unit(normal)
    axes = (*_frame(n, tangent), n)
    return (torch.stack([(shading * axis).sum(-1) for axis in axes], -1) + 1) / 2


def _frame(n: Float[Tensor, "*N 3"], tangent: Float[Tensor, "*N 3"]) -> tuple[Tensor, Tensor]:
    t = _unit(tangent - (tangent * n).sum(-1, keepdim=True) * n)
    return t, torch.linalg.cross(n, t)


def _unit(vector: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
    """Length 1; a vector of length 0 (a pixel without surface) stays, with a gradient of ordinary size."""
    length = vector.norm(dim=-1, keepdim=True)
    return vector / torch.where(length > 1e-12, length, 1.0)


def brdf(cosine: Float[Tensor, "*N 1"], roughness: Float[Tensor, "*N 1"]) -> Float[Tensor, "*N 2"]:
    """(A, B) of Karis 2013: of light from everywhere a GGX mirror of head-on reflectance F seen at that n . v sends on F A + B."""
    spot = torch.cat([cosine, roughness], -1).reshape(1, 1, -1, 2) * 2 - 1
    table = brdf_table(str(spot.device)).to(spot.dtype)
    found = F.grid_sample(table[None], spot, padding_mode="border", align_corners=True)
    return found[0, :, 0].T.reshape(*cosine.shape[:-1], 2)


@lru_cache(maxsize=4)
@torch.no_grad()
def brdf_table(device: str = "cpu") -> Float[Tensor, "2 R V"]:
    """A and B for roughness i / 63 (rows) and n . v = j / 63 (columns): integrals of the GGX lobe with Smith's height-correlated shadowing.

    Facets are drawn, from Hammersley's points, as often as the viewer sees them (Heitz 2018): each then adds (1 - F_c, F_c) G_2 / G_1 with
    F_c = (1 - v . h)^5, which is at most 1, so that A + B never passes 1.
    """
    steps = torch.linspace(0, 1, _TABLE, dtype=torch.float64)
    alpha = steps.clamp(min=0.02).square()[:, None, None]
    nv = steps.clamp(min=1e-3)[None, :, None]
    sv = (1 - nv**2).sqrt()  # v = (sv, 0, nv)
    index = torch.arange(_SAMPLES)
    bits = sum(((index >> i) & 1) * 2.0 ** -(i + 1) for i in range(_SAMPLES.bit_length() - 1))
    turn = 2 * math.pi * (bits.double() + 0.5 / _SAMPLES)
    radius = ((index + 0.5) / _SAMPLES).double().sqrt()
    # In the space where facets form a hemisphere, seen along (a, 0, b): a point of the disc, squeezed to the visible part, lifted onto it.
    size = ((alpha * sv) ** 2 + nv**2).sqrt()
    a, b = alpha * sv / size, nv / size
    t1 = radius * turn.cos()
    t2 = (1 - b) / 2 * (1 - t1**2).sqrt() + (1 + b) / 2 * radius * turn.sin()
    lift = (1 - t1**2 - t2**2).clamp(min=0).sqrt()
    x, y, z = alpha * (a * lift - b * t2), alpha * t1, (b * lift + a * t2).clamp(min=0)
    length = (x**2 + y**2 + z**2).sqrt()
    vh = ((sv * x + nv * z) / length).clamp(0, 1)
    nl = 2 * vh * z / length - nv

    def shadowed(cosine):  # 1 + 2 Lambda
        return (1 + alpha**2 * (1 / cosine.clamp(min=1e-6) ** 2 - 1)).sqrt()

    weight = torch.where(nl > 0, (1 + shadowed(nv)) / (shadowed(nl) + shadowed(nv)), 0.0)
    fresnel = (1 - vh) ** 5
    return torch.stack([((1 - fresnel) * weight).mean(-1), (fresnel * weight).mean(-1)]).float().to(device)


def srgb_to_linear(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Decode sRGB (IEC 61966-2-1), as mesh.export's for arrays."""
    return torch.where(value <= 0.04045, value / 12.92, ((value.clamp(min=0.04) + 0.055) / 1.055) ** 2.4)


def linear_to_srgb(value: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The inverse of `srgb_to_linear`."""
    return torch.where(value <= 0.0031308, value * 12.92, 1.055 * value.clamp(min=0.003) ** (1 / 2.4) - 0.055)
