"""The shapes of the embedded models, in the Hugging Face classes and folder formats that the big ones use."""

from pathlib import Path

import torch
from torch import nn

from toybox.captions import CONTEXT, vocabulary, write_tokenizer

MODELS = Path(__file__).parent / "models"
SIZE = 64  # pixels a side, for every embedded model
WIDTH = 128  # of the text embedding
PIXELS = 32  # of tiny-if, which works on pictures themselves
T5_WIDTH, T5_LENGTH = 64, 77  # DeepFloyd's pipeline pads every prompt to 77 tokens, whatever the tokenizer says


def build_autoencoder() -> nn.Module:
    """`AutoencoderTiny`, 64x64x3 <-> 16x16x4: no normalisation that would wash colors out, and a light encoder since gradients go through it."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(40, 40, 40),
        decoder_block_out_channels=(40, 40, 40),
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=4,
        latent_magnitude=3,
    )


def _text_config(folder: Path):
    from transformers import CLIPTextConfig, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(folder)
    return CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CONTEXT,
        projection_dim=WIDTH,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def build_text_encoder(folder: Path) -> nn.Module:
    """A small `CLIPTextModel` for the tokenizer in `folder`."""
    from transformers import CLIPTextModel

    return CLIPTextModel(_text_config(folder))


def _vision_config():
    from transformers import CLIPVisionConfig

    return CLIPVisionConfig(
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=8,
        projection_dim=WIDTH,
    )


def build_image_encoder() -> nn.Module:
    """The half of `build_clip` that sees, by itself."""
    from transformers import CLIPVisionModelWithProjection

    config = _vision_config()
    config._attn_implementation = "eager"
    return CLIPVisionModelWithProjection(config)


def build_projection() -> nn.Module:
    """From the image embedding and the four numbers of the pose to as many tokens as a caption has. The published models have one layer,
    one token, and a large denoiser that turns the object; here the turning needs a little depth, and the denoiser knows captions."""
    layers = (nn.Linear(WIDTH + 4, 3 * WIDTH), nn.SiLU(), nn.Linear(3 * WIDTH, 3 * WIDTH), nn.SiLU())
    return nn.Sequential(*layers, nn.Linear(3 * WIDTH, CONTEXT * WIDTH), nn.Unflatten(-1, (CONTEXT, WIDTH)))


def build_clip(folder: Path) -> nn.Module:
    """A small `CLIPModel` (pictures of 64x64 in patches of 8) for the tokenizer in `folder`."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=_text_config(folder), vision_config=_vision_config(), projection_dim=WIDTH)
    config._attn_implementation = "eager"  # trains faster than the fused one on a CPU
    return CLIPModel(config)


def build_unet(in_channels: int = 4) -> nn.Module:
    """The denoiser (8 channels in: that of tiny-zero123). The text reaches it twice: by cross-attention, and pooled into the time embedding.

    The second way (`addition_embed_type="text"`) scales and shifts every residual block, so that kind, color and view are learned in
    thousands of steps instead of tens of thousands. Attention stays at 4x4: above, it costs more time than it gives.
    """
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=in_channels,
        out_channels=4,
        block_out_channels=(48, 96, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 3,
        cross_attention_dim=WIDTH,
        attention_head_dim=4,  # the number of heads, whatever the name says
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_scheduler():
    """Stable Diffusion's noise schedule, predicting v: its loss weighs shape (high noise) and detail (low noise) evenly."""
    from diffusers import DDIMScheduler

    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def save_pipeline(folder: Path, unet: nn.Module, text_encoder: nn.Module, vae: nn.Module) -> None:
    """Write a `StableDiffusionPipeline` folder in half precision, without traces of where the parts came from."""
    from diffusers import StableDiffusionPipeline
    from transformers import CLIPTokenizer

    write_tokenizer(folder / "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    parts = [module.to(torch.float16) for module in (unet, text_encoder, vae)]
    pipeline = StableDiffusionPipeline(
        vae=parts[2],
        text_encoder=parts[1],
        tokenizer=tokenizer,
        unet=parts[0],
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.save_pretrained(folder, safe_serialization=True)


def save_view_pipeline(
    folder: Path, unet: nn.Module, image_encoder: nn.Module, projection: nn.Module, vae: nn.Module
) -> None:
    """Write a Zero-1-to-3 folder (see guidance/zero123_reference.py) in half precision."""
    from guidance.zero123_reference import write_view_model
    from toybox.train_clip import MEAN, SPREAD

    unet, image_encoder, projection, vae = (part.to(torch.float16) for part in (unet, image_encoder, projection, vae))
    looks = [MEAN] * 3, [SPREAD] * 3
    write_view_model(
        folder, unet, vae, build_scheduler(), image_encoder, projection, "radius", *looks, any_background=True
    )


def build_t5() -> tuple[nn.Module, object]:
    """A `T5EncoderModel` of one layer, and a `T5Tokenizer` whose every token is a whole word."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = [("\N{LOWER ONE EIGHTH BLOCK}" + word if word != "," else word, -1.0) for word in vocabulary()]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + words, extra_ids=0, model_max_length=T5_LENGTH)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=T5_WIDTH // 4,
        d_ff=2 * T5_WIDTH,
        num_layers=1,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    config._attn_implementation = "eager"  # trains faster than the fused one on a CPU
    return T5EncoderModel(config), tokenizer


def build_pixel_unet() -> nn.Module:
    """The denoiser of tiny-if: like `build_unet`, one level more, on pictures of 32 x 32; three channels of output are for the variance."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=PIXELS,
        in_channels=3,
        out_channels=6,
        block_out_channels=(32, 64, 128, 192),
        layers_per_block=1,
        down_block_types=("DownBlock2D",) * 4,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("UpBlock2D",) * 4,
        cross_attention_dim=T5_WIDTH,
        encoder_hid_dim=T5_WIDTH,
        encoder_hid_dim_type="text_proj",
        attention_head_dim=4,  # the number of heads, whatever the name says
        norm_num_groups=16,
        resnet_time_scale_shift="scale_shift",
        addition_embed_type="text",
        addition_embed_type_num_heads=4,
    )


def build_pixel_scheduler():
    """DeepFloyd IF's noise schedule and learned variance, predicting v."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_schedule="squaredcos_cap_v2",
        variance_type="learned_range",
        clip_sample=True,
        prediction_type="v_prediction",
    )


def save_pixel_pipeline(folder: Path, unet: nn.Module, text_encoder: nn.Module) -> None:
    """Write an `IFPipeline` folder in half precision."""
    from diffusers import IFPipeline

    unet, text_encoder = (module.to(torch.float16) for module in (unet, text_encoder))
    pipeline = IFPipeline(
        build_t5()[1], text_encoder, unet, build_pixel_scheduler(), None, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, safe_serialization=True)
