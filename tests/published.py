"""Parts of threestudio's configuration files as our flags, for the tables of systems.py and systems_photos.py."""


def camera(elevation, distance, fovy, show=None, perturbed=True):
    """threestudio's camera block: elevations (degrees above the horizon), distances, fields of view; what it shows results from."""
    found = {"theta_range": (90 - elevation[1], 90 - elevation[0]), "radius_range": distance, "fovy_range": fovy}
    found |= {"jitter_pose": perturbed, "phi_range": (-180, 180)}
    if perturbed:  # camera_perturb 0.1 is half the width
        found |= {"jitter_center": 2 * 0.1, "jitter_target": 0.2, "jitter_up": 0.02}
    height, far, angle = show
    return found | {"default_polar": 90 - height, "default_radius": far, "default_fovy": angle}


def sds(scale, low=0.02, high=0.98, weighting="sds"):
    """eps_c + scale (eps_c - eps_u) is a guidance of scale + 1."""
    return {"distill": "sds", "guidance_scale": scale + 1, "t_range": (low, high), "weighting": weighting}


def views(front=45):
    """Words by thresholds: 60 degrees of elevation, `front` degrees to either side."""
    return {"view_words": 4, "view_blend": False, "angle_overhead": 90 - 60, "angle_front": 2 * front}


def hash_grid(radius, finest=4096):
    """16 levels from 16 to `finest` cells across a box of `radius`; ours are counted across a box of 1."""
    found = {"bound": radius, "num_levels": 16, "level_dim": 2, "log2_hashmap_size": 19, "base_resolution": 16}
    return found | {"desired_resolution": finest // radius, "hidden_dim": 64, "mlp_layers": 1 + 1}


def marching(radius, samples=512):
    """Steps of 2 sqrt(3) radius / samples; empty is an alpha of 0.01."""
    step = 2 * 1.732 * radius / samples
    return {"cuda_ray": True, "grid_size": 32, "max_steps": samples // radius, "density_thresh": round(0.01 / step, 2)}


def blob(height, width, activation="softplus"):
    return {"density_activation": activation, "blob_density": height, "blob_radius": width}


def adam(lr, steps, optim="adam", **factors):
    return {"optim": optim, "lr": lr, "lr_scale": factors, "iters": steps, "ema_decay": 0}


def weights(**given):
    """Regularisers; those not named are 0."""
    zero = dict.fromkeys(("entropy", "opacity", "orient", "sparsity", "opaque", "emptiness", "convex", "eikonal"), 0)
    zero |= dict.fromkeys(("zvar", "shape", "tv", "wd", "2d_normal_smooth", "3d_normal_smooth", "center"), 0)
    return {f"lambda_{name}": value for name, value in {**zero, **given}.items()}


def surface(**given):
    mesh = {"mesh_normal": 0, "mesh_laplacian": 0} | given
    return {"dmtet": True, "w": 512, "h": 512, "dmtet_reso_scale": 1, "batch_size": 1} | {
        f"lambda_{name}": value for name, value in mesh.items()
    }


def at(*points):
    """A course as (step, value) pairs, to compare with."""
    return dict(points)


SMALL = {"w": 64, "h": 64, "batch_size": 1, "latent_iter_ratio": 0}
FULL = {"w": 512, "h": 512, "batch_size": 1, "latent_iter_ratio": 0}
SD = {"sd_version": "2.1", "hf_key": None, "IF": False}
IF = {"sd_version": "embedded", "hf_key": "DeepFloyd/IF-I-XL-v1.0", "IF": True}  # the key takes the version's place
UNLIT = {"albedo_iter_ratio": 1}
POINT_LIGHT = {"albedo_iter_ratio": 2000 / 10000, "albedo_ratio": 1 - 0.75, "textureless_ratio": 0.5}
BANDS = {"max_level": at((0, 8 / 16), (2000, 8 / 16), (6500, 1), (9999, 1))}  # more in a test below
ORIENT = at((0, 30 * 10), (2500, 30 * 505), (5000, 30 * 1000), (9999, 30 * 1000))  # per sample, 30 of them on a ray
NETWORK, AUGMENTED = {"background": "mlp", "background_ratio": 1}, {"background": "mlp", "background_ratio": 0.5}
LOW, WIDE = (-10, 45), (-10, 90)
SHOW = (15, 2, 70)
