"""Signed-distance primitives: the bricks of the toybox.

Lengths are world units, angles degrees. Every primitive is defined in its own frame (axis of revolution = y) and
placed by a rotation about the origin followed by a translation.

| shape     | size                                   | remark                                      |
|-----------|----------------------------------------|---------------------------------------------|
| ellipsoid | (rx, ry, rz)                           | first-order bound; exact for a sphere       |
| box       | (hx, hy, hz, rounding)                 | half extents, rounding included             |
| cylinder  | (radius, half height, rounding)        | rounding included in the extents            |
| cone      | (bottom radius, top radius, half height) | a frustum; top radius 0 gives a cone      |
| torus     | (ring radius, tube radius)             | the ring lies in the xz plane               |
| capsule   | (radius, half length)                  | half length between the centres of the caps |
| prism     | (hx, hy, hz)                           | gable roof, ridge along z; lower bound      |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor

Vec3 = tuple[float, float, float]


@dataclass(frozen=True)
class Main:
    """The colour that the prompt names, times a brightness factor."""

    scale: float = 1.0


MAIN = Main()


@dataclass(frozen=True)
class Part:
    """One primitive, placed in the world: x_world = R(rotation) x_local + position.

    rotation: degrees about x, then y, then z (R = Rz Ry Rx). color: linear RGB in [0, 1], or `Main`.
    face: belongs to the features that only the front of the object shows.
    """

    shape: str
    size: tuple[float, ...]
    position: Vec3 = (0.0, 0.0, 0.0)
    rotation: Vec3 = (0.0, 0.0, 0.0)
    color: Vec3 | Main = MAIN
    face: bool = False

    def __post_init__(self) -> None:
        if self.shape not in SHAPES:
            raise ValueError(f"unknown shape {self.shape!r}, expected one of {', '.join(SHAPES)}")
        if len(self.size) != SHAPES[self.shape].arity:
            raise ValueError(f"{self.shape} wants {SHAPES[self.shape].arity} sizes, got {self.size}")

    def moved(self, offset: Vec3, scale: float) -> "Part":
        """The part after x -> scale * (x + offset)."""
        position = tuple(scale * (p + o) for p, o in zip(self.position, offset, strict=True))
        return replace(self, position=position, size=tuple(scale * s for s in self.size))


def pair(part: Part) -> tuple[Part, Part]:
    """A part and its mirror image in the plane x = 0 (every primitive is itself symmetric in x)."""
    (x, y, z), (a, b, c) = part.position, part.rotation
    return part, replace(part, position=(-x, y, z), rotation=(a, -b, -c))


# --- signed distances in the local frame -----------------------------------------------------------------------------
# They take the coordinates apart, x, y, z [N]: contiguous rows are what the tracer keeps in the cache.


def _hypot(a: Tensor, b: Tensor) -> Tensor:
    return (a * a + b * b).sqrt()


def _ellipsoid(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    rx, ry, rz = size
    u, v, w = x / rx, y / ry, z / rz
    k0 = (u * u + v * v + w * w).sqrt()
    k1 = ((u / rx) ** 2 + (v / ry) ** 2 + (w / rz) ** 2).sqrt()
    # |f| / |grad f| of f = k0 (k0 - 1); the quotient is 0/0 at the centre, where the nearest surface is known.
    return torch.where(k0 < 1e-6, -min(size), k0 * (k0 - 1) / k1.clamp_min(1e-12))


def _box(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    hx, hy, hz, r = size
    qx, qy, qz = x.abs() - (hx - r), y.abs() - (hy - r), z.abs() - (hz - r)
    inside = torch.maximum(torch.maximum(qx, qy), qz).clamp_max(0)
    qx, qy, qz = qx.clamp_min(0), qy.clamp_min(0), qz.clamp_min(0)
    return (qx * qx + qy * qy + qz * qz).sqrt() + inside - r


def _cylinder(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    radius, half, r = size
    qr, qy = _hypot(x, z) - (radius - r), y.abs() - (half - r)
    inside = torch.maximum(qr, qy).clamp_max(0)
    return _hypot(qr.clamp_min(0), qy.clamp_min(0)) + inside - r


def _cone(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    bottom, top, half = size
    ring = _hypot(x, z)
    # Nearest point of the caps (a) and of the slanted wall (b), in the half plane (ring, y).
    ar = (ring - torch.where(y < 0, bottom, top)).clamp_min(0)
    ay = y.abs() - half
    dr, dy = top - bottom, 2 * half
    s = (((ring - bottom) * dr + (y + half) * dy) / (dr * dr + dy * dy)).clamp(0, 1)
    br, by = ring - bottom - s * dr, y + half - s * dy
    distance = torch.minimum(ar * ar + ay * ay, br * br + by * by).sqrt()
    return torch.where((br < 0) & (ay < 0), -distance, distance)


def _torus(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    return _hypot(_hypot(x, z) - size[0], y) - size[1]


def _capsule(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    radius, half = size
    y = y - y.clamp(-half, half)
    return (x * x + y * y + z * z).sqrt() - radius


def _prism(x: Tensor, y: Tensor, z: Tensor, size: tuple[float, ...]) -> Tensor:
    hx, hy, hz = size
    slope = math.hypot(2 * hy, hx)
    roof = (2 * hy * x.abs() + hx * (y - hy)) / slope
    return torch.maximum(torch.maximum(roof, -y - hy), z.abs() - hz)


# --- support points in the local frame: the point of the convex hull that lies farthest along a direction u [K, 3] -----


def _sign(u: Tensor) -> Tensor:
    return torch.where(u < 0, -1.0, 1.0).to(u)


def _rim(u: Tensor, radius: float) -> tuple[Tensor, Tensor]:
    length = _hypot(u[:, 0], u[:, 2]).clamp_min(1e-12)
    return radius * u[:, 0] / length, radius * u[:, 2] / length


def _ellipsoid_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    r = torch.tensor(size, dtype=u.dtype)
    return r * r * u / (r * u).norm(dim=-1, keepdim=True)


def _box_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    return _sign(u) * (torch.tensor(size[:3], dtype=u.dtype) - size[3]) + size[3] * u


def _cylinder_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    radius, half, r = size
    x, z = _rim(u, radius - r)
    return torch.stack([x, _sign(u[:, 1]) * (half - r), z], -1) + r * u


def _cone_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    bottom, top, half = size
    low, high = (_cylinder_support(u, (radius, half, 0.0)) for radius in (bottom, top))
    low[:, 1], high[:, 1] = -half, half
    return torch.where(((high - low) * u).sum(-1, keepdim=True) > 0, high, low)


def _torus_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    x, z = _rim(u, size[0])
    return torch.stack([x, torch.zeros_like(x), z], -1) + size[1] * u


def _capsule_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    zero = torch.zeros_like(u[:, 0])
    return torch.stack([zero, size[1] * _sign(u[:, 1]), zero], -1) + size[0] * u


def _prism_support(u: Tensor, size: tuple[float, ...]) -> Tensor:
    hx, hy, hz = size
    corners = [(-hx, -hy), (hx, -hy), (0.0, hy)]
    vertices = torch.tensor([(x, y, z) for x, y in corners for z in (-hz, hz)], dtype=u.dtype)
    return vertices[(u @ vertices.T).argmax(-1)]


# --- the table of shapes -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """What the toybox knows about a primitive, all in its local frame."""

    arity: int
    distance: Callable[[Tensor, Tensor, Tensor, tuple[float, ...]], Tensor]
    support: Callable[[Tensor, tuple[float, ...]], Tensor]
    extent: Callable[[tuple[float, ...]], Vec3]  # half extents of the bounding box
    thickness: Callable[[tuple[float, ...]], float]  # the thinnest full width of the solid


SHAPES: dict[str, Shape] = {
    "ellipsoid": Shape(3, _ellipsoid, _ellipsoid_support, lambda s: s, lambda s: 2 * min(s)),
    "box": Shape(4, _box, _box_support, lambda s: s[:3], lambda s: 2 * min(s[:3])),
    "cylinder": Shape(3, _cylinder, _cylinder_support, lambda s: (s[0], s[1], s[0]), lambda s: 2 * min(s[:2])),
    "cone": Shape(
        3, _cone, _cone_support, lambda s: (max(s[:2]), s[2], max(s[:2])), lambda s: min(s[0] + s[1], 2 * s[2])
    ),
    "torus": Shape(2, _torus, _torus_support, lambda s: (s[0] + s[1], s[1], s[0] + s[1]), lambda s: 2 * s[1]),
    "capsule": Shape(2, _capsule, _capsule_support, lambda s: (s[0], s[0] + s[1], s[0]), lambda s: 2 * s[0]),
    "prism": Shape(3, _prism, _prism_support, lambda s: s, lambda s: min(s[0], 2 * s[1], 2 * s[2])),
}


def thickness(part: Part) -> float:
    """The thinnest full width of a part, in world units (of a cone: its mean width)."""
    return SHAPES[part.shape].thickness(part.size)


@cache
def rotation_matrix(degrees: Vec3) -> Float[Tensor, "3 3"]:
    """Rz Ry Rx in float64: turns local vectors into world vectors."""
    (ca, sa), (cb, sb), (cc, sc) = ((math.cos(math.radians(d)), math.sin(math.radians(d))) for d in degrees)
    x = torch.tensor([[1, 0, 0], [0, ca, -sa], [0, sa, ca]], dtype=torch.float64)
    y = torch.tensor([[cb, 0, sb], [0, 1, 0], [-sb, 0, cb]], dtype=torch.float64)
    z = torch.tensor([[cc, -sc, 0], [sc, cc, 0], [0, 0, 1]], dtype=torch.float64)
    return z @ y @ x


def distance(part: Part, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N"]:
    """Signed distance (negative inside) from world points to a part."""
    local = (points - points.new_tensor(part.position)) @ rotation_matrix(part.rotation).to(points)
    return SHAPES[part.shape].distance(*local.unbind(-1), part.size)


def support(part: Part, directions: Float[Tensor, "K 3"]) -> Float[Tensor, "K 3"]:
    """For each unit direction, the point of the part's convex hull that lies farthest along it."""
    rotation = rotation_matrix(part.rotation).to(directions)
    local = SHAPES[part.shape].support(directions @ rotation, part.size)
    return local @ rotation.T + directions.new_tensor(part.position)
