"""Which prior and which text encoder go with which diffusers pipeline."""

import torch

from errors import UserError
from guidance.adapters import put_on_denoiser
from guidance.controlnet import ControlNet, control_source
from guidance.deepfloyd_if import DeepFloydIF, DeepFloydIFUpscaler
from guidance.instruct_pix2pix import InstructPix2Pix
from guidance.multiview import MultiView, is_multiview
from guidance.prior import Prior
from guidance.stable_diffusion import StableDiffusion
from guidance.stable_diffusion_3 import StableDiffusion3
from guidance.stable_diffusion_xl import StableDiffusionXL
from guidance.text import ClipText, SD3Text, SDXLText, T5Text, TextEncoder
from guidance.weights import Source, fetch, kind_of


def load_prior(source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32, opt=None) -> Prior:
    """The prior in what `weights.resolve` found, its weights in `dtype`.

    What `--lora` named is put on its denoiser. opt, if given: `control`, `control_key`, `control_scale` (a ControlNet), `edit_scale`
    (InstructPix2Pix), `view_group` (multi-view models).
    Raises UserError if it cannot be had, read or used.
    """
    prior = _load(source, device, dtype, opt)
    if source.adapters:
        put_on_denoiser(prior.denoiser, source.adapters, kind_of(source), source.name)
    return prior


def _load(source: Source, device: torch.device | str, dtype: torch.dtype, opt) -> Prior:
    where = (source, device, dtype)
    if opt is not None and opt.control != "none":
        return _with_control(*where, opt)
    match kind_of(source):
        case "MVDreamPipeline":
            return _multi_view(*where, opt)
        case "StableDiffusionPipeline" | "StableDiffusionImg2ImgPipeline":
            several = is_multiview(fetch(source, dtype != torch.float32))
            return _multi_view(*where, opt) if several else StableDiffusion.load(*where)
        case "StableDiffusionInstructPix2PixPipeline":
            return InstructPix2Pix.load(*where, *([] if opt is None else [opt.edit_scale]))
        case "StableDiffusionXLPipeline":
            return StableDiffusionXL.load(*where)
        case "StableDiffusion3Pipeline":
            return StableDiffusion3.load(*where)
        case "IFPipeline":
            return DeepFloydIF.load(*where)
        case "IFSuperResolutionPipeline":
            return DeepFloydIFUpscaler.load(*where)
        case kind:
            raise ValueError(f"no prior for a {kind}")


def _with_control(source: Source, device: torch.device | str, dtype: torch.dtype, opt) -> Prior:
    kind = kind_of(source)
    if kind not in ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"):
        raise UserError(f"--control {opt.control}: goes with Stable Diffusion 1 and 2, not with a {kind}; leave it out")
    its = control_source(opt.control, opt.control_key)
    return ControlNet.load(source, its, opt.control, opt.control_scale, device, dtype)


def _multi_view(source: Source, device: torch.device | str, dtype: torch.dtype, opt) -> Prior:
    prior = MultiView.load(source, device, dtype)
    views = prior.view_group
    if opt is not None and opt.view_group != views:
        raise UserError(
            f"--view_group {opt.view_group}: this model looks at {views} views at once; use --view_group {views}, and a "
            "--batch_size that is a multiple of it"
        )
    return prior


def text_encoder(source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> TextEncoder:
    """The text encoder that belongs to what `weights.resolve` found; nothing is read before it is first used."""
    match kind_of(source):
        case "StableDiffusionXLPipeline":
            return SDXLText(source, device, dtype)
        case "StableDiffusion3Pipeline":
            return SD3Text(source, device, dtype)
        case "IFPipeline" | "IFSuperResolutionPipeline":
            return T5Text(source, device, dtype)
        case _:
            return ClipText(source, device, dtype)
