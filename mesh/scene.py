"""A scene whose pictures are those of a surface: triangles from `geometry`, colours from a field, rasterised."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

import rasterizer
from mesh.environment import Environment
from mesh.geometry import Fixed, Surface, Tetrahedral
from mesh.material import shade_pbr
from mesh.texture import PhysicalHead
from nerf.provider import Cameras
from nerf.renderer import NeRFRenderer, Render
from nerf.shading import Shading, shade

POINTS_AT_ONCE = 1 << 17  # of the field, when nothing is learnt


class MeshScene(nn.Module):
    """To the trainer the same as a radiance field: `render`, `parameter_groups`, `set_progress`.

    `field` gives the albedo of points (its density is not used) and, seen past the object, its background network; `geometry` the triangles.
    With `head` the material is physically based, and `environment` lights it.
    """

    def __init__(
        self,
        opt: Any,
        field: NeRFRenderer,
        geometry: Tetrahedral | Fixed,
        head: PhysicalHead | None = None,
        environment: Environment | None = None,
    ):
        super().__init__()
        field.occupancy = None
        self.field, self.geometry, self.head, self.environment = field, geometry, head, environment
        self.channels, self.bound = field.channels, field.bound
        self.blank = False  # set where a checkpoint is going to be loaded
        self._rate = opt.lr_geometry
        self._raster = rasterizer.backend(opt.rasterizer)
        self._edges: tuple[Tensor, Any] | None = None

    @property
    def background_network(self) -> nn.Module | None:
        return self.field.background_network

    @property
    def locked(self) -> bool:
        """Whether the triangles stay as they are."""
        return isinstance(self.geometry, Fixed)

    # ---- training -----------------------------------------------------------------------------------------------------------

    def set_progress(self, ratio: float) -> None:
        self.field.set_progress(ratio)

    def update_occupancy(self, step: int, generator: torch.Generator | None = None) -> None:
        """Nothing to do: a surface knows where it is."""

    def reset_occupancy(self) -> None:
        """The same."""

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The field's groups without what only its density needs, the geometry at `--lr_geometry`, the head at `lr`."""
        groups = [*self.field.parameter_groups(lr), *self.geometry.parameter_groups(self._rate)]
        return groups + ([{"name": "material", "params": list(self.head.parameters()), "lr": lr}] if self.head else [])

    def adapt(self, values: dict[str, Tensor]) -> None:
        """Take the shapes of a checkpoint whose entries `values` are about to be loaded."""
        start = "geometry."
        self.geometry.adapt({name.removeprefix(start): v for name, v in values.items() if name.startswith(start)})

    # ---- pictures -----------------------------------------------------------------------------------------------------------

    def surface(self) -> Surface:
        """The triangles as they are now."""
        return self.geometry()

    def show(self, cameras: Cameras, background: Tensor | None, step: int) -> Render:
        """A picture for the eye, with normals."""
        return self.render(cameras, "pbr" if self.head else "albedo", background=background, step=step, normals=True)

    def render(
        self,
        cameras: Cameras,
        shading: Shading = "albedo",
        light: Float[Tensor, "B 3"] | None = None,
        ambient: Float[Tensor, "B"] | float = 1.0,
        background: Float[Tensor, "*any"] | None = None,
        step: int = 0,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
        normals: bool | None = None,
    ) -> Render:
        """What `NeRFRenderer.render` promises, of a surface: every pixel shows its nearest triangle, outlines are antialiased.

        With gradients in train mode, whatever `normals` says the normals are there. `generator` and `chunk` are not needed.
        """
        with torch.set_grad_enabled(self.training and torch.is_grad_enabled()):
            with torch.autocast(self.geometry_device.type, enabled=False):
                return self._render(cameras, shading, light, ambient, background)

    @property
    def geometry_device(self) -> torch.device:
        return self.field.aabb.device

    def _render(self, cameras: Cameras, shading: Shading, light: Any, ambient: Any, background: Any) -> Render:
        cameras = cameras.to(self.geometry_device)
        surface = self.surface()
        vertices, faces = surface.vertices, surface.faces
        size = (cameras.height, cameras.width)
        homogeneous = F.pad(vertices, (0, 1), value=1.0)
        clip = homogeneous @ cameras.mvp().transpose(1, 2)
        raster = self._raster.rasterize(clip, faces, *size)
        known = torch.cat([vertices, surface.normals], -1)[None]
        seen = self._raster.interpolate(known, raster, faces)
        covered = raster[..., 3] > 0
        pixel = torch.nonzero(covered.reshape(-1))[:, 0]  # once: the device is waited for
        view = pixel // (size[0] * size[1])
        found = seen.reshape(-1, 6)[pixel]
        point, normal = found[:, :3], F.normalize(found[:, 3:], dim=-1)
        towards = cameras.position[view] - point
        distance = towards.norm(dim=-1, keepdim=True)
        if self.locked:  # an open surface may be seen from behind
            normal = normal * self._facing(surface, raster.reshape(-1, 4)[pixel, 3], towards)
        if light is None:
            light = F.normalize(cameras.position, dim=-1)
        ambient = torch.as_tensor(ambient, dtype=torch.float32, device=point.device).reshape(-1, 1)
        ambient = ambient.expand(len(cameras), 1)[view]
        colour = self._colour(point, normal, towards / distance, light.to(point)[view], ambient, shading)

        _, directions = cameras.rays()
        channels = colour.shape[-1]
        behind = self.field.behind(background, directions, channels).expand(*covered.shape, channels)
        image = behind.to(colour).masked_scatter(covered[..., None], colour)
        rest = torch.cat([torch.ones_like(distance), distance, normal], -1)
        rest = torch.zeros(*covered.shape, 5, device=point.device).masked_scatter(covered[..., None], rest)
        smooth = self._raster.antialias(torch.cat([image, rest], -1), raster, clip, faces, self._topology(faces))
        image, alpha, depth, normal = smooth.split([channels, 1, 1, 3], -1)
        return Render(image, alpha, depth, normal, cameras, len(point), surface=surface if self.training else None)

    def _colour(self, point: Tensor, normal: Tensor, towards: Tensor, light: Tensor, ambient: Tensor, shading: Shading):
        """Shaded colours of points of the surface; `towards`: unit, to the camera."""
        if shading in ("normal", "textureless"):
            return shade(normal.new_zeros(len(normal), self.channels), normal, light, ambient, shading)
        albedo, hidden = self._ask(point)
        if shading != "pbr":
            return shade(albedo, normal, light, ambient, shading)
        self.environment = self.environment.to(point.device)
        told = self.head(hidden, normal)
        return shade_pbr(albedo, told["roughness"], told["metallic"], told["normal"], towards, self.environment)

    def _ask(self, point: Float[Tensor, "M 3"]) -> tuple[Tensor, Tensor]:
        """Albedo and features of points, in pieces when nothing is learnt."""
        point = point.clamp(-self.bound, self.bound)
        if torch.is_grad_enabled() or len(point) <= POINTS_AT_ONCE:
            return self.field.colour(point)
        parts = [self.field.colour(part) for part in point.split(POINTS_AT_ONCE)]
        return torch.cat([a for a, _ in parts]), torch.cat([h for _, h in parts])

    def _facing(self, surface: Surface, number: Tensor, towards: Tensor) -> Float[Tensor, "M 1"]:
        """1 where a triangle's front is seen, -1 where its back is."""
        corners = surface.vertices[surface.faces[number.long() - 1]]
        front = torch.linalg.cross(corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0])
        return torch.where((front * towards).sum(-1, keepdim=True) < 0, -1.0, 1.0)

    def _topology(self, faces: Tensor) -> Any:
        """Which triangles share an edge; kept as long as the faces stay the same object."""
        if self._edges is None or self._edges[0] is not faces:
            self._edges = (faces, self._raster.edges_of(faces))
        return self._edges[1]

    # ---- what it is made of -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def material(self, point: Float[Tensor, "N 3"], normal: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """For textures: `albedo` [N, 3], with a physical material also `roughness`, `metallic` [N, 1] and the bent `normal` [N, 3] (world)."""
        albedo, hidden = self._ask(point)
        return {"albedo": albedo, **(self.head(hidden, normal) if self.head else {})}
