"""A multi-view prior (MVDream, Shi et al. 2024): the views of a group are denoised together, each told its camera, and so agree.

A UNet2DConditionModel whose self-attention runs over all pixels of all views of a group, and whose class embedding
(`class_embed_type="projection"`) takes the 16 numbers of the camera. Two folders can be read:

- a StableDiffusionPipeline with such a denoiser (its config may name the views of a group: `view_group`);
- MVDream itself as published in diffusers' layout (ashawkey/mvdream-sd2.1-diffusers, downloaded to a folder), whose denoiser lies there
  under the names of the original code: they are translated. Its single-file form (sd-v2.1-base-4view.pt) and ImageDream are not read.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from errors import UserError
from guidance.prior import Hints, noise_levels
from guidance.stable_diffusion import StableDiffusion, check_channels
from guidance.weights import Source, fetch, load_pipeline, read_json

CAMERA_NUMBERS = 16
DEFAULT_VIEWS = 4
# Rows: MVDream's x, y, z in ours. Its z is up and its x is the object's front; ours are y and z; the object's left is its y and our x.
_AXES = ((0.0, 0.0, 1.0), (1.0, 0.0, 0.0), (0.0, 1.0, 0.0))


class MultiView(StableDiffusion):
    """A frozen multi-view diffusion model. Every `view_group` consecutive samples are views of one scene; needs the hint `c2w`."""

    wants = ("c2w",)

    @classmethod
    def load(
        cls,
        source: Source,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
        views: int | None = None,
    ) -> "MultiView":
        """Reads a model of one of the two forms above. views: of a group; default: as the model's config says, else 4.

        Raises UserError if it cannot be read or is not told cameras.
        """
        left_out = ["text_encoder", "tokenizer"]
        folder = fetch(source, dtype != torch.float32) / "unet"
        mvdream = _is_mvdream(read_json(folder / "config.json"))
        if mvdream:  # a class that diffusers does not have
            left_out.append("unet")
        pipe, place = load_pipeline("StableDiffusionPipeline", source, dtype, **dict.fromkeys(left_out))
        unet = read_mvdream(folder, dtype, source.flag) if mvdream else pipe.unet
        place, config = f"{source.flag}: {place}", unet.config
        check_channels(unet, pipe.vae, place)
        if not _takes_cameras(config):
            raise UserError(
                f"{place}: not a multi-view model: its denoiser is not told the {CAMERA_NUMBERS} numbers of a camera"
            )
        prior = cls(unet, pipe.vae, *noise_levels(pipe.scheduler, place), device, source.name)
        prior.view_group = views or config.get("view_group") or DEFAULT_VIEWS
        join_views(prior.denoiser, prior.view_group)
        return prior

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        if "c2w" not in hints:
            raise ValueError("a multi-view model must be told the cameras: the hints lack c2w")
        if len(noisy) % self.view_group:
            raise ValueError(f"{len(noisy)} samples are no whole groups of {self.view_group} views")
        camera = camera_numbers(hints["c2w"].float()).to(self.dtype)
        return self.denoiser(noisy.to(self.dtype), t, embedding.to(self.dtype), class_labels=camera).sample


def is_multiview(folder: Path) -> bool:
    """Whether a folder in diffusers' layout holds a model that `MultiView` reads."""
    path = folder / "unet" / "config.json"
    config = read_json(path) if path.is_file() else {}
    return _is_mvdream(config) or _takes_cameras(config)


def _is_mvdream(config) -> bool:
    return config.get("_class_name") == "MultiViewUNetModel"


def _takes_cameras(config) -> bool:
    numbers = config.get("projection_class_embeddings_input_dim")
    return config.get("class_embed_type") == "projection" and numbers == CAMERA_NUMBERS


def camera_numbers(c2w: Float[Tensor, "B 4 4"]) -> Float[Tensor, "B 16"]:
    """What the denoiser is told of a camera: its camera-to-world matrix, row by row, in MVDream's world, at distance 1 from the origin.

    Both have OpenGL's camera axes. MVDream's world has z up and the object's front along +x (ours: y up, front +z), so that its camera at
    azimuth a (from the front towards the object's left) and elevation e stands at (cos e cos a, cos e sin a, sin e).
    """
    turn = torch.eye(4, dtype=c2w.dtype, device=c2w.device)
    turn[:3, :3] = c2w.new_tensor(_AXES)
    camera = turn @ c2w
    camera[:, :3, 3] = F.normalize(camera[:, :3, 3], dim=-1)
    return camera.flatten(1)


def join_views(denoiser: nn.Module, views: int) -> None:
    """From now on every self-attention (`attn1`) looks at all pixels of `views` consecutive samples together.

    Done around the attention, whatever computes it: setting another attention processor (slicing, xformers) later does not undo it.
    """

    def join(module: nn.Module, args: tuple, kwargs: dict):
        hidden = args[0]
        return (hidden.reshape(len(hidden) // views, -1, hidden.shape[-1]), *args[1:]), kwargs

    def part(module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        return output.reshape(len(output) * views, -1, output.shape[-1])

    for name, module in denoiser.named_modules():
        if name.endswith(".attn1"):
            module.register_forward_pre_hook(join, with_kwargs=True)
            module.register_forward_hook(part)


def read_mvdream(folder: Path, dtype: torch.dtype, flag: str) -> nn.Module:
    """MVDream's own denoiser (config.json of a MultiViewUNetModel and its weights) as a UNet2DConditionModel.

    Its camera embedding is what diffusers calls a class embedding by projection. Raises UserError if the weights do not fit.
    """
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
    from safetensors.torch import load_file

    given = read_json(folder / "config.json")
    if given.get("ip_dim"):
        raise UserError(f"{flag}: {folder} is ImageDream, which is told a picture as well; only MVDream can be used")
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise UserError(f"{flag}: {folder} has no weights (*.safetensors)")
    try:
        widths = [given["model_channels"] * factor for factor in given["channel_mult"]]
        attends = [2**level in given["attention_resolutions"] for level in range(len(widths))]
        width = given.get("num_head_channels", -1)
        config = {
            "sample_size": given["image_size"],
            "in_channels": given["in_channels"],
            "out_channels": given["out_channels"],
            "layers_per_block": given["num_res_blocks"],
            "block_out_channels": widths,
            "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
            "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
            "cross_attention_dim": given["context_dim"],
            "attention_head_dim": [one // width for one in widths]
            if width > 0
            else given["num_heads"],  # the number of heads
            "use_linear_projection": True,
            "class_embed_type": "projection",
            "projection_class_embeddings_input_dim": given["camera_dim"],
        }
        weights = load_file(files[0])
        renamed = {f"model.diffusion_model.{_label(name)}": value for name, value in weights.items()}
        with torch.device("meta"):  # the initial weights would take seconds, and random numbers
            unet = UNet2DConditionModel(**config)
        unet.load_state_dict(convert_ldm_unet_checkpoint(renamed, config), assign=True)
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{flag}: {folder} cannot be read as MVDream's denoiser: {reason}") from error
    return unet.to(dtype).eval()


def _label(name: str) -> str:
    start, dot, rest = name.partition(".")
    return f"label_emb.0.{rest}" if start == "camera_embed" else name
