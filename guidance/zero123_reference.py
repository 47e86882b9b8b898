"""Reading Zero-1-to-3 and Stable-Zero123, and what their denoiser sees of a known picture (Liu et al. 2023, section 3.2).

A model is a folder in diffusers' layout: `unet` (twice the latents' channels), `vae`, `scheduler`, `image_encoder` (a
CLIPVisionModelWithProjection) and `cc_projection` (or `clip_camera_projection`): a linear layer, of the image embedding and four numbers
of the pose to a token of the cross-attention; in tiny-zero123 several layers, with SiLU between, to several tokens.
scripts/convert_zero123.py makes such a folder of the original checkpoints.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from errors import UserError
from files import make_folder
from guidance.parts import part_source, read_part
from guidance.prior import noise_levels, resize
from guidance.weights import EMBEDDED_ZERO123, Source, ask_hub, quiet, read_json

PROJECTIONS = ("cc_projection", "clip_camera_projection")
POSES = ("radius", "polar")  # what the fourth number of the pose is: see `zero123.relative_pose`
_WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin", "pytorch_model.bin")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # OpenAI's


@dataclass(frozen=True)
class Parts:
    """What a folder holds: all networks frozen, on the device they are needed on."""

    unet: nn.Module
    vae: nn.Module
    levels: tuple[Tensor, Tensor, str]  # signal, sigma, prediction type: see `prior.noise_levels`
    tower: nn.Module
    projection: nn.Sequential  # [B, E + 4] -> [B, n, D]; float32
    pose: str  # one of POSES
    any_background: (
        bool  # trained on plain backgrounds of any color, the same one in both pictures; else on white alone
    )
    mean: Float[Tensor, "3 1 1"]
    std: Float[Tensor, "3 1 1"]


def view_source(key: str | None) -> Source:
    """Where the model that `--zero123` names lies: a folder or a hub id, the embedded one if it is empty or "embedded".

    Touches no network. Raises UserError if it is neither.
    """
    named = key not in (None, "", "embedded")
    if not named and not EMBEDDED_ZERO123.is_dir():
        raise UserError(
            f"--zero123 embedded: the folder {EMBEDDED_ZERO123} is missing; restore it (git checkout toybox/models), "
            "or name another model with --zero123"
        )
    return part_source(key if named else None, EMBEDDED_ZERO123, f"--zero123 {key}" if named else "--zero123 embedded")


def is_embedded(source: Source) -> bool:
    """Whether it is tiny-zero123, which knows nothing but the toybox."""
    return source.local and Path(source.path_or_id).resolve() == EMBEDDED_ZERO123


def fetch_view_model(source: Source) -> Path:
    """The folder that holds the model; a hub id's files come from the cache, else are downloaded. UserError if they cannot be had."""
    if source.local:
        return Path(source.path_or_id)

    def download(cached: bool):
        from huggingface_hub import snapshot_download

        folders = ("unet", "vae", "scheduler", "image_encoder", "feature_extractor", *PROJECTIONS)
        wanted = ["model_index.json", *(f"{folder}/*" for folder in folders)]
        return snapshot_download(source.path_or_id, allow_patterns=wanted, local_files_only=cached)

    reason = ""
    for cached in (True, False):
        folder, reason = ask_hub(lambda: download(cached))  # noqa: B023 (called at once)
        if folder and not _missing(folder):
            return folder
    raise UserError(
        f"{source.flag}: {reason or 'not a whole Zero-1-to-3 model'}; check the id, connect once to download it, or name a local "
        "folder (scripts/convert_zero123.py makes one of a .ckpt)"
    )


def read_view_model(source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Parts:
    """Reads what `view_source` found; the networks' weights in `dtype`. Raises UserError if it cannot be had, read or used."""
    from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionModelWithProjection

    folder = fetch_view_model(source)
    place = f"{source.flag}: {folder}"
    if folder.is_dir() and (missing := _missing(folder)):
        raise UserError(
            f"{place} is not a whole Zero-1-to-3 model; missing: {', '.join(missing)} (scripts/convert_zero123.py makes one of a .ckpt)"
        )

    def read(kind, part: str):
        return read_part(kind, Source(str(folder / part), True, part, source.flag), dtype).requires_grad_(False).eval()

    vae_kind = read_json(folder / "vae" / "config.json").get("_class_name")
    unet = read(UNet2DConditionModel, "unet")
    vae = read(AutoencoderTiny if vae_kind == "AutoencoderTiny" else AutoencoderKL, "vae")
    tower = read(CLIPVisionModelWithProjection, "image_encoder").to(device)
    try:
        with quiet():
            scheduler = DDIMScheduler.from_pretrained(str(folder / "scheduler"), local_files_only=True)
    except Exception as error:  # broken files fail in many ways
        raise UserError(f"{place}: its scheduler cannot be read ({_first_line(error)})") from error
    channels, latents = unet.config.in_channels, vae.config.latent_channels
    if channels != 2 * latents:
        raise UserError(
            f"{place}: not a Zero-1-to-3 model: its denoiser takes {channels} channels, not twice the {latents} of its autoencoder"
        )
    wanted = tower.config.projection_dim + 4, unet.config.cross_attention_dim
    projection, pose, any_background = _read_projection(folder, place, source.name, wanted)
    mean, std = _normalisation(folder)
    levels, looks = noise_levels(scheduler, place), (mean.to(device), std.to(device))
    return Parts(unet, vae, levels, tower, projection.to(device), pose, any_background, *looks)


@torch.no_grad()
def embed_picture(parts: Parts, picture: Float[Tensor, "N 3 h w"], image_size: int) -> Float[Tensor, "N E"]:
    """The image embeddings of pictures in [0, 1] (on white), not normalised, as the model was trained with them.

    The picture at the model's own size is brought to the tower's without averaging, corners on corners: what the original code does.
    """
    size = parts.tower.config.image_size
    picture = resize(picture.float(), image_size)
    if picture.shape[-1] != size:
        picture = F.interpolate(picture, (size, size), mode="bicubic", align_corners=True)
    with torch.autocast(picture.device.type, enabled=False):
        return parts.tower(((picture - parts.mean) / parts.std).to(parts.tower.dtype)).image_embeds.float()


def write_view_model(
    folder: Path,
    unet: nn.Module,
    vae: nn.Module,
    scheduler,
    tower: nn.Module,
    projection: nn.Module,
    pose: str = "radius",
    mean: Sequence[float] = _MEAN,
    std: Sequence[float] = _STD,
    any_background: bool = False,
) -> None:
    """Writes the folder that `read_view_model` reads, in the precision that the networks have. model_index.json comes last."""
    from diffusers import __version__
    from safetensors.torch import save_file

    home = make_folder(folder / "cc_projection")
    with quiet():
        for name, part in (("unet", unet), ("vae", vae), ("scheduler", scheduler), ("image_encoder", tower)):
            part.save_pretrained(folder / name)
    weights = {f"projection.{name}": value.contiguous() for name, value in projection.state_dict().items()}
    save_file(weights, home / "diffusion_pytorch_model.safetensors")
    layers = [layer for layer in projection.modules() if isinstance(layer, nn.Linear)]
    shape = {"in_channel": layers[0].in_features, "out_channel": layers[-1].out_features}
    size = tower.config.image_size
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "image_mean": list(mean),
        "image_std": list(std),
        "size": {"height": size, "width": size},
        "crop_size": {"height": size, "width": size},
    }
    index = {
        "_class_name": "Zero1to3StableDiffusionPipeline",
        "_diffusers_version": __version__,
        "cc_projection": ["pipeline_zero1to3", "CCProjection"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
        "scheduler": ["diffusers", "DDIMScheduler"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", type(vae).__name__],
    }
    files = {
        home / "config.json": {"_class_name": "CCProjection", **shape, "pose": pose, "any_background": any_background},
        make_folder(folder / "feature_extractor") / "preprocessor_config.json": processor,
        folder / "model_index.json": index,
    }
    for path, content in files.items():
        path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _missing(folder: Path) -> list[str]:
    wanted = [f"{part}/config.json" for part in ("unet", "vae", "image_encoder")] + ["scheduler/scheduler_config.json"]
    lacking = [name for name in wanted if not (folder / name).is_file()]
    return lacking if _projection_file(folder) else [*lacking, "cc_projection's weights"]


def _projection_file(folder: Path) -> Path | None:
    places = [folder / part / name for part in PROJECTIONS for name in _WEIGHTS]
    return next((place for place in places if place.is_file()), None)


def _read_projection(folder: Path, place: str, name: str, wanted: tuple[int, int]) -> tuple[nn.Sequential, str, bool]:
    """The layers, SiLU between them; what the fourth number of the pose is, as its config.json says (`pose`), else by the model's name;
    `any_background`. wanted: numbers in, and of one token."""
    file = _projection_file(folder)
    config = read_json(file.parent / "config.json") if (file.parent / "config.json").is_file() else {}
    pose = config.get("pose") or ("polar" if "stable" in name.lower() else "radius")
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            weights = load_file(file)
        else:
            weights = torch.load(file, map_location="cpu", weights_only=True)
        layers: list[nn.Module] = []
        for key in sorted(key for key in weights if key.endswith("weight")):
            weight, bias = weights[key].float(), weights[key.removesuffix("weight") + "bias"].float()
            layers += [nn.SiLU()] * bool(layers) + [nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])]
            layers[-1].load_state_dict({"weight": weight, "bias": bias})
        wide = layers[0].in_features, layers[-1].out_features
        projection = nn.Sequential(*layers).requires_grad_(False)
    except Exception as error:
        raise UserError(f"{place}: {file.parent.name} is not made of linear layers ({_first_line(error)})") from error
    if pose not in POSES:
        raise UserError(f"{place}: its {file.parent.name}/config.json says pose {pose!r}; known are {', '.join(POSES)}")
    if wide[0] != wanted[0] or wide[1] % wanted[1]:
        raise UserError(
            f"{place}: its {file.parent.name} makes {wide[1]} numbers of {wide[0]}, but its image encoder and its denoiser need "
            f"{wanted[1]} of {wanted[0]}"
        )
    projection.append(nn.Unflatten(-1, (-1, wanted[1])))
    return projection, pose, bool(config.get("any_background"))


def _normalisation(folder: Path) -> tuple[Float[Tensor, "3 1 1"], Float[Tensor, "3 1 1"]]:
    """(mean, standard deviation) of the colors that the image encoder was trained with."""
    names = [folder / part / "preprocessor_config.json" for part in ("feature_extractor", "image_encoder")]
    config = next((read_json(name) for name in names if name.is_file()), {})
    mean, std = config.get("image_mean", _MEAN), config.get("image_std", _STD)
    return torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
