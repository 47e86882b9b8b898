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
        Flag("text", "text", None, 'the prompt: --text "a hamburger"; or lib:word_word, the one prompt of the library with these words'),
        Flag("prompt_library", "text", "data/prompts.json", "the library for it, a JSON file", saved=False),
        Flag("negative", "text", "", "what the picture must not show; takes the place of the empty prompt"),
        Flag("blend", "text", None, 'another prompt, mixed into the prompt by so much: "a green sks teddy:0.3" (docs/dreambooth.md)'),
        Flag("workspace", "text", "workspace", "the folder that receives everything", saved=False),
        Flag("save_mesh", "flag", False, "export the mesh at the end: mesh/mesh.obj, mesh/mesh.glb (--mesh_format)", saved=False),
        Flag("test", "flag", False, "no training: restore the workspace, render the turntable (--save_mesh: the mesh)", saved=False),
        Flag("six_views", "flag", False, "no training: restore the workspace, write six pictures of it", saved=False),
    ),
    "Photographs (docs/photos.md)": (
        Flag("image", "text", None, "a picture of the object, seen from the default view; its alpha is the mask, else one is made"),
        Flag("image_config", "text", None, "several pictures: a CSV file with the columns image, polar, azimuth, radius, and others"),
        Flag("photos", "text", None, "a folder of photographs with known cameras: NeRF's transforms.json, or a CO3D sequence"),
        Flag("photo_views", "text", "all", "which of --photos: all, a number of them spread evenly, or their places, 0,7,12"),
        Flag("photo_align", "choice", "auto", "--photos: find the object's place and size, or keep those of the file", choices=("auto", "file")),
        Flag("known_view_interval", "int", 4, "every so many steps show a known view, in which nobody but the photograph judges; 0: never",
             "steps", ">= 0"),
        Flag("known_view_sum", "flag", False, "such steps ask the prior about another view as well"),
        Flag("known_view_scale", "float", 1.5, "known views are so many times as large as other training pictures", range="> 0"),
        Flag("known_view_noise_scale", "float", 2e-3, "shake of the cameras of known views", "radians and world units", ">= 0"),
        Flag("lambda_rgb", "schedule", 1000.0, "known views: the colours agree", range=">= 0"),
        Flag("lambda_mask", "schedule", 500.0, "known views: the outlines agree", range=">= 0"),
        Flag("lambda_depth", "schedule", 10.0, "known views: the depths agree up to scale and shift, where x_depth.png lies beside x_rgba.png",
             range=">= 0"),
        Flag("lambda_depth_rank", "schedule", 0.0, "known views: what is nearer there is nearer", range=">= 0"),
        Flag("lambda_normal", "schedule", 0.0, "known views: the normals agree, where x_normal.png lies beside x_rgba.png", range=">= 0"),
        Flag("lambda_zero123", "schedule", 0.0, "weight of the novel-view prior's opinion of other views", range=">= 0"),
        Flag("zero123", "text", None, "that prior by its hub id or folder (scripts/convert_zero123.py); else the small one of this program"),
        Flag("zero123_scale", "float", None, "strength of its classifier-free guidance; default 5, with the small one 3", range=">= 0"),
        Flag("zero123_grad_scale", "choice", "angle", "how much views count: as they turn away from the pictures, or all alike",
             choices=("angle", "none")),
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
        Flag("retry", "int", 1, "how often a scene that stays empty begins again from other random weights; then the run ends with status 1",
             "times", ">= 0"),
        Flag("eval_interval", "int", 500, "validation pictures and the checkpoint for them; 0: only at the end", "steps", ">= 0"),
        Flag("test_interval", "int", 0, "turntable video during the training; 0: only at the end", "steps", ">= 0"),
        Flag("dataset_size_valid", "int", 8, "pictures of a validation", "views", "> 0"),
        Flag("dataset_size_test", "int", 100, "frames of the turntable", "views", "> 0"),
        Flag("save_guidance", "flag", False, "write what the prior sees and wants into guidance/"),
        Flag("save_guidance_interval", "int", 10, "how often, with --save_guidance", "steps", "> 0"),
    ),
    "Looking while it trains": (
        Flag("gui", "flag", False, "a window to look at the scene and steer its training; with --test to look at a finished one", saved=False),
        Flag("viewer", "flag", False, "the same in a browser, also from another machine through ssh -L", saved=False),
        Flag("viewer_host", "text", "127.0.0.1", "--viewer: the address to listen on; 0.0.0.0 lets everybody in",
             saved=False),
        Flag("viewer_port", "int", 8080, "--viewer: the port; the next free one if it is taken",
             range="[1, 65535]", saved=False),
    ),
    "Prior": (
        Flag("sd_version", "choice", "embedded", "the diffusion model: the one that comes with this program, or a Stable Diffusion to download",
             choices=("embedded", "1.5", "2.0", "2.1", "xl", "3", "3.5")),
        Flag("IF", "flag", False, "a model of pixels: the small one that comes with this program, or a DeepFloyd IF named with --hf_key"),
        Flag("hf_key", "text", None, "a diffusers model by its hub id or folder (Stable Diffusion 1 to 3.5, DeepFloyd IF, InstructPix2Pix); "
             "takes the place of --sd_version"),
        Flag("lora", "text", None, "adapters (LoRA) to put on it: PATH[:weight], several separated by commas; diffusers' or peft's files"),
        Flag("control", "choice", "none", "a ControlNet that sees the scene's own normals, depth or edges",
             choices=("none", "normal", "depth", "canny")),
        Flag("control_key", "text", None, "the ControlNet by its hub id or folder, instead of the usual one for Stable Diffusion 1.5"),
        Flag("control_scale", "schedule", 1.0, "strength of the ControlNet", range=">= 0"),
        Flag("edit_scale", "schedule", 1.5, "InstructPix2Pix: how strongly the picture to edit is kept", range=">= 0"),
        Flag("lambda_clip", "schedule", 0.0, "weight of CLIP's opinion beside the diffusion model's: of the prompt, and with "
             "photographs of how much a view resembles the nearest (published: 10)", range=">= 0"),
        Flag("clip_model", "text", None, "the CLIP for it by its hub id or folder; else the small one that comes with this program, with a big "
             "prior openai/clip-vit-large-patch14"),
        Flag("guidance_scale", "schedule", 100.0, "strength of classifier-free guidance", range=">= 0"),
        Flag("t_range", "schedules", (0.02, 0.98), "noise levels to draw from", "fraction of the model's steps", "[0, 1]"),
        Flag("latent_iter_ratio", "float", 0.2, "start: normals and opacity stand for the latents", "fraction of the run", "[0, 1]"),
    ),
    "Prompt": (
        Flag("view_words", "choice", 4, "words that tell the prior the view: none, front/side/back/overhead, or eight around", choices=(0, 4, 8)),
        Flag("view_blend", "flag", True, "blend the words of neighbouring views instead of switching"),
        Flag("angle_overhead", "float", 30.0, "views with a smaller polar angle are from overhead", "degrees", "[0, 180]"),
        Flag("angle_front", "float", 60.0, "width of the front (and back) views when they are not blended", "degrees", "[0, 180]"),
        Flag("perpneg", "flag", False, "Perp-Neg: push away from the words of the other views (four predictions a view instead of two)"),
        Flag("negative_w", "float", -2.0, "Perp-Neg: weight of the other views' words; further below zero if the front shows everywhere",
             range="[-100, 0]"),
        Flag("front_decay_factor", "float", 2.0, "Perp-Neg: how fast the front's weight falls as the view turns to it", range=">= 0"),
        Flag("side_decay_factor", "float", 10.0, "Perp-Neg: the same for the side", range=">= 0"),
        Flag("debias_prompt", "flag", False, "leave out, view by view, words of the prompt that contradict the view"),
        Flag("debias_model", "text", "bert-base-uncased", "the masked language model that judges it, by its hub id or folder"),
    ),
    "Distillation": (
        Flag("distill", "choice", "sds", "the score-distillation method; see docs/distillation.md",
             choices=("sds", "sjc", "csd", "nfsd", "bridge", "vsd", "ism", "sdi", "hifa", "cds", "asd")),
        Flag("t_schedule", "choice", "auto", "how noise levels follow each other inside --t_range: drawn at random, or falling with the run "
             "(linearly; as HiFA; as DreamTime)", choices=("auto", "random", "linear", "sqrt", "dreamtime")),
        Flag("weighting", "choice", "auto", "w(t): the method's own; 1 - abar; 1; sqrt(abar) (1 - abar); sqrt((1 - abar) / abar); 1 / sqrt(abar)",
             choices=("auto", "sds", "uniform", "fantasia3d", "ism", "flow")),
        Flag("lambda_guidance", "schedule", 1.0, "weight of the prior's gradient", range=">= 0"),
        Flag("lambda_image", "schedule", 0.0, "HiFA: weight of the same opinion in terms of the picture (needs the decoder)", range=">= 0"),
        Flag("clip_latent", "schedule", 0.0, "limit of every element of the prior's gradient; 0: none", range=">= 0"),
        Flag("clip_pixel", "schedule", 0.0, "limit of its length at every pixel; 0: none", range=">= 0"),
        Flag("clip_norm", "schedule", 0.0, "limit of its length over a whole picture; 0: none", range=">= 0"),
        Flag("grad_clip", "float", -1.0, "limit of every gradient element of the scene; negative: none"),
        Flag("grad_clip_rgb", "float", -1.0, "limit of the gradient at the rendered picture; negative: none"),
        Flag("source", "text", "{text}, oversaturated, smooth, pixelated, cartoon, foggy, hazy, blurry, bad structure, noisy, malformed",
             "bridge: what the pictures look like now; {text} stands for the prompt"),
        Flag("bridge_from", "float", 0.8, "bridge: SDS until then", "fraction of the run", "[0, 1]"),
        Flag("inversion_steps", "int", 5, "ism, sdi: steps from the picture to its noise at most", "steps", "> 0"),
        Flag("inversion_scale", "float", 0.0, "ism, sdi: classifier-free guidance on the way to the noise (0: the negative prompt alone)",
             range="[-100, 100]"),
        Flag("inversion_eta", "float", 0.0, "ism, sdi: fresh noise on the way", range="[0, 1]"),
        Flag("interval", "float", 0.05, "ism, cds, asd: how far apart the two noise levels are", "fraction of the model's steps", "(0, 1]"),
        Flag("lora_rank", "int", 4, "vsd: rank of the adaptation that learns what the scene looks like now", range="> 0"),
        Flag("lora_lr", "float", 1e-4, "vsd: its learning rate", range="> 0"),
        Flag("lora_scale", "float", 1.0, "vsd: classifier-free guidance of the adaptation; below 1 more variety (ESD)", range="[0, 10]"),
        Flag("particles", "int", 1, "vsd: how many scenes are made at once, sharing one adaptation", range="> 0"),
    ),
    "Memory and speed of the prior": (
        Flag("vram_O", "flag", False, "save GPU memory at the price of time: the denoiser sees one sample per call and its weights wait in main "
             "memory (CUDA), the autoencoder works picture by picture and recomputes its activations, weights are stored channels-last"),
        Flag("precision", "choice", "auto", "of the prior's weights; auto: half on a GPU unless --no_fp16 is typed, single on a CPU",
             choices=("auto", "fp32", "fp16", "bf16")),
        Flag("offload", "choice", "none", "where the prior's weights wait: on the GPU, in main memory network by network, or layer by layer (slow)",
             choices=("none", "model", "sequential")),
        Flag("attention_slicing", "flag", False, "attention head by head"),
        Flag("vae_slicing", "flag", False, "one picture at a time through the autoencoder"),
        Flag("vae_tiling", "flag", False, "large pictures through the autoencoder in tiles (seams are blended)"),
        Flag("channels_last", "flag", False, "weights of convolutions channels-last"),
        Flag("tomesd", "float", 0.0, "share of the denoiser's tokens that are merged (package tomesd); 0: none", range="[0, 0.75]"),
        Flag("xformers", "flag", False, "attention of the package xformers"),
        Flag("taesd", "flag", False, "the tiny autoencoder in place of the model's own: faster, a little blurred"),
        Flag("taesd_key", "text", None, "that autoencoder by its hub id or folder, instead of the one published for the model"),
        Flag("compile", "flag", False, "compile the frozen networks (minutes at the start)"),
    ),
    "Scene": (
        Flag("backbone", "choice", "grid", "the field: a hash grid, a plain network on frequencies, dense voxels, or a hash grid of signed distances",
             choices=("grid", "vanilla", "voxel", "sdf")),
        Flag("latent", "flag", False, "the scene consists of the prior's latents; a second stage (--init_with) turns them into colors"),
        Flag("voxel_size", "int", 100, "--backbone voxel: nodes along an edge", range="[4, 512]"),
        Flag("sdf_beta", "float", 0.05, "--backbone sdf: softness of the surface at the start", "world units", "> 0.001"),
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
        Flag("mlp_layers", "int", 3, "linear layers of the network behind the grid", range=">= 2"),
        Flag("progressive_level", "flag", False, "begin with the coarse levels and add finer ones"),
        Flag("max_level", "schedule", 1.0, "share of the hash grid's levels in use", range="(0, 1]"),
        Flag("background", "text", "mlp", "behind the scene in training: random (a plain colour each step), mlp (every other step what a small "
             "network paints), white, black, #rrggbb"),
        Flag("background_ratio", "float", 0.5, "--background mlp: share of the steps with the network", "probability", "[0, 1]"),
        Flag("bg_radius", "float", 1.4, "not above 0: --background mlp has no network and means random", "world units"),
    ),
    "Rendering": (
        Flag("cuda_ray", "flag", False, "skip empty space with an occupancy grid (on whatever device; part of -O)"),
        Flag("w", "int", 64, "width of a training picture", "pixels", "> 0"),
        Flag("h", "int", 64, "height of a training picture", "pixels", "> 0"),
        Flag("W", "int", 800, "width of validation pictures and of the turntable", "pixels", "> 0"),
        Flag("H", "int", 800, "height of the same", "pixels", "> 0"),
        Flag("size_scale", "schedule", 1.0, "training pictures are so many times --w and --h; a step in it is a milestone", range="> 0"),
        Flag("batch_size", "int", 1, "views per step", range="> 0"),
        Flag("accumulate", "int", 1, "so many batches are added up before the scene moves: a larger batch in less memory", range="> 0"),
        Flag("view_group", "int", 1, "so many consecutive views of a batch have one height and stand evenly around", "views", "> 0"),
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
        Flag("albedo_ratio", "float", 0.0, "share of the steps after that without light", "probability", "[0, 1]"),
        Flag("textureless_ratio", "float", 0.2, "share of the shaded steps without colour", "probability", "[0, 1]"),
        Flag("train_shading", "choice", "auto", "what the prior sees: pictures as they are lit, or the normals alone", choices=("auto", "normal")),
    ),
    "Regularisers (weights)": (
        Flag("lambda_entropy", "schedule", 1e-3, "samples are either full or empty", range=">= 0"),
        Flag("lambda_opacity", "schedule", 0.0, "little of the picture is covered", range=">= 0"),
        Flag("lambda_sparsity", "schedule", 0.0, "the same, with a gradient where nothing is (threestudio)", range=">= 0"),
        Flag("lambda_opaque", "schedule", 0.0, "pixels are either covered or not", range=">= 0"),
        Flag("lambda_emptiness", "schedule", 0.0, "most samples are empty (Score Jacobian Chaining)", range=">= 0"),
        Flag("lambda_convex", "schedule", 0.0, "the picture of the normals bulges (SDI)", range=">= 0"),
        Flag("lambda_eikonal", "schedule", 0.0, "--backbone sdf: it is a distance", range=">= 0"),
        Flag("lambda_shape", "schedule", 0.0, "the scene is full inside --guide_shape and empty outside", range=">= 0"),
        Flag("guide_shape", "text", None, "a mesh file that tells the rough shape (Sketch-Shape)"),
        Flag("lambda_orient", "schedule", 1e-2, "visible surfaces do not face away", range=">= 0"),
        Flag("lambda_tv", "schedule", 0.0, "neighbouring grid entries agree", range=">= 0"),
        Flag("lambda_wd", "schedule", 0.0, "grid entries stay small", range=">= 0"),
        Flag("lambda_2d_normal_smooth", "schedule", 0.0, "the picture of the normals is smooth", range=">= 0"),
        Flag("lambda_3d_normal_smooth", "schedule", 0.0, "normals of neighbouring points agree", range=">= 0"),
        Flag("lambda_zvar", "schedule", 0.0, "along a ray the surface is thin (HiFA's z-variance)", range=">= 0"),
        Flag("lambda_mesh_normal", "schedule", 0.5, "neighbouring triangles face the same way (--dmtet)", range=">= 0"),
        Flag("lambda_mesh_laplacian", "schedule", 3.0, "vertices lie in the middle of their neighbours (--dmtet)", range=">= 0"),
        Flag("lambda_center", "schedule", 0.0, "the centre of mass stays at the origin", range=">= 0"),
    ),
    "Optimiser": (
        Flag("optim", "choice", "adan", "the optimiser; Adan takes five times the learning rate", choices=("adan", "adam", "adamw", "adamax")),
        Flag("lr", "schedule", 1e-3, "learning rate", range=">= 0"),
        Flag("lr_scale", "text", "encoder=10", "factors on it for parts of the scene (encoder, trunk, background, material): encoder=10,trunk=1"),
    ),
    "Surface (a mesh that trains)": (
        Flag("dmtet", "flag", False, "train a surface instead of a field, usually a finished one's: --init_with"),
        Flag("init_with", "text", None, "start from another run (its folder, or a checkpoint) or from a mesh file (.obj .ply .glb .gltf .stl .off), "
             "which means --dmtet"),
        Flag("lock_geo", "flag", False, "the surface stays as it is: only what it looks like is trained"),
        Flag("shape_init", "text", "sphere 0.5", "without --init_with: sphere R, ellipsoid X Y Z, box X Y Z, cylinder R H, capsule R H, torus R r",
             "world units"),
        Flag("tet_grid_size", "int", 128, "cells along an edge of the grid of tetrahedra", range="[8, 256]"),
        Flag("dmtet_reso_scale", "float", 8.0, "training pictures of a surface are so many times larger than --w and --h", range="> 0"),
        Flag("lr_geometry", "float", 0.02, "learning rate of the surface's position; follows the course of --lr", "grid cells per step", ">= 0"),
        Flag("material", "choice", "plain", "colours alone, or a physically based material under --environment", choices=("plain", "pbr")),
        Flag("environment", "text", "studio", "light for --material pbr: studio, sky, white, or a picture of all directions (.hdr .exr .png)"),
        Flag("environment_scale", "float", 1.0, "its brightness", range="> 0"),
        Flag("environment_rotation", "float", 0.0, "turns it from the front towards the object's left", "degrees", "[-360, 360]"),
        Flag("rasterizer", "choice", "own", "what draws triangles", choices=("own", "nvdiffrast")),
    ),
    "Mesh files": (
        Flag("mesh_format", "text", "obj,glb", "formats, separated by commas: obj, glb, ply, usdz, stl", saved=False),
        Flag("texture_size", "int", 1024, "edge of the texture; 0: colours at the vertices instead", "pixels", "[0, 16384]", saved=False),
        Flag("unwrap_seconds", "int", 60, "time limit for finding texture coordinates; then simple ones are used", "seconds", ">= 0", saved=False),
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
