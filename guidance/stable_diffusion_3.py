"""Stable Diffusion 3 and 3.5 as a prior: rectified flow with a transformer (Esser et al. 2024).

z_t = (1 - sigma) z_0 + sigma eps; the network predicts the velocity eps - z_0 and is told 1000 sigma.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError
from guidance.prior import Hints, Prior
from guidance.stable_diffusion import check_channels
from guidance.text import split_pooled
from guidance.weights import Source, load_pipeline


class StableDiffusion3(Prior):
    """A frozen Stable Diffusion 3; see `Prior`."""

    @classmethod
    def load(cls, source: Source, device: torch.device | str, dtype: torch.dtype = torch.float32) -> "StableDiffusion3":
        """Reads a model from where `weights.resolve` found it. Raises UserError if it cannot be read or is of another kind."""
        parts = dict.fromkeys(
            f"{kind}{number}" for kind in ("text_encoder", "tokenizer") for number in ("", "_2", "_3")
        )
        pipe, folder = load_pipeline("StableDiffusion3Pipeline", source, dtype, **parts)
        place = f"{source.flag}: {folder}"
        check_channels(pipe.transformer, pipe.vae, place)
        sigma = flow_levels(pipe.scheduler, pipe.transformer.config, place)
        return cls(pipe.transformer, pipe.vae, 1 - sigma, sigma, "flow_prediction", device, source.name)

    def denoise(self, noisy: Tensor, t: Tensor, embedding: Tensor, hints: Hints) -> Tensor:
        tokens, pooled = split_pooled(embedding.to(self.dtype), self.denoiser.config.pooled_projection_dim)
        time = self.num_timesteps * self.sigma[t]  # in float32, as its own pipeline gives it
        return self.denoiser(noisy.to(self.dtype), tokens, pooled, time).sample


def flow_levels(scheduler, config, place: str) -> Float[Tensor, "T"]:
    """The noise levels that the scheduler steps through when it takes all its steps, from the lowest up; sigma[T - 1] = 1.

    config: of the transformer, whose number of tokens decides the shift where that is dynamic. Raises UserError, beginning with `place`,
    for a scheduler of another kind.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

    options = scheduler.config
    if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler) or options.invert_sigmas:
        raise UserError(
            f"{place}: not a model that can be used ({type(scheduler).__name__}): its scheduler must be FlowMatchEulerDiscreteScheduler"
        )
    count = options.num_train_timesteps
    moved = {}
    if options.use_dynamic_shifting:
        lengths = options.base_image_seq_len, options.max_image_seq_len
        tokens = (config.sample_size // config.patch_size) ** 2
        moved["mu"] = calculate_shift(tokens, *lengths, options.base_shift, options.max_shift)
    scheduler.set_timesteps(sigmas=[step / count for step in range(count, 0, -1)], **moved)
    return scheduler.sigmas[:count].flip(0)
