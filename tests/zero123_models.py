"""A random Zero-1-to-3 of a few hundred kilobytes, written by the real code."""

import torch
from tiny_models import DIFFUSION, autoencoder_of

from guidance.zero123_reference import write_view_model

SIZE, WIDTH = 32, 24  # pixels a side, channels of the token


def random_model(folder, autoencoder="kl", pose="radius", seed=0, any_background=False, projection=None):
    """Pictures of 32, latents of 4 x 8 x 8, an image tower of 24; autoencoder: "kl" or "tiny"."""
    from diffusers import DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=8,
        out_channels=4,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=WIDTH,
        attention_head_dim=2,
        norm_num_groups=8,
    )
    tower = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=24, patch_size=8,
            projection_dim=WIDTH,
        )
    )  # fmt: skip
    scheduler = DDIMScheduler(**DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    projection = projection or torch.nn.Linear(WIDTH + 4, WIDTH)
    write_view_model(
        folder, unet, autoencoder_of(autoencoder), scheduler, tower, projection, pose, any_background=any_background
    )
    return folder
