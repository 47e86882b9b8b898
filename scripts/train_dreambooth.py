#!/usr/bin/env python3
"""DreamBooth: teach a diffusion model a subject from a few photographs; the result is a small adapter (LoRA) for main.py --lora.

    python scripts/train_dreambooth.py --instance_data_dir photos --instance_prompt "a sks teddy" --class_prompt "a teddy" --output_dir my_teddy
    python main.py --lora my_teddy/full --text "a sks teddy" -O

Options are named as in diffusers' DreamBooth scripts. The same command again goes on where a stopped one was; what is complete is not
done again. With the model that comes with this program, defaults come from configs/dreambooth/embedded.yaml.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from errors import UserError, status_of  # noqa: E402
from flags import Flag, convert  # noqa: E402
from layers import CONFIGS, suggest  # noqa: E402
from options import Parser  # noqa: E402

EMBEDDED = CONFIGS / "dreambooth" / "embedded.yaml"
SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")
VERSIONS = ("embedded", "1.5", "2.0", "2.1", "xl")
REQUIRED = ("instance_data_dir", "instance_prompt", "output_dir")

# One row is one line, for the eye; the formatter would make ten of it.
# fmt: off
GROUPS: dict[str, tuple[Flag, ...]] = {
    "Subject": (
        Flag("instance_data_dir", "text", None, "the folder with the photographs, 3 to 20 of them"),
        Flag("instance_prompt", "text", None, 'what they show, with a word for the subject that means nothing yet: "a photo of sks dog"'),
        Flag("class_prompt", "text", None, 'the same without that word: "a photo of a dog"'),
        Flag("instance_views", "choice", 0, "a set of view words; each photograph's prompt gets those that suit it best, by the model's own opinion",
             choices=(0, 4, 8)),
        Flag("resolution", "int", 0, "side of the pictures; 0: as the model's own", "pixels", ">= 0"),
    ),
    "Model": (
        Flag("pretrained_model_name_or_path", "text", None, "a diffusers model by its hub id or folder; takes the place of --sd_version"),
        Flag("sd_version", "choice", "embedded", "the one that comes with this program, or a Stable Diffusion to download", choices=VERSIONS),
        Flag("device", "choice", "auto", "where to compute", choices=("auto", "cpu", "cuda")),
        Flag("mixed_precision", "choice", "no", "of the weights that do not learn; with --full of the computation", choices=("no", "fp16", "bf16")),
        Flag("gradient_checkpointing", "flag", False, "less memory, more time"),
    ),
    "What learns": (
        Flag("rank", "int", 4, "of the adapter's matrices", range="> 0"),
        Flag("lora_alpha", "float", 0, "the adapter counts alpha / rank; 0: the rank", range=">= 0"),
        Flag("full", "flag", False, "the denoiser's own weights instead of an adapter; each snapshot is a whole model"),
        Flag("train_text_encoder", "flag", False, "an adapter of the text encoder, too"),
        Flag("start", "text", None, "an adapter to go on from, of the same rank"),
    ),
    "Learning": (
        Flag("max_train_steps", "int", 800, "how long", "steps", "> 0"),
        Flag("snapshots", "text", "partial:0.19 full:1", "what to keep, as NAME:STEP ...; up to 1 a share of --max_train_steps"),
        Flag("learning_rate", "float", 1e-4, "AdamW's; 5e-6 is usual with --full", range="> 0"),
        Flag("train_batch_size", "int", 1, "photographs in a step, and as many class pictures", range="> 0"),
        Flag("gradient_accumulation_steps", "int", 1, "batches in a step", range="> 0"),
        Flag("lr_scheduler", "choice", "constant", "of the learning rate", choices=SCHEDULERS),
        Flag("lr_warmup_steps", "int", 0, "over which it rises, where the scheduler does that", "steps", ">= 0"),
        Flag("adam_weight_decay", "float", 1e-2, "AdamW's", range=">= 0"),
        Flag("max_grad_norm", "float", 1.0, "a longer gradient is cut", range="> 0"),
        Flag("seed", "int", 0, "every random choice follows from it", range=">= 0"),
    ),
    "Prior preservation (the class stays what it was)": (
        Flag("with_prior_preservation", "flag", True, "learn the model's own pictures of the class beside the photographs"),
        Flag("prior_loss_weight", "float", 1.0, "their weight", range=">= 0"),
        Flag("num_class_images", "int", 100, "how many", range="> 0"),
        Flag("class_data_dir", "text", None, "where they are kept; what it lacks is drawn; default: OUTPUT_DIR/class"),
        Flag("class_views", "choice", 0, "sets of view words that their prompts take turns with", choices=(0, 4, 8)),
        Flag("sample_steps", "int", 30, "of a picture that the model draws", "steps", "> 0"),
        Flag("sample_scale", "float", 7.5, "guidance of such pictures", range=">= 0"),
    ),
    "Result": (
        Flag("output_dir", "text", None, "the folder that receives everything"),
        Flag("num_validation_images", "int", 4, "views of each snapshot on samples.png", range="[0, 4]"),
        Flag("checkpointing_steps", "int", 100, "how often everything is kept, for going on after a stop", "steps", "> 0"),
        Flag("ckpt", "choice", "latest", "go on where a stopped run was, or start over", choices=("latest", "scratch")),
    ),
}
# fmt: on
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """default < configs/dreambooth/embedded.yaml (with the embedded model) < typed. Raises UserError for what makes no sense."""
    typed, unknown = parser().parse_known_args(argv)
    if unknown:
        switches = [f"--no_{flag.name}" for flag in FLAGS.values() if flag.kind == "flag"]
        known = [f"--{name}" for name in FLAGS] + switches
        raise UserError(f"unknown argument {unknown[0]}{suggest(unknown[0].partition('=')[0], known)}")
    values = {name: flag.default for name, flag in FLAGS.items()}
    values |= {name: convert(FLAGS[name], value, f"{EMBEDDED.name} {name}") for name, value in embedded(typed).items()}
    values |= {name: convert(FLAGS[name], value, f"--{name}") for name, value in vars(typed).items()}
    for name in REQUIRED:
        if not values[name]:
            raise UserError(f"--{name} is missing: {FLAGS[name].help}")
    if values["with_prior_preservation"] and not values["class_prompt"]:
        raise UserError(
            f"--class_prompt is missing: {FLAGS['class_prompt'].help} (or leave prior preservation out: --no_with_prior_preservation)"
        )
    values["snapshots"] = values["snapshots"].split()
    return argparse.Namespace(**values)


def embedded(typed: argparse.Namespace) -> dict[str, Any]:
    """What the model that comes with this program is personalised with; {} for another one."""
    if "pretrained_model_name_or_path" in typed or getattr(typed, "sd_version", "embedded") != "embedded":
        return {}
    import yaml

    return yaml.safe_load(EMBEDDED.read_text(encoding="utf-8"))


def parser(groups: dict = GROUPS, about: str | None = __doc__, usage: str | None = None) -> Parser:
    """--help in groups, with units, ranges and defaults."""
    from options import add_flag

    result = Parser(
        description=about,
        usage=usage,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, group in groups.items():
        section = result.add_argument_group(title)
        for flag in group:
            add_flag(section, flag)
    return result


def main(argv: Sequence[str] | None = None) -> int:
    """Personalise; returns the exit status."""

    def work() -> None:
        options = read_options(argv)
        from dreambooth import run, tell
        from toybox.sheet import labelled_sheet

        tell(run(options, labelled_sheet), options)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
