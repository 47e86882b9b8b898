"""The scene as a field: cameras, networks, renderer, losses, training loop."""

from typing import Any


def build_scene(opt: Any, channels: int = 3):
    """The scene that `--backbone` names, on the CPU; `channels` is 3 for RGB (albedo in [0, 1]) or more for latents (raw)."""
    if opt.backbone == "vanilla":
        from nerf.network_vanilla import NeRFNetwork
    else:
        from nerf.network_grid import NeRFNetwork
    return NeRFNetwork(opt, channels)
