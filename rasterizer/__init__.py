"""Differentiable rasterisation of triangle meshes: who is seen where, interpolation, textures, antialiased silhouettes.

The four steps of Laine et al. 2020 (Modular Primitives for High-Performance Differentiable Rendering), written anew, for
CPU and CUDA. Compiled where `extension.py` can build it, else the PyTorch twins in `reference.py`.

Positions are OpenGL clip coordinates. Row 0 of every picture is the top one: with n = clip.xyz / clip.w a point lies at
column (1 + n.x) W / 2 and row (1 - n.y) H / 2, and the centre of pixel [i, j] at column j + 1/2 and row i + 1/2. Faces
are drawn from both sides. Everything computes in float32 or float64, as the positions (or the picture) have it.
"""

import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

import extension
from errors import UserError
from rasterizer import reference

__all__ = ["antialias", "backend", "edges_of", "interpolate", "rasterize", "texture"]

FOLDER = Path(__file__).resolve().parent


def _ops(tensor: Tensor) -> Any | None:
    return extension.ops_for(tensor, FOLDER, "rasterizer")


def _real(tensor: Tensor, like: Tensor | None = None) -> Tensor:
    """float32 or float64 (that of `like`), contiguous."""
    dtype = like.dtype if like is not None else tensor.dtype
    return tensor.to(dtype if dtype.itemsize >= 4 else torch.float32).contiguous()


def _indices(faces: Tensor) -> Tensor:
    return faces.int().contiguous()


def rasterize(
    positions: Float[Tensor, "B V 4"], faces: Int[Tensor, "F 3"], height: int, width: int, derivatives: bool = False
) -> Float[Tensor, "B H W 4"] | tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 4"]]:
    """What each pixel's centre shows: (u, v, z/w, face + 1), or zeros where there is nothing.

    u and v are the perspective-correct weights of the face's corners 0 and 1 (1 - u - v that of corner 2). Of several
    faces the one with the smallest z/w in [-1, 1], rounded to float32, is seen; of equal ones the first. Faces that cross
    the near plane are drawn up to it; one without area, or with a vertex that is not finite or not there, is not drawn.

    Args:
        positions: clip coordinates (x, y, z, w) of the vertices, for each of B views.
        faces: three vertices each, int32 or int64, at most 2^24 (float32).
        derivatives: also return (du/dX, du/dY, dv/dX, dv/dY), X (right) and Y (down) in pixels; these carry no gradient.
    Gradients go to the positions through u, v and z/w; none through what is seen: that is `antialias`'s part.
    """
    positions, faces = _real(positions), _indices(faces)
    ops = _ops(positions)
    if ops is None:
        return reference.rasterize(positions, faces, height, width, derivatives)
    raster, slopes = _Rasterize.apply(positions, faces, height, width, derivatives, ops)
    return (raster, slopes) if derivatives else raster


class _Rasterize(Function):
    @staticmethod
    def forward(
        ctx: Any, positions: Tensor, faces: Tensor, height: int, width: int, derivatives: bool, ops: Any
    ) -> tuple[Tensor, Tensor]:
        raster, slopes = ops.rasterize(positions, faces, height, width, derivatives)
        ctx.save_for_backward(positions, faces, raster)
        ctx.ops = ops
        ctx.mark_non_differentiable(slopes)
        return raster, slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.ops.rasterize_backward(*ctx.saved_tensors, grad.contiguous()), None, None, None, None, None


def interpolate(
    attributes: Float[Tensor, "b V C"],
    raster: Float[Tensor, "B H W 4"],
    faces: Int[Tensor, "F 3"],
    raster_db: Float[Tensor, "B H W 4"] | None = None,
) -> Float[Tensor, "B H W C"] | tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W D"]]:
    """Attributes of the corners at every pixel, 0 where nothing is seen; gradients go to the attributes and to u and v.

    Args:
        attributes: C numbers per vertex, for each view or (b = 1) for all. They may have vertices of their own: texture
            coordinates with the faces that index them.
        raster: of `rasterize`; faces: as many as there, in the same order.
        raster_db: the derivatives of `rasterize`. Then also returns those of the attributes, [B, H, W, 2C]: all d/dX, then
            all d/dY; without a gradient.
    """
    raster, faces = _real(raster), _indices(faces)
    attributes = _real(attributes, raster)
    slopes = None if raster_db is None else _real(raster_db, raster)
    if len(attributes) not in (1, len(raster)):
        raise ValueError(f"attributes of {len(attributes)} views do not fit to a raster of {len(raster)}")
    ops = _ops(raster)
    if ops is None:
        return reference.interpolate(attributes, raster, faces, slopes)
    out, out_slopes = _Interpolate.apply(attributes, raster, faces, slopes, ops)
    return out if slopes is None else (out, out_slopes)


class _Interpolate(Function):
    @staticmethod
    def forward(
        ctx: Any, attributes: Tensor, raster: Tensor, faces: Tensor, slopes: Tensor | None, ops: Any
    ) -> tuple[Tensor, Tensor]:
        out, out_slopes = ops.interpolate(attributes, raster, faces, slopes)
        ctx.save_for_backward(attributes, raster, faces)
        ctx.ops = ops
        ctx.mark_non_differentiable(out_slopes)
        return out, out_slopes

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        grad = grad.contiguous()
        for_attributes, for_raster = (extension.will_compute(node) for node, _ in ctx.next_functions[:2])
        return (
            ctx.ops.interpolate_backward(*ctx.saved_tensors, grad) if for_attributes else None,
            ctx.ops.interpolate_raster_backward(*ctx.saved_tensors, grad) if for_raster else None,
            *(None, None, None),
        )


def texture(
    picture: Float[Tensor, "b h w C"],
    uv: Float[Tensor, "B H W 2"],
    uv_da: Float[Tensor, "B H W 4"] | None = None,
    wrap: str = "wrap",
) -> Float[Tensor, "B H W C"]:
    """A picture at texture coordinates; gradients go to the picture and to uv.

    (0, 0) is the top left corner of the picture and (1, 1) the bottom right one, as in glTF: texel [i, j] has its centre at
    u = (j + 1/2) / w, v = (i + 1/2) / h. Between four centres it is bilinear; where a coordinate is not finite, 0.

    Args:
        picture: one for each view or (b = 1) for all, at least one texel.
        uv_da: (du/dX, dv/dX, du/dY, dv/dY), as `interpolate` returns it. Then the picture is averaged down, 2 x 2 texels at
            a time, until a pixel's longer side is one to two texels of the coarser of two levels, blended; without a gradient.
        wrap: "wrap" repeats the picture, "clamp" repeats its border.
    """
    if wrap not in ("wrap", "clamp"):
        raise ValueError(f"wrap must be 'wrap' or 'clamp', got {wrap!r}")
    b, h, w, channels = picture.shape
    if h * w == 0 or b not in (1, len(uv)):
        raise ValueError(f"a picture of shape {tuple(picture.shape)} for {len(uv)} views of texture coordinates")
    picture = _real(picture)
    uv = _real(uv, picture)
    ops = _ops(uv)
    if ops is None:
        return reference.texture(picture, uv, None if uv_da is None else _real(uv_da, uv), wrap)
    chain, lod = [picture], None
    if uv_da is not None:
        chain = reference.mip_chain(picture)
        lod = reference.level_of_detail(_real(uv_da, uv), h, w, len(chain))
    sizes = [size for level in chain for size in level.shape[1:3]]
    flat = [level.reshape(b, -1, channels) for level in chain]
    return _Texture.apply(flat[0] if len(flat) == 1 else torch.cat(flat, 1), uv, lod, sizes, wrap == "clamp", ops)


class _Texture(Function):
    @staticmethod
    def forward(
        ctx: Any, chain: Tensor, uv: Tensor, lod: Tensor | None, sizes: list[int], clamp: bool, ops: Any
    ) -> Tensor:
        ctx.save_for_backward(chain, uv, lod)
        ctx.rest = ops, sizes, clamp
        return ops.texture(chain, sizes, uv, lod, clamp)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        chain, uv, lod = ctx.saved_tensors
        ops, sizes, clamp = ctx.rest
        given = chain, sizes, uv, lod, clamp, grad.contiguous()
        for_chain, for_uv = (extension.will_compute(node) for node, _ in ctx.next_functions[:2])
        return (
            ops.texture_backward(*given) if for_chain else None,
            ops.texture_uv_backward(*given) if for_uv else None,
            *(None, None, None, None),
        )


def edges_of(faces: Int[Tensor, "F 3"]) -> Int[Tensor, "F 3"]:
    """Which faces share an edge, for `antialias`: good for as long as the faces stay the same.

    For edge k of face f, the one opposite to corner k: the next edge 3 f' + k' that joins the same two vertices. A surface
    hangs together where faces share vertices; vertices that only lie at the same place (seams) are borders.
    """
    faces = _indices(faces)
    ops = _ops(faces) if faces.device.type == "cpu" else None
    return (ops or reference).edges_of(faces)


def antialias(
    colour: Float[Tensor, "B H W C"],
    raster: Float[Tensor, "B H W 4"],
    positions: Float[Tensor, "B V 4"],
    faces: Int[Tensor, "F 3"],
    topology: Int[Tensor, "F 3"] | None = None,
) -> Float[Tensor, "B H W C"]:
    """Blends the colours at both sides of silhouettes by where these pass between the pixels' centres.

    Gradients go to the colours and, through where silhouettes are, to the positions: the only ones that make a surface
    grow or move on the picture. The sum of an antialiased mask is the covered area; its gradient is the area's, for
    triangles smaller than a pixel, too. An edge is a silhouette if all its faces lie on one side of it on the screen.

    Args:
        colour: any channels; where nothing is seen, the background.
        raster, positions, faces: what `rasterize` returned, and was given; raster gets no gradient here.
        topology: `edges_of(faces)`, to have it computed once.
    """
    positions, faces = _real(positions), _indices(faces)
    colour, raster = _real(colour, positions), _real(raster, positions).detach()
    topology = edges_of(faces) if topology is None else _indices(topology)
    ops = _ops(positions)
    if ops is None:
        return reference.antialias(colour, raster, positions, faces, topology)
    return _Antialias.apply(colour, positions, raster, faces, topology, ops)


class _Antialias(Function):
    @staticmethod
    def forward(
        ctx: Any, colour: Tensor, positions: Tensor, raster: Tensor, faces: Tensor, topology: Tensor, ops: Any
    ) -> Tensor:
        out, blends, edges = ops.antialias(colour, raster, positions, faces, topology)
        ctx.save_for_backward(colour, positions, faces, blends, edges)
        ctx.ops = ops
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        colour, positions, faces, blends, edges = ctx.saved_tensors
        grad = grad.contiguous()
        for_colour, for_positions = (extension.will_compute(node) for node, _ in ctx.next_functions[:2])
        return (
            ctx.ops.antialias_colour_backward(blends, grad) if for_colour else None,
            ctx.ops.antialias_backward(colour, positions, faces, blends, edges, grad) if for_positions else None,
            *(None, None, None, None),
        )


def backend(name: str) -> Any:
    """Something with the functions `rasterize`, `interpolate`, `texture`, `antialias` and `edges_of`: "own" | "nvdiffrast".

    "own" is this package. "nvdiffrast" calls that library, if it is installed, with the conventions of this package; it
    needs a CUDA device. Raises UserError for anything else.
    """
    if name == "own":
        return sys.modules[__name__]
    if name == "nvdiffrast":
        from rasterizer.adapter import Nvdiffrast

        return Nvdiffrast()
    raise UserError(f"--rasterizer {name}: there is no such rasteriser; choose own or nvdiffrast")
