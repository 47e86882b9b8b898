"""Exact pictures of toybox objects: colour, mask, depth, normal, face mask, from any camera.

An object is a union of convex-ish parts, so the first hit of the union is the nearest of the parts' first hits. Each
part is traced alone, by only those rays that cross its bounding box and start where they enter it: ten times less work
than marching the union, and the part that was hit is known for free.

Conventions: c2w has OpenGL axes (x right, y up, looks along -z); pixel centres at +0.5; row 0 at the top; images
[B, H, W, C], linear, in [0, 1]; depth is the distance along the ray.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from toybox.objects import Object
from toybox.primitives import SHAPES, Main, Part, Vec3, distance, rotation_matrix

TOLERANCE = 1e-4  # world units: a hundredth of a subpixel at 64 pixels
MAX_STEPS = 48
COMPACT_EVERY = 3
RAYS_PER_CHUNK = (
    1 << 17
)  # measured: fewer, and the dispatch of small ops dominates; more gains nothing and takes memory
CHANNELS = 10  # main, fixed (3), alpha, face, depth, normal (3)


@dataclass(frozen=True)
class Layers:
    """What the camera sees, before the main colour and the background are chosen. Means over the subsamples."""

    main: Float[Tensor, "B H W"]  # shade x scale of the parts in the main colour
    fixed: Float[Tensor, "B H W 3"]  # premultiplied, shaded colour of the other parts
    alpha: Float[Tensor, "B H W"]  # coverage
    face: Float[Tensor, "B H W"]  # coverage of the face parts
    depth: Float[Tensor, "B H W"]  # world units along the ray, mean over hits; 0 where nothing is hit
    normal: Float[Tensor, "B H W 3"]  # unit, world space; 0 where nothing is hit


# --- cameras ---------------------------------------------------------------------------------------------------------


def orbit_cameras(
    polar: Float[Tensor, "B"] | float, azimuth: Float[Tensor, "B"] | float, radius: Float[Tensor, "B"] | float
) -> Float[Tensor, "B 4 4"]:
    """Cameras on a sphere around the origin, looking at it.

    Degrees: polar 0 straight above, 90 at the horizon; azimuth 0 at +z, 90 at +x. At polar 0 the top of the picture is
    the direction -z turned by the azimuth: the limit of the nearby cameras.
    """
    polar, azimuth, radius = torch.broadcast_tensors(
        *(torch.as_tensor(v, dtype=torch.float32).reshape(-1) for v in (polar, azimuth, radius))
    )
    p, a = torch.deg2rad(polar), torch.deg2rad(azimuth)
    zero = torch.zeros_like(p)
    # Derivatives of the spherical coordinates: an orthonormal frame everywhere, the poles included.
    right = torch.stack([a.cos(), zero, -a.sin()], -1)
    up = torch.stack([-p.cos() * a.sin(), p.sin(), -p.cos() * a.cos()], -1)
    back = torch.stack([p.sin() * a.sin(), p.cos(), p.sin() * a.cos()], -1)
    c2w = torch.eye(4).repeat(len(p), 1, 1)
    c2w[:, :3] = torch.stack([right, up, back, radius[:, None] * back], -1)
    return c2w


def _pixel_directions(fovy: Float[Tensor, "B"], size: int) -> Float[Tensor, "B 3 P"]:
    """Unit directions in the camera frame through the centres of size x size pixels, row by row."""
    s = (torch.arange(size, dtype=torch.float32) + 0.5) * (2 / size) - 1
    v, u = torch.meshgrid(-s, s, indexing="ij")
    half = torch.deg2rad(fovy / 2).tan()[:, None]
    u, v = half * u.reshape(1, -1), half * v.reshape(1, -1)
    # Not F.normalize: a norm over a strided dimension is ten times slower than these passes.
    return torch.stack([u, v, -torch.ones_like(u)], 1) * (u * u + v * v + 1).rsqrt()[:, None]


# --- one part ----------------------------------------------------------------------------------------------------------


def _enter_box(
    origin: Float[Tensor, "B 3"], rays: Float[Tensor, "B 3 P"], extent: Vec3
) -> tuple[Float[Tensor, "B P"], Float[Tensor, "B P"]]:
    """Distances at which rays enter and leave the box |x_i| <= extent_i (enter > leave: they miss it)."""
    inverse = rays.reciprocal()
    middle = inverse * -origin[:, :, None]
    # Which of two opposite faces a ray meets first depends on the sign of its direction alone.
    reach = inverse.abs_().mul_(torch.tensor(extent)[:, None])
    near, far = (middle - reach).unbind(1), middle.add_(reach).unbind(1)
    return torch.maximum(torch.maximum(near[0], near[1]), near[2]), torch.minimum(torch.minimum(far[0], far[1]), far[2])


def _hit_ellipsoid(ray: Float[Tensor, "8 N"], size: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Closed form, in the space where the ellipsoid is the unit sphere."""
    radii = torch.tensor(size)[:, None]
    p, d = ray[0:3] / radii, ray[3:6] / radii
    a, b, c = (d * d).sum(0), (p * d).sum(0), (p * p).sum(0) - 1
    discriminant = b * b - a * c
    hit = (discriminant > 0).nonzero().squeeze(1)
    step = (-b - discriminant.clamp_min(0).sqrt()) / a
    return hit, (ray[6] + step)[hit]


def _hit_marching(part: Part, ray: Float[Tensor, "8 N"]) -> tuple[Tensor, Tensor]:
    """Sphere tracing from the entry of the bounding box to its exit; rays that are done leave every few steps."""
    field = SHAPES[part.shape].distance
    index = torch.arange(ray.shape[1])
    hits, lengths = [], []
    for step in range(MAX_STEPS):
        gap = field(ray[0], ray[1], ray[2], part.size)
        if step % COMPACT_EVERY == 0 or step == MAX_STEPS - 1:
            # A ray that has arrived creeps on by less than the tolerance until the next look: no harm.
            close = gap < (TOLERANCE if step < MAX_STEPS - 1 else 10 * TOLERANCE)
            hits.append(index[close])
            lengths.append((ray[6] + gap)[close])
            live = (~close & (ray[6] < ray[7])).nonzero().squeeze(1)
            if not len(live):
                break
            index, ray, gap = index[live], ray.index_select(1, live), gap[live]
        ray[0:3].addcmul_(ray[3:6], gap)
        ray[6] += gap
    return torch.cat(hits), torch.cat(lengths)


def _local_normal(part: Part, p: Float[Tensor, "3 N"]) -> Float[Tensor, "3 N"]:
    """Unit normal at surface points in the part's frame."""
    if part.shape == "ellipsoid":
        gradient = p / torch.tensor(part.size)[:, None] ** 2
        return gradient * (gradient * gradient).sum(0).rsqrt()
    field, eps = SHAPES[part.shape].distance, 1e-3
    # Four corners of a tetrahedron: the cheapest symmetric difference.
    x, y, z = p
    (xm, xp), (ym, yp), (zm, zp) = ((c - eps, c + eps) for c in (x, y, z))
    a, b = field(xp, ym, zm, part.size), field(xm, ym, zp, part.size)
    c, d = field(xm, yp, zm, part.size), field(xp, yp, zp, part.size)
    gradient = torch.stack([a - b - c + d, c + d - a - b, b + d - a - c])
    return gradient * (gradient * gradient).sum(0).clamp_min(1e-12).rsqrt()


# --- pictures ----------------------------------------------------------------------------------------------------------


def _trace_rays(
    obj: Object,
    origin: Float[Tensor, "B 3"],
    rays: Float[Tensor, "B 3 P"],
    light: Float[Tensor, "B 3"],
    ambient: Float[Tensor, "B"],
) -> Float[Tensor, "C B P"]:
    """First hits and their shading for B cameras with P rays each; channels as in `CHANNELS`."""
    count, pixels = rays.shape[0], rays.shape[2]
    nearest = torch.full((count * pixels,), torch.inf)
    found = []
    for part in obj.parts:
        rotation = rotation_matrix(part.rotation).float()
        o = (origin - torch.tensor(part.position)) @ rotation
        d = rotation.T @ rays
        enter, leave = _enter_box(o, d, SHAPES[part.shape].extent(part.size))
        index = (enter < torch.minimum(leave, nearest.view(count, pixels))).view(-1).nonzero().squeeze(1)
        camera = index // pixels
        ray = torch.empty(8, len(index))
        ray[3:6] = d.transpose(0, 1).reshape(3, -1).index_select(1, index)
        ray[6], ray[7] = enter.view(-1)[index], leave.view(-1)[index]
        base = o.T.index_select(1, camera)
        ray[0:3] = torch.addcmul(base, ray[3:6], ray[6])
        direction = ray[3:6]
        hit, t = _hit_ellipsoid(ray, part.size) if part.shape == "ellipsoid" else _hit_marching(part, ray)
        before = t < nearest[index[hit]]
        hit, t = hit[before], t[before]
        nearest[index[hit]] = t
        found.append((part, index[hit], camera[hit], t, torch.addcmul(base[:, hit], direction[:, hit], t)))

    out = torch.zeros(CHANNELS, count * pixels)
    for part, index, camera, t, p in found:
        mine = (t == nearest[index]).nonzero().squeeze(1)
        if not len(mine):
            continue
        index, camera, t = index[mine], camera[mine], t[mine]
        normal = rotation_matrix(part.rotation).float() @ _local_normal(part, p.index_select(1, mine))
        lit = (normal * light.T.index_select(1, camera)).sum(0).clamp_min(0)
        shade = torch.lerp(lit, torch.ones(()), ambient[camera])
        values = torch.zeros(CHANNELS, len(mine))
        if isinstance(part.color, Main):
            values[0] = part.color.scale * shade
        else:
            values[1:4] = torch.tensor(part.color)[:, None] * shade
        values[4], values[5], values[6], values[7:] = 1.0, float(part.face), t, normal
        out[:, index] = values
    return out.view(CHANNELS, count, pixels)


@torch.no_grad()
def trace(
    obj: Object,
    c2w: Float[Tensor, "B 4 4"],
    fovy: float | Float[Tensor, "B"],
    size: int,
    light: Float[Tensor, "B 3"],
    ambient: Float[Tensor, "B"],
    supersample: int = 2,
) -> Layers:
    """Pictures of one object, size x size pixels with supersample^2 rays each.

    The cameras must lie outside the object's bounding sphere. fovy: vertical field of view, degrees. light: unit
    direction towards the light, world space. ambient: in [0, 1]; shade = ambient + (1 - ambient) max(0, n . light).
    """
    count, fine = len(c2w), size * supersample
    fovy = torch.as_tensor(fovy, dtype=torch.float32).expand(count)
    light, ambient = F.normalize(light.float(), dim=-1).expand(count, 3), ambient.float().expand(count)
    chunk = max(1, RAYS_PER_CHUNK // (fine * fine))
    pieces = []
    for i in range(0, count, chunk):
        part = slice(i, i + chunk)
        rays = c2w[part, :3, :3].float() @ _pixel_directions(fovy[part], fine)
        values = _trace_rays(obj, c2w[part, :3, 3].float(), rays, light[part], ambient[part])
        pieces.append(F.avg_pool2d(values.view(CHANNELS, -1, fine, fine), supersample))
    main, r, g, b, alpha, face, depth, *normal = torch.cat(pieces, 1)
    return Layers(
        main=main,
        fixed=torch.stack([r, g, b], -1),
        alpha=alpha,
        face=face,
        depth=torch.where(alpha > 0, depth / alpha.clamp_min(1e-6), 0.0),
        normal=F.normalize(torch.stack(normal, -1), dim=-1),
    )


def compose(
    layers: Layers, color: Float[Tensor, "*b 3"], background: Float[Tensor, "*b 3"]
) -> Float[Tensor, "B H W 3"]:
    """fixed + main x color + (1 - alpha) x background; a colour per picture [B, 3] or one for all [3]."""
    color, background = (c.reshape(-1, 1, 1, 3) for c in (color, background))
    return layers.fixed + layers.main[..., None] * color + (1 - layers.alpha)[..., None] * background


# --- truth in space -----------------------------------------------------------------------------------------------------


def sdf(obj: Object, points: Float[Tensor, "N 3"]) -> Float[Tensor, "N"]:
    """Signed distance (negative inside; exact sign, first-order magnitude near ellipsoids) to the object."""
    return torch.stack([distance(part, points) for part in obj.parts]).amin(0)


def albedo(obj: Object, points: Float[Tensor, "N 3"], color: Vec3 | Float[Tensor, "3"]) -> Float[Tensor, "N 3"]:
    """Unlit colour of the part that is nearest to each point, with `color` as the object's main colour."""
    main = torch.as_tensor(color, dtype=points.dtype)
    palette = [p.color.scale * main if isinstance(p.color, Main) else points.new_tensor(p.color) for p in obj.parts]
    nearest = torch.stack([distance(part, points) for part in obj.parts]).argmin(0)
    return torch.stack(palette)[nearest]


# --- contact sheet ------------------------------------------------------------------------------------------------------


def contact_sheet(path: str, size: int = 64, columns: int = 4, zoom: int = 2) -> None:
    """All kinds from the front, their left side, the back and from above, labelled; a picture file at `path`."""
    from PIL import Image, ImageDraw

    from toybox.objects import OBJECTS

    c2w = orbit_cameras(torch.tensor([75.0, 75, 75, 30]), torch.tensor([0.0, 90, 180, 35]), 3.2)
    cell, label = size * zoom, 14
    rows = -(-len(OBJECTS) // columns)
    sheet = Image.new("RGB", (columns * (4 * cell + 8), rows * (cell + label)), "white")
    draw = ImageDraw.Draw(sheet)
    light = F.normalize(c2w[:, :3, 2] + 0.4 * c2w[:, :3, 1] + 0.2 * c2w[:, :3, 0], dim=-1)
    for i, (name, obj) in enumerate(OBJECTS.items()):
        image = compose(
            trace(obj, c2w, 29.0, size, light, torch.full((4,), 0.5)), torch.tensor(obj.default), torch.full((3,), 0.75)
        )
        strip = (torch.cat(list(image), 1).clamp(0, 1) * 255).round().byte().numpy()
        x, y = i % columns * (4 * cell + 8), i // columns * (cell + label)
        picture = Image.fromarray(strip).resize((4 * cell, cell), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y + label))
        draw.text((x + 2, y + 1), name + (" (face)" if obj.has_face else ""), fill="black")
    sheet.save(path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(description="Draw a contact sheet of all toybox objects.")
    parser.add_argument("--out", required=True, help="picture file to write")
    contact_sheet(parser.parse_args().out)
