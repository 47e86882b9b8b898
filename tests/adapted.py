"""Random priors of every kind, small enough for tests of VSD's adaptation."""

import torch

from guidance.deepfloyd_if import DeepFloydIF
from guidance.lora import Adaptation
from guidance.stable_diffusion import StableDiffusion
from guidance.stable_diffusion_3 import StableDiffusion3
from nerf.provider import orbit

STEPS = 50  # noise levels
ABAR = torch.linspace(0.999, 0.01, STEPS)
LEVELS = ABAR.sqrt(), (1 - ABAR).sqrt()


def unet(channels=4, attends="CrossAttn", **more):
    """One level of 16 channels; attends: "CrossAttn" everywhere, or "" in the middle alone."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=channels,
        out_channels=more.pop("out_channels", channels),
        layers_per_block=1,
        block_out_channels=(16,),
        down_block_types=(f"{attends}DownBlock2D",),
        up_block_types=(f"{attends}UpBlock2D",),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def transformer():
    from diffusers import SD3Transformer2DModel

    torch.manual_seed(0)
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=1,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=16,
        caption_projection_dim=16,
        pooled_projection_dim=16,
        out_channels=4,
        pos_embed_max_size=8,
    )


def latent_model(kind="v_prediction", dtype=torch.float32, **more):
    network = unet(**more) if dtype == torch.float32 else unet(**more).to(dtype)
    return StableDiffusion(network, None, *LEVELS, kind, "cpu")


def pixel_model():
    return DeepFloydIF(unet(3, out_channels=6), None, *LEVELS, "epsilon", "cpu")


def flow_model():
    sigma = torch.linspace(0.01, 0.99, STEPS)
    return StableDiffusion3(transformer(), None, 1 - sigma, sigma, "flow_prediction", "cpu")


MODELS = {
    "eps": lambda: latent_model("epsilon"),
    "v": latent_model,
    "sample": lambda: latent_model("sample"),
    "middle": lambda: latent_model(attends=""),
    "pixels": pixel_model,
    "flow": flow_model,
    "bf16": lambda: latent_model(dtype=torch.bfloat16),
}


def adapt(prior, rank=4, lr=1e-2, seed=0, warm_up=1):
    return Adaptation(prior, rank, lr, torch.Generator().manual_seed(seed), warm_up)


def question(prior, batch=2):
    """Noisy latents, timesteps, embedding, hints: cameras half a turn apart."""
    draw = {"generator": torch.Generator().manual_seed(1)}
    noisy = torch.randn(batch, prior.latent_channels, 8, 8, **draw)
    embedding = torch.randn(1, 6, 16, **draw).expand(batch, -1, -1)
    polar, azimuth = torch.full((batch,), 80.0), 180.0 * torch.arange(batch)
    return noisy, torch.arange(batch) % 2 * 20 + 5, embedding, {"c2w": orbit(polar, azimuth, 3.2, 30.0, 8, 8).c2w}


def taught(prior, steps=4, **settings):
    """An adaptation that has seen some pictures, and so differs from the prior."""
    adaptation = adapt(prior, **settings)
    latents, _, embedding, hints = question(prior)
    for _ in range(steps):
        adaptation.learn(latents, embedding, hints)
    return adaptation
