#!/usr/bin/env python3
"""Turn an original Zero-1-to-3 or Stable-Zero123 checkpoint into the folder that --zero123 reads.

    python scripts/convert_zero123.py zero123-xl.ckpt --out models/zero123-xl
    python scripts/convert_zero123.py stable_zero123.ckpt --stable --out models/stable-zero123 --dtype fp16

The checkpoint is read without running any code that it may hold (torch.load with weights_only; or a .safetensors file of the same names).
"""

import argparse
import math
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from errors import UserError, say, status_of  # noqa: E402
from guidance.weights import quiet  # noqa: E402
from guidance.zero123_reference import write_view_model  # noqa: E402
from options import Parser  # noqa: E402

UNET, VAE, CLIP, PROJECTION = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.model.visual.",
    "cc_projection.",
)
NEEDED = {
    "denoiser": UNET + "input_blocks.0.0.weight",
    "autoencoder": VAE + "encoder.conv_in.weight",
    "image encoder": CLIP + "conv1.weight",
    "projection of the pose": PROJECTION + "weight",
}
HEADS, CLIP_HEAD, SCALING = 8, 64, 0.18215  # of the published models; no checkpoint says them
HARMLESS = (
    "pytorch_lightning.",
    "lightning.",
    "omegaconf.",
    "lightning_fabric.",
)  # what a trainer leaves beside the weights
_CLIP_NAMES = (  # OpenAI's names and transformers', in this order
    ("transformer.resblocks.", "vision_model.encoder.layers."),
    (".attn.out_proj.", ".self_attn.out_proj."),
    (".ln_1.", ".layer_norm1."),
    (".ln_2.", ".layer_norm2."),
    (".mlp.c_fc.", ".mlp.fc1."),
    (".mlp.c_proj.", ".mlp.fc2."),
    ("ln_pre.", "vision_model.pre_layrnorm."),
    ("ln_post.", "vision_model.post_layernorm."),
    ("conv1.", "vision_model.embeddings.patch_embedding."),
)

State = dict[str, Tensor]


# -- reading -----------------------------------------------------------------------------------------------------------


def read_checkpoint(path: Path) -> State:
    """The weights in a .ckpt or .safetensors file, by their original names. Raises UserError for a file of another kind."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            with torch.serialization.safe_globals(_stand_ins(path)):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=_is_zip(path))
    except Exception as error:  # broken files fail in many ways
        raise UserError(f"{path}: cannot be read safely ({_reason(error)}); use the published file") from error
    state = state.get("state_dict", state) if isinstance(state, dict) else {}
    state = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    missing = [f"{part} ({name})" for part, name in NEEDED.items() if name not in state]
    if missing:
        raise UserError(f"{path}: not an original Zero-1-to-3 checkpoint; it lacks its {', its '.join(missing)}")
    return state


def _is_zip(path: Path) -> bool:
    import zipfile

    return zipfile.is_zipfile(path)  # older files cannot be mapped into memory


def _stand_ins(path: Path) -> list:
    """Empty classes for what a trainer's bookkeeping names, so that it can be skipped without its packages and without running them."""

    class Nothing(dict):
        def __init__(self, *args, **kwargs):
            super().__init__()

        def __setstate__(self, state):
            pass

        __hash__ = object.__hash__  # some are keys

    try:
        named = torch.serialization.get_unsafe_globals_in_checkpoint(path)
    except Exception:  # not a file of torch's: reading it will say so
        return []
    return [(type("Nothing", (Nothing,), {}), name) for name in named if name.startswith(HARMLESS)]


def _reason(error: Exception) -> str:
    text = str(error)
    if "Unsupported global" in text:
        return "it holds Python objects: " + text.partition("Unsupported global: ")[2].split()[1]
    return (text.strip() or type(error).__name__).splitlines()[0]


# -- the parts ---------------------------------------------------------------------------------------------------------


def convert_unet(state: State, size: int) -> nn.Module:
    """The denoiser, with the averaged weights if the checkpoint has them, as the published demo does. size: of the latents."""
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    names = [name[len(UNET) :] for name in state if name.startswith(UNET)]
    levels, blocks, attends = _unet_levels(state, names)
    key = next(name for name in names if name.endswith("attn2.to_k.weight"))
    proj_in = next(name for name in names if name.endswith("proj_in.weight"))
    config = {
        "sample_size": size,
        "in_channels": state[UNET + "input_blocks.0.0.weight"].shape[1],
        "out_channels": state[UNET + "out.2.weight"].shape[0],
        "block_out_channels": levels,
        "layers_per_block": blocks,
        "down_block_types": ["CrossAttnDownBlock2D" if yes else "DownBlock2D" for yes in attends],
        "up_block_types": ["CrossAttnUpBlock2D" if yes else "UpBlock2D" for yes in reversed(attends)],
        "cross_attention_dim": state[UNET + key].shape[1],
        "attention_head_dim": HEADS,  # the number of heads, whatever the name says
        "use_linear_projection": state[UNET + proj_in].ndim == 2,
    }
    averaged = sum(name.startswith("model_ema.") for name in state) > 100
    with quiet():
        weights = convert_ldm_unet_checkpoint(state, config, extract_ema=averaged)
    return _filled(UNet2DConditionModel, config, weights, "denoiser")


def _unet_levels(state: State, names: list[str]) -> tuple[list[int], int, list[bool]]:
    """(channels of every level, residual blocks in each, which of them attend)."""
    count = 1 + max(int(name.split(".")[1]) for name in names if name.startswith("input_blocks."))
    here = [{name for name in names if name.startswith(f"input_blocks.{i}.")} for i in range(count)]
    channels, attends, blocks = [], [], [0]
    for i in range(1, count):
        if f"input_blocks.{i}.0.op.weight" in here[i]:
            blocks.append(0)
            continue
        blocks[-1] += 1
        if blocks[-1] == 1:
            channels.append(state[f"{UNET}input_blocks.{i}.0.out_layers.3.weight"].shape[0])
            attends.append(any("transformer_blocks" in name for name in here[i]))
    return channels, blocks[0], attends


def convert_vae(state: State, size: int) -> nn.Module:
    """The autoencoder. size: of the pictures."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    names = [name[len(VAE) :] for name in state if name.startswith(VAE)]
    levels = 1 + max(int(name.split(".")[2]) for name in names if name.startswith("encoder.down."))
    blocks = 1 + max(int(name.split(".")[4]) for name in names if name.startswith("encoder.down.0.block."))
    config = {
        "sample_size": size,
        "in_channels": 3,
        "out_channels": 3,
        "block_out_channels": [state[f"{VAE}encoder.down.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)],
        "layers_per_block": blocks,
        "latent_channels": state[VAE + "decoder.conv_in.weight"].shape[1],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "scaling_factor": SCALING,
    }
    weights = {name: value for name, value in state.items() if name.startswith(VAE)}
    return _filled(AutoencoderKL, config, convert_ldm_vae_checkpoint(weights, config), "autoencoder")


def convert_clip(state: State) -> nn.Module:
    """OpenAI's image tower as a CLIPVisionModelWithProjection; it has one head for every 64 channels."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    old = {name[len(CLIP) :]: value for name, value in state.items() if name.startswith(CLIP)}
    width, patch = old["conv1.weight"].shape[0], old["conv1.weight"].shape[2]
    config = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=old["transformer.resblocks.0.mlp.c_fc.weight"].shape[0],
        num_hidden_layers=1 + max(int(n.split(".")[2]) for n in old if n.startswith("transformer.resblocks.")),
        num_attention_heads=max(1, width // CLIP_HEAD),
        image_size=math.isqrt(len(old["positional_embedding"]) - 1) * patch,
        patch_size=patch,
        projection_dim=old["proj"].shape[1],
        hidden_act="quick_gelu",
    )
    new = {
        "vision_model.embeddings.class_embedding": old.pop("class_embedding"),
        "vision_model.embeddings.position_embedding.weight": old.pop("positional_embedding"),
        "visual_projection.weight": old.pop("proj").T.contiguous(),
    }
    for name, value in old.items():
        head, joined, kind = name.partition(".attn.in_proj_")
        pieces = zip("qkv", value.chunk(3), strict=True) if joined else [("", value)]
        for letter, piece in pieces:
            renamed = f"{head}.self_attn.{letter}_proj.{kind}" if joined else name
            for theirs, ours in _CLIP_NAMES:
                if theirs.startswith(".") or renamed.startswith(theirs):
                    renamed = renamed.replace(theirs, ours)
            new[renamed] = piece.contiguous()
    return _filled(CLIPVisionModelWithProjection, config, new, "image encoder")


def convert_projection(state: State) -> nn.Linear:
    """From the image embedding and the pose to the token."""
    weight = state[PROJECTION + "weight"]
    layer = nn.utils.skip_init(nn.Linear, weight.shape[1], weight.shape[0])
    layer.load_state_dict({"weight": weight, "bias": state[PROJECTION + "bias"]})
    return layer


def build_scheduler(state: State):
    """The noise levels it was trained with: those that the checkpoint lists, else Stable Diffusion's."""
    from diffusers import DDIMScheduler

    betas = state.get("betas")
    ends = (0.00085, 0.012, 1000) if betas is None else (float(betas[0]), float(betas[-1]), len(betas))
    settings = dict(zip(("beta_start", "beta_end", "num_train_timesteps"), ends, strict=True))
    same = {"beta_schedule": "scaled_linear", "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}
    return DDIMScheduler(**settings, **same, prediction_type="epsilon")


def _filled(kind, config, weights: State, part: str) -> nn.Module:
    """A network of class `kind` with these weights, which must be all of its weights."""
    with torch.device("meta"), quiet():  # the initial weights would take minutes
        network = kind(**config) if isinstance(config, dict) else kind(config)
    kept = {name for name, _ in network.named_buffers()} - set(network.state_dict())
    try:
        network.load_state_dict({name: value.float() for name, value in weights.items()}, assign=True)
    except (AttributeError, RuntimeError) as error:
        lines = " ".join(str(error).split())
        raise UserError(f"the {part} of this checkpoint is not one that is known: {lines[:200]}") from error
    for name in kept:  # tables that no file holds, such as the numbers of the positions
        home, _, leaf = name.rpartition(".")
        owner = network.get_submodule(home)
        owner.register_buffer(leaf, torch.arange(owner.get_buffer(leaf).numel()).reshape(1, -1), persistent=False)
    return network


# -- the command -------------------------------------------------------------------------------------------------------


def convert(path: Path, out: Path, stable: bool, size: int, dtype: torch.dtype) -> None:
    """Writes the folder. Raises UserError if the file is none of those that can be converted."""
    state = read_checkpoint(path)
    vae = convert_vae(state, size)
    smaller = 2 ** (len(vae.config.block_out_channels) - 1)
    try:
        parts = convert_unet(state, size // smaller), vae, build_scheduler(state), convert_clip(state)
        projection = convert_projection(state)
    except (KeyError, StopIteration, ValueError) as error:
        raise UserError(f"{path}: not an original Zero-1-to-3 checkpoint; it lacks {error}") from error
    unet, vae, scheduler, tower = parts
    for network in (unet, vae, tower, projection):
        network.to(dtype)
    write_view_model(out, unet, vae, scheduler, tower, projection, "polar" if stable else "radius")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the original .ckpt (or .safetensors)")
    parser.add_argument("--out", type=Path, required=True, help="folder to write; name it with --zero123")
    parser.add_argument(
        "--stable", action="store_true", help="it is Stable-Zero123, which is told the reference's elevation"
    )
    parser.add_argument("--size", type=int, default=256, help="pixels a side that it was trained with (default 256)")
    parser.add_argument(
        "--dtype", choices=("fp32", "fp16"), default="fp32", help="of the weights written (default fp32)"
    )
    parser.add_argument("--force", action="store_true", help="write into a folder that holds something")

    def work() -> None:
        args = parser.parse_args(argv)
        if not args.force and args.out.is_dir() and any(args.out.iterdir()):
            raise UserError(f"--out {args.out}: holds something already; choose another folder, or add --force")
        dtype = torch.float16 if args.dtype == "fp16" else torch.float32
        convert(args.checkpoint, args.out, args.stable, args.size, dtype)
        say(f"{args.out}: ready; use it with --zero123 {args.out}")

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
