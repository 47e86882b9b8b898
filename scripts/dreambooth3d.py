#!/usr/bin/env python3
"""DreamBooth3D: a few photographs of your own subject and a prompt in, a 3-D model of it out (Raj et al. 2023).

    python scripts/dreambooth3d.py --instance_dir photos --prompt "a photo of sks dog" --class_prompt "a photo of a dog" --sd_version 1.5 \\
        --workspace my_dog
    python scripts/dreambooth3d.py --instance_dir photos --prompt "a sks teddy" --class_prompt "a teddy" --workspace my_teddy -- --iters 300

Six stages: personalise (adapters/partial, adapters/full), nerf (a scene of the partial one), views (pseudo: that scene from all around, drawn
over with the full one), multiview (an adapter that learns from these and the photographs), final (its scene, which also looks at the
pictures), mesh. With --context one more: the subject in another guise. What is complete is not done again, what was stopped goes on: the
same command. WORKSPACE/report.html shows all of it. What stands after -- are flags of main.py, for the scenes.
"""

import argparse
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)]
sys.path.append(str(ROOT / "scripts"))

from train_dreambooth import GROUPS as LEARNING  # noqa: E402
from train_dreambooth import embedded, parser  # noqa: E402

from errors import INTERRUPTED, UserError, say, status_of  # noqa: E402
from files import claimed  # noqa: E402
from flags import Flag, convert  # noqa: E402
from layers import suggest  # noqa: E402
from nerf.batch_page import finished  # noqa: E402
from subject_state import STAGES, State, digest  # noqa: E402

USAGE = (
    "dreambooth3d.py --instance_dir FOLDER --prompt TEXT --class_prompt TEXT --workspace FOLDER [options] "
    "[-- flags of main.py]"
)

REQUIRED = ("instance_dir", "prompt", "class_prompt", "workspace")
OURS = (
    "--text",
    "--workspace",
    "--ckpt",
    "--lora",
    "--image_config",
    "--init_with",
    "--sd_version",
    "--hf_key",
    "--seed",
    "--dmtet",
    "--test",
)
RENAMED = {"instance_data_dir", "instance_prompt", "output_dir", "full", "start", "ckpt", "class_prompt"}
SETTINGS = "configs/dreambooth3d/{}.yaml"

# One row is one line, for the eye; the formatter would make ten of it.
# fmt: off
GROUPS: dict[str, tuple[Flag, ...]] = {
    "What to make": (
        Flag("instance_dir", "text", None, "the folder with the photographs, 3 to 20 of them"),
        Flag("prompt", "text", None, 'what they show, with a word for the subject that means nothing yet: "a photo of sks dog"'),
        Flag("class_prompt", "text", None, 'the same without that word: "a photo of a dog"'),
        Flag("workspace", "text", None, "the folder that receives everything"),
        Flag("stage", "text", "all", f"one of {', '.join(STAGES)}, or several separated by commas"),
        Flag("ckpt", "choice", "latest", "go on where a stopped run was, or start the chosen stages over", choices=("latest", "scratch")),
        Flag("context", "text", None, 'the subject in another guise as well: "a green sks teddy"'),
        Flag("context_weight", "float", 0.3, "how much of it there is, beside the prompt itself", range="[0, 1]"),
    ),
    "Pictures from all around": (
        Flag("num_views", "int", 24, "how many, in three rings", range="[3, 1000]"),
        Flag("strength", "float", 0.4, "how much of a render is drawn anew; 0.3 to 0.5 are usual", range="(0, 1]"),
        Flag("multiview_steps", "int", 0, "of the adapter that learns from them; 0: as many as the partial one had", "steps", ">= 0"),
        Flag("final_from", "choice", "scratch", "what the final scene begins as: empty, or the first one", choices=("scratch", "nerf")),
    ),
}
# fmt: on
GROUPS |= {
    title: tuple(flag for flag in group if flag.name not in RENAMED)
    for title, group in LEARNING.items()
    if title != "Result"
}
GROUPS["Result"] = tuple(flag for flag in LEARNING["Result"] if flag.name not in RENAMED)
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}


def read_options(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """default < configs/embedded-dreambooth.yaml (with the embedded model) < typed; `stages`: those to run; `flags`: for main.py. Raises
    UserError for what makes no sense."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    words, flags = words[:at], words[at + 1 :]
    typed, unknown = parser(GROUPS, __doc__, USAGE).parse_known_args(words)
    if unknown:
        hint = suggest(unknown[0].partition("=")[0], [f"--{name}" for name in FLAGS])
        raise UserError(f"unknown argument {unknown[0]}{hint}; flags of main.py stand behind --")
    for flag in flags:
        if flag.partition("=")[0] in OURS:
            raise UserError(f"{flag}: is chosen by this script; leave it out")
    values = {name: flag.default for name, flag in FLAGS.items()}
    values |= {name: convert(FLAGS[name], value, name) for name, value in _of_embedded(typed).items()}
    values |= {name: convert(FLAGS[name], value, f"--{name}") for name, value in vars(typed).items()}
    for name in REQUIRED:
        if not values[name]:
            raise UserError(f"--{name} is missing: {FLAGS[name].help}")
    chosen = [name.strip() for name in values["stage"].split(",")]
    if wrong := [name for name in chosen if name not in (*STAGES, "all")]:
        raise UserError(f"--stage {wrong[0]}: unknown{suggest(wrong[0], STAGES)}; one of all, {', '.join(STAGES)}")
    if "context" in chosen and not values["context"]:
        raise UserError(f"--context is missing: {FLAGS['context'].help}")
    everything = [name for name in STAGES if name != "context" or values["context"]]
    values["stages"] = everything if "all" in chosen else [name for name in STAGES if name in chosen]
    values["snapshots"] = values["snapshots"].split()
    names = {text.partition(":")[0] for text in values["snapshots"]}
    if not {"partial", "full"} <= names or "multiview" in names:
        raise UserError("--snapshots: must name partial and full here, such as partial:0.19 full:1")
    values |= {"instance_data_dir": values["instance_dir"], "instance_prompt": values["prompt"], "full": False}
    values |= {"output_dir": str(Path(values["workspace"]).expanduser() / "adapters"), "start": None, "flags": flags}
    return argparse.Namespace(**values)


def _of_embedded(typed: argparse.Namespace) -> dict[str, Any]:
    """What the model that comes with this program is used with; {} for another one."""
    import yaml

    learning = embedded(typed)
    return learning and {**learning, **yaml.safe_load((ROOT / SETTINGS.format("embedded")).read_text(encoding="utf-8"))}


# -- the stages ----------------------------------------------------------------------------------------------------------


def run(asked: argparse.Namespace) -> None:
    """The chosen stages, in their order, each unless it is complete. Raises UserError; SystemExit 130 where one was stopped."""
    from dreambooth import find_model, find_pictures, precision_of, read_pictures, recipe_of, taught

    source = find_model(asked)
    paths = find_pictures(Path(asked.instance_dir), "--instance_dir")
    read_pictures(paths, "--instance_dir", 64)  # a broken one is better noticed now
    recipe_of(asked)
    precision_of(asked, _device(asked))
    taught(source, asked.prompt, asked.class_prompt)
    if asked.context:
        taught(source, asked.context, asked.class_prompt)
    scene_flags(asked, "nerf")
    workspace = Path(asked.workspace).expanduser()
    with claimed(workspace):
        scratch = asked.ckpt == "scratch" and asked.stages[0] == "personalise"
        state = State(
            workspace, {"prompt": asked.prompt, "class": asked.class_prompt, "photographs": digest(paths)}, scratch
        )
        keys = _keys(asked, state)
        if asked.ckpt == "scratch":
            state.forget(asked.stages)
        for stage in asked.stages:
            if state.complete(stage, keys[stage]):
                say(f"{stage}: finished already")
                continue
            for needed in STAGES[stage]:
                if not state.complete(needed, keys[needed]):
                    raise UserError(
                        f"--stage {stage}: needs the stage {needed} first; run it, or all of them: --stage all"
                    )
            anew = state.begin(stage, keys[stage])
            say(f"{stage}: {'begins' if anew else 'goes on'}")
            began = time.monotonic()
            WORK[stage](asked, workspace, stage, anew)
            state.end(stage, time.monotonic() - began)
            _page(asked, workspace, state, paths)
        _page(asked, workspace, state, paths)
    say(f"{workspace / 'report.html'}: all stages")


def _page(asked: argparse.Namespace, workspace: Path, state: State, paths: list[Path]) -> None:
    from subject_state import write_report

    write_report(workspace, asked.prompt, asked.context, state, paths)


def _keys(asked: argparse.Namespace, state: State) -> dict[str, str]:
    """For each stage a text that changes with whatever its result depends on."""
    learning = {
        flag.name: getattr(asked, flag.name)
        for group in LEARNING.values()
        for flag in group
        if hasattr(asked, flag.name)
    }
    for name in (
        "instance_data_dir",
        "output_dir",
        "ckpt",
        "checkpointing_steps",
        "num_validation_images",
        "class_data_dir",
        "device",
    ):
        learning.pop(name, None)
    views = [asked.num_views, asked.strength]
    own: dict[str, Any] = {
        "personalise": [learning, state.inputs],
        "nerf": scene_flags(asked, "nerf"),
        "views": views,
        "multiview": asked.multiview_steps,
        "final": [*scene_flags(asked, "final"), asked.final_from],
        "mesh": scene_flags(asked, "mesh"),
        "context": [*scene_flags(asked, "context"), asked.context, asked.context_weight],
    }
    keys: dict[str, str] = {}
    for stage, needs in STAGES.items():
        settings = [path for path in [ROOT / SETTINGS.format(stage)] if path.is_file()]
        keys[stage] = digest(settings, [own[stage], *(keys[needed] for needed in needs)])
    return keys


def personalise(asked: argparse.Namespace, workspace: Path, stage: str, anew: bool) -> None:
    """adapters/partial and adapters/full."""
    import dreambooth
    from toybox.sheet import labelled_sheet

    dreambooth.run(argparse.Namespace(**{**vars(asked), "ckpt": "scratch" if anew else "latest"}), labelled_sheet)


def views(asked: argparse.Namespace, workspace: Path, stage: str, anew: bool) -> None:
    """pseudo/NNN_rgba.png, pseudo/views.csv, pseudo/sheet.png."""
    from pseudo_views import draw_over, rendered, write_views

    folder = workspace / "pseudo"
    for file in folder.glob("*.png") if anew else ():
        file.unlink()
    opt, prior, bank = _model(asked, workspace, "full")
    scene = rendered(workspace / "nerf", asked.num_views, prior.image_size, prior.device)
    drawn = draw_over(prior, bank, scene, folder, asked.strength, asked.sample_steps, asked.sample_scale, asked.seed)
    write_views(scene, drawn, folder)


def _model(asked: argparse.Namespace, workspace: Path, adapter: str | None) -> tuple[Any, Any, Any]:
    """The scene's options, the prior, with an adapter or without, and the prompt in all its wordings."""
    from guidance.embeddings import CachedEncoder
    from guidance.priors import load_prior, text_encoder
    from guidance.prompt import PromptBank
    from guidance.weights import resolve
    from options import parse

    opt = parse([*scene_flags(asked, "nerf"), *(["--lora", str(workspace / "adapters" / adapter)] if adapter else [])])
    from dreambooth import precision_of

    device = _device(asked)
    source, dtype = resolve(opt), precision_of(asked, device)
    encoder = CachedEncoder(text_encoder(source, device, dtype))
    bank = PromptBank(
        encoder, opt.text, opt.negative, opt.view_words, opt.view_blend, opt.angle_front, opt.angle_overhead
    )
    encoder.close()
    return opt, load_prior(source, device, dtype), bank


def multiview(asked: argparse.Namespace, workspace: Path, stage: str, anew: bool) -> None:
    """adapters/multiview: goes on from `partial` with the drawn pictures, each under its own view words, and the photographs."""
    from pseudo_views import learn

    learn(asked, workspace, anew, _device(asked))


def scene(asked: argparse.Namespace, workspace: Path, stage: str, anew: bool) -> None:
    """A run of main.py in WORKSPACE/STAGE."""
    pseudo, adapters = workspace / "pseudo" / "views.csv", workspace / "adapters"
    extra = {
        "nerf": ["--lora", str(adapters / "partial")],
        "final": ["--lora", str(adapters / "multiview"), "--image_config", str(pseudo)],
        "mesh": ["--lora", str(adapters / "multiview"), "--image_config", str(pseudo), "--dmtet", "--save_mesh"],
        "context": ["--lora", str(adapters / "multiview"), "--blend", f"{asked.context}:{asked.context_weight:g}"],
    }[stage]
    start = {"mesh": "final", "context": "final", "final": "nerf" if asked.final_from == "nerf" else None}.get(stage)
    extra += ["--init_with", str(workspace / start)] if start else []
    place = ["--workspace", str(workspace / stage), "--ckpt", "scratch" if anew else "latest"]
    status = call([sys.executable, str(ROOT / "main.py"), *scene_flags(asked, stage), *extra, *place])
    if status:
        raise SystemExit(status) if status != 2 else UserError(f"{stage}: main.py says why, above")
    if not finished(workspace / stage):
        say(f"{workspace / stage}: was stopped; the same command goes on")
        raise SystemExit(INTERRUPTED)


def scene_flags(asked: argparse.Namespace, stage: str) -> list[str]:
    """What main.py is told of the model and the scene, places aside."""
    model = ["--sd_version", asked.sd_version]
    if asked.pretrained_model_name_or_path:
        model = ["--hf_key", asked.pretrained_model_name_or_path]
    device = [] if asked.device == "auto" else ["--device", asked.device]
    fast = [] if "-O2" in asked.flags else ["-O"]
    config = ["--config", SETTINGS.format(stage)]
    return ["--text", asked.prompt, *fast, *config, *model, "--seed", str(asked.seed), *device, *asked.flags]


def call(command: Sequence[str]) -> int:
    """A process to its end, its exit status; it does not outlive this one, however that ends."""
    process = subprocess.Popen(command, preexec_fn=_die_with_parent)
    try:
        while True:
            with suppress(KeyboardInterrupt):  # it heard that as well, and knows what to do
                return process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()


def _die_with_parent() -> None:
    """On Linux: a SIGTERM, at which a run saves, when the parent has gone."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)


def _device(asked: argparse.Namespace) -> Any:
    import torch

    return torch.device("cuda" if asked.device != "cpu" and torch.cuda.is_available() else "cpu")


WORK = {
    "personalise": personalise,
    "nerf": scene,
    "views": views,
    "multiview": multiview,
    "final": scene,
    "mesh": scene,
    "context": scene,
}


def main(argv: Sequence[str] | None = None) -> int:
    """The pipeline; returns the exit status."""
    return status_of(lambda: run(read_options(argv)))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    sys.exit(main())
