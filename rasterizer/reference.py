"""The rasteriser in plain PyTorch: the definition, the fallback and the test oracle. Geometry is computed in float64.

A corner of a triangle is P = (X, Y, w), its clip position with X = (x + w) W / 2 and Y = (w - y) H / 2, so that (X / w,
Y / w) are column and row. The pixel with the centre q = (column + 1/2, row + 1/2, 1) lies in the triangle where q is a
combination of its corners with weights a_k / det(P), a_0 = q . (P_1 x P_2) and so on, that are not negative. That needs
no division by w and no clipping: triangles behind the camera have no such pixel (Olano and Greer 1997).
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import avg_pool2d

from rasterizer.silhouettes import antialias, corners_of, edges_of

__all__ = ["antialias", "edges_of", "interpolate", "rasterize", "texture"]

NOTHING = torch.iinfo(torch.int64).max
SLACK = 1e-3  # pixels by which a bounding box is widened: only speed depends on it
PAIRS = 1 << 21  # (triangle, pixel) pairs that are looked at in one go


def rasterize(
    positions: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], height: int, width: int, derivatives: bool = False
) -> Float[Tensor, "B H W 4"] | tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 4"]]:
    """Which triangle each pixel shows, and where in it; see `rasterizer.rasterize`."""
    faces, corners = faces.long(), corners_of(positions, height, width)
    ids = torch.zeros(len(positions), height, width, dtype=torch.int64, device=positions.device)
    for view, out in zip(corners.detach(), ids, strict=True):
        out.copy_(visible(view, faces, height, width))
    where = ids.nonzero(as_tuple=True)
    P = corners[where[0][:, None], faces[ids[where] - 1]]
    z, w = P[..., 2], P[..., 3]
    x = P[..., 0] - (where[2][:, None] + 0.5) * w  # relative to the pixel's centre, times w
    y = P[..., 1] - (where[1][:, None] + 0.5) * w
    a = cross(x, y)
    total = a.sum(-1, keepdim=True)
    weights = (a / total)[:, :2]
    depth = (a * z).sum(-1) / (a * w).sum(-1)
    values = torch.cat([weights, depth[:, None], ids[where][:, None]], 1).to(positions.dtype)
    empty = positions.new_zeros(*ids.shape, 4)
    raster = empty.index_put(where, values)
    if not derivatives:
        return raster
    with torch.no_grad():  # x and y change by -w per pixel
        slopes = []
        for change in cross(-w, y), cross(x, -w):
            slopes.append((change[:, :2] - weights * change.sum(-1, keepdim=True)) / total)
        values = torch.stack(slopes, -1).flatten(1).to(positions.dtype)
        return raster, empty.index_put(where, values)


def cross(x: Float[Tensor, "*N 3"], y: Float[Tensor, "*N 3"]) -> Float[Tensor, "*N 3"]:
    """x_i y_j - x_j y_i for (i, j) = (1, 2), (2, 0), (0, 1): twice the area that each corner's weight stands for."""
    return x.roll(-1, -1) * y.roll(-2, -1) - x.roll(-2, -1) * y.roll(-1, -1)


def edge_functions(P: Float[Tensor, "F 3 4"]) -> Float[Tensor, "F 3 3"]:
    """Coefficients of a_k = A column + B row + C, for each k: the cross product of the other two corners.

    Two triangles get the same numbers for the edge that they share, but for the sign: so no pixel between them is missed.
    """
    (ax, ay, aw), (bx, by, bw) = (P[..., [0, 1, 3]].roll(-k, 1).unbind(-1) for k in (1, 2))
    return torch.stack([ay * bw - by * aw, aw * bx - bw * ax, ax * by - bx * ay], -1)


def boxes(P: Float[Tensor, "F 3 4"], height: int, width: int) -> tuple[Int[Tensor, "F 2"], Int[Tensor, "F 2"]]:
    """First pixel (column, row) of each triangle's bounding box and its size; of the part before the near plane z = -w."""
    near = P[..., 2] + P[..., 3]
    following, near_following = P.roll(-1, 1), near.roll(-1, 1)
    cut = (near >= 0) != (near_following >= 0)
    t = torch.where(cut, near / torch.where(cut, near - near_following, 1), 0)
    points = torch.cat([P, P + t[..., None] * (following - P)], 1)
    counts = torch.cat([near >= 0, cut], 1)
    w = points[..., 3]
    everywhere = (counts & (w <= 0)).any(1)[:, None]
    place = points[..., :2] / torch.where(w > 0, w, 1)[..., None]
    lowest = torch.where(counts[..., None], place, torch.inf).amin(1)
    highest = torch.where(counts[..., None], place, -torch.inf).amax(1)
    size = torch.tensor([width, height], dtype=P.dtype, device=P.device)
    lowest = torch.where(everywhere, 0, (lowest - 0.5 - SLACK).ceil()).maximum(size * 0).minimum(size)
    highest = torch.where(everywhere, size, (highest - 0.5 + SLACK).floor()).maximum(size * 0 - 1).minimum(size - 1)
    extent = (highest - lowest + 1).clamp(min=0)
    return lowest.nan_to_num().long(), torch.where(counts.any(1)[:, None], extent, 0).long()


def visible(corners: Float[Tensor, "V 4"], faces: Int[Tensor, "F 3"], height: int, width: int) -> Int[Tensor, "H W"]:
    """Triangle id + 1 of the nearest triangle (smallest z/w as float32, then smallest id) at each pixel's centre."""
    nearest = torch.full((height * width,), NOTHING, device=corners.device)
    known = ((faces >= 0) & (faces < len(corners))).all(1)
    drawn = known.nonzero()[:, 0]
    P = corners[faces[drawn]]
    finite = P.isfinite().all(-1).all(-1)
    drawn, P = drawn[finite], P[finite]
    edges = edge_functions(P)
    det = (edges[:, 0] * P[:, 0][:, [0, 1, 3]]).sum(-1)
    first, extent = boxes(P, height, width)
    pixels = torch.where((det != 0) & det.isfinite(), extent.prod(1), 0)
    edges = edges * det.sign()[:, None, None]
    ends = pixels.cumsum(0)
    begin = 0
    while begin < len(drawn):
        before = int(ends[begin - 1]) if begin else 0
        end = max(int(torch.searchsorted(ends, before + PAIRS, right=True)), begin + 1)
        count = pixels[begin:end]
        t = torch.repeat_interleave(torch.arange(begin, end, device=count.device), count)
        place = torch.arange(len(t), device=t.device) - (ends[t] - pixels[t] - before)
        column, row = first[t, 0] + place % extent[t, 0], first[t, 1] + place // extent[t, 0]
        A, B, C = edges[t].unbind(-1)
        a = A * (column + 0.5)[:, None] + (B * (row + 0.5)[:, None] + C)
        inside = (a >= 0).all(1) & (a.sum(1) > 0)
        t, a, pixel = t[inside], a[inside], (row * width + column)[inside]
        depth = ((a * P[t, :, 2]).sum(1) / (a * P[t, :, 3]).sum(1)).float() + 0.0  # -0.0 becomes 0.0
        inside = (depth >= -1) & (depth <= 1)
        bits = depth.view(torch.int32).long()
        key = (torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits) << 32) | drawn[t]
        nearest.scatter_reduce_(0, pixel[inside], key[inside], "amin")
        begin = end
    return torch.where(nearest == NOTHING, 0, (nearest & 0xFFFFFFFF) + 1).view(height, width)


def interpolate(
    attributes: Float[Tensor, "b V C"],
    raster: Float[Tensor, "B H W 4"],
    faces: Int[Tensor, "F 3"],
    raster_db: Float[Tensor, "B H W 4"] | None = None,
) -> Float[Tensor, "B H W C"] | tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W D"]]:
    """Attributes of corners at pixels; see `rasterizer.interpolate`."""
    where, corner = shown(raster, faces, attributes.shape[1])
    picture = where[0] if len(attributes) > 1 else torch.zeros_like(where[0])
    A = attributes[picture[:, None], corner]
    u, v = raster[where][:, :2, None].unbind(1)
    values = u * A[:, 0] + v * A[:, 1] + (1 - u - v) * A[:, 2]
    empty = raster.new_zeros(*raster.shape[:3], attributes.shape[2])
    out = empty.index_put(where, values)
    if raster_db is None:
        return out
    with torch.no_grad():
        to_u, to_v = A[:, 0] - A[:, 2], A[:, 1] - A[:, 2]
        du_dX, du_dY, dv_dX, dv_dY = raster_db[where][:, :, None].unbind(1)
        values = torch.cat([du_dX * to_u + dv_dX * to_v, du_dY * to_u + dv_dY * to_v], 1)
        return out, torch.cat([empty, empty], -1).index_put(where, values)


def shown(
    raster: Float[Tensor, "B H W 4"], faces: Int[Tensor, "F 3"], vertices: int
) -> tuple[tuple[Tensor, ...], Int[Tensor, "N 3"]]:
    """The pixels (views, rows, columns) that show a triangle, and its corners; ids without a face show nothing."""
    ids = raster[..., 3].detach().long() - 1
    where = ((ids >= 0) & (ids < len(faces))).nonzero(as_tuple=True)
    corner = faces.long()[ids[where]]
    known = ((corner >= 0) & (corner < vertices)).all(1)
    return tuple(index[known] for index in where), corner[known]


def mip_chain(picture: Float[Tensor, "b h w C"]) -> list[Float[Tensor, "b i j C"]]:
    """The picture and its halvings down to one texel: each texel the mean of (up to) 2 x 2 of the level before."""
    chain = [picture]
    while max(chain[-1].shape[1:3]) > 1:
        # A side of 1 stays; the last texel of an odd side is alone in its direction.
        finer = chain[-1].movedim(-1, 1)
        chain.append(avg_pool2d(finer, 2, ceil_mode=True, count_include_pad=False).movedim(1, -1))
    return chain


def level_of_detail(uv_da: Float[Tensor, "B H W 4"], h: int, w: int, levels: int) -> Float[Tensor, "B H W"]:
    """log2 of the texels that a step of one pixel passes, in the direction where it passes more; 0 .. levels - 1."""
    steps = uv_da.detach().unflatten(-1, (2, 2)) * uv_da.new_tensor([w, h])
    widest = steps.square().sum(-1).amax(-1)
    return (0.5 * torch.log2(widest)).nan_to_num(0, levels - 1, 0).clamp(0, levels - 1)


def texture(
    picture: Float[Tensor, "b h w C"],
    uv: Float[Tensor, "B H W 2"],
    uv_da: Float[Tensor, "B H W 4"] | None = None,
    wrap: str = "wrap",
) -> Float[Tensor, "B H W C"]:
    """A picture looked up at texture coordinates; see `rasterizer.texture`."""
    if uv_da is None:
        return bilinear(picture, uv, wrap)
    chain = mip_chain(picture)
    lod = level_of_detail(uv_da, picture.shape[1], picture.shape[2], len(chain))
    out = torch.zeros((), dtype=uv.dtype, device=uv.device)
    for number, level in enumerate(chain):
        weight = (1 - (lod - number).abs()).clamp(min=0)[..., None]
        if (weight > 0).any():
            out = out + weight * bilinear(level, uv, wrap)
    return out.expand(*uv.shape[:3], picture.shape[3])


def bilinear(picture: Float[Tensor, "b h w C"], uv: Float[Tensor, "B H W 2"], wrap: str) -> Float[Tensor, "B H W C"]:
    """The four texels around (u w - 1/2, v h - 1/2), blended; 0 where a coordinate is not finite."""
    h, w = picture.shape[1:3]
    good = uv.isfinite().all(-1, keepdim=True)
    uv = torch.where(good, uv, 0)
    size = uv.new_tensor([w, h])
    if wrap == "wrap":
        place = (uv - uv.detach().floor()) * size - 0.5
    else:
        place = (uv * size - 0.5).maximum(size * 0).minimum(size - 1)
    first = place.detach().floor()
    fx, fy = (place - first)[..., None].unbind(-2)
    first = first.long()
    second = first + 1
    limit = torch.tensor([w, h], device=uv.device)
    if wrap == "wrap":
        first, second = first.remainder(limit), second.remainder(limit)
    else:
        second = second.minimum(limit - 1)
    (x0, y0), (x1, y1) = first.unbind(-1), second.unbind(-1)
    b = torch.arange(len(uv), device=uv.device)[:, None, None] if len(picture) > 1 else 0
    top = picture[b, y0, x0] * (1 - fx) + picture[b, y0, x1] * fx
    bottom = picture[b, y1, x0] * (1 - fx) + picture[b, y1, x1] * fx
    return torch.where(good, top * (1 - fy) + bottom * fy, 0)
