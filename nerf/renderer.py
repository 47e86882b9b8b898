"""Volume rendering of a field: samples on rays, what they emit, and how that adds up to a picture.

With `--cuda_ray` an occupancy grid says where to sample (on any device); without, samples are stratified and refined by
importance. Both give the same slices of samples, and everything after that is shared.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import ranks
from nerf.background import BackgroundNetwork
from nerf.occupancy import OccupancyGrid
from nerf.provider import Cameras
from nerf.sampling import importance, interval_edges, places, ray_of_sample, transmittance_weights, uniform, visible
from nerf.shading import Shading, needs_normal, shade
from raymarching import Samples, composite_rays, composite_rays_train, march_rays, march_rays_train, near_far_from_aabb

VISIBLE = 1e-3  # samples that get less light than this are not evaluated
OPAQUE = 1e-4  # light left at which compositing stops
FAINT = 1e-4  # compositing weight below which a sample's colour is not asked for when nothing is learnt
POINTS_AT_ONCE = 1 << 16  # whose normals are asked for, when nothing is learnt
BURST = 16  # samples of a living ray between two looks at whether it is still alive, when nothing is learnt


@dataclass
class Render:
    """A picture of a scene, and in training what the losses need to know about how it came about.

    image   [B, H, W, C] in front of the background; alpha [B, H, W, 1] in [0, 1]
    depth   [B, H, W, 1] sum of weight x distance along the ray: the background counts as 0, a half covered pixel as half
    normal  [B, H, W, 3] sum of weight x unit normal in world space, or None
    The rest describes, in training only, of a field the M samples of the N = B H W rays: weights, positions, normals (or None), ray
    directions, and `rays` (offset, count) into them; of a mesh the `surface` (mesh.geometry.Surface) that was drawn.
    """

    image: Float[Tensor, "B H W C"]
    alpha: Float[Tensor, "B H W 1"]
    depth: Float[Tensor, "B H W 1"]
    normal: Float[Tensor, "B H W 3"] | None
    cameras: Cameras
    num_samples: int
    weights: Float[Tensor, "M"] | None = None
    positions: Float[Tensor, "M 3"] | None = None
    normals: Float[Tensor, "M 3"] | None = None
    directions: Float[Tensor, "M 3"] | None = None
    rays: Int[Tensor, "N 2"] | None = None
    generator: torch.Generator | None = None
    surface: Any | None = None

    def detach(self) -> "Render":
        """The same without gradients."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Render(**{name: v.detach() if isinstance(v, Tensor) else v for name, v in values.items()})


@dataclass(frozen=True)
class Sampling:
    """How rays are sampled: see the flags of these names. A viewer may put another one in its place for a while.

    `box` (xmin ymin zmin xmax ymax zmax): what lies outside is not shown; None: everything is. `between` is called again and again while a
    picture is made in eval mode; it may raise to abandon it.
    """

    min_near: float
    max_steps: int
    dt_gamma: float
    num_steps: int
    upsample_steps: int
    max_ray_batch: int
    box: tuple[float, ...] | None = None
    between: Callable[[], None] | None = None


@dataclass
class _View:
    """What is asked of every ray of a picture (one row for all of them, or one each): light, ambient share, mode, normals."""

    light: Float[Tensor, "#N 3"]
    ambient: Float[Tensor, "#N 1"]
    mode: Shading
    normals: bool


class NeRFRenderer(nn.Module):
    """Renders whatever its subclass says about points: see `Field` for `query`, `density`, `normal`.

    Buffers: `density_grid` [C, grid_size^3], `density_bitfield` (C grid_size^3 / 8 bytes), `mean_density`, all of them the
    occupancy grid's (None without `--cuda_ray`).
    """

    def __init__(self, opt: Any, channels: int):
        super().__init__()
        self.channels, self.bound = channels, float(opt.bound)
        steps = (opt.num_steps, opt.upsample_steps)
        self.sampling = Sampling(opt.min_near, opt.max_steps, opt.dt_gamma, *steps, opt.max_ray_batch)
        self._normal_losses = (
            opt.lambda_orient,
            opt.lambda_2d_normal_smooth,
            opt.lambda_3d_normal_smooth,
            opt.lambda_convex,
        )
        box = torch.tensor([-1.0, -1, -1, 1, 1, 1]) * self.bound
        self.register_buffer("aabb", box, persistent=False)
        marching = opt.cuda_ray
        self.occupancy = OccupancyGrid(opt.grid_size, self.bound, opt.density_thresh) if marching else None
        network = opt.bg_radius > 0 and opt.background == "mlp"
        self.background_network = BackgroundNetwork(channels) if network else None

    def query(
        self, x: Float[Tensor, "M 3"], normals: bool = False
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M C"], Float[Tensor, "M 3"] | None]:
        """Density, albedo and unit normals (None unless asked for) at points of the box."""
        raise NotImplementedError

    def sigma(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """Density alone, float32."""
        return self.query(x)[0].float()

    @property
    def density_grid(self) -> Tensor | None:
        return self.occupancy.density if self.occupancy else None

    @property
    def density_bitfield(self) -> Tensor | None:
        return self.occupancy.bitfield if self.occupancy else None

    @property
    def mean_density(self) -> Tensor | None:
        return self.occupancy.mean if self.occupancy else None

    def background(self, directions: Float[Tensor, "*rays 3"]) -> Float[Tensor, "*rays C"]:
        """The background network's colours, or white if there is none."""
        if self.background_network is None:
            return directions.new_ones(*directions.shape[:-1], self.channels)
        return self.background_network(directions)

    def update_occupancy(self, step: int, generator: torch.Generator | None = None) -> None:
        """Refresh the occupancy grid (nothing to do without one); the trainer calls it every `update_extra_interval` steps."""
        if self.occupancy is not None:
            self.occupancy.update(self.sigma, step, generator)

    def reset_occupancy(self) -> None:
        """Forget the occupancy grid, after the field has changed at a stroke."""
        if self.occupancy is not None:
            self.occupancy.reset()

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
        """Render all cameras: image = sum_i w_i colour_i + (1 - alpha) background.

        In train mode with gradients, samples jittered with `generator` (the global one if None); in eval mode without
        gradients or jitter, `chunk` (default `max_ray_batch`) rays at a time. `light`: unit direction to the light per
        camera, by default the direction to the camera. `background`: None (the network, else white), [C], [B, C] or
        [B, H, W, C]. `normals`: compute them; by default when the shading or a loss active at `step` needs them.
        """
        shape = (len(cameras), cameras.height, cameras.width)
        device = self.aabb.device
        cameras = cameras.to(device)
        origins, directions = (rays.reshape(-1, 3) for rays in cameras.rays())
        if normals is None:
            normals = needs_normal(shading) or (
                self.training and any(weight(step) > 0 for weight in self._normal_losses)
            )
        view = self._view(cameras, shading, light, ambient, normals)

        if self.training:
            out, told = self._trace(origins, directions, view, generator)
            count = len(told["weights"])
        else:
            chunk, told, parts = chunk or self.sampling.max_ray_batch, {}, []
            for start in range(0, len(origins), chunk):
                part = slice(start, start + chunk)
                parts.append(self._show(origins[part], directions[part], _part(view, part)))
                if self.sampling.between is not None:
                    self.sampling.between()
            out = {name: torch.cat([part[name] for part, _ in parts]) for name in parts[0][0]}
            count = sum(number for _, number in parts)

        with torch.set_grad_enabled(self.training):
            image, alpha = out["image"].reshape(*shape, -1), out["alpha"].reshape(*shape, 1)
            behind = self.behind(background, directions.reshape(*shape, 3), image.shape[-1])
            image = image + (1 - alpha) * behind
        normal = out["normal"].reshape(*shape, 3) if normals else None
        return Render(image, alpha, out["depth"].reshape(*shape, 1), normal, cameras, count, **told)

    def _view(self, cameras: Cameras, mode: Shading, light: Tensor | None, ambient: Any, normals: bool) -> _View:
        """Spread what is given per camera over its rays; one row is enough if there is one camera."""
        batch, pixels = len(cameras), cameras.height * cameras.width
        ambient = torch.as_tensor(ambient, dtype=torch.float32, device=self.aabb.device).reshape(-1, 1)
        if light is None:
            light = nn.functional.normalize(cameras.position, dim=-1)
        light = light.to(self.aabb.device)
        if batch > 1:
            light = light.repeat_interleave(pixels, 0)
            ambient = ambient.expand(batch, 1).repeat_interleave(pixels, 0)
        return _View(light, ambient, mode, normals)

    @torch.no_grad()
    def show(self, cameras: Cameras, background: Tensor | None, step: int) -> Render:
        """A picture for the eye, with normals.

        The normal of a pixel is that of the field at the pixel's mean depth, times alpha: one evaluation instead of one per sample.
        """
        render = self.render(cameras, background=background, step=step, normals=False)
        origins, directions = render.cameras.rays()
        some = render.alpha[..., 0] > 0.01
        distance = (render.depth / render.alpha.clamp(min=1e-4))[some]
        points = (origins[some] + distance * directions[some]).clamp(-self.bound, self.bound)
        found = torch.zeros_like(directions)
        if len(points):
            found[some] = torch.cat([self.normal(part) for part in points.split(POINTS_AT_ONCE)]).float()
        render.normal = found * render.alpha
        return render

    def behind(
        self, background: Tensor | None, directions: Float[Tensor, "B H W 3"], channels: int
    ) -> Float[Tensor, "*any"]:
        """What `render` is given as background, as something that broadcasts to [B, H, W, channels]."""
        if background is None:
            own = self.background(directions)
            return own if own.shape[-1] == channels else torch.ones_like(own[..., :1])
        background = background.to(directions.device)
        return background[:, None, None] if background.dim() == 2 else background

    def _trace(
        self,
        origins: Float[Tensor, "N 3"],
        directions: Float[Tensor, "N 3"],
        view: _View,
        generator: torch.Generator | None,
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """With gradients: the pixels of N rays, without background, and the record of their samples."""
        if self.occupancy is not None:
            samples = self._visible(self._march(origins, directions, generator))
        else:
            samples = self._stratify(origins, directions, generator)
        ray = ray_of_sample(samples.rays, len(samples.xyz))
        sigma, emitted, unit = self._emit(samples.xyz, ray, view)
        with torch.autocast(origins.device.type, enabled=False):
            weights, *sums = composite_rays_train(sigma.float(), emitted.float(), samples.t, samples.rays, OPAQUE)
        record = {"weights": weights, "positions": samples.xyz, "normals": unit, "directions": samples.direction}
        return _split(*sums, view.normals), record | {"rays": samples.rays, "generator": generator}

    @torch.no_grad()
    def _show(
        self, origins: Float[Tensor, "N 3"], directions: Float[Tensor, "N 3"], view: _View
    ) -> tuple[dict[str, Tensor], int]:
        """Without gradients: the pixels of N rays, without background, and how many samples were looked at.

        Colours and normals are asked for only where they count; of a ray that has become opaque nothing more is asked.
        """
        width = (3 if view.mode == "normal" else self.channels) + 3 * view.normals
        left, alpha, depth = origins.new_ones(len(origins)), *origins.new_zeros(2, len(origins))
        state = [left, alpha, depth, origins.new_zeros(len(origins), width)]
        bursts = self._bursts(origins, directions, left) if self.occupancy is not None else None
        count = 0
        for index, samples in bursts or [(slice(None), self._stratify(origins, directions, None))]:
            part = [whole[index] for whole in state]
            sigma = self.sigma(samples.xyz)
            ray = ray_of_sample(samples.rays, len(sigma))
            own = composite_rays_train(sigma, sigma[:, None], samples.t, samples.rays, OPAQUE)[0]
            seen = torch.nonzero(own * part[0][ray] > FAINT)[:, 0]
            emitted = sigma.new_zeros(len(sigma), width)
            emitted[seen] = self._emit(samples.xyz[seen], ray[seen], _part(view, index))[1].float()
            composite_rays(sigma, emitted, samples.t, samples.rays, *part, OPAQUE)
            for whole, values in zip(state, part, strict=True):
                whole[index] = values
            count += len(sigma)
        return _split(*state[1:], view.normals), count

    def _emit(
        self, xyz: Float[Tensor, "M 3"], ray: Int[Tensor, "M"], view: _View
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M K"], Float[Tensor, "M 3"] | None]:
        """Density, shaded colour (followed by the normal, if there is one) and normal of samples."""
        sigma, albedo, unit = self.query(xyz, view.normals)
        light, ambient = (value if len(value) == 1 else value[ray] for value in (view.light, view.ambient))
        colour = shade(albedo, unit, light, ambient, view.mode)
        return sigma, colour if unit is None else torch.cat([colour, unit], -1), unit

    def _reach(self, origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
        """Where rays enter the scene's box and leave it, or the smaller box that is to be shown."""
        box = self.aabb if self.sampling.box is None else self.aabb.new_tensor(self.sampling.box)
        return near_far_from_aabb(origins, directions, box, self.sampling.min_near)

    def _grid(self) -> tuple[float, Tensor, int, int]:
        grid = self.occupancy
        return self.bound, grid.bitfield if self.training else grid.solid, grid.cascades, grid.size

    @torch.no_grad()
    def _march(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None) -> Samples:
        """Samples in the occupied cells."""
        near, far = self._reach(origins, directions)
        noise = ranks.mine(lambda count: uniform((count,), generator, origins.device), len(origins))
        steps = (self.sampling.dt_gamma, self.sampling.max_steps)
        return march_rays_train(origins, directions, *self._grid(), near, far, noise, *steps)

    @torch.no_grad()
    def _visible(self, samples: Samples) -> Samples:
        """The same without what lies behind the opaque inside of things, as the occupancy grid last saw it."""
        sigma = self.occupancy.core_density(samples.xyz)
        keep, rays = visible(sigma, samples.t, samples.rays, VISIBLE)
        index = torch.nonzero(keep)[:, 0]
        return Samples(samples.xyz[index], samples.direction[index], samples.t[index], rays)

    def _bursts(
        self, origins: Tensor, directions: Tensor, left: Float[Tensor, "N"]
    ) -> Iterator[tuple[Tensor, Samples]]:
        """The next few samples of the rays that are alive, with the rays' numbers, until none is; `left` is their light."""
        near, far = self._reach(origins, directions)
        steps = (self.sampling.dt_gamma, self.sampling.max_steps)
        alive = torch.nonzero(near < far)[:, 0]
        cursor = torch.zeros(len(alive), 2, dtype=torch.int32, device=origins.device)
        while len(alive):
            budget = BURST * min(len(origins) // len(alive), 8)
            rays = (origins[alive], directions[alive], *self._grid(), near[alive], far[alive])
            samples, cursor = march_rays(*rays, cursor, budget, None, *steps)
            yield alive, samples
            going = (cursor[:, 0] >= 0) & (left[alive] >= OPAQUE)
            alive, cursor = alive[going], cursor[going]

    @torch.no_grad()
    def _stratify(self, origins: Tensor, directions: Tensor, generator: torch.Generator | None) -> Samples:
        """`num_steps` spread samples on each ray that meets the box, `upsample_steps` more where the first found matter."""
        near, far = self._reach(origins, directions)
        hit = torch.isfinite(far)
        near, far = torch.where(hit, near, 0)[:, None], torch.where(hit, far, 0)[:, None]

        def spread(count: int) -> Tensor:
            return places((len(origins), count), self.training, generator, origins.device)

        def points(t: Tensor) -> Tensor:  # a ray that misses the box has intervals of length 0; it looks at the origin
            return torch.where(hit[:, None, None], origins[:, None] + directions[:, None] * t[..., None], 0).reshape(
                -1, 3
            )

        t = near + (far - near) * spread(self.sampling.num_steps)
        edges = interval_edges(t, near, far)
        if self.sampling.upsample_steps > 0:
            sigma = self.sigma(points(t)).reshape(t.shape)
            more = importance(
                edges, transmittance_weights(sigma, edges.diff(dim=-1)), spread(self.sampling.upsample_steps)
            )
            t = torch.sort(torch.cat([t, more], -1), -1).values
            edges = interval_edges(t, near, far)
        count = t.shape[1]
        first = torch.arange(len(t), device=t.device, dtype=torch.int32) * count
        rays = torch.stack([first, torch.full_like(first, count)], -1)
        intervals = torch.stack([t, edges.diff(dim=-1)], -1).reshape(-1, 2)
        return Samples(points(t), directions.repeat_interleave(count, 0), intervals, rays)


def _part(view: _View, part: slice | Tensor) -> _View:
    """The same for some of the rays."""
    light, ambient = (value if len(value) == 1 else value[part] for value in (view.light, view.ambient))
    return _View(light, ambient, view.mode, view.normals)


def _split(alpha: Tensor, depth: Tensor, image: Tensor, normals: bool) -> dict[str, Tensor]:
    out = {"alpha": alpha, "depth": depth, "image": image}
    if normals:
        out["image"], out["normal"] = image[:, :-3], image[:, -3:]
    return out
