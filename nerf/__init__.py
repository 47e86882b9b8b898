"""The scene as a field: cameras, networks, renderer, losses, training loop."""

from typing import Any


def build_field(opt: Any, channels: int = 3):
    """The radiance field that `--backbone` names, on the CPU; `channels` is 3 for RGB (albedo in [0, 1]) or more for latents (raw)."""
    if opt.backbone == "vanilla":
        from nerf.network_vanilla import NeRFNetwork
    else:
        from nerf.network_grid import NeRFNetwork
    return NeRFNetwork(opt, channels)


def build_scene(opt: Any, channels: int = 3, device: Any = "cpu"):
    """What is to be trained, on the CPU: a field, with `--dmtet` a surface (which `device` helps to find in an earlier run's field).

    With `--particles` several of them in one, which differ in their initial weights.
    """

    def build():
        if not opt.dmtet:
            return build_field(opt, channels)
        from mesh.start import build_mesh_scene

        return build_mesh_scene(opt, channels, device)

    if opt.particles == 1:
        return build()
    from nerf.particles import Particles

    return Particles([build() for _ in range(opt.particles)])
