"""Light from all around: an environment as a picture of the sphere, filtered beforehand so that shading a point is two look-ups.

Directions. y up, front +z, azimuth from +z towards +x. The equirectangular picture is not mirrored: it is what one sees standing at the
origin, and its middle column lies at -z (azimuth 180, what the front camera sees behind the object), a quarter to the right of it +x; the top row
is +y. `rotation` turns the light around y, in degrees, the way azimuths grow. Filtered light is kept on octahedral maps
(Cigolle et al. 2014): a square that covers the sphere nearly evenly, without poles, whose edges join, so that look-ups are smooth everywhere.
"""

import math
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from mesh.hdr import read_radiance

BUILT_IN = ("studio", "sky", "white")
_SIDE = 256  # of the chain's maps: 0.8 degrees to a texel
# Roughness, side of the map it is worked out on, rows of the picture it is worked out from: as fine as the lobe is wide.
_LEVELS = ((0.125, 96, 128), (0.25, 64, 96), (0.375, 64, 64), *((i / 8, 64, 48) for i in range(4, 9)))


@dataclass(frozen=True)
class Environment:
    """Light from all around: linear radiance, times `scale`, turned by `rotation` degrees from +z towards +x.

    `irradiance_map`: octahedral map of the cosine-weighted mean of the light, with a border. `chain`: the light as a rough mirror gathers it,
    level i for roughness i / (L - 1), each with a border.
    """

    irradiance_map: Float[Tensor, "3 n n"]
    chain: Float[Tensor, "3 L N N"]
    scale: float = 1.0
    rotation: float = 0.0

    def to(self, device: torch.device | str) -> "Environment":
        return replace(self, irradiance_map=self.irradiance_map.to(device), chain=self.chain.to(device))

    def irradiance(self, normal: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
        """What a white matte surface facing that way sends out: 1/pi times the integral of light times cosine. `normal` is unit."""
        spot = octahedral(self._turned(normal.reshape(-1, 3)))
        return self.scale * _look_up(self.irradiance_map, spot).reshape(normal.shape)

    def specular(
        self, direction: Float[Tensor, "*N 3"], roughness: Float[Tensor, "*N 1"] | float = 0.0
    ) -> Float[Tensor, "*N 3"]:
        """The light from around a unit direction as a GGX mirror of that roughness gathers it seen head-on; roughness 0 is the light itself."""
        spot = octahedral(self._turned(direction.reshape(-1, 3)))
        if not isinstance(roughness, Tensor):
            roughness = torch.full_like(direction[..., :1], roughness)
        levels, size = self.chain.shape[1], self.chain.shape[-1]
        level = roughness.reshape(-1, 1).clamp(0, 1) * (levels - 1)
        # grid_sample counts from -1 to 1 across the outer edges of all cells.
        where = torch.cat([_within(spot, size), (2 * level + 1) / levels - 1], 1)
        found = F.grid_sample(
            self.chain[None].to(where.dtype), where[None, None, None], padding_mode="border", align_corners=False
        )
        return self.scale * found[0, :, 0, 0].T.reshape(direction.shape)

    def _turned(self, direction: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        if self.rotation == 0:
            return direction
        c, s = math.cos(math.radians(self.rotation)), math.sin(math.radians(self.rotation))
        x, y, z = direction.unbind(1)
        return torch.stack([c * x - s * z, y, s * x + c * z], 1)


def load_environment(name: str, scale: float = 1.0, rotation: float = 0.0) -> Environment:
    """The built-in light `studio` (soft key, fill and rim lights on grey), `sky` or `white` (1 from everywhere), or a picture's.

    A picture is equirectangular, twice as wide as high: .hdr, .exr, or an ordinary one, taken as sRGB. 2 to 4 s on the CPU.
    UserError naming --environment for a name that is neither, and for a file that cannot be read.
    """
    if name == "white":
        picture = torch.ones(16, 32, 3)
    elif name in BUILT_IN:
        picture = {"studio": studio, "sky": sky}[name](_SIDE)
    elif not Path(name).is_file() and not Path(name).suffix:
        raise UserError(f"--environment {name}: neither a picture nor one of {', '.join(BUILT_IN)}")
    else:
        picture = torch.from_numpy(read_radiance(Path(name)))
        height, width = picture.shape[:2]
        if abs(width / (2 * height) - 1) > 0.05:
            raise UserError(
                f"--environment {name}: {width} x {height} is not equirectangular; its width is twice its height"
            )
    return replace(prefilter(picture), scale=float(scale), rotation=float(rotation))


@torch.no_grad()
def prefilter(picture: Float[Tensor, "h w 3"]) -> Environment:
    """The environment of an equirectangular picture of linear radiance: its irradiance and its chain of GGX lobes.

    A level holds sum L w / sum w over the picture, w = (n . l) D(h) solid angle with n = v = the direction asked for: the integral that Karis
    (Real Shading in Unreal Engine 4, 2013) samples, here summed over every pixel, hence without noise and without loss.
    """
    picture = shrink(picture, _SIDE)
    maps = [equirectangular(picture, _centres(_SIDE).to(picture))]
    for roughness, side, rows in _LEVELS:
        low = _gather(shrink(picture, rows), side, lambda c, a=roughness**2: _lobe(c, a))
        spot = octahedral(_centres(_SIDE).to(picture))
        maps.append(_look_up(_bordered(_square(low)), spot))
    chain = torch.stack([_bordered(_square(level)) for level in maps], 1)
    matte = _gather(shrink(picture, 96), 64, lambda c: c.clamp(min=0))
    return Environment(_bordered(_square(matte)), chain)


def _lobe(cosine: Float[Tensor, "*N"], alpha: float) -> Float[Tensor, "*N"]:
    """(n . l) D(h) up to a factor, from n . l, where the view is along the normal: then (n . h)^2 = (1 + n . l) / 2."""
    half = (1 - alpha**2) / 2
    spread = cosine.mul(-half).add_(1 - half)
    return cosine.clamp(min=0).div_(spread.square_())


def _gather(picture: Float[Tensor, "h w 3"], side: int, kernel) -> Float[Tensor, "N 3"]:
    """For the direction of every texel the mean of the picture with weights kernel(cosine of the angle) times solid angle."""
    directions, solid = sphere(*picture.shape[:2])
    directions, solid = directions.reshape(-1, 3).to(picture), solid.reshape(-1, 1).to(picture)
    values = torch.cat([picture.reshape(-1, 3) * solid, solid], 1)
    # 32 at a time: a few MB, which stay in the processor's cache.
    sums = torch.cat([kernel(part @ directions.T) @ values for part in _centres(side).to(picture).split(32)])
    return sums[:, :3] / sums[:, 3:]


def sphere(height: int, width: int) -> tuple[Float[Tensor, "h w 3"], Float[Tensor, "h w 1"]]:
    """The unit direction of every pixel of an equirectangular picture, and its solid angle (together 4 pi)."""
    polar = (torch.arange(height, dtype=torch.float64) + 0.5) * math.pi / height
    azimuth = math.pi - ((torch.arange(width, dtype=torch.float64) + 0.5) / width - 0.5) * 2 * math.pi
    polar, azimuth = polar[:, None], azimuth[None]
    up = polar.cos().expand(-1, width)
    directions = torch.stack([polar.sin() * azimuth.sin(), up, polar.sin() * azimuth.cos()], -1)
    solid = 2 * torch.sin(polar) * math.sin(math.pi / height / 2) * (2 * math.pi / width)
    return directions.float(), solid.expand(-1, width)[..., None].float()


def equirectangular(picture: Float[Tensor, "h w 3"], direction: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
    """The picture in these unit directions, bilinear; it goes on beyond its edges: around, and over the poles."""
    height, width = picture.shape[:2]
    x, y, z = direction.unbind(1)
    column = (0.5 + torch.atan2(x, -z) / (2 * math.pi)) * width + 1  # with one more column, and row, on each side
    row = torch.acos(y.clamp(-1, 1)) / math.pi * height + 1
    tall = torch.cat([picture[:1].roll(width // 2, 1), picture, picture[-1:].roll(width // 2, 1)])
    wide = torch.cat([tall[:, -1:], tall, tall[:, :1]], 1).permute(2, 0, 1)
    where = torch.stack([2 * column / (width + 2) - 1, 2 * row / (height + 2) - 1], 1)
    return _look_up(wide, where, raw=True)


def shrink(picture: Float[Tensor, "h w 3"], rows: int) -> Float[Tensor, "r c 3"]:
    """The picture with at most that many rows (and twice as many columns), averaged by solid angle: the light keeps its power."""
    if picture.shape[0] <= rows:
        return picture
    _, solid = sphere(*picture.shape[:2])
    solid = solid.to(picture)
    both = torch.cat([picture * solid, solid], -1).permute(2, 0, 1)
    both = F.adaptive_avg_pool2d(both[None], (rows, 2 * rows))[0].permute(1, 2, 0)
    return both[..., :3] / both[..., 3:]


def octahedral(direction: Float[Tensor, "N 3"]) -> Float[Tensor, "N 2"]:
    """Directions (of any length) to the square [-1, 1]^2: the upper half is the diamond |u| + |v| <= 1, u along x, v along z."""
    size = direction.abs().sum(1, keepdim=True)
    across = direction[:, ::2] / torch.where(size > 0, size, 1.0)  # no direction at all counts as +y
    folded = (1 - across.abs().flip(1)) * torch.where(across >= 0, 1.0, -1.0).to(across.dtype)
    return torch.where(direction[:, 1:2] >= 0, across, folded)


def _centres(side: int) -> Float[Tensor, "N 3"]:
    """The unit directions of the texels of an octahedral map, row by row (rows along v)."""
    axis = (torch.arange(side) + 0.5) * 2 / side - 1
    v, u = torch.meshgrid(axis, axis, indexing="ij")
    y = 1 - u.abs() - v.abs()
    below = (-y).clamp(min=0)
    x, z = (w - torch.sign(w) * below for w in (u, v))
    return F.normalize(torch.stack([x, y, z], -1).reshape(-1, 3), dim=-1)


def _square(values: Float[Tensor, "N 3"]) -> Float[Tensor, "3 n n"]:
    side = math.isqrt(len(values))
    return values.T.reshape(3, side, side)


def _bordered(square: Float[Tensor, "3 n n"]) -> Float[Tensor, "3 m m"]:
    """An octahedral map with one texel more on each side. An edge joins itself, turned around its middle."""
    wide = torch.cat([square[:, :, :1].flip(1), square, square[:, :, -1:].flip(1)], 2)
    return torch.cat([wide[:, :1].flip(2), wide, wide[:, -1:].flip(2)], 1)


def _within(spot: Float[Tensor, "N 2"], size: int) -> Float[Tensor, "N 2"]:
    """Places on the map without its border as places on the map with it, `size` texels in all."""
    return spot * ((size - 2) / size)


def _look_up(square: Float[Tensor, "3 h w"], spot: Float[Tensor, "N 2"], raw: bool = False) -> Float[Tensor, "N 3"]:
    """Bilinear, at places in [-1, 1]^2: of the map without its border, or (raw) of all of it."""
    where = spot if raw else _within(spot, square.shape[-1])
    found = F.grid_sample(square[None].to(where.dtype), where[None, None], padding_mode="border", align_corners=False)
    return found[0, :, 0].T


def _light(directions: Tensor, polar: float, azimuth: float, radius: float, colour: tuple) -> Tensor:
    """A round lamp with a soft rim, in degrees: full within `radius`, nothing from a fifth farther out."""
    p, a = math.radians(polar), math.radians(azimuth)
    towards = torch.tensor([math.sin(p) * math.sin(a), math.cos(p), math.sin(p) * math.cos(a)])
    angle = torch.rad2deg(torch.acos((directions @ towards).clamp(-1, 1)))
    share = ((1.2 * radius - angle) / (0.2 * radius)).clamp(0, 1)[..., None]
    return share.square() * (3 - 2 * share) * torch.tensor(colour)


def studio(rows: int) -> Float[Tensor, "h w 3"]:
    """A large warm key light in front on the right, a wide cooler fill on the left, two rim lights behind, on grey."""
    directions, _ = sphere(rows, 2 * rows)
    grey = (0.35 + 0.15 * directions[..., 1:2]).expand(-1, -1, 3)
    key = _light(directions, 50, 40, 24, (6.0, 5.8, 5.5))
    fill = _light(directions, 75, -60, 36, (1.1, 1.15, 1.25))
    rims = sum(_light(directions, 50, azimuth, 12, (7.0, 7.0, 7.2)) for azimuth in (150, -140))
    return 0.6 * (grey + key + fill + rims)  # brings a white surface that faces the key light to 1.1


def sky(rows: int) -> Float[Tensor, "h w 3"]:
    """A clear blue sky, whiter at the horizon, a soft sun at azimuth 35, 40 degrees above the horizon, over brownish ground."""
    directions, _ = sphere(rows, 2 * rows)
    up = directions[..., 1:2]
    high = up.clamp(min=0).sqrt()
    sky = torch.tensor([0.95, 1.0, 1.05]) * (1 - high) + torch.tensor([0.28, 0.5, 0.95]) * high
    ground = torch.tensor([0.26, 0.23, 0.19])
    edge = ((up + 0.03) / 0.06).clamp(0, 1)
    return ground + (sky - ground) * edge + _light(directions, 50, 35, 6, (42.0, 38.0, 31.0))
