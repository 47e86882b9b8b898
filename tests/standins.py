"""A scene without a network and a guidance without a model: what the trainer is tested with.

The scene renders through the real renderer; its field is a grid of numbers (`VoxelScene`) or a formula (`FormulaScene`).
"""

import torch
from torch import nn
from torch.nn import functional as F

from nerf.provider import orbit
from nerf.renderer import NeRFRenderer

RED = (0.9, 0.1, 0.1)


class _Scene(NeRFRenderer):
    def density(self, x):
        sigma, albedo, _ = self.query(x)
        return {"sigma": sigma, "albedo": albedo}

    def normal(self, x):
        return self.query(x, normals=True)[2]

    def query(self, x, normals=False):
        sigma, albedo = self.values(x)
        if not normals:
            return sigma, albedo, None
        step = 0.02 * torch.eye(3, device=x.device)
        slope = [self.values(x + e)[0] - self.values(x - e)[0] for e in step]
        return sigma, albedo, F.normalize(-torch.stack(slope, -1), dim=-1)

    def set_progress(self, ratio):
        self.progress = ratio


class VoxelScene(_Scene):
    """Density and colour from a grid, a soft ball at the origin to begin with."""

    def __init__(self, opt, size=12):
        super().__init__(opt, 3)
        axis = torch.linspace(-1, 1, size)
        z, y, x = torch.meshgrid(axis, axis, axis, indexing="ij")
        radius = (x**2 + y**2 + z**2).sqrt()
        start = torch.zeros(1, 4, size, size, size)
        start[:, 0] = 12 * (0.6 - radius)
        self.grid = nn.Parameter(start)

    def values(self, x):
        raw = F.grid_sample(self.grid, x[None, None, None], align_corners=True)[0, :, 0, 0].T
        return 10 * F.softplus(raw[:, 0]), torch.sigmoid(raw[:, 1:])

    def parameter_groups(self, lr):
        return [{"name": "grid", "params": [self.grid], "lr": lr}]


class FormulaScene(_Scene):
    """`formula(x[N, 3]) -> sigma[N], albedo[N, 3]`; one parameter, so that it has something to average."""

    def __init__(self, opt, formula):
        super().__init__(opt, 3)
        self.formula, self.unused = formula, nn.Parameter(torch.zeros(1))

    def values(self, x):
        return self.formula(x)

    def parameter_groups(self, lr):
        return [{"name": "unused", "params": [self.unused], "lr": lr}]


def lopsided(x, hardness=60.0):
    """A grey body, a red arm towards +x (its left), a green nose towards +z (its front), a blue hat (+y)."""
    parts = [
        ((0.0, 0.0, 0.0), 0.4, (0.5, 0.5, 0.5)),
        ((0.5, 0.0, 0.0), 0.2, (0.9, 0.1, 0.1)),
        ((0.0, 0.0, 0.45), 0.15, (0.1, 0.8, 0.1)),
        ((0.0, 0.45, 0.0), 0.22, (0.1, 0.1, 0.9)),
    ]
    inside = torch.stack([r - (x - x.new_tensor(c)).norm(dim=-1) for c, r, _ in parts])
    colors = torch.stack([x.new_tensor(color) for *_, color in parts])
    return hardness * torch.sigmoid(inside.amax(0) / 0.015), colors[inside.argmax(0)]


class BallGuidance:
    """Pulls towards pictures of a red ball of radius 0.5 on white, plus noise; its cameras stand at radius 3.2 with a field of view of 30."""

    wants = ()

    def __init__(self, radius=0.5, seed=0, spoil=()):
        self.radius, self.spoil, self.calls = radius, set(spoil), 0
        self.generator = torch.Generator().manual_seed(seed)

    def target(self, polar, azimuth, height, width):
        cameras = orbit(polar.cpu(), azimuth.cpu(), 3.2, 30.0, height, width)
        origins, directions = cameras.rays()
        nearest = origins - (origins * directions).sum(-1, keepdim=True) * directions
        inside = (nearest.norm(dim=-1, keepdim=True) < self.radius).float()
        return inside * torch.tensor(RED) + (1 - inside), inside

    def __call__(self, image, polar, azimuth, step, as_latent=False, unit_range=True, hints=None):
        self.calls += 1
        target, inside = self.target(polar, azimuth, *image.shape[1:3])
        if as_latent:
            target = torch.cat([0.5 * torch.ones_like(target), inside], -1)
        noise = 0.02 * torch.randn(target.shape, generator=self.generator)
        loss = ((image - target - noise) ** 2).sum() / len(image)
        if step in self.spoil:
            loss = loss * float("nan")
        return loss, {"grad_norm": loss.detach(), "nonfinite": torch.zeros(())}

    def state(self):
        return {"generator": self.generator.get_state()}

    def load_state(self, state):
        self.generator.set_state(state["generator"])
