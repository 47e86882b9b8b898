"""Random pipelines of a megabyte or less, written by the real code: what the big ones are in small.

`build_folder(folder, kind)` writes one of KINDS (Stable Diffusion 1 and 2: the network predicts eps or v; the autoencoder is AutoencoderKL,
with a posterior and factor 0.18215, or AutoencoderTiny) or of FAMILIES (the other pipeline classes).
"""

import json
from pathlib import Path

import torch

from guidance.weights import quiet

KINDS = {
    "eps-kl": ("epsilon", "kl"),
    "v-kl": ("v_prediction", "kl"),
    "eps-tiny": ("epsilon", "tiny"),
    "v-tiny": ("v_prediction", "tiny"),
}
FAMILIES = ("xl-eps", "xl-v", "sd3", "sd3-no-t5", "if-eps", "if-v", "if-upscaler", "pix2pix")
WORDS = (
    "a red blue chair hamburger teddy front back side left right overhead view".split(),
    16,
)  # words, context length
DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}  # Stable Diffusion's


def build_folder(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a random pipeline; T = 1000. Pictures are 32 x 32; latents are 4 x 8 x 8, IF's 3 x 16 x 16, its upscaler's 3 x 32 x 32."""
    torch.manual_seed(seed)
    if kind in KINDS:
        pipe = _stable_diffusion(folder, *KINDS[kind])
    elif kind == "pix2pix":
        pipe = _pix2pix(folder)
    elif kind in ("xl-eps", "xl-v"):
        pipe = _stable_diffusion_xl(folder, {"xl-eps": "epsilon", "xl-v": "v_prediction"}[kind])
    elif kind in ("sd3", "sd3-no-t5"):
        pipe = _stable_diffusion_3(folder, kind == "sd3")
    elif kind == "if-upscaler":
        pipe = _deepfloyd_upscaler()
    else:
        pipe = _deepfloyd(kind == "if-v")
    with quiet():
        pipe.to(dtype=dtype).save_pretrained(folder)
    return folder


def _stable_diffusion(folder: Path, prediction: str, autoencoder: str):
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    tokenizer = word_tokenizer(folder, *WORDS)
    scheduler = DDIMScheduler(
        **DIFFUSION, clip_sample=False, set_alpha_to_one=False, steps_offset=1, prediction_type=prediction
    )
    encoder, unet = clip_encoder(tokenizer), _unet(8, 4, 4, 16)
    parts = autoencoder_of(autoencoder), encoder, tokenizer, unet, scheduler, None, None
    return StableDiffusionPipeline(*parts, requires_safety_checker=False)


def _pix2pix(folder: Path):
    from diffusers import EulerAncestralDiscreteScheduler, StableDiffusionInstructPix2PixPipeline

    tokenizer = word_tokenizer(folder, *WORDS)
    encoder, unet = clip_encoder(tokenizer), _unet(8, 8, 4, 16)
    scheduler = EulerAncestralDiscreteScheduler(**DIFFUSION, steps_offset=1)
    parts = autoencoder_of("kl"), encoder, tokenizer, unet, scheduler, None, None
    return StableDiffusionInstructPix2PixPipeline(*parts, requires_safety_checker=False)


def _stable_diffusion_xl(folder: Path, prediction: str):
    """Two CLIPs of 16 and 32; a pooled vector of 24; six numbers of 8 about the size."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizers = [word_tokenizer(folder, *WORDS, name=name) for name in ("tokenizer", "tokenizer_2")]
    encoders = clip_encoder(tokenizers[0], layers=2), clip_encoder(tokenizers[1], 32, 2, projection=24)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    unet = _unet(8, 4, 4, 48, projection_class_embeddings_input_dim=24 + 6 * 8, **added)
    with torch.no_grad():  # as first drawn, the size makes a difference of 1e-4
        unet.add_embedding.linear_1.weight[:, 24:] *= 10
    scheduler = EulerDiscreteScheduler(**DIFFUSION, steps_offset=1, prediction_type=prediction)
    return StableDiffusionXLPipeline(
        autoencoder_of("kl"), *encoders, *tokenizers, unet, scheduler, add_watermarker=False
    )


def _stable_diffusion_3(folder: Path, t5: bool):
    """Two CLIPs of 16 and 24, pooled 16 + 24; a T5 of 48, or none and noise levels that depend on the picture's size."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizers = [word_tokenizer(folder, *WORDS, name=name) for name in ("tokenizer", "tokenizer_2")]
    encoders = [clip_encoder(tokenizers[i], width, 2, projection=width) for i, width in enumerate((16, 24))]
    encoder_3, tokenizer_3 = t5_encoder(48) if t5 else (None, None)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=48,
        caption_projection_dim=32,
        pooled_projection_dim=40,
        out_channels=4,
        pos_embed_max_size=12,
        qk_norm="rms_norm",
    )
    _enlarge(transformer, 0.2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=not t5)
    parts = zip(encoders, tokenizers, strict=True)
    both = [part for pair in parts for part in pair]
    autoencoder = autoencoder_of("kl", scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False)
    return StableDiffusion3Pipeline(transformer, scheduler, autoencoder, *both, encoder_3, tokenizer_3)


def _deepfloyd(v_prediction: bool):
    from diffusers import DDPMScheduler, IFPipeline

    unet = _unet(16, 3, 6, 32, **_T5_TEXT)
    learned = {"variance_type": "learned_range", "clip_sample": True}
    if (
        v_prediction
    ):  # DeepFloyd's own schedule, at whose end a random network's guess at the picture would know no bounds
        scheduler = DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", **learned)
    else:
        scheduler = DDPMScheduler(beta_end=0.004, beta_schedule="linear", **learned)
    return IFPipeline(*_t5_pair(), unet, scheduler, None, None, None, requires_safety_checker=False)


def _deepfloyd_upscaler():
    from diffusers import DDPMScheduler, IFSuperResolutionPipeline

    unet = _unet(32, 6, 6, 32, class_embed_type="timestep", **_T5_TEXT)
    scheduler = DDPMScheduler(beta_end=0.004, beta_schedule="linear", variance_type="learned_range")
    noising = DDPMScheduler(beta_schedule="squaredcos_cap_v2")
    parts = *_t5_pair(), unet, scheduler, noising, None, None, None
    return IFSuperResolutionPipeline(*parts, requires_safety_checker=False)


_T5_TEXT = {
    "encoder_hid_dim": 24,
    "encoder_hid_dim_type": "text_proj",
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 4,
    "cross_attention_norm": "group_norm",
}


def _unet(size: int, in_channels: int, out_channels: int, text_width: int, **more):
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=size,
        in_channels=in_channels,
        out_channels=out_channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=text_width,
        attention_head_dim=2,
        norm_num_groups=4,
        **more,
    )


def clip_encoder(tokenizer, width: int = 16, layers: int = 1, projection: int = 0):
    """A random CLIP text encoder for a tokenizer, with a projection of the whole text if `projection` (its width) is not 0."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=2,
        projection_dim=projection or width,
        max_position_embeddings=WORDS[1],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return _enlarge((CLIPTextModelWithProjection if projection else CLIPTextModel)(config), 0.3)


def t5_encoder(width: int):
    """(a random T5 encoder, a tokenizer whose every token is a whole word)."""
    from transformers import T5Config, T5EncoderModel, T5Tokenizer

    words = [(f"\N{LOWER ONE EIGHTH BLOCK}{word}", -1.0) for word in WORDS[0]] + [(",", -1.0)]
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\N{LOWER ONE EIGHTH BLOCK}", -2.0)]
    tokenizer = T5Tokenizer(vocab=special + words, extra_ids=0)
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=width // 4,
        d_ff=2 * width,
        num_layers=1,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config), tokenizer


def _t5_pair():
    encoder, tokenizer = t5_encoder(24)
    return tokenizer, encoder


def _enlarge(network, spread: float):
    """The usual initial weights are too small for words to make a difference."""
    for parameter in network.parameters():
        parameter.data.normal_(0, spread) if parameter.ndim > 1 else None
    return network


def autoencoder_of(kind: str, **more):
    """A random autoencoder, 4x smaller latents."""
    from diffusers import AutoencoderKL, AutoencoderTiny

    if kind == "tiny":
        return AutoencoderTiny(
            encoder_block_out_channels=(8, 8, 8),
            decoder_block_out_channels=(8, 8, 8),
            num_encoder_blocks=(1, 1, 1),
            num_decoder_blocks=(1, 1, 1),
            scaling_factor=0.84,
        )
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **({"scaling_factor": 0.18215} | more),
    )


def word_tokenizer(folder: Path, words: list[str], length: int, name: str = "tokenizer"):
    """A CLIP tokenizer in which each word is one token: every merge extends a word's beginning by one letter."""
    from transformers import CLIPTokenizer

    letters = [chr(code) for code in range(33, 127)] + [chr(code) for code in range(161, 256)]
    tokens, merges = letters + [f"{letter}</w>" for letter in letters], []
    for word in words:
        start = word[0]
        for letter in [*word[1:-1], f"{word[-1]}</w>"] if len(word) > 1 else []:
            merge = f"{start} {letter}"
            start += letter
            if merge not in merges:
                merges.append(merge)
                tokens.append(start)
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    source = folder / name
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer.from_pretrained(str(source), model_max_length=length)


class Folders(dict):
    """kind -> folder, written when it is first asked for."""

    def __init__(self, root: Path):
        super().__init__()
        self.root = root

    def __missing__(self, kind: str) -> Path:
        self[kind] = build_folder(self.root / kind, kind)
        return self[kind]
