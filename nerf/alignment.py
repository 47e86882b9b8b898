"""Calibrated photographs in our world: turned upright, the object at the origin, the cameras at the usual distance; and their pictures as
those of cameras with the principal point in the middle of a square."""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from nerf.cutout import box_of
from nerf.photo_sets import Shot

Z_UP = ((1.0, 0.0, 0.0), (0.0, 0.0, 1.0), (0.0, -1.0, 0.0))  # (x, y, z) of a file with z up is our (x, z, -y)
SLANT = 60.0  # degrees between a file's z and the cameras' up from where on the file is not believed
MARGIN = 1.1  # a cropped square reaches so many times as far as the object
PARALLEL = 1e-3  # cameras whose directions spread by less (radians squared) say nothing about a distance


@dataclass(frozen=True)
class Similarity:
    """x -> scale * rotation (x - centre): from a file's world into ours."""

    rotation: Float[Tensor, "3 3"]
    centre: Float[Tensor, "3"]
    scale: float

    def cameras(self, c2w: Float[Tensor, "N 4 4"]) -> Float[Tensor, "N 4 4"]:
        """The cameras with it; their axes stay unit vectors."""
        out = c2w.clone()
        out[:, :3, :3] = self.rotation @ c2w[:, :3, :3]
        out[:, :3, 3] = self.scale * (c2w[:, :3, 3] - self.centre) @ self.rotation.T
        return out


def closest_point(origins: Float[Tensor, "N 3"], directions: Float[Tensor, "N 3"]) -> Float[Tensor, "3"] | None:
    """The point with the least sum of squared distances from the lines; None if they are (almost) parallel.

    Solves sum_i (1 - d_i d_i^T) (x - o_i) = 0.
    """
    directions = F.normalize(directions.double(), dim=-1)
    across = torch.eye(3, dtype=torch.float64) - directions[:, :, None] * directions[:, None]
    total = across.mean(0)
    if float(torch.linalg.eigvalsh(total)[0]) < PARALLEL:
        return None
    return torch.linalg.solve(total, (across @ origins.double()[..., None]).mean(0)[:, 0]).float()


def camera_up(c2w: Float[Tensor, "N 4 4"]) -> Float[Tensor, "3"]:
    """What the photographer held upright: the direction that the cameras' right sides are most perpendicular to.

    The least eigenvector of mean r r^T - 1e-4 u u^T, u the mean of the cameras' up: photographs from above lean u, but not r. The second term
    decides where all cameras look the same way.
    """
    right, up = c2w[:, :3, 0].double(), F.normalize(c2w[:, :3, 1].double().mean(0), dim=0)
    spread = (right[:, :, None] * right[:, None]).mean(0) - 1e-4 * up[:, None] * up
    axis = torch.linalg.eigh(spread).eigenvectors[:, 0]
    return (axis * torch.sign(axis @ up)).float()


def turn_upright(up: Float[Tensor, "3"]) -> Float[Tensor, "3 3"]:
    """The smallest rotation that takes `up` to y (half a turn about x if they are opposite)."""
    a, y = F.normalize(up.double(), dim=0), torch.tensor([0.0, 1.0, 0.0], dtype=torch.float64)
    axis, cosine = torch.linalg.cross(a, y), float(a @ y)
    if cosine < -1 + 1e-9:
        return torch.diag(torch.tensor([1.0, -1.0, -1.0]))
    x, v, z = axis.tolist()
    k = torch.tensor([[0, -z, v], [z, 0, -x], [-v, x, 0]], dtype=torch.float64)
    return (torch.eye(3, dtype=torch.float64) + k + k @ k / (1 + cosine)).float()


def turn_about_y(degrees: float) -> Float[Tensor, "3 3"]:
    """Adds `degrees` to every azimuth."""
    angle = torch.deg2rad(torch.tensor(float(degrees)))
    c, s = float(angle.cos()), float(angle.sin())
    return torch.tensor([[c, 0.0, s], [0.0, 1.0, 0.0], [-s, 0.0, c]])


def upright(c2w: Float[Tensor, "N 4 4"], z_up: bool) -> tuple[Float[Tensor, "3 3"], bool]:
    """(the rotation into a world with y up, whether the file's word was taken).

    `z_up`: the file says that z is up, which is believed unless the cameras stand more than `SLANT` degrees askew in it.
    """
    up = camera_up(c2w)
    if z_up and float(up[2]) > float(torch.cos(torch.deg2rad(torch.tensor(SLANT)))):
        return torch.tensor(Z_UP), True
    return turn_upright(up), False


# -- pictures ----------------------------------------------------------------------------------------------------------------


def middle_ray(shot: Shot, mask: Float[Tensor, "H W 1"]) -> Float[Tensor, "3"]:
    """The direction, in the file's world, through the middle of what a mask covers."""
    weight = mask[..., 0] / mask.sum().clamp(min=1e-6)
    rows, columns = torch.arange(mask.shape[0]) + 0.5, torch.arange(mask.shape[1]) + 0.5
    x = (float((weight.sum(0) * columns).sum()) - shot.centre[0]) / shot.focal[0]
    y = (float((weight.sum(1) * rows).sum()) - shot.centre[1]) / shot.focal[1]
    return shot.c2w[:3, :3] @ F.normalize(torch.tensor([x, -y, -1.0]), dim=0)


def place(shot: Shot, point: Float[Tensor, "3"]) -> tuple[float, float] | None:
    """Column and row, in pixels, where a point of the file's world is seen (the lens's distortion aside); None behind the camera."""
    x, y, z = (shot.c2w[:3, :3].T @ (point - shot.c2w[:3, 3])).tolist()
    if z >= 0:
        return None
    return shot.centre[0] - shot.focal[0] * x / z, shot.centre[1] + shot.focal[1] * y / z


def _box(mask: Float[Tensor, "H W 1"]) -> tuple[float, float, float, float]:
    """Left, right, top, bottom of what a mask covers."""
    top, bottom, left, right = box_of(mask)
    return float(left), float(right), float(top), float(bottom)


def reach(shot: Shot, mask: Float[Tensor, "H W 1"], about: tuple[float, float] | None = None) -> float:
    """How far from a pixel (the principal point) a mask goes, to the side or up, at distance 1."""
    left, right, top, bottom = _box(mask)
    x, y = about or shot.centre
    return max(
        abs(left - x) / shot.focal[0],
        abs(right - x) / shot.focal[0],
        abs(top - y) / shot.focal[1],
        abs(bottom - y) / shot.focal[1],
    )


def sees(shot: Shot, mask: Float[Tensor, "H W 1"], point: Float[Tensor, "3"]) -> bool:
    """Whether a point of the file's world lies in front of the camera, within the box around what the mask covers."""
    found = place(shot, point)
    left, right, top, bottom = _box(mask)
    return found is not None and left <= found[0] <= right and top <= found[1] <= bottom


def window(shot: Shot, mask: Float[Tensor, "H W 1"]) -> float:
    """Half the width, at distance 1, of the square about the optical axis that is kept of a photograph.

    The whole picture if it is square, undistorted and centred; else as little as shows the object with a `MARGIN`, and never more than
    the photograph has.
    """
    height, width = mask.shape[:2]
    fx, fy = shot.focal
    off = max(abs(shot.centre[0] - width / 2), abs(shot.centre[1] - height / 2))
    if width == height and off < 1e-3 * width and abs(fx / fy - 1) < 1e-4 and not any(shot.distortion):
        return width / 2 / fx
    whole = max(shot.centre[0] / fx, (width - shot.centre[0]) / fx, shot.centre[1] / fy, (height - shot.centre[1]) / fy)
    return min(MARGIN * reach(shot, mask), whole)


def undistorted(
    values: Float[Tensor, "H W C"], shot: Shot, half: float, size: int
) -> tuple[Float[Tensor, "s s C"], Float[Tensor, "s s 1"]]:
    """The picture of a camera without distortion, with square pixels and the principal point in the middle, that stands where the shot's
    does; and where the photograph reaches. `half` is half its width at distance 1. Averaged over subsamples where it shrinks.
    """
    height, width = values.shape[:2]
    if (height, width) == (size, size) and abs(half * shot.focal[0] - width / 2) < 1e-3 * width / 2:
        if not any(shot.distortion) and abs(shot.centre[0] - width / 2) + abs(shot.centre[1] - height / 2) < 0.01:
            return values, torch.ones_like(values[..., :1])
    fine = max(1, round(2 * half * max(shot.focal) / size))
    places = ((torch.arange(size * fine) + 0.5) / (size * fine) * 2 - 1) * half
    y, x = torch.meshgrid(places, places, indexing="ij")  # y down
    k1, k2, p1, p2, k3 = shot.distortion
    r2 = x * x + y * y
    radial = 1 + r2 * (k1 + r2 * (k2 + r2 * k3))
    column = shot.focal[0] * (x * radial + 2 * p1 * x * y + p2 * (r2 + 2 * x * x)) + shot.centre[0]
    row = shot.focal[1] * (y * radial + p1 * (r2 + 2 * y * y) + 2 * p2 * x * y) + shot.centre[1]
    grid = torch.stack([2 * column / width - 1, 2 * row / height - 1], -1)[None]
    found = F.grid_sample(values.permute(2, 0, 1)[None], grid, padding_mode="border", align_corners=False)
    inside = (grid.abs() <= 1).all(-1)[:, None].to(values)
    found, inside = F.avg_pool2d(found * inside, fine), F.avg_pool2d(inside, fine)
    found = found / inside.clamp(min=1e-6)
    return found[0].permute(1, 2, 0), (inside[0].permute(1, 2, 0) > 0.5).to(values)
