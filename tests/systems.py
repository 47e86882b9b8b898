"""The systems in configs/systems for the tests: their stages, and what was published for each.

The numbers are those of threestudio's configuration files (and NeMo's), converted where a comment of the YAML says so.
"""

from published import (
    AUGMENTED,
    BANDS,
    FULL,
    IF,
    LOW,
    NETWORK,
    ORIENT,
    POINT_LIGHT,
    SD,
    SHOW,
    SMALL,
    UNLIT,
    WIDE,
    adam,
    at,
    blob,
    camera,
    hash_grid,
    marching,
    sds,
    surface,
    views,
    weights,
)
from systems_photos import FROM_PHOTOS

from options import CONFIGS

NAMES = sorted(path.stem for path in (CONFIGS / "systems").glob("*.yaml"))
STAGES = {  # script -> its stages, first to last
    "magic3d.sh": ["magic3d-coarse-sd", "magic3d-refine-sd"],
    "latentnerf.sh": ["latentnerf", "latentnerf-refine"],
    "sketchshape.sh": ["sketchshape", "sketchshape-refine"],
    "fantasia3d.sh": ["fantasia3d", "fantasia3d-texture"],
    "prolificdreamer.sh": ["prolificdreamer", "prolificdreamer-geometry", "prolificdreamer-texture"],
    "nemo.sh": ["nemo-dreamfusion", "nemo-dmtet"],
    "zero123.sh": ["zero123", "zero123-geometry"],
    "magic123.sh": ["magic123-coarse", "magic123-refine"],
    "image.sh": ["image-text", "image-text-refine"],
}
ALSO = {  # script, what it is called with -> the stages that it then has
    ("zero123.sh", "PRIOR=stable"): ["stable-zero123", "zero123-geometry"],
    ("image.sh", "no prompt"): ["image", "image-refine"],
}
WORDLESS = ("zero123", "zero123-geometry", "stable-zero123", "image", "image-refine")  # photographs without a prompt


def shown(name, text="a red chair", guide="chair.obj", image="mug_rgba.png", photos="mugs"):
    """What has to be typed to tell a system what to make."""
    typed = [] if name in WORDLESS else ["--text", text]
    typed += ["--guide_shape", guide] if name.startswith("sketchshape") else []
    typed += ["--photos", photos] if name == "co3d" else []
    return [*typed, *(["--image", image] if name in FROM_PHOTOS and name != "co3d" else [])]


# ---- published ------------------------------------------------------------------------------------------------------------

dreamfusion = {
    **SD,
    **SMALL,
    **sds(100),
    **views(),
    **hash_grid(2),
    **BANDS,
    **marching(2),
    **blob(10, 0.5),
    **NETWORK,
    **camera(LOW, (1.5, 2), (40, 70), SHOW),
    **POINT_LIGHT,
    "min_ambient_ratio": 0.1,
    "normals": "analytic",
    **weights(orient=ORIENT, sparsity=1),
    **adam(0.01, 10000, encoder=1, trunk=1, background=0.001 / 0.01),
}
by_if = {**IF, **sds(20), **camera(WIDE, (1.5, 2), (40, 70), SHOW), "uniform_sphere_rate": 0.5}
magic3d = {**dreamfusion, "weighting": "uniform", "max_level": 1, "min_ambient_ratio": 0}
latent = {
    **SD,
    **SMALL,
    **sds(100),
    **views(),
    **marching(1),
    **NETWORK,
    **camera(LOW, (1, 1.5), (40, 70), (15, 1.5, 70)),
    **UNLIT,
    **weights(sparsity=5e-4),
    **adam(at((0, 1e-3), (100, 1e-2), (5050, 1e-2 * 0.1**0.5), (9999, 1e-3)), 10000, encoder=1, trunk=1, background=1),
    "latent": False,
}
prolific = {
    **SD,
    "distill": "vsd",
    "guidance_scale": 7.5,
    "lora_scale": 1,
    "lora_lr": 1e-4,
    "lora_rank": 4,
    **views(30),
    **NETWORK,
    **camera(LOW, (1, 1.5), (40, 70), (15, 1.5, 70), perturbed=False),
    **UNLIT,
}
coarse = {
    **prolific,
    **SMALL,
    **hash_grid(1),
    **marching(1),
    **blob(10, 0.5),
    **AUGMENTED,
    "t_range": (0.02, at((0, 0.98), (4999, 0.98), (5001, 0.5), (24999, 0.5))),
    "size_scale": at((0, 1), (4999, 1), (5001, 8)),
    **weights(sparsity=10, opaque=at((0, 0), (9999, 0), (10001, 1000))),
    **adam(0.001, 25000, "adamw", encoder=0.01 / 0.001, trunk=1, background=1),
}
fantasia = {
    **SD,
    **views(),
    **camera(LOW, (3, 3), (25, 45), (15, 3, 45), perturbed=False),
    **surface(),
}
nemo = {
    **SD,
    "distill": "sds",
    "guidance_scale": 100,  # as it is defined here
    "t_range": (0.02, 0.98),
    "view_words": 4,
    "view_blend": True,
    "angle_overhead": 30,
    "angle_front": 60,
    "radius_range": (3, 3.5),
    "theta_range": (45, 105),
    "phi_range": (-180, 180),
    "fovy_range": (10, 30),
    "jitter_pose": False,
    "default_radius": 3.2,
    "default_polar": 90,
    "default_fovy": 20,
    "albedo_iter_ratio": 0,
    "min_ambient_ratio": 0.1,
    "textureless_ratio": 0.2,
    "seed": 2023,
    "batch_size": 1,
    "W": 800,
    "H": 800,
    "optim": "adan",
    "lr": 0.005 / 5,
    "ema_decay": 0,
}

PUBLISHED = {
    "dreamfusion-sd": dreamfusion,
    "dreamfusion-if": {**dreamfusion, **by_if},
    "dreamfusion-sd-plain": {k: v for k, v in dreamfusion.items() if k not in POINT_LIGHT}
    | UNLIT
    | {"lambda_orient": 0},
    "dreamfusion-sd-augment": {**dreamfusion, **AUGMENTED},
    "magic3d-coarse-sd": magic3d,
    "magic3d-coarse-if": {**magic3d, **by_if, "weighting": "uniform"},
    "magic3d-refine-sd": {
        **SD,
        **sds(100, high=0.5),
        **views(),
        **NETWORK,
        **camera(LOW, (1.5, 2), (30, 45), SHOW),
        **surface(mesh_normal=1e4),
        "tet_grid_size": 128,
        "albedo_iter_ratio": 0,
        "min_ambient_ratio": 0,
        **adam(0.01, 5000, encoder=1, trunk=1, background=1),
    },
    "sjc": {
        **SD,
        **SMALL,
        **views(),
        **NETWORK,
        "distill": "sjc",
        "guidance_scale": 101,
        "t_range": (0.01, 0.97),
        "latent": True,
        "backbone": "voxel",
        "voxel_size": 100,
        "density_activation": "softplus",  # of v - 1, no blob
        "blob_density": 0,
        "bound": 1,
        "cuda_ray": False,
        "num_steps": 512,
        "upsample_steps": 0,
        **camera(LOW, (1.5, 1.5), (40, 70), (20, 1.5, 70), perturbed=False),
        **UNLIT,
        **weights(emptiness=at((0, 1e4), (4999, 1e4), (5001, 2e5))),
        **adam(0.05, 10000, "adamax", encoder=1, trunk=1, background=0.0001 / 0.05),
    },
    "latentnerf": {**latent, **hash_grid(1), **blob(5, 0.2, "exp"), "latent": True},
    "latentnerf-refine": latent,
    "sketchshape": {
        **latent,
        **hash_grid(1),
        **blob(10, 0.5),
        "latent": True,
        **weights(shape=1 * 1e5),  # the mean of 10^5 samples, not their sum
    },
    "sketchshape-refine": {**latent, **weights(shape=1 * 1e5)},
    "fantasia3d": {
        **fantasia,
        **hash_grid(1),
        **sds(100, high=0.5, weighting="fantasia3d"),
        "latent_iter_ratio": 1000 / 10000,
        "train_shading": "normal",
        "shape_init": "sphere 0.5",
        "tet_grid_size": 128,
        "init_with": None,
        **adam(0.001, 10000, "adamw", encoder=1, trunk=1),
    },
    "fantasia3d-texture": {
        **fantasia,
        **sds(100, high=0.5),
        "latent_iter_ratio": 0,
        "lock_geo": True,
        "material": "pbr",
        "environment_scale": 2,
        "background": "white",
        **adam(0.01, 5000, "adamw", encoder=1, trunk=1, material=1),
    },
    "prolificdreamer": coarse,
    "prolificdreamer-scene": {
        **coarse,
        **NETWORK,
        **hash_grid(5),
        **marching(5),
        **blob(-10, 2.5),
        "view_words": 0,
        **camera(LOW, (0.1, 2.3), (40, 70), SHOW, perturbed=False),
        "t_range": (0.02, at((0, 0.98), (9999, 0.98), (10001, 0.5))),
        **weights(zvar=1),
        "view_blend": True,
        "angle_front": 60,
    },
    "prolificdreamer-geometry": {
        **SD,
        **sds(100, high=at((0, 0.98), (4999, 0.98), (5001, 0.5))),
        **views(),
        **camera(LOW, (1, 1.5), (40, 70), (15, 1.5, 70), perturbed=False),
        **surface(mesh_normal=1e4, mesh_laplacian=6 * 1e4),
        "tet_grid_size": 128,
        "train_shading": "normal",
        **adam(0.005, 15000, encoder=1, trunk=1),
    },
    "prolificdreamer-texture": {
        **prolific,
        **surface(),
        "lock_geo": True,
        "t_range": (0.02, at((0, 0.98), (4999, 0.98), (5001, 0.5))),
        **adam(0.001, 30000, "adamw", encoder=10, trunk=1, background=1),
    },
    "hifa": {
        **SD,
        **FULL,
        **sds(100, low=0.3),
        "distill": "hifa",
        "t_schedule": "auto",  # the square root, by the method
        "lambda_image": 0.01,
        **views(),
        **hash_grid(1),
        **marching(1),
        **blob(10, 0.5),
        **AUGMENTED,
        **camera(LOW, (1, 1.5), (40, 70), (15, 1.5, 70), perturbed=False),
        **UNLIT,
        **weights(zvar=100, sparsity=1),
        **adam(0.001, 25000, encoder=10, trunk=1, background=1),
    },
    "sdi": {
        **dreamfusion,
        **FULL,
        "distill": "sdi",
        "guidance_scale": 7.5,  # Perp-Neg's branch is as ours
        "weighting": "auto",
        "inversion_scale": -7.5,
        "inversion_steps": 10,
        "inversion_eta": 0.3,
        "t_range": (0.25, 0.98),
        "t_schedule": "linear",
        "perpneg": True,
        "view_blend": True,
        "albedo_iter_ratio": 1000 / 10000,
        "albedo_ratio": 1 - 0.3,
        "textureless_ratio": 0.75,
        "lambda_guidance": 1 / (4 * 64 * 64),  # published is a mean
        **weights(
            orient=30 * 0.1,
            sparsity=at((0, 0.15), (1500, 0.075), (3000, 0)),
            opaque=0.1,
            convex=at((0, 1), (4000, 0.1)),
            zvar=1,
        ),
    },
    "textmesh-if": {
        **{k: v for k, v in dreamfusion.items() if k not in blob(0, 0)},
        **by_if,
        **hash_grid(2, 2048),
        "backbone": "sdf",
        "shape_init": "sphere 0.5",
        "normals": "finite",
        **weights(eikonal=1000),
        **adam(0.001, 10000, encoder=10, trunk=1, background=1),
    },
    "nemo-dreamfusion": {
        **nemo,
        **hash_grid(1, 2048),
        "mlp_layers": 3,
        **blob(5, 0.2, "exp"),
        "normals": "finite",
        "background": "#0000ff",
        "cuda_ray": True,
        "grid_size": 128,
        "density_thresh": 10,
        "max_steps": 1024,
        "update_extra_interval": 16,
        "latent_iter_ratio": 0.2,
        "w": 64,
        "h": 64,
        "iters": 10000,
        **weights(entropy=1e-3, orient=1e-2),
        "lr_scale": {"encoder": 1, "trunk": 1},
    },
    "nemo-dmtet": {
        **nemo,
        **surface(mesh_normal=0.5, mesh_laplacian=6 * 0.5),
        **NETWORK,
        "tet_grid_size": 128,
        "latent_iter_ratio": 0,
        "iters": 5000,
        "lr_scale": {"encoder": 1, "trunk": 1, "background": 1},
    },
    **FROM_PHOTOS,
}
