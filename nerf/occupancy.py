"""Which parts of space are worth a look: a grid of remembered densities and the bits that the ray marcher reads.

C cubes of grid_size^3 cells surround each other: cube c reaches to min(2^c, bound) on each side. Cells are in Morton order.
"""

import math
from collections.abc import Callable

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor, nn

from nerf.sampling import uniform
from raymarching import morton3D, morton3D_invert, packbits

DECAY = 0.95  # what an unseen density loses per update
WARM_UP = 256  # steps during which every update looks at every cell
SWEEP_SHARE = 0.25  # share of the cells that a later update looks at besides the occupied ones
EXPLORED_SHARE = (0.05, 0.02)  # share of the empty cells, during and after the warm-up, that are sampled all the same
CHUNK = {"cpu": 1 << 15, "cuda": 1 << 20}  # cells evaluated at once


class OccupancyGrid(nn.Module):
    """Remembered densities [C, grid_size^3] (-1: never looked at), the marcher's bits, the mean density, and the core.

    A cell is occupied if its density is above min(mean, threshold) or if a neighbour's is: the shell around what there is
    lets it grow. A random few of the other cells are marked too, others after each update, so that no part of space is cut
    off from the gradient for good; `solid` are the bits without those. Before the first update everything is occupied.
    The core holds, for each cell, the least density last seen in it and its neighbours: how opaque the inside of things is.
    """

    def __init__(self, size: int, bound: float, threshold: float):
        super().__init__()
        self.size, self.bound, self.threshold = size, bound, threshold
        self.cascades = 1 + math.ceil(math.log2(bound)) if bound > 1 else 1
        self.register_buffer("density", torch.full((self.cascades, size**3), -1.0))
        self.register_buffer("bitfield", torch.full((self.cascades * size**3 // 8,), 255, dtype=torch.uint8))
        self.register_buffer("solid", self.bitfield.clone())
        self.register_buffer("mean", torch.zeros(()))
        self.register_buffer("core", torch.zeros_like(self.density))

    def reset(self) -> None:
        """Forget everything: all of space is sampled until the next update, which looks at every cell."""
        self.density.fill_(-1)
        self.bitfield.fill_(255)
        self.solid.fill_(255)
        self.mean.zero_()
        self.core.zero_()

    @torch.no_grad()
    def update(
        self,
        density: Callable[[Float[Tensor, "N 3"]], Float[Tensor, "N"]],
        step: int,
        generator: torch.Generator | None,
    ) -> None:
        """Look at the cells again, each at a random point of it: remembered = max(0.95 remembered, density).

        Every cell during the first 256 steps; then the occupied ones and a random quarter of all.
        """
        device, cells = self.density.device, self.size**3
        chunk = CHUNK.get(device.type, CHUNK["cuda"])
        everything = step < WARM_UP or bool((self.density < 0).any())
        chosen = []
        for cascade in range(self.cascades):
            if everything:
                chosen.append(torch.arange(cells, device=device))
            else:
                drawn = self._random(cells, generator) < SWEEP_SHARE
                chosen.append(torch.nonzero(drawn | self._above(self.density[cascade]))[:, 0])
        latest = torch.zeros_like(self.density)
        for cascade, index in enumerate(chosen):
            for part in index.split(chunk):
                seen = density(self._points(part, cascade, generator)).float()
                old = self.density[cascade, part]
                self.density[cascade, part] = torch.maximum(old * DECAY, seen)
                latest[cascade, part] = seen
        self.mean.copy_(self.density.mean())
        occupied = self._in_space(lambda cubes: pool(cubes, torch.logical_or), self._above(self.density))
        self.solid.copy_(packbits(occupied.float(), 0.5))
        explored = EXPLORED_SHARE[step >= WARM_UP]
        occupied |= (self._random(occupied.numel(), generator) < explored).reshape(occupied.shape)
        self.bitfield.copy_(packbits(occupied.float(), 0.5))
        self.core.copy_(self._in_space(lambda cubes: pool(cubes, torch.minimum), latest))

    def core_density(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """A density that points of the box surely have, as of the last update; 0 near any surface."""
        cascade = torch.zeros_like(x[:, 0], dtype=torch.long)
        half = x.new_ones(())
        if self.cascades > 1:
            cascade = torch.ceil(torch.log2(x.abs().amax(-1))).clamp(0, self.cascades - 1).long()
            half = (2.0**cascade).clamp(max=self.bound)[:, None]
        elif self.bound != 1:
            half = half * min(self.bound, 1.0)
        place = ((x / half + 1) * (self.size / 2)).int().clamp(0, self.size - 1)
        return self.core.reshape(-1)[cascade * self.size**3 + morton3D(place)]

    def _points(self, index: Tensor, cascade: int, generator: torch.Generator | None) -> Float[Tensor, "N 3"]:
        """A random point in each of these cells of a cascade."""
        coords = morton3D_invert(index.int()).float()
        draw = uniform(tuple(coords.shape), generator, coords.device)
        return ((coords + draw) * (2 / self.size) - 1) * min(2.0**cascade, self.bound)

    def _above(self, density: Float[Tensor, "*any"]) -> Bool[Tensor, "*any"]:
        return density > self.mean.clamp(max=self.threshold)

    def _in_space(self, work: Callable[[Tensor], Tensor], cells: Shaped[Tensor, "C H3"]) -> Shaped[Tensor, "C H3"]:
        """Something done to cubes [C, x, y, z] instead of cells in Morton order."""
        codes, out = self._morton(), torch.empty_like(cells)
        out[:, codes] = work(cells[:, codes].reshape(-1, *[self.size] * 3)).reshape(cells.shape)
        return out

    def _morton(self) -> Tensor:
        """Morton code of cell (x, y, z), for all of them; made once per device."""
        cached = getattr(self, "_codes", None)
        if cached is None or cached.device != self.density.device:
            axis = torch.arange(self.size, device=self.density.device, dtype=torch.int32)
            grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
            cached = self._codes = morton3D(grid).long()
        return cached

    def _random(self, count: int, generator: torch.Generator | None) -> Float[Tensor, "N"]:
        return uniform((count,), generator, self.density.device)


def pool(cubes: Shaped[Tensor, "C X Y Z"], combine: Callable[[Tensor, Tensor], Tensor]) -> Shaped[Tensor, "C X Y Z"]:
    """Each cell combined with its 26 neighbours (with fewer at the border): or, least, largest."""
    for axis in (1, 2, 3):
        size = cubes.shape[axis]
        wider = cubes.clone()
        for to, of in ((1, 0), (0, 1)):
            mine = wider.narrow(axis, to, size - 1)
            mine.copy_(combine(mine, cubes.narrow(axis, of, size - 1)))
        cubes = wider
    return cubes
