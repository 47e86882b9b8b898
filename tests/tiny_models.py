"""Random Stable Diffusion folders of a megabyte, written and read by the real code: what the big ones are in small.

Four kinds: the network predicts eps or v; the autoencoder is AutoencoderKL (a posterior, factor 0.18215) or AutoencoderTiny.
"""

from pathlib import Path

import torch

from guidance.weights import quiet

KINDS = {
    "eps-kl": ("epsilon", "kl"),
    "v-kl": ("v_prediction", "kl"),
    "eps-tiny": ("epsilon", "tiny"),
    "v-tiny": ("v_prediction", "tiny"),
}
WORDS = (
    "a red blue chair hamburger teddy front back side left right overhead view".split(),
    16,
)  # words, context length


def build_folder(folder: Path, kind: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> Path:
    """Writes a random pipeline: 32 x 32 pictures, 4 x 8 x 8 latents, T = 1000."""
    from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    prediction, autoencoder = KINDS[kind]
    torch.manual_seed(seed)
    tokenizer = word_tokenizer(folder, *WORDS)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=WORDS[1],
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    for (
        parameter
    ) in text_encoder.parameters():  # the usual initial weights are too small for words to make a difference
        parameter.data.normal_(0, 0.3) if parameter.ndim > 1 else None
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        attention_head_dim=2,
        norm_num_groups=4,
    )
    scheduler = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )
    pipe = StableDiffusionPipeline(
        autoencoder_of(autoencoder), text_encoder, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    with quiet():
        pipe.to(dtype=dtype).save_pretrained(folder)
    return folder


def autoencoder_of(kind: str):
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
        scaling_factor=0.18215,
    )


def word_tokenizer(folder: Path, words: list[str], length: int):
    """A CLIP tokenizer in which each word is one token: every merge extends a word's beginning by one letter."""
    import json

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
    source = folder / "tokenizer"
    source.mkdir(parents=True, exist_ok=True)
    (source / "vocab.json").write_text(json.dumps({token: number for number, token in enumerate(tokens)}))
    (source / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]))
    return CLIPTokenizer.from_pretrained(str(source), model_max_length=length)
