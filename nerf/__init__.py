"""The scene as a field: cameras, networks, renderer, losses, training loop."""

from typing import Any


def build_field(opt: Any, channels: int = 3):
    """The radiance field that `--backbone` names, on the CPU; `channels` is 3 for RGB (albedo in [0, 1]) or more for latents (raw)."""
    if opt.backbone == "vanilla":
        from nerf.network_vanilla import NeRFNetwork
    elif opt.backbone == "voxel":
        from nerf.network_voxel import NeRFNetwork
    elif opt.backbone == "sdf":
        from nerf.network_sdf import NeRFNetwork
    else:
        from nerf.network_grid import NeRFNetwork
    return NeRFNetwork(opt, channels)


def begun_again(opt: Any, count: int, device: Any = "cpu", model: Any = None) -> dict[str, Any]:
    """The state of the scene of these options as it begins, with random weights that follow from the seed and `count` (1, 2, ...).

    Nobody else's random numbers move. What `--init_with` says stays; what the workspace holds does not matter.
    """
    import zlib
    from types import SimpleNamespace

    import torch

    seed = zlib.crc32(f"{opt.seed} retry {count}".encode())
    with torch.random.fork_rng([]):
        torch.default_generator.manual_seed(seed)
        scene = build_scene(SimpleNamespace(**{**vars(opt), "ckpt": "scratch", "seed": seed}), 3, device, model)
    return scene.state_dict()


def build_scene(opt: Any, channels: int = 3, device: Any = "cpu", model: Any = None):
    """What is to be trained, on the CPU: a field, with `--dmtet` a surface (which `device` helps to find in an earlier run's field).

    `model`: the folder of the prior, for `--latent`. With `--particles` several scenes in one, which differ in their initial weights.
    """

    def build():
        if opt.dmtet:
            from mesh.start import build_mesh_scene

            return build_mesh_scene(opt, channels, device)
        if opt.latent or opt.init_with:
            from nerf.start import build_field_scene

            return build_field_scene(opt, channels, model)
        return build_field(opt, channels)

    if opt.particles == 1:
        scene = build()
    else:
        from nerf.particles import Particles

        scene = Particles([build() for _ in range(opt.particles)])
    if opt.guide_shape and not (opt.test or opt.six_views or opt.dmtet):
        from nerf.guide_shape import GuideShape

        scene.guide_shape = GuideShape(opt.guide_shape)
    return scene
