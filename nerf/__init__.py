"""The scene as a field: cameras, networks, renderer, losses, training loop."""

from typing import Any


def build_scene(opt: Any, channels: int = 3):
    """The scene that `--backbone` names, on the CPU; `channels` is 3 for RGB (albedo in [0, 1]) or more for latents (raw).

    With `--particles` several of them in one, which differ in their initial weights.
    """
    if opt.backbone == "vanilla":
        from nerf.network_vanilla import NeRFNetwork
    else:
        from nerf.network_grid import NeRFNetwork
    if opt.particles == 1:
        return NeRFNetwork(opt, channels)
    from nerf.particles import Particles

    return Particles([NeRFNetwork(opt, channels) for _ in range(opt.particles)])
