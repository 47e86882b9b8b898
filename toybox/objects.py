"""The objects of the toybox: named solids with a main colour and a known shape.

Right-handed world, y up, the front faces +z, so +x is the object's own left side. Each object is centred at the origin
and scaled so that its farthest point lies at `RADIUS`.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from toybox.kinds_living import LIVING
from toybox.kinds_things import THINGS
from toybox.kinds_vehicles import VEHICLES
from toybox.primitives import Part, Vec3, support

RADIUS = 0.78

COLORS: dict[str, Vec3] = {
    "red": (0.85, 0.10, 0.10),
    "orange": (1.00, 0.50, 0.05),
    "yellow": (0.98, 0.87, 0.12),
    "green": (0.12, 0.62, 0.18),
    "cyan": (0.15, 0.80, 0.85),
    "blue": (0.12, 0.25, 0.85),
    "purple": (0.52, 0.15, 0.72),
    "pink": (1.00, 0.55, 0.75),
    "brown": (0.42, 0.24, 0.10),
    "white": (0.95, 0.95, 0.95),
}


@dataclass(frozen=True)
class Object:
    """A kind of object: its parts in world units, and the RGB of its main colour when the prompt names none."""

    name: str
    default: Vec3
    parts: tuple[Part, ...]

    @property
    def has_face(self) -> bool:
        """Whether it has features that only its front shows."""
        return any(part.face for part in self.parts)


def _directions(count: int) -> Float[Tensor, "K 3"]:
    """The six axes and a Fibonacci sphere, float64."""
    i = torch.arange(count, dtype=torch.float64)
    y = 1 - (2 * i + 1) / count
    angle = i * (torch.pi * (3 - 5**0.5))
    ring = (1 - y * y).sqrt()
    axes = torch.eye(3, dtype=torch.float64)
    return torch.cat([axes, -axes, torch.stack([ring * angle.cos(), y, ring * angle.sin()], -1)])


def bounding_radius(parts: tuple[Part, ...]) -> float:
    """Distance of the farthest surface point from the origin."""
    farthest = 0.0
    for part in parts:
        u = _directions(200)
        for _ in range(8):
            # The support point along p is at least as far out as p: this climbs to a local maximum from each start.
            p = support(part, u)
            u = p / p.norm(dim=-1, keepdim=True).clamp_min(1e-9)
        farthest = max(farthest, float(p.norm(dim=-1).max()))
    return farthest


def normalized(parts: tuple[Part, ...], radius: float = RADIUS) -> tuple[Part, ...]:
    """The same solid with its bounding box centred at the origin and its farthest point at `radius`."""
    hull = torch.cat([support(part, _directions(0)) for part in parts])
    center = (hull.amin(0) + hull.amax(0)) / 2
    x, y, z = (-center).tolist()
    centered = tuple(part.moved((x, y, z), 1.0) for part in parts)
    scale = radius / bounding_radius(centered)
    return tuple(part.moved((0.0, 0.0, 0.0), scale) for part in centered)


OBJECTS: dict[str, Object] = {
    name: Object(name, default, normalized(tuple(parts)))
    for name, (default, parts) in sorted({**THINGS, **VEHICLES, **LIVING}.items())
}
