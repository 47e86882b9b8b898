"""Where the scene is looked at from: cameras, their rays, and the light that follows them.

World: right-handed, y up. A camera stands at polar angle p (from +y) and azimuth a (from +z towards +x), in degrees:
position = radius (sin p sin a, cos p, sin p cos a). Its axes are OpenGL's: x right, y up, and it looks along -z, so that a
rotation is never a reflection (determinant +1). Azimuths are reported in (-180, 180].
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

SIX_VIEWS = ((90.0, 0.0), (90.0, 90.0), (90.0, 180.0), (90.0, -90.0), (0.0, 0.0), (180.0, 0.0))


@dataclass(frozen=True)
class Cameras:
    """A batch of B pinhole cameras that share one picture size.

    `c2w` maps camera to world; `fovy` is the vertical field of view; `polar`, `azimuth` (degrees) and `radius` say where
    the camera really stands relative to the origin, jitter included.
    """

    c2w: Float[Tensor, "B 4 4"]
    fovy: Float[Tensor, "B"]
    polar: Float[Tensor, "B"]
    azimuth: Float[Tensor, "B"]
    radius: Float[Tensor, "B"]
    height: int
    width: int

    def __len__(self) -> int:
        return self.c2w.shape[0]

    def __getitem__(self, index: slice) -> "Cameras":
        """Some of the cameras: `cameras[2:4]`."""
        return self._map(lambda value: value[index])

    def to(self, device: torch.device | str) -> "Cameras":
        return self._map(lambda value: value.to(device))

    def resized(self, height: int, width: int) -> "Cameras":
        """The same cameras with another picture size (pixels); the vertical field of view stays."""
        return replace(self, height=height, width=width)

    def _map(self, function) -> "Cameras":
        names = ("c2w", "fovy", "polar", "azimuth", "radius")
        return replace(self, **{name: function(getattr(self, name)) for name in names})

    @property
    def position(self) -> Float[Tensor, "B 3"]:
        return self.c2w[:, :3, 3]

    @property
    def focal(self) -> Float[Tensor, "B"]:
        """Focal length in pixels, the same for both axes."""
        return self.height / (2 * torch.tan(torch.deg2rad(self.fovy) / 2))

    def rays(self) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W 3"]]:
        """Origins and unit directions through the pixel centres (column + 1/2, row + 1/2); row 0 is the top."""
        like = {"device": self.c2w.device, "dtype": self.c2w.dtype}
        x = torch.arange(self.width, **like) + 0.5 - self.width / 2
        y = self.height / 2 - torch.arange(self.height, **like) - 0.5
        plane = torch.stack([*torch.meshgrid(x, y, indexing="xy"), torch.zeros(self.height, self.width, **like)], -1)
        local = plane / self.focal[:, None, None, None] - torch.tensor([0.0, 0.0, 1.0], **like)
        directions = F.normalize(torch.einsum("bij,bhwj->bhwi", self.c2w[:, :3, :3], local), dim=-1)
        return self.position[:, None, None].expand_as(directions), directions

    def mvp(self, near: float = 0.1, far: float = 1000.0) -> Float[Tensor, "B 4 4"]:
        """World to OpenGL clip space: with n = clip.xyz / clip.w a point lands at column (1 + n.x) W / 2 and row (1 - n.y) H / 2."""
        projection = torch.zeros_like(self.c2w)
        projection[:, 0, 0] = 2 * self.focal / self.width
        projection[:, 1, 1] = 2 * self.focal / self.height
        projection[:, 2, 2] = -(far + near) / (far - near)
        projection[:, 2, 3] = -2 * far * near / (far - near)
        projection[:, 3, 2] = -1
        return projection @ torch.linalg.inv(self.c2w)


def sphere_point(polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"]) -> Float[Tensor, "B 3"]:
    """The point of the unit sphere at these angles (degrees)."""
    p, a = torch.deg2rad(polar), torch.deg2rad(azimuth)
    return torch.stack([torch.sin(p) * torch.sin(a), torch.cos(p), torch.sin(p) * torch.cos(a)], -1)


def sphere_angles(point: Float[Tensor, "B 3"]) -> tuple[Float[Tensor, "B"], Float[Tensor, "B"], Float[Tensor, "B"]]:
    """Polar angle and azimuth (degrees) and distance from the origin: the inverse of `sphere_point`."""
    x, y, z = point.unbind(-1)
    polar = torch.rad2deg(torch.atan2(torch.hypot(x, z), y))
    return polar, torch.rad2deg(torch.atan2(x, z)), point.norm(dim=-1)


def _upward(polar: Float[Tensor, "B"], azimuth: Float[Tensor, "B"]) -> Float[Tensor, "B 3"]:
    """Towards smaller polar angles: what "up" means on the sphere, also at its poles, where the world's y says nothing."""
    return sphere_point(polar - 90, azimuth)


def _look_at(
    position: Float[Tensor, "B 3"], target: Float[Tensor, "B 3"], upward: Float[Tensor, "B 3"]
) -> Float[Tensor, "B 4 4"]:
    back = F.normalize(position - target, dim=-1)
    right = F.normalize(torch.linalg.cross(upward, back), dim=-1)
    up = torch.linalg.cross(back, right)
    c2w = torch.eye(4, dtype=position.dtype, device=position.device).repeat(len(position), 1, 1)
    c2w[:, :3] = torch.stack([right, up, back, position], -1)
    return c2w


def _wrap(azimuth: Float[Tensor, "B"]) -> Float[Tensor, "B"]:
    return 180 - torch.remainder(180 - azimuth, 360)


def orbit(
    polar: Float[Tensor, "B"] | float,
    azimuth: Float[Tensor, "B"] | float,
    radius: Float[Tensor, "B"] | float,
    fovy: Float[Tensor, "B"] | float,
    height: int,
    width: int,
) -> Cameras:
    """Cameras on a sphere around the origin, looking at it (degrees; pixels). Numbers are repeated for the whole batch.

    Straight above, the top of the picture is the direction -z turned by the azimuth: the limit of the cameras nearby.
    """
    values = [torch.as_tensor(value, dtype=torch.float32).reshape(-1) for value in (polar, azimuth, radius, fovy)]
    polar, azimuth, radius, fovy = (value.clone() for value in torch.broadcast_tensors(*values))
    position = radius[:, None] * sphere_point(polar, azimuth)
    c2w = _look_at(position, torch.zeros_like(position), _upward(polar, azimuth))
    return Cameras(c2w, fovy, polar, _wrap(azimuth), radius, height, width)


def view_ranges(opt: Any, step: int) -> dict[str, tuple[float, float]]:
    """The ranges that cameras are drawn from at this step: `radius`, `polar`, `azimuth`, `fovy`.

    With `--progressive_view` each end moves from the default view to its full value:
    s = min(1, init_ratio + 2 step / iters), end = (1 - s) default + s full.
    """
    share = min(1.0, opt.progressive_view_init_ratio + 2 * step / opt.iters) if opt.progressive_view else 1.0
    full = {
        "radius": (opt.radius_range, opt.default_radius),
        "polar": (opt.theta_range, opt.default_polar),
        "azimuth": (opt.phi_range, opt.default_azimuth),
        "fovy": (opt.fovy_range, opt.default_fovy),
    }
    return {name: tuple((1 - share) * default + share * end for end in ends) for name, (ends, default) in full.items()}


def training_size(opt: Any, step: int) -> tuple[int, int]:
    """Height and width of a training picture, in pixels: `--h`, `--w` times `--size_scale`, for a mesh times `--dmtet_reso_scale`."""
    scale = opt.size_scale(step) * (opt.dmtet_reso_scale if opt.dmtet else 1)
    return max(1, round(opt.h * scale)), max(1, round(opt.w * scale))


def random_cameras(opt: Any, batch: int, step: int, generator: torch.Generator) -> Cameras:
    """`batch` cameras of `training_size` pixels, every quantity drawn for each of them; on the generator's device.

    Angles are uniform in their ranges; with probability `uniform_sphere_rate` the direction is uniform on the upper
    half sphere instead. With `--view_group` V all this is drawn for the first of every V consecutive cameras; the others
    have its polar angle, radius and field of view and follow at steps of 360 / V degrees of azimuth, whatever its range.
    `--jitter_pose` moves each camera (uniform, full width `jitter_center`), the point it looks at and its up vector
    (Gaussian, `jitter_target`, `jitter_up`); the angles and the radius are those of the moved camera.
    """
    device = generator.device
    low_high = view_ranges(opt, step)
    if batch % opt.view_group:
        raise ValueError(f"{batch} cameras are no whole groups of {opt.view_group}")
    groups = batch // opt.view_group

    def uniform(name: str) -> Tensor:
        low, high = low_high[name]
        return low + (high - low) * torch.rand(groups, generator=generator, device=device)

    def gauss(count: int) -> Tensor:
        return torch.randn(count, 3, generator=generator, device=device)

    radius, polar, azimuth, fovy = uniform("radius"), uniform("polar"), uniform("azimuth"), uniform("fovy")
    if opt.uniform_sphere_rate > 0:
        draw = gauss(groups)
        draw[:, 1] = draw[:, 1].abs()
        anywhere = torch.rand(groups, generator=generator, device=device) < opt.uniform_sphere_rate
        polar_any, azimuth_any, _ = sphere_angles(draw)
        polar, azimuth = torch.where(anywhere, polar_any, polar), torch.where(anywhere, azimuth_any, azimuth)
    radius, polar, azimuth, fovy = (x.repeat_interleave(opt.view_group) for x in (radius, polar, azimuth, fovy))
    azimuth = azimuth + torch.arange(opt.view_group, device=device).repeat(groups) * (360 / opt.view_group)
    size = training_size(opt, step)
    if not opt.jitter_pose:
        return orbit(polar, azimuth, radius, fovy, *size)

    shift = (torch.rand(batch, 3, generator=generator, device=device) - 0.5) * opt.jitter_center
    target = gauss(batch) * opt.jitter_target
    position = radius[:, None] * sphere_point(polar, azimuth) + shift
    look_polar, look_azimuth, _ = sphere_angles(position - target)
    upward = _upward(look_polar, look_azimuth) + gauss(batch) * opt.jitter_up
    polar, azimuth, radius = sphere_angles(position)
    return Cameras(_look_at(position, target, upward), fovy, polar, azimuth, radius, *size)


def turntable(opt: Any, count: int, height: int, width: int) -> Cameras:
    """`count` cameras once around the object from `default_azimuth` on, with the default polar angle, radius and field of view."""
    azimuth = opt.default_azimuth + torch.arange(count) * (360.0 / max(count, 1))
    return orbit(float(opt.default_polar), azimuth, float(opt.default_radius), float(opt.default_fovy), height, width)


def six_views(opt: Any, height: int, width: int) -> Cameras:
    """Front, +x side, back, -x side, above, below, from the default radius and with the default field of view."""
    polar, azimuth = torch.tensor(SIX_VIEWS).unbind(-1)
    return orbit(polar, azimuth, float(opt.default_radius), float(opt.default_fovy), height, width)


def random_light(cameras: Cameras, generator: torch.Generator) -> Float[Tensor, "B 3"]:
    """One unit direction to a distant light for each camera: the camera's position, shifted by a Gaussian of 1 world unit."""
    noise = torch.randn(len(cameras), 3, generator=generator, device=generator.device)
    return F.normalize(cameras.position + noise.to(cameras.c2w.device), dim=-1)
