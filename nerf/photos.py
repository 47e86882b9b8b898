"""What is known of the object: photographs with their cameras, and which of them a training step looks at.

--image x_rgba.png        one picture, at the default view
--image_config views.csv  several, each with its polar angle, azimuth and radius
--photos FOLDER           calibrated ones: transforms.json or a CO3D sequence
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from errors import UserError, say
from nerf import alignment
from nerf.cutout import SIZE, cut_out
from nerf.photo_files import Photo, read_grey, read_photo, read_picture, read_rows, resized
from nerf.photo_sets import Shot, choose, find_set, read_co3d, read_transforms
from nerf.progress import Bar
from nerf.provider import Cameras, orbit, sphere_angles, training_size

ROOM = 0.95  # of the scene's half width that a photographed object may take


@dataclass(frozen=True)
class References:
    """N known views of one size.

    rgb: the picture's own values in [0, 1], not multiplied by the mask. mask: coverage. seen: 0 where the photograph did not reach, so that
    nothing is known there. weight: how much the novel-view prior goes by it. depth: distance along the optical axis up to scale and shift
    (larger is farther). normal: unit, in the camera's own frame: x right, y up, z towards the viewer. Both count within the mask alone.
    """

    cameras: Cameras
    rgb: Float[Tensor, "N H W 3"]
    mask: Float[Tensor, "N H W 1"]
    seen: Float[Tensor, "N H W 1"]
    weight: Float[Tensor, "N"]
    depth: Float[Tensor, "N H W 1"] | None = None
    normal: Float[Tensor, "N H W 3"] | None = None

    def __len__(self) -> int:
        return len(self.cameras)

    def __getitem__(self, index: slice | Int[Tensor, "K"]) -> "References":
        """Some of the views: `references[1:3]`, `references[torch.tensor([0, 2])]`."""
        c = self.cameras
        cameras = Cameras(
            c.c2w[index], c.fovy[index], c.polar[index], c.azimuth[index], c.radius[index], c.height, c.width
        )
        return replace(self, cameras=cameras, **self._layers(lambda value: value[index]))

    def to(self, device: torch.device | str) -> "References":
        return replace(self, cameras=self.cameras.to(device), **self._layers(lambda value: value.to(device)))

    def at(self, size: int) -> "References":
        """The same views `size` pixels wide: averaged over areas where they shrink, colours, depths and normals within the mask alone."""
        if self.rgb.shape[1] == size:
            return self
        return replace(
            self,
            cameras=self.cameras.resized(size, size),
            rgb=resized(self.rgb, size, self.mask),
            mask=resized(self.mask, size),
            seen=resized(self.seen, size),
            depth=None if self.depth is None else resized(self.depth, size, self.mask),
            normal=None if self.normal is None else F.normalize(resized(self.normal, size, self.mask), dim=-1),
        )

    def picture(self, i: int, background: Float[Tensor, "3"] | None = None) -> Float[Tensor, "3 H W"]:
        """View `i` in front of a plain colour (white): what a prior is shown."""
        behind = self.rgb.new_ones(3) if background is None else background.to(self.rgb)
        return (self.rgb[i] * self.mask[i] + behind * (1 - self.mask[i])).permute(2, 0, 1)

    def _layers(self, function) -> dict[str, Tensor]:
        names = ("rgb", "mask", "seen", "weight", "depth", "normal")
        return {name: function(getattr(self, name)) for name in names if getattr(self, name) is not None}


# -- from the command line ---------------------------------------------------------------------------------------------------


def load_references(opt: Any) -> References | None:
    """What `--image`, then `--image_config`, and `--photos` name, on the CPU; None if nothing is named.

    Pictures of all kinds may be mixed; all of them get the size of the largest, `SIZE` pixels at most. Depths and normals are kept if every
    picture has them. UserError in one line for what cannot be read.
    """
    photos: list[Photo] = []
    views: list[tuple[Cameras, float]] = []
    paths = [opt.image] if isinstance(opt.image, (str, Path)) else list(opt.image or [])
    if len(paths) > 1:
        raise UserError("--image: names one picture, seen from the default view; several need --image_config")
    for path in paths:
        photos.append(read_photo(Path(path).expanduser(), f"--image {path}"))
        views.append((_orbit(opt.default_polar, opt.default_azimuth, opt.default_radius, opt.default_fovy), 1.0))
    if opt.image_config:
        for row in read_rows(Path(opt.image_config).expanduser()):
            photos.append(read_photo(row.image, f"--image_config {row.image}"))
            fovy = opt.default_fovy if row.fovy is None else row.fovy
            views.append((_orbit(row.polar, row.azimuth, row.radius, fovy), row.weight))
    if opt.photos:
        found, cameras = _read_set(opt)
        photos += found
        views += [(cameras[i : i + 1], 1.0) for i in range(len(found))]
    return _stack(photos, views) if photos else None


def default_view(opt: Any) -> dict[str, float]:
    """What the first line of `--image_config` makes of the default view, as in stable-dreamfusion; {} where it has no say."""
    if opt.image or not opt.image_config:
        return {}
    row = read_rows(Path(opt.image_config).expanduser())[0]
    return {"default_polar": row.polar, "default_azimuth": row.azimuth, "default_radius": row.radius}


def _orbit(polar: float, azimuth: float, radius: float, fovy: float) -> Cameras:
    return orbit(float(polar), float(azimuth), float(radius), float(fovy), 1, 1)


def _stack(photos: Sequence[Photo], views: Sequence[tuple[Cameras, float]]) -> References:
    size = min(SIZE, max(len(photo.mask) for photo in photos))
    single = [_single(photo, camera, weight).at(size) for photo, (camera, weight) in zip(photos, views, strict=True)]
    cameras = Cameras(
        *(
            torch.cat([getattr(s.cameras, name) for s in single])
            for name in ("c2w", "fovy", "polar", "azimuth", "radius")
        ),
        size,
        size,
    )
    layers = {}
    for name in ("rgb", "mask", "seen", "weight", "depth", "normal"):
        found = [getattr(s, name) for s in single if getattr(s, name) is not None]
        if 0 < len(found) < len(single):
            say(f"{len(found)} of {len(single)} pictures have a {name} picture beside them: left out")
        layers[name] = torch.cat(found) if len(found) == len(single) else None
    return References(cameras, **layers)


def _single(photo: Photo, camera: Cameras, weight: float) -> References:
    side = len(photo.mask)
    names = ("rgb", "mask", "seen", "depth", "normal")
    layers = {name: getattr(photo, name)[None] for name in names if getattr(photo, name) is not None}
    return References(camera.resized(side, side), weight=torch.tensor([float(weight)]), **layers)


# -- calibrated photographs --------------------------------------------------------------------------------------------------


def _read_set(opt: Any) -> tuple[list[Photo], Cameras]:
    """The photographs of `--photos` that `--photo_views` names, and their cameras in our world.

    Upright: transforms.json has z up (its -y becomes our front), CO3D what the cameras hold upright, its first view then becoming the default
    azimuth. Centre: what the optical axes of all the cameras come closest to if the masks agree, else what the rays through the masks'
    middles do. Scale: the cameras' median distance becomes `--default_radius`, or less if the object would not fit into the scene.
    `--photo_align file` only turns z to y and keeps the file's centre and scale.
    """
    folder = Path(opt.photos).expanduser()
    kind, path = find_set(folder)
    shots = read_transforms(path) if kind == "nerf" else read_co3d(path, folder)
    chosen = choose(len(shots), str(opt.photo_views))
    everything = torch.stack([shot.c2w for shot in shots])
    label = f"--photos {opt.photos}"
    pictures = []
    with Bar("photos", len(chosen)) as bar:
        for number, i in enumerate(chosen):
            pictures.append(_read_shot(shots[i], label))
            bar.update(number + 1)
    taken = [shot for shot, _, _ in pictures]
    masks = [mask for _, _, mask in pictures]

    rotation, believed = alignment.upright(everything, kind == "nerf")
    if kind == "nerf" and not believed:
        say(f"{label}: the cameras do not stand upright in a world with z up; what they hold upright is up instead")
    centre, scale = torch.zeros(3), 1.0
    if opt.photo_align == "auto":
        centre = _centre(everything, taken, masks, kind, label)
        distances = (everything[:, :3, 3] - centre).norm(dim=-1)
        if float(distances.amin()) < 1e-6:
            raise UserError(f"{label}: a camera stands where the object is; correct its transform_matrix")
        scale = float(opt.default_radius / distances.median())
        scale = _fitting(opt, scale, centre, taken, masks, label)
        if kind == "co3d":
            first = alignment.Similarity(rotation, centre, scale).cameras(everything[chosen[:1]])
            azimuth = sphere_angles(first[:, :3, 3])[1]
            rotation = alignment.turn_about_y(opt.default_azimuth - float(azimuth)) @ rotation
    c2w = alignment.Similarity(rotation, centre, scale).cameras(torch.stack([shot.c2w for shot in taken]))
    halves = [alignment.window(shot, mask) for shot, mask in zip(taken, masks, strict=True)]
    photos = [_photo(*parts, half) for parts, half in zip(pictures, halves, strict=True)]
    fovy = torch.rad2deg(2 * torch.atan(torch.tensor(halves)))
    polar, azimuth, radius = sphere_angles(c2w[:, :3, 3])
    say(
        f"{label}: {len(photos)} of {len(shots)} photographs, distance {radius.amin():.2f} to {radius.amax():.2f}, polar angle "
        f"{polar.amin():.0f} to {polar.amax():.0f}, field of view {fovy.amin():.0f} to {fovy.amax():.0f} degrees"
    )
    return photos, Cameras(c2w, fovy, polar, azimuth, radius, 1, 1)


def _read_shot(shot: Shot, label: str) -> tuple[Shot, Float[Tensor, "H W 3"], Float[Tensor, "H W 1"]]:
    """A photograph's pixels and mask, and the shot in pixels of what was read."""
    name = f"{label}: {shot.image.name}"
    rgb, mask = read_picture(shot.image, name, turn=False)
    if shot.mask is not None:
        mask = read_grey(shot.mask, f"{label}: {shot.mask.name}", turn=False)
        if mask.shape[:2] != rgb.shape[:2]:
            mask = F.interpolate(mask.permute(2, 0, 1)[None], rgb.shape[:2], mode="area")[0].permute(1, 2, 0)
    if mask is None:
        mask = cut_out(rgb, name)
    if float(mask.amax()) <= 0.5:
        raise UserError(f"{name}: its mask is empty; leave this view out with --photo_views, or mend the mask")
    height, width = mask.shape[:2]
    if shot.size is not None and abs(width / height - shot.size[0] / shot.size[1]) > 0.01 * width / height:
        raise UserError(
            f"{name}: {width} x {height} pixels, but its calibration is for {shot.size[0]} x {shot.size[1]}; restore it"
        )
    return shot.scaled_to(width, height), rgb, mask


def _photo(shot: Shot, rgb: Float[Tensor, "H W 3"], mask: Float[Tensor, "H W 1"], half: float) -> Photo:
    size = max(16, min(SIZE, round(2 * half * max(shot.focal))))
    layers, seen = alignment.undistorted(torch.cat([rgb * mask, mask], -1), shot, half, size)
    colour, mask = layers[..., :3], layers[..., 3:]
    return Photo(torch.where(mask > 1e-3, colour / mask.clamp(min=1e-3), colour).clamp(0, 1), mask * seen, seen)


def _centre(
    everything: Float[Tensor, "N 4 4"], taken: Sequence[Shot], masks: Sequence[Tensor], kind: str, label: str
) -> Float[Tensor, "3"]:
    centre = alignment.closest_point(everything[:, :3, 3], -everything[:, :3, 2])
    pairs = list(zip(taken, masks, strict=True))
    if centre is not None and all(alignment.sees(shot, mask, centre) for shot, mask in pairs):
        return centre
    rays = torch.stack([alignment.middle_ray(shot, mask) for shot, mask in pairs])
    aimed = alignment.closest_point(torch.stack([shot.c2w[:3, 3] for shot in taken]), rays)
    if aimed is not None:
        say(f"{label}: the cameras do not point at the object: its place is found from the masks")
        return aimed
    if kind == "nerf":
        say(f"{label}: these views do not say how far away the object is: the file's own origin is taken for its place")
        return torch.zeros(3)
    raise UserError(f"{label}: these views do not say how far away the object is; give views from more sides")


def _fitting(
    opt: Any, scale: float, centre: Tensor, taken: Sequence[Shot], masks: Sequence[Tensor], label: str
) -> float:
    """The scale, or a smaller one with which what the masks cover lies within the scene."""
    sizes = [
        alignment.reach(shot, mask, alignment.place(shot, centre)) * float((shot.c2w[:3, 3] - centre).norm()) * scale
        for shot, mask in zip(taken, masks, strict=True)
    ]
    largest, room = max(sizes), ROOM * opt.bound
    if largest > room:
        say(f"{label}: the object is too wide for --bound {opt.bound:g} from this distance: the cameras come nearer")
        scale *= room / largest
    shown = opt.default_radius * float(torch.tan(torch.deg2rad(torch.tensor(opt.default_fovy / 2))))
    if min(largest, room) > shown:
        fovy = 2 * float(
            torch.rad2deg(torch.atan(torch.tensor(min(largest, room) * alignment.MARGIN / opt.default_radius)))
        )
        say(
            f"{label}: --default_fovy {fovy:.0f} would show the whole object; --default_fovy {opt.default_fovy:g} does not"
        )
    return scale


# -- known views in training -------------------------------------------------------------------------------------------------


def is_known_step(opt: Any, step: int) -> bool:
    """Whether a step (counted from 0) shows known views and asks no prior: every `--known_view_interval`-th does; 0: none."""
    return opt.known_view_interval > 0 and (step + 1) % opt.known_view_interval == 0


def known_size(opt: Any, step: int) -> int:
    """Edge of a known view's picture, pixels: `--known_view_scale` times the height of a training picture of this step."""
    return max(1, int(opt.known_view_scale * training_size(opt, step)[0]))


def known_view(references: References, step: int, opt: Any, generator: torch.Generator) -> tuple[References, Cameras]:
    """The known views of a step, at `known_size`, and the cameras to render them with.

    `--batch_size` of them, drawn anew each time, or all if there are no more. The cameras stand and look a little askew, so that the scene
    cannot fit single rays: position + N(0, s^2) along each axis (world units), turned by N(0, s^2) radians about each axis, with
    s = `--known_view_noise_scale`; to first order what stable-dreamfusion does to the rays' origins and directions.
    """
    count, device = len(references), references.rgb.device
    order = torch.randperm(count, generator=generator, device=generator.device)
    if count > opt.batch_size:
        references = references[order[: opt.batch_size].to(device)]
    references = references.at(known_size(opt, step))
    cameras = references.cameras
    noise = torch.randn(2, len(references), 3, generator=generator, device=generator.device).to(device)
    shift, turn = opt.known_view_noise_scale * noise
    c2w = cameras.c2w.clone()
    x, y, z = turn.unbind(-1)
    zero = torch.zeros_like(x)
    small = torch.stack([zero, -z, y, z, zero, -x, -y, x, zero], -1).reshape(-1, 3, 3)
    c2w[:, :3, :3] = torch.linalg.matrix_exp(small) @ c2w[:, :3, :3]
    c2w[:, :3, 3] += shift
    return references, replace(cameras, c2w=c2w)


def known_background(references: References, generator: torch.Generator) -> Float[Tensor, "N H W 3"]:
    """A random colour for every pixel, as upstream: nothing but the object can explain what stays the same."""
    draw = torch.rand(references.rgb.shape, generator=generator, device=generator.device)
    return draw.to(references.rgb.device)
