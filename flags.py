"""Every flag of the command line, once: name, kind, default, help, unit, range; and how a value becomes one of that kind.

Kinds: `flag` (--x, --no_x), `int`, `float`, `text`, `choice`, `pair` (two floats, low and high), `schedule` (a number that may change with
the step, see schedule.py), `schedules` (two of them). Ranges are written as `> 0`, `>= 0`, `[0, 1]`, `(0, 1]`.
"""

from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any, NamedTuple

from errors import UserError
from schedule import Schedule


class Flag(NamedTuple):
    """One row: what a user may type, what it means, and which values make sense."""

    name: str
    kind: str
    default: Any
    help: str
    unit: str = ""
    range: str = ""
    choices: tuple = ()
    saved: bool = True  # part of what WORKSPACE/config.yaml restores; what concerns a single call is not


# One row is one line, for the eye; the formatter would make ten of it.
# fmt: off
GROUPS: dict[str, tuple[Flag, ...]] = {
    "What to make": (
        Flag("text", "text", None, 'the prompt: --text "a hamburger"'),
        Flag("negative", "text", "", "what the picture must not show; takes the place of the empty prompt"),
        Flag("workspace", "text", "workspace", "the folder that receives everything", saved=False),
        Flag("save_mesh", "flag", False, "export mesh/mesh.obj and mesh/mesh.glb at the end", saved=False),
        Flag("test", "flag", False, "no training: restore the workspace, render the turntable (--save_mesh: the mesh)", saved=False),
        Flag("six_views", "flag", False, "no training: restore the workspace, write six pictures of it", saved=False),
    ),
    "Presets (what is typed always wins over them)": (
        Flag("O", "flag", False, "fast: --fp16 --cuda_ray", saved=False),
        Flag("O2", "flag", False, "without a grid: --fp16 --backbone vanilla --progressive_level", saved=False),
        Flag("config", "text", None, "flag values from a YAML file; may be repeated, the later one wins", saved=False),
        Flag("file", "text", None, "flags from a text file, written as on the command line; # starts a comment", saved=False),
    ),
    "Run": (
        Flag("iters", "int", 10000, "length of the training", "steps", "> 0"),
        Flag("seed", "int", 0, "every random choice follows from it", range=">= 0"),
        Flag("device", "choice", "auto", "where to compute; auto takes the GPU if there is one", choices=("auto", "cpu", "cuda"), saved=False),
        Flag("ckpt", "text", "latest", "checkpoint to go on from: latest, scratch (start anew) or a file", saved=False),
        Flag("fp16", "flag", False, "mixed precision for the scene and half precision for the prior, on a GPU"),
        Flag("vram_O", "flag", False, "save GPU memory at the price of time: the denoiser sees one sample per call and its weights wait in main "
             "memory (CUDA), the autoencoder works picture by picture and recomputes its activations, weights are stored channels-last"),
        Flag("eval_interval", "int", 500, "validation pictures and the checkpoint for them; 0: only at the end", "steps", ">= 0"),
        Flag("test_interval", "int", 0, "turntable video during the training; 0: only at the end", "steps", ">= 0"),
        Flag("dataset_size_valid", "int", 8, "pictures of a validation", "views", "> 0"),
        Flag("dataset_size_test", "int", 100, "frames of the turntable", "views", "> 0"),
        Flag("save_guidance", "flag", False, "write what the prior sees and wants into guidance/"),
        Flag("save_guidance_interval", "int", 10, "how often, with --save_guidance", "steps", "> 0"),
    ),
    "Prior and distillation": (
        Flag("sd_version", "choice", "embedded", "the diffusion model: the one that comes with this program, or a Stable Diffusion to download",
             choices=("embedded", "1.5", "2.0", "2.1")),
        Flag("hf_key", "text", None, "a Stable Diffusion model by its hub id or folder; takes the place of --sd_version"),
        Flag("guidance_scale", "schedule", 100.0, "strength of classifier-free guidance", range=">= 0"),
        Flag("t_range", "schedules", (0.02, 0.98), "noise levels to draw from", "fraction of the model's steps", "[0, 1]"),
        Flag("lambda_guidance", "schedule", 1.0, "weight of the prior's gradient", range=">= 0"),
        Flag("grad_clip", "float", -1.0, "limit of every gradient element of the scene; negative: none"),
        Flag("grad_clip_rgb", "float", -1.0, "limit of the gradient at the rendered picture; negative: none"),
        Flag("latent_iter_ratio", "float", 0.2, "start: normals and opacity stand for the latents", "fraction of the run", "[0, 1]"),
        Flag("view_words", "choice", 4, "words that tell the prior the view: none, front/side/back/overhead, or eight around", choices=(0, 4, 8)),
        Flag("view_blend", "flag", True, "blend the words of neighbouring views instead of switching"),
        Flag("angle_overhead", "float", 30.0, "views with a smaller polar angle are from overhead", "degrees", "[0, 180]"),
        Flag("angle_front", "float", 60.0, "width of the front (and back) views when they are not blended", "degrees", "[0, 180]"),
    ),
    "Scene": (
        Flag("backbone", "choice", "grid", "the field: a hash grid, or a plain network on frequencies", choices=("grid", "vanilla")),
        Flag("bound", "float", 1.0, "the scene is the cube from -bound to bound", "world units", "> 0"),
        Flag("density_activation", "choice", "exp", "from network output to density", choices=("exp", "softplus")),
        Flag("density_thresh", "float", 10.0, "densities below are empty space for --cuda_ray", "1 / world unit", "> 0"),
        Flag("blob_density", "float", 5.0, "density of the blob that the scene starts from, before the activation"),
        Flag("blob_radius", "float", 0.2, "size of that blob", "world units", "> 0"),
        Flag("normals", "choice", "analytic", "from the exact gradient, or from differences of six points", choices=("analytic", "finite")),
        Flag("num_levels", "int", 16, "levels of the hash grid", range="> 0"),
        Flag("level_dim", "choice", 2, "features per level", choices=(1, 2, 4, 8)),
        Flag("log2_hashmap_size", "int", 19, "entries per level, as a power of two", range="[4, 24]"),
        Flag("base_resolution", "int", 16, "cells along an edge at the coarsest level", range="> 0"),
        Flag("desired_resolution", "int", 2048, "cells along an edge at the finest level", range="> 0"),
        Flag("hidden_dim", "int", 64, "width of the network behind the grid (vanilla: of the whole)", range="> 0"),
        Flag("progressive_level", "flag", False, "begin with the coarse levels and add finer ones"),
        Flag("background", "text", "mlp", "behind the scene in training: random (a plain colour each step), mlp (every other step what a small "
             "network paints), white, black, #rrggbb"),
        Flag("bg_radius", "float", 1.4, "not above 0: --background mlp has no network and means random", "world units"),
    ),
    "Rendering": (
        Flag("cuda_ray", "flag", False, "skip empty space with an occupancy grid (on whatever device; part of -O)"),
        Flag("w", "int", 64, "width of a training picture", "pixels", "> 0"),
        Flag("h", "int", 64, "height of a training picture", "pixels", "> 0"),
        Flag("W", "int", 800, "width of validation pictures and of the turntable", "pixels", "> 0"),
        Flag("H", "int", 800, "height of the same", "pixels", "> 0"),
        Flag("batch_size", "int", 1, "views per step", range="> 0"),
        Flag("max_steps", "int", 1024, "samples along a ray at most (--cuda_ray); sets the smallest step", range="> 0"),
        Flag("num_steps", "int", 64, "coarse samples along a ray (without --cuda_ray)", range="> 0"),
        Flag("upsample_steps", "int", 32, "samples added where the coarse ones found something", range=">= 0"),
        Flag("grid_size", "choice", 128, "cells along an edge of the occupancy grid", choices=(16, 32, 64, 128, 256)),
        Flag("update_extra_interval", "int", 16, "how often the occupancy grid is brought up to date", "steps", "> 0"),
        Flag("max_ray_batch", "int", 4096, "rays at a time when a picture is shown; less needs less memory", "rays", "> 0"),
        Flag("dt_gamma", "float", 0.0, "growth of the step with the distance; 0: equal steps", range="[0, 1]"),
        Flag("min_near", "float", 0.01, "nothing is seen nearer than this", "world units", "> 0"),
        Flag("ema_decay", "float", 0.995, "the average of the weights that is shown; 0: the weights themselves", "per step", "[0, 1)"),
    ),
    "Cameras (polar 0 is straight above, 90 the horizon; azimuth 0 the front, 90 the object's left)": (
        Flag("radius_range", "pair", (3.0, 3.5), "distance in training", "world units", "> 0"),
        Flag("theta_range", "pair", (45.0, 105.0), "polar angle in training", "degrees", "[0, 180]"),
        Flag("phi_range", "pair", (-180.0, 180.0), "azimuth in training", "degrees", "[-360, 360]"),
        Flag("fovy_range", "pair", (10.0, 30.0), "vertical field of view in training", "degrees", "(0, 180)"),
        Flag("default_radius", "float", 3.2, "distance when a result is shown", "world units", "> 0"),
        Flag("default_polar", "float", 90.0, "polar angle when a result is shown", "degrees", "[0, 180]"),
        Flag("default_azimuth", "float", 0.0, "azimuth where a turntable begins", "degrees", "[-360, 360]"),
        Flag("default_fovy", "float", 20.0, "field of view when a result is shown", "degrees", "(0, 180)"),
        Flag("uniform_sphere_rate", "float", 0.0, "share of views spread evenly over the upper half", "probability", "[0, 1]"),
        Flag("jitter_pose", "flag", False, "shake the cameras"),
        Flag("jitter_center", "float", 0.2, "shake of the position: full width", "world units", ">= 0"),
        Flag("jitter_target", "float", 0.2, "shake of the point looked at: standard deviation", "world units", ">= 0"),
        Flag("jitter_up", "float", 0.02, "shake of the upward direction: standard deviation", range=">= 0"),
        Flag("progressive_view", "flag", False, "begin near the default view and widen the ranges"),
        Flag("progressive_view_init_ratio", "float", 0.2, "share of the ranges to begin with", range="[0, 1]"),
    ),
    "Shading": (
        Flag("albedo_iter_ratio", "float", 0.0, "until then no shading, only colour", "fraction of the run", "[0, 1]"),
        Flag("min_ambient_ratio", "float", 0.1, "ambient light is drawn from here to 1", range="[0, 1]"),
        Flag("textureless_ratio", "float", 0.2, "share of the shaded steps without colour", "probability", "[0, 1]"),
    ),
    "Regularisers (weights)": (
        Flag("lambda_entropy", "schedule", 1e-3, "samples are either full or empty", range=">= 0"),
        Flag("lambda_opacity", "schedule", 0.0, "little of the picture is covered", range=">= 0"),
        Flag("lambda_orient", "schedule", 1e-2, "visible surfaces do not face away", range=">= 0"),
        Flag("lambda_tv", "schedule", 0.0, "neighbouring grid entries agree", range=">= 0"),
        Flag("lambda_wd", "schedule", 0.0, "grid entries stay small", range=">= 0"),
        Flag("lambda_2d_normal_smooth", "schedule", 0.0, "the picture of the normals is smooth", range=">= 0"),
        Flag("lambda_3d_normal_smooth", "schedule", 0.0, "normals of neighbouring points agree", range=">= 0"),
        Flag("lambda_center", "schedule", 0.0, "the centre of mass stays at the origin", range=">= 0"),
    ),
    "Optimiser": (
        Flag("optim", "choice", "adan", "the optimiser; Adan takes five times the learning rate", choices=("adan", "adam")),
        Flag("lr", "schedule", 1e-3, "learning rate; the grid takes ten times as much", range=">= 0"),
    ),
    "Mesh": (
        Flag("mcubes_resolution", "int", 256, "cells along an edge for marching cubes", range="[8, 1024]"),
        Flag("mesh_threshold", "text", "auto", "density of the surface: auto, or a number", "1 / world unit"),
        Flag("decimate_target", "int", 50000, "faces at most; 0 or less: all of them", "faces"),
    ),
}
# fmt: on

FLAGS: dict[str, Flag] = {flag.name: flag for group in GROUPS.values() for flag in group}

PRESETS: dict[str, dict[str, Any]] = {
    "O": {"fp16": True, "cuda_ray": True},
    "O2": {"fp16": True, "backbone": "vanilla", "progressive_level": True},
}


def convert(flag: Flag, value: Any, label: str) -> Any:
    """The value of a flag from what was typed, found in YAML, or is its default; in range, or UserError."""
    if value is None:
        if flag.default is None:
            return None
        raise UserError(f"{label}: has no value")
    try:
        return _CONVERTERS[flag.kind](flag, value)
    except ValueError as error:
        raise UserError(f"{label} {show(value)}: {error}") from None


def _to_flag(flag: Flag, value) -> bool:
    if not isinstance(value, bool):
        raise ValueError("is a switch: true or false")
    return value


def _to_float(flag: Flag, value) -> float:
    return _in_range(flag, Schedule(value)) if isinstance(value, (int, float, str)) else _refuse("must be a number")


def _to_int(flag: Flag, value) -> int:
    number = _to_float(flag, value)
    return int(number) if number == int(number) else _refuse("must be a whole number")


def _to_text(flag: Flag, value) -> str:
    return (
        str(value) if isinstance(value, (str, int, float)) and not isinstance(value, bool) else _refuse("must be text")
    )


def _to_choice(flag: Flag, value):
    named = {str(choice): choice for choice in flag.choices}
    if str(value) in named:
        return named[str(value)]
    close = get_close_matches(str(value), named, n=1)
    return _refuse(f"did you mean {close[0]}?" if close else "must be one of " + ", ".join(named))


def _to_pair(flag: Flag, value) -> tuple[float, float]:
    low, high = (_to_float(flag, end) for end in _two(value))
    return (low, high) if low <= high else _refuse("the first number must not be above the second")


def _to_schedule(flag: Flag, value) -> Schedule:
    schedule = Schedule.parse(value) if isinstance(value, str) else Schedule(value)
    _in_range(flag, schedule)
    return schedule


def _to_schedules(flag: Flag, value) -> tuple[Schedule, Schedule]:
    low, high = (_to_schedule(flag, end) for end in _two(value))
    return low, high


_CONVERTERS = {
    "flag": _to_flag,
    "int": _to_int,
    "float": _to_float,
    "text": _to_text,
    "choice": _to_choice,
    "pair": _to_pair,
    "schedule": _to_schedule,
    "schedules": _to_schedules,
}


def _two(value) -> Sequence:
    return value if isinstance(value, (list, tuple)) and len(value) == 2 else _refuse("takes two values")


def _refuse(reason: str):
    raise ValueError(reason)


def _in_range(flag: Flag, schedule: Schedule) -> float:
    """Check every value a schedule takes against the range of the flag; returns the first."""
    low, high, text = schedule.min(), schedule.max(), flag.range
    if text.startswith(">"):
        limit = float(text.lstrip("> ="))
        good = low >= limit if "=" in text else low > limit
    elif text:
        bottom, top = (float(part) for part in text[1:-1].split(","))
        good = (low >= bottom if text[0] == "[" else low > bottom) and (high <= top if text[-1] == "]" else high < top)
    else:
        good = True
    if not good:
        raise ValueError(f"must be {text if text.startswith('>') else 'in ' + text}")
    return schedule(0)


def show(value: Any) -> str:
    """A value as a user would type it."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, (list, tuple)):
        return " ".join(show(item) for item in value)
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"
