"""The published diffusion models' sizes, and networks of these sizes with random weights."""

from dataclasses import dataclass
from typing import Any

import torch

from guidance.deepfloyd_if import DeepFloydIF
from guidance.prior import Prior
from guidance.stable_diffusion import StableDiffusion
from guidance.stable_diffusion_3 import StableDiffusion3
from guidance.stable_diffusion_xl import StableDiffusionXL

_CROSS, _DOWN, _UP = ("CrossAttnDownBlock2D",), ("DownBlock2D",), ("UpBlock2D",)
SD15 = {
    "sample_size": 64,
    "block_out_channels": (320, 640, 1280, 1280),
    "down_block_types": _CROSS * 3 + _DOWN,
    "up_block_types": _UP + ("CrossAttnUpBlock2D",) * 3,
    "attention_head_dim": 8,  # diffusers' name for the number of heads in these two
    "cross_attention_dim": 768,
}
SD21 = SD15 | {"attention_head_dim": (5, 10, 20, 20), "cross_attention_dim": 1024, "use_linear_projection": True}
SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": _DOWN + _CROSS * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + _UP,
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1280 + 6 * 256,
}
SD3 = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "num_attention_heads": 24,
    "attention_head_dim": 64,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 192,
}


def deepfloyd(width: int) -> dict[str, Any]:
    """Stage I; M, L and XL differ in width alone."""
    return {
        "sample_size": 64,
        "in_channels": 3,
        "out_channels": 6,
        "layers_per_block": 3,
        "block_out_channels": tuple(width * factor for factor in (1, 2, 3, 4)),
        "down_block_types": ("ResnetDownsampleBlock2D",) + ("SimpleCrossAttnDownBlock2D",) * 3,
        "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
        "up_block_types": ("SimpleCrossAttnUpBlock2D",) * 3 + ("ResnetUpsampleBlock2D",),
        "act_fn": "gelu",
        "attention_head_dim": 64,
        "cross_attention_dim": 4 * width,
        "cross_attention_norm": "group_norm",
        "encoder_hid_dim": 4096,
        "encoder_hid_dim_type": "text_proj",
        "addition_embed_type": "text",
        "addition_embed_type_num_heads": 64,
        "resnet_time_scale_shift": "scale_shift",
    }


KL = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "sample_size": 512,
}
KL_16 = KL | {"latent_channels": 16, "use_quant_conv": False, "use_post_quant_conv": False}


@dataclass(frozen=True)
class Architecture:
    """A denoiser (its class and settings), an autoencoder, and what the text encoders would give: [rows, width]."""

    prior: type[Prior]
    denoiser: dict[str, Any]
    autoencoder: dict[str, Any] | None
    embedding: tuple[int, int]
    network: str = "UNet2DConditionModel"
    prediction: str = "epsilon"


ARCHITECTURES = {
    "sd1.5": Architecture(StableDiffusion, SD15, KL, (77, 768)),
    "sd2.1": Architecture(StableDiffusion, SD21, KL, (77, 1024)),
    "sdxl": Architecture(StableDiffusionXL, SDXL, KL, (78, 2048)),
    "sd3": Architecture(StableDiffusion3, SD3, KL_16, (334, 4096), "SD3Transformer2DModel", "flow_prediction"),
    "if-m": Architecture(DeepFloydIF, deepfloyd(192), None, (77, 4096)),
    "if-l": Architecture(DeepFloydIF, deepfloyd(320), None, (77, 4096)),
    "if-xl": Architecture(DeepFloydIF, deepfloyd(704), None, (77, 4096)),
}


def random_network(kind: type, config: dict[str, Any], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A network whose weights were never anywhere but on the device; cheap random numbers that keep activations at about their size."""
    from guidance.weights import quiet

    with quiet(), torch.device("meta"):
        network = kind(**config).to(dtype)
    network = network.to_empty(device=device).requires_grad_(False).eval()
    block = torch.randn(1 << 20, generator=torch.Generator().manual_seed(0)).to(device, dtype)
    norms = {id(p) for name, p in network.named_parameters() if p.ndim == 1 and name.endswith("weight")}
    for tensor in [*network.parameters(), *network.buffers()]:
        if id(tensor) in norms:
            tensor.fill_(1)
        elif tensor.ndim == 1 or not tensor.is_floating_point():
            tensor.zero_()
        else:
            scale = tensor[0].numel() ** -0.5
            for piece in tensor.view(-1).split(len(block)):
                torch.mul(block[: len(piece)], scale, out=piece)
    return network
