"""How a viewer looks at the scene: a camera that a hand turns, the light, the way it is drawn."""

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mesh.scene import MeshScene
from nerf.provider import Cameras, orbit, sphere_angles
from nerf.renderer import NeRFRenderer

MODES = ("image", "albedo", "lambertian", "textureless", "normal", "depth")
STEEP = 1.0  # degrees that a camera stays away from the poles

# Where in a pixel the pictures of a still frame look, relative to its middle: Halton points, the first in the middle.
_X, _Y = (
    (0, 1 / 4, -1 / 4, 3 / 8, -1 / 8, 1 / 8, -3 / 8, 7 / 16),
    (0, 1 / 3, -1 / 3, -1 / 9, 2 / 9, -4 / 9, 1 / 9, 4 / 9),
)
SHIFTS = tuple(zip(_X, _Y, strict=True))


@dataclass(frozen=True)
class Look:
    """How the scene is looked at. Angles in degrees; `target` is the point in the middle; the light stands where the camera is unless
    `light` (polar, azimuth) is given; `background` None: the scene's own; `box` cuts the picture (xmin ymin zmin xmax ymax zmax)."""

    polar: float
    azimuth: float
    radius: float
    fovy: float
    height: int
    width: int
    target: tuple[float, float, float] = (0.0, 0.0, 0.0)
    mode: str = "image"
    light: tuple[float, float] | None = None
    ambient: float = 0.3
    background: tuple[float, float, float] | None = (1.0, 1.0, 1.0)
    box: tuple[float, ...] | None = None
    max_steps: int = 0  # samples along a ray at most; 0: as the run has it
    dt_gamma: float | None = None  # None: as the run has it
    dynamic: bool = True  # quick pictures while something moves
    samples: int = 4  # pictures, each shifted by a part of a pixel, that a still one is the mean of

    def cameras(self, scale: float = 1.0, shift: tuple[float, float] = (0.0, 0.0)) -> Cameras:
        """One camera with so many times the pixels, turned by `shift` of a pixel to the right and up."""
        height, width = (max(8, round(size * scale)) for size in (self.height, self.width))
        found = orbit(self.polar, self.azimuth, self.radius, self.fovy, height, width)
        c2w = found.c2w.clone()
        angles = [math.atan(part / float(found.focal)) for part in shift]
        if any(angles):
            c2w[:, :3, :3] = c2w[:, :3, :3] @ _turn(*angles)
        c2w[:, :3, 3] += torch.tensor(self.target)
        return replace(found, c2w=c2w)

    def orbited(self, right: float, down: float) -> "Look":
        """After a drag by so many degrees: the object follows the hand."""
        azimuth = (self.azimuth - right + 180) % 360 - 180
        return replace(self, azimuth=azimuth, polar=min(max(self.polar - down, STEEP), 180 - STEEP))

    def panned(self, right: float, down: float) -> "Look":
        """After a drag by so many pixels: what lies at the distance of the target follows the hand."""
        x, y = self.cameras().c2w[0, :3, :2].T
        unit = 2 * self.radius * math.tan(math.radians(self.fovy) / 2) / self.height
        moved = torch.tensor(self.target) - unit * right * x + unit * down * y
        return replace(self, target=tuple(moved.tolist()))

    def zoomed(self, notches: float) -> "Look":
        """After so many notches of the wheel; positive: nearer."""
        return replace(self, radius=min(max(self.radius * 1.1**-notches, 0.05), 100.0))

    def seen_from(self, position: Any, target: Any) -> "Look":
        """With a camera at `position` that looks at `target`, upright (world units)."""
        position, target = (torch.as_tensor(point, dtype=torch.float32).reshape(1, 3) for point in (position, target))
        polar, azimuth, radius = (float(value) for value in sphere_angles(position - target))
        polar = min(max(polar, STEEP), 180 - STEEP)
        return replace(self, polar=polar, azimuth=azimuth, radius=max(radius, 0.05), target=tuple(target[0].tolist()))


def ignored(scene: Any) -> frozenset[str]:
    """The fields of a look that make no difference to the pictures of `scene`."""
    modules = list(scene.modules())
    if any(isinstance(module, MeshScene) for module in modules):
        return frozenset({"box", "max_steps", "dt_gamma"})
    marching = any(isinstance(module, NeRFRenderer) and module.occupancy is not None for module in modules)
    return frozenset() if marching else frozenset({"dt_gamma"})


def _turn(right: float, up: float) -> Tensor:
    """The rotation of a camera's axes by small angles (radians)."""
    c, s, d, t = math.cos(right), math.sin(right), math.cos(up), math.sin(up)
    yaw = torch.tensor([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    pitch = torch.tensor([[1, 0, 0], [0, d, -t], [0, t, d]])
    return yaw @ pitch
