"""`--vram_O`: measures that make a guidance step need less memory, one small function each.

None of them changes the result (beyond rounding). A measure returns "" once it is in force, or says why it cannot be.
"""

from collections.abc import Callable

import torch

from errors import say


def split_batches(prior) -> str:
    """one sample in a call of the denoiser: half the activations of classifier-free guidance, or less"""
    prior.max_batch = 1
    return ""


def slice_autoencoder(prior) -> str:
    """one picture at a time through the autoencoder"""
    prior.vae.enable_slicing()
    return ""


def checkpoint_encoder(prior) -> str:
    """the encoder's activations are computed again in the backward pass: the largest item of a step in latent space"""
    if type(prior.vae).__name__ != "AutoencoderKL":  # diffusers' tiny encoder skips its input scaling when checkpointed
        return "the tiny autoencoder has little to save"
    prior.vae.enable_gradient_checkpointing()
    return ""


def channels_last(prior) -> str:
    """convolutions in the memory layout that needs no extra workspace"""
    for network in (prior.unet, prior.vae):
        network.to(memory_format=torch.channels_last)
    return ""


def offload_denoiser(prior) -> str:
    """the denoiser's weights stay in the computer's memory and visit the GPU layer by layer (slow)"""
    if prior.device.type != "cuda":
        return "there is no GPU to relieve"
    try:
        from accelerate import cpu_offload
    except ImportError:
        return "it needs the package accelerate"
    cpu_offload(prior.unet.to("cpu"), execution_device=prior.device)
    torch.cuda.empty_cache()
    return ""


MEASURES: tuple[Callable[..., str], ...] = (
    split_batches,
    slice_autoencoder,
    checkpoint_encoder,
    channels_last,
    offload_denoiser,
)


def save_memory(prior) -> dict[str, str]:
    """Takes every measure that can be taken and says which in one line, and one more for each that cannot.

    Returns {measure: "" or why not}.
    """
    answers = {measure.__name__.replace("_", " "): measure(prior) for measure in MEASURES}
    say("--vram_O: " + ", ".join(name for name, problem in answers.items() if not problem))
    for name, problem in answers.items():
        if problem:
            say(f"--vram_O: no {name}: {problem}")
    return answers
