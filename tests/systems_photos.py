"""What was published for the systems that start from photographs: threestudio's configuration files and stable-dreamfusion's presets."""

from published import NETWORK, adam, at, blob, camera, hash_grid, marching, sds, surface, views, weights


def prior(model, weight, scale, low, high, by_angle="none"):
    """Zero-1-to-3's; its guidance is as it is defined here."""
    found = {"zero123": model, "lambda_zero123": weight, "zero123_scale": scale, "zero123_grad_scale": by_angle}
    return {**found, "t_range": (low, high), "distill": "sds", "weighting": "sds"}


def known(rgb, mask, scale, depth=0, interval=1, both=True, noise=0.002):
    """Known views: weights, size beside random views; in every step beside a random view (`accumulate`), or in some instead of it."""
    losses = {"lambda_rgb": rgb, "lambda_mask": mask, "lambda_depth": depth, "lambda_depth_rank": 0, "lambda_normal": 0}
    steps = {"known_view_interval": interval, "known_view_sum": both, "known_view_noise_scale": noise}
    return {**losses, **steps, "known_view_scale": scale, "latent_iter_ratio": 0}


def still(elevation, distance, fovy, height):
    """Cameras that are not perturbed; the known view stands straight before the object, `height` degrees above the horizon."""
    found = camera(elevation, (distance, distance), (fovy, fovy), (height, distance, fovy), perturbed=False)
    return {**found, "default_azimuth": 0, "progressive_view": False, "progressive_level": False}


XL, STABLE, FIRST = (
    "ashawkey/zero123-xl-diffusers",
    "ashawkey/stable-zero123-diffusers",
    "bennyguo/zero123-diffusers",
)
SD15 = {"sd_version": "1.5", "hf_key": None, "IF": False}
WHITE = {"background": "white", "albedo_iter_ratio": 1}
ORIENT = 30 * 1  # per sample, 30 of them on a ray

zero123 = {
    **prior(XL, 0.1, 3, at((0, 0.4), (100, 0.3), (200, 0.2)), at((0, 0.85), (100, 0.675), (200, 0.5), (599, 0.5))),
    **known(500, 50, 128 / 64),
    **hash_grid(2),
    "mlp_layers": 2 + 1,
    **marching(2),
    **blob(10, 0.5),
    **WHITE,
    "w": 64,
    "h": 64,
    "size_scale": at((0, 1), (199, 1), (200, 2), (299, 2), (300, 4), (599, 4)),
    "batch_size": 4,  # of 12, 4, 2
    **still((-10, 80), 3.8, 20, height=5),
    **weights(**{"2d_normal_smooth": 8, "3d_normal_smooth": 8}, orient=ORIENT, sparsity=0.1, opaque=0.1),
    **adam(0.01, 600, encoder=1, trunk=1),
}
SMOOTH = at((0, 7), (100, 7), (150, 5), (175, 7.5), (200, 10), (599, 10))

magic123 = {
    **SD15,
    **prior(FIRST, 1, 5, 0.2, 0.6),
    "guidance_scale": 100,  # as it is defined here
    "lambda_guidance": 0.025,
    **views(),
    **known(1000, 100, 1),
    **WHITE,
    **still((-45, 45), 2.5, 40, height=0),
}

# -- stable-dreamfusion: its defaults, and what pictures bring along -------------------------------------------------------------

pictures = {
    "distill": "sds",
    "w": 64,
    "h": 64,
    "batch_size": 1,
    "background": "random",
    "radius_range": (3, 3.5),
    "theta_range": (45, 105),
    "phi_range": (-180, 180),
    "jitter_pose": False,
    "progressive_level": True,
    "default_radius": 3.2,
    "default_polar": 90,
    "default_azimuth": 0,
    "default_fovy": 20,
    "albedo_iter_ratio": 0,
    "min_ambient_ratio": 0.1,
    "textureless_ratio": 0.2,
    "optim": "adan",
    "lr": 0.005 / 5,
    "lr_scale": {"encoder": 10, "trunk": 1},
}
field = {
    **pictures,
    **hash_grid(1, 2048),
    "mlp_layers": 3,
    **blob(5, 0.2, "exp"),
    "normals": "finite",
    "cuda_ray": True,
    "grid_size": 128,
    "density_thresh": 10,
    "max_steps": 1024,
    "progressive_view": True,
    "progressive_view_init_ratio": 0.2,
    "iters": 5000,
}
FULL = at((0, 0), (1250, 0.5), (2500, 1), (4999, 1))  # entropy: it grows over half of the run
mesh = {
    **pictures,
    **surface(mesh_normal=0.5, mesh_laplacian=6 * 0.5),
    "w": 64,
    "h": 64,
    "dmtet_reso_scale": 8,
    "tet_grid_size": 128,
    "progressive_view": False,
}
words = {
    "sd_version": "2.1",
    "hf_key": None,
    "guidance_scale": 10,
    "lambda_guidance": 1,
    "lambda_clip": 10,
    "clip_model": "openai/clip-vit-base-patch16",
    "lambda_zero123": 0,
    "view_words": 4,
    "view_blend": True,
    "fovy_range": (10, 30),
}
alone = {**prior(XL, 1, 5, 0.02, 0.98, "angle"), "fovy_range": (20, 20)}

# -- threestudio's image condition -----------------------------------------------------------------------------------------------

condition = {
    **SD15,
    **sds(100),
    **views(),
    "lambda_zero123": 0,
    "lambda_guidance": at((0, 0), (99, 0), (101, 0.1), (9999, 0.1)),
    **known(10, 1, 96 / 64, depth=1),
    **hash_grid(1),
    "mlp_layers": 2 + 1,
    "normals": "finite",
    **marching(1),
    **blob(10, 0.5),
    **NETWORK,
    "bg_radius": 1.4,
    "w": 64,
    "h": 64,
    "batch_size": 4,
    **camera((-10, 90), (1, 1.5), (40, 70), (0, 1.2, 60)),
    "progressive_view": False,
    "progressive_level": False,
    "albedo_iter_ratio": 100 / 10000,
    "albedo_ratio": 1 - 1,
    "min_ambient_ratio": 0.5,
    "textureless_ratio": 0.2,
    **weights(),
    **adam(0.005 / 5, 10000, "adan", encoder=0.05 / 0.005, trunk=1, background=1),
}

FROM_PHOTOS = {
    "zero123": zero123,
    "stable-zero123": {
        **zero123,
        **prior(
            STABLE, 0.1, 3, at((0, 0.7), (50, 0.7), (200, 0.3)), at((0, 0.98), (50, 0.98), (125, 0.89), (200, 0.8))
        ),
        "fp16": False,
        "lambda_rgb": at((0, 500), (100, 500), (250, 750), (400, 1000), (599, 1000)),
        **weights(**{"2d_normal_smooth": SMOOTH, "3d_normal_smooth": SMOOTH}, orient=ORIENT, sparsity=0.5, opaque=0.5),
        "batch_size": 8,  # of 12, 8, 4
    },
    "zero123-geometry": {
        **prior(XL, 1, 3, 0.02, 0.5),
        **known(10000, 100, 512 / 256),
        **WHITE,
        **still((-10, 45), 3.8, 20, height=5),  # published 0, but 5 in the stage before
        **surface(mesh_normal=at((0, 10000), (49, 10000), (51, 1000), (199, 1000))),
        "tet_grid_size": 128,
        "w": 256,
        "h": 256,
        "batch_size": 8,
        **adam(0.01, 200, encoder=1, trunk=1),
    },
    "magic123-coarse": {
        **magic123,
        **hash_grid(1),
        "mlp_layers": 2 + 1,
        "max_level": at((0, 8 / 16), (2000, 8 / 16), (4700, 1), (9999, 1)),
        **marching(1, samples=256),
        **blob(10, 0.5),
        "w": 128,
        "h": 128,
        "batch_size": 1,
        **weights(**{"2d_normal_smooth": 1000}),
        **adam(0.001, 10000, encoder=0.01 / 0.001, trunk=1),
    },
    "magic123-refine": {
        **magic123,
        **surface(mesh_normal=1000),
        "tet_grid_size": 128,
        **adam(0.001, 10000, encoder=1, trunk=1),
    },
    "image": {
        **field,
        **alone,
        **known(1000, 500, 1.5, depth=10, interval=4, both=False),
        **weights(**{"3d_normal_smooth": 10}, entropy=FULL, orient=1),
    },
    "image-refine": {
        **mesh,
        **alone,
        **known(1000, 500, 1, interval=4, both=False),
        "t_range": (0.02, 0.5),
        "iters": 5000,
    },
    "image-text": {
        **field,
        **words,
        **known(1000, 500, 1.5, depth=10, interval=2, both=False),
        "t_range": (0.2, 0.6),
        **weights(**{"3d_normal_smooth": 20}, entropy=FULL, orient=1),
    },
    "image-text-refine": {
        **mesh,
        **words,
        **known(1000, 500, 1, interval=2, both=False),
        "t_range": (0.2, 0.5),
        "iters": 10000,
    },
    "image-dreamfusion": condition,
    "co3d": {
        **condition,
        "lambda_guidance": at((0, 0), (999, 0), (1001, 0.1), (9999, 0.1)),
        **known(10, 1, 1, noise=0),  # 64 x 64 is 4096 rays
        "batch_size": 1,
        "default_radius": 3 * 0.95,
        "default_fovy": 27,  # shows as much as 60 degrees from 1.2
        "albedo_iter_ratio": 1000 / 10000,
        **weights(orient=ORIENT, opaque=0.01),
    },
}
