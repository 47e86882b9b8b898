"""nvdiffrast behind the functions of this package: its rows run from the bottom to the top, and it needs CUDA.

Mirroring the positions in y turns its rows over, so no picture has to be. Its faces are not culled, so the mirrored
triangles are drawn alike, and d/dY counts downwards as ours does.
"""

import importlib
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from errors import UserError


class Nvdiffrast:
    """The five functions of `rasterizer`, computed by nvdiffrast; see there for the arguments."""

    def __init__(self):
        try:
            self.library = importlib.import_module("nvdiffrast.torch")
        except ImportError:
            raise UserError(
                "--rasterizer nvdiffrast: that library is not installed; install it, or use --rasterizer own"
            ) from None
        self.contexts: dict[torch.device, Any] = {}

    def _context(self, device: torch.device) -> Any:
        if device not in self.contexts:
            if device.type != "cuda":
                raise UserError(f"--rasterizer nvdiffrast: it runs on CUDA, not on {device.type}; use --rasterizer own")
            self.contexts[device] = self.library.RasterizeCudaContext(device=device)
        return self.contexts[device]

    def rasterize(
        self,
        positions: Float[Tensor, "B V 4"],
        faces: Int[Tensor, "F 3"],
        height: int,
        width: int,
        derivatives: bool = False,
    ) -> Float[Tensor, "B H W 4"] | tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B H W 4"]]:
        """(u, v, z/w, face + 1), and with `derivatives` (du/dX, du/dY, dv/dX, dv/dY)."""
        raster, slopes = self.library.rasterize(
            *(self._context(positions.device), _mirrored(positions), _indices(faces), [height, width]),
            grad_db=derivatives,
        )
        return (raster, slopes) if derivatives else raster

    def interpolate(
        self,
        attributes: Float[Tensor, "b V C"],
        raster: Float[Tensor, "B H W 4"],
        faces: Int[Tensor, "F 3"],
        raster_db: Float[Tensor, "B H W 4"] | None = None,
    ) -> Float[Tensor, "B H W C"] | tuple[Float[Tensor, "B H W C"], Float[Tensor, "B H W D"]]:
        """Attributes at pixels, and with `raster_db` their derivatives: all d/dX, then all d/dY."""
        attributes, faces = attributes.float().contiguous(), _indices(faces)
        if raster_db is None:
            return self.library.interpolate(attributes, raster, faces)[0]
        out, slopes = self.library.interpolate(attributes, raster, faces, rast_db=raster_db, diff_attrs="all")
        return out, slopes.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)  # there d/dX and d/dY alternate

    def texture(
        self,
        picture: Float[Tensor, "b h w C"],
        uv: Float[Tensor, "B H W 2"],
        uv_da: Float[Tensor, "B H W 4"] | None = None,
        wrap: str = "wrap",
    ) -> Float[Tensor, "B H W C"]:
        """A picture at texture coordinates, with `uv_da` out of a chain of averaged pictures."""
        picture, uv = picture.float().contiguous(), uv.float().contiguous()
        if uv_da is None:
            return self.library.texture(picture, uv, filter_mode="linear", boundary_mode=wrap)
        slopes = uv_da.float().unflatten(-1, (2, 2)).transpose(-1, -2).flatten(-2).contiguous()
        return self.library.texture(picture, uv, slopes, filter_mode="linear-mipmap-linear", boundary_mode=wrap)

    def edges_of(self, faces: Int[Tensor, "F 3"]) -> Any:
        """What `antialias` wants to know of the faces, as nvdiffrast keeps it."""
        return self.library.antialias_construct_topology_hash(_indices(faces))

    def antialias(
        self,
        colour: Float[Tensor, "B H W C"],
        raster: Float[Tensor, "B H W 4"],
        positions: Float[Tensor, "B V 4"],
        faces: Int[Tensor, "F 3"],
        topology: Any = None,
    ) -> Float[Tensor, "B H W C"]:
        """Silhouettes blended between neighbouring pixels."""
        colour, positions = colour.float().contiguous(), _mirrored(positions)
        return self.library.antialias(colour, raster, positions, _indices(faces), topology_hash=topology)


def _mirrored(positions: Tensor) -> Tensor:
    positions = positions.float()
    return (positions * positions.new_tensor([1, -1, 1, 1])).contiguous()


def _indices(faces: Tensor) -> Tensor:
    return faces.int().contiguous()
