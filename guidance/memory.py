"""What makes a guidance step need less memory or less time, one small function each, and one table of them.

`apply` takes what the options ask for: single switches, and the row of measures that `--vram_O` stands for. Unless its docstring says
otherwise a measure does not change the result (beyond rounding). It returns "" once it is in force, or says why it cannot be.
"""

import importlib.util
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from errors import UserError, say
from guidance.visits import visit_as_a_whole, visit_by_layer

TINY = {  # the tiny autoencoder that was trained to give the same latents, by (latent_channels, scaling_factor) of the large one
    (4, 0.18215): "madebyollin/taesd",  # Stable Diffusion 1 and 2
    (4, 0.13025): "madebyollin/taesdxl",
    (16, 1.5305): "madebyollin/taesd3",
}
_DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def precision(opt, device: torch.device | str) -> torch.dtype:
    """Of the prior's weights, by `--precision`: auto is half precision on a GPU unless `--no_fp16` was asked for, single on a CPU.

    Raises UserError for what the device cannot compute.
    """
    device, wanted = torch.device(device), opt.precision
    if wanted == "auto":
        refused = not opt.fp16 and opt.origins.get("fp16", "default") != "default"
        wanted = "fp32" if device.type == "cpu" or refused else "fp16"
    if device.type == "cpu" and wanted == "fp16":
        raise UserError("--precision fp16: a CPU computes it very slowly or not at all; use bf16 or fp32")
    if device.type == "cpu" and wanted == "bf16" and not torch.cpu._is_avx512_bf16_supported():
        say("--precision bf16: this CPU has no instructions for it; it halves the memory, but fp32 would be faster")
    if device.type == "cuda" and wanted == "bf16" and not torch.cuda.is_bf16_supported(including_emulation=False):
        raise UserError("--precision bf16: this GPU cannot compute it; use fp16")
    return _DTYPES[wanted]


def tiny_autoencoder(opt, prior) -> None:
    """`--taesd`: an AutoencoderTiny takes the place of the prior's autoencoder, with a tenth of its work. Changes the result a little.

    It is the one published for the model, or the one that `--taesd_key` names (a folder or hub id). Raises UserError if there is none, if it
    cannot be had, or if its latents are of another shape.
    """
    from guidance.parts import part_source, read_part

    flag = f"--taesd_key {opt.taesd_key}" if opt.taesd_key else "--taesd"
    if prior.autoencoder is None:
        raise UserError(f"{flag}: this model works on pixels and has no autoencoder; leave it out")
    config = prior.autoencoder.config
    published = TINY.get((config.latent_channels, round(float(config.scaling_factor), 5)))
    if not (opt.taesd_key or published) or (not opt.taesd_key and _is_tiny(prior.autoencoder)):
        why = (
            "this model's own is a tiny one already"
            if _is_tiny(prior.autoencoder)
            else "none is published for this model"
        )
        raise UserError(f"{flag}: {why}; leave it out, or name another with --taesd_key")
    from diffusers import AutoencoderTiny

    tiny = read_part(AutoencoderTiny, part_source(opt.taesd_key, published or "", flag), prior.dtype)
    factors = 2 ** (len(tiny.config.encoder_block_out_channels) - 1), prior.image_size // prior.latent_size
    if (tiny.config.latent_channels, factors[0]) != (prior.latent_channels, factors[1]):
        raise UserError(
            f"{flag}: its latents have {tiny.config.latent_channels} channels and are {factors[0]} times smaller than the picture, the "
            f"model's {prior.latent_channels} and {factors[1]}; use one that was made for this model"
        )
    prior.use_autoencoder(tiny)
    if prior.device.type == "cuda":
        torch.cuda.empty_cache()


# -- the measures ------------------------------------------------------------------------------------------------------


def split_batches(prior, opt) -> str:
    """one sample in a call of the denoiser

    With classifier-free guidance that halves its activations for one view and divides them by 2 B for B views. A GPU that is busy
    with one sample loses little.
    """
    prior.max_batch = 1
    return ""


def checkpoint_encoder(prior, opt) -> str:
    """the encoder's activations are computed again in the backward pass

    They are the largest item of a step in latent space: 3.3 GB in single precision for one picture of 512 x 512 pixels (the denoiser's:
    0.5 GB for two samples). One residual block is computed at a time, where diffusers' own switch takes all of a resolution: 1.5 instead
    of 2.4 GB, and less work. Costs one more forward pass of the encoder.
    """
    if prior.autoencoder is None:
        return "there is no autoencoder"
    if _is_tiny(prior.autoencoder):
        return "the tiny autoencoder has little to save"
    for module in prior.autoencoder.encoder.modules():
        if type(module).__name__ in ("ResnetBlock2D", "Attention") and "forward" not in vars(module):  # once
            _recompute(module)
    return ""


def slice_autoencoder(prior, opt) -> str:
    """one picture at a time through the autoencoder, whose encoder computes its activations again in the backward pass

    Without the second half the backward pass would need all pictures' activations at once after all.
    """
    if prior.autoencoder is None:
        return "there is no autoencoder"
    prior.autoencoder.enable_slicing()
    checkpoint_encoder(prior, opt)
    return ""


def tile_autoencoder(prior, opt) -> str:
    """pictures go through the autoencoder in overlapping tiles of half their side, each computed again in the backward pass

    Changes the result: each tile is normalised, and attends, by itself, and seams are blended. Not part of --vram_O for that reason.
    """
    if prior.autoencoder is None:
        return "there is no autoencoder"
    if _is_tiny(prior.autoencoder):  # and diffusers' tiling of it is right for 4 channels and a factor of 8 alone
        return "the tiny autoencoder has little to save"
    prior.autoencoder.enable_tiling()
    # diffusers' own tiles are as large as our pictures, which would be no tiles
    prior.autoencoder.tile_sample_min_size = prior.image_size // 2
    prior.autoencoder.tile_latent_min_size = prior.latent_size // 2
    _recompute(prior.autoencoder.encoder)
    return ""


def slice_attention(prior, opt) -> str:
    """attention head by head

    Not part of --vram_O: PyTorch's fused attention never holds a whole matrix of scores, slices hold one for every head. This is for
    devices on which the fused kernels do not run.
    """
    if opt.xformers:
        return "it and --xformers exclude each other; leave one out"
    if not hasattr(prior.denoiser, "set_attention_slice"):
        return f"{_kind(prior.denoiser)} has no such setting"
    for network in _denoisers(prior):
        network.set_attention_slice("max")
    return ""


def use_xformers(prior, opt) -> str:
    """attention by the package xformers

    Not part of --vram_O: PyTorch's own fused attention needs no more memory.
    """
    if importlib.util.find_spec("xformers") is None:
        return "the package is not installed; install it (pip install xformers), or leave the flag out: PyTorch's own attention is as lean"
    if prior.device.type != "cuda":
        return "the package works on a GPU alone"
    try:
        for network in _networks(prior):
            network.enable_xformers_memory_efficient_attention()
    except Exception as error:  # a package built for another torch or another GPU fails in ways of its own
        return f"the package does not work here ({_first_line(error)})"
    return ""


def merge_tokens(prior, opt) -> str:
    """similar tokens of the denoiser are merged before self-attention and separated after it (Bolya and Hoffman 2023)

    Changes the result. Happens at the finest level that has attention. The tokens that others are merged into are drawn anew in the
    published code; here they are always the same (one corner of every 2 x 2), so that all wordings of a prompt are merged alike however
    they are spread over calls, and a resumed run repeats.
    """
    level = _finest_attention(prior.denoiser)
    if level is None:
        return f"{_kind(prior.denoiser)} has no blocks that the package tomesd knows"
    try:
        import tomesd
    except ImportError:
        return "it needs the package tomesd (pip install tomesd)"
    tomesd.apply_patch(prior.denoiser, ratio=opt.tomesd, max_downsample=2**level, use_rand=False)
    state = prior.denoiser._tome_info
    # Neither is used, but a generator made in the midst of a call, and handles for removing the patch, could not be compiled.
    state["args"]["generator"] = torch.Generator(prior.device)
    state["hooks"].clear()
    return ""


def channels_last(prior, opt) -> str:
    """convolutions in the memory layout that the fastest kernels want, without copies into it and back"""
    for network in _networks(prior):
        network.to(memory_format=torch.channels_last)
    return ""


def offload(prior, opt) -> str:
    """the denoiser's weights stay in main memory and visit the GPU

    `model` (and --vram_O): as a whole, from its first call in a step until the next picture is encoded or its gradient comes back, so that
    they and the encoder's activations are never there together; once up a step, and not down again, since they never change. The
    autoencoder stays: it is small and is needed in the backward pass. `sequential`: layer by layer in every call; for denoisers that do
    not fit at all.
    """
    if prior.device.type != "cuda":
        return "there is no GPU to relieve"
    if opt.compile:
        return "compiled networks cannot move; leave out --compile to offload them"
    by_layer = opt.offload == "sequential"
    if by_layer and any(p.requires_grad for p in prior.denoiser.parameters()):
        return (
            "the method trains an adaptation of the denoiser, whose backward pass needs all layers; use --offload model"
        )
    networks = _denoisers(prior)
    if by_layer:
        visit_by_layer(networks, prior.device)
    else:
        visit_as_a_whole(networks, prior)
    torch.cuda.empty_cache()
    return ""


def compile_networks(prior, opt, backend: str | Callable = "inductor") -> str:
    """the denoiser and the encoder are compiled, once for every batch size

    On a GPU the denoiser also becomes a CUDA graph: one view at a time it spends its time launching kernels. The encoder does not, since
    it computes at length; nor does an adaptation of the denoiser (VSD), which is trained and stays as it was.
    """
    if backend == "inductor" and not any(map(shutil.which, ("c++", "g++", "clang++", "cl"))):
        return "it needs a C++ compiler (g++ or clang++)"
    if prior.device.type == "cuda" and importlib.util.find_spec("triton") is None:
        return "it needs the package triton (pip install triton)"
    mode = "reduce-overhead" if prior.device.type == "cuda" else None
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 32)  # batch sizes, not accidents
    settings = {"fullgraph": True, "dynamic": False, "backend": backend}  # a break would be an error, not a silent loss
    prior.denoiser = torch.compile(prior.denoiser, mode=mode, **settings)
    prior.denoiser.register_forward_hook(_own_copy)
    if prior.autoencoder is not None:
        prior.autoencoder.encoder.compile(**settings)
    return ""


@dataclass(frozen=True)
class Measure:
    """A row of the table: what to do; the flag that asks for it alone; whether `--vram_O` asks for it."""

    act: Callable[..., str]
    flag: str | None = None
    saves: bool = False

    def asked(self, opt) -> bool:
        """Whether its own flag asks for it."""
        return self.flag is not None and getattr(opt, self.flag) not in (False, 0, "none")


MEASURES = (  # in this order: what changes the networks' parts, where their weights lie, what is made of the result
    Measure(split_batches, saves=True),
    Measure(checkpoint_encoder, saves=True),
    Measure(slice_autoencoder, "vae_slicing", saves=True),
    Measure(tile_autoencoder, "vae_tiling"),
    Measure(slice_attention, "attention_slicing"),
    Measure(use_xformers, "xformers"),
    Measure(merge_tokens, "tomesd"),
    Measure(channels_last, "channels_last", saves=True),
    Measure(offload, "offload", saves=True),
    Measure(compile_networks, "compile"),
)


def apply(prior, opt) -> dict[str, str]:
    """Takes every measure that the options ask for; once, when the prior is complete (adaptations of the denoiser included).

    Returns {measure: "" or why it cannot be taken}; a measure of `--vram_O` that cannot be is also said in a line. Raises UserError
    if one that was asked for by its own flag cannot be.
    """
    answers, parts = {}, {}
    for measure in MEASURES:
        asked = measure.asked(opt)
        if not (asked or (opt.vram_O and measure.saves)):
            continue
        name, problem = measure.act.__name__.replace("_", " "), measure.act(prior, opt)
        if problem and asked:
            value = getattr(opt, measure.flag)
            raise UserError(f"--{measure.flag}{'' if value is True else f' {value}'}: {problem}")
        answers[name] = problem
        if measure.saves and opt.vram_O:
            parts[name] = problem
    if parts:
        say("--vram_O: " + ", ".join(name for name, problem in parts.items() if not problem))
    for name, problem in parts.items():
        if problem:
            say(f"--vram_O: no {name}: {problem}")
    return answers


# -- what there is to work on ------------------------------------------------------------------------------------------


def _networks(prior) -> list[nn.Module]:
    """All of the prior's: denoiser, autoencoder, and what else a family has (a ControlNet)."""
    return [value for value in vars(prior).values() if isinstance(value, nn.Module)]


def _denoisers(prior) -> list[nn.Module]:
    return [network for network in _networks(prior) if network is not prior.autoencoder]


def _finest_attention(denoiser: nn.Module) -> int | None:
    """How many times the picture has been halved where a UNet first has transformer blocks; None if it has none."""

    def attends(part: nn.Module) -> bool:
        return any(type(module).__name__ == "BasicTransformerBlock" for module in part.modules())

    levels = list(getattr(denoiser, "down_blocks", []))
    for level, block in enumerate(levels):
        if attends(block):
            return level
    return len(levels) - 1 if levels and attends(denoiser) else None


def _recompute(module: nn.Module) -> None:
    """Of the module's call autograd keeps the arguments alone, and calls it again in the backward pass."""
    module.forward = partial(checkpoint, module.forward, use_reentrant=False, preserve_rng_state=False)


def _is_tiny(autoencoder: nn.Module) -> bool:
    return type(autoencoder).__name__ == "AutoencoderTiny"


def _kind(network: nn.Module) -> str:
    return f"this model's denoiser (a {type(network).__name__})"


def _own_copy(module: nn.Module, arguments: Any, output: Any) -> Any:
    """What a CUDA graph returns is overwritten by its next run."""
    return torch.utils._pytree.tree_map_only(torch.Tensor, torch.clone, output)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
