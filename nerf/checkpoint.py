"""Checkpoints: everything that the future of a run depends on, in files that are whole or absent.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts (`Trainer.state`), written by torch.save and read back with weights_only,
so that a file from a stranger cannot run code. Names: `step_0000500.pt` while the run goes on, `step_0000500_final.pt` at its end.
"""

from pathlib import Path
from typing import Any

import torch

from errors import UserError, say
from files import atomic, make_folder

FORMAT = 1
KEEP = 2  # besides the final one


def save(folder: Path, state: dict[str, Any], final: bool = False) -> Path:
    """Write `state` (its 'step' names the file) and drop all but the newest `KEEP` checkpoints and the newest final one."""
    path = folder / f"step_{state['step']:07d}{'_final' if final else ''}.pt"
    with atomic(path) as beside:
        torch.save({"format": FORMAT, **state}, beside)
    found = newest_first(folder)
    finals = [p for p in found if p.stem.endswith("_final")]
    others = [p for p in found if p not in finals]
    for old in others[KEEP:] + finals[1:]:
        old.unlink(missing_ok=True)
    return path


def newest_first(folder: Path) -> list[Path]:
    """The checkpoints in `folder`, the one with the most steps first, a final one before an ordinary one of the same step."""
    return sorted(folder.glob("step_*.pt"), reverse=True)


def read(path: Path) -> dict[str, Any]:
    """The state in `path`, its tensors on the CPU; UserError, naming the file, if it is missing, broken or foreign."""
    if not path.is_file():
        raise UserError(f"--ckpt {path}: no such checkpoint: give a file, 'latest' or 'scratch'")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises a dozen kinds for a file that is cut short, empty, foreign or unsafe
        reason = str(error).strip().split("\n")[0][:80] or type(error).__name__
        raise UserError(f"{path}: broken checkpoint ({reason}): delete it, or start over with --ckpt scratch") from None
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise UserError(
            f"{path}: not a checkpoint of this program: give another --ckpt, or start over with --ckpt scratch"
        )
    return state


def choose(folder: Path, wanted: str) -> tuple[dict[str, Any], Path] | None:
    """The state that `--ckpt` asks for and its file, or None to start at step 0.

    'scratch': none, and what is there is set aside (`set_aside`). 'latest': the newest checkpoint in `folder`; if that is broken, the one
    before it, with a line said. Anything else is the path of a file.
    """
    if wanted == "scratch":
        set_aside(folder)
        return None
    if wanted != "latest":
        return read(Path(wanted)), Path(wanted)
    found = newest_first(folder)
    for i, path in enumerate(found):
        try:
            return read(path), path
        except UserError as error:
            if i + 1 == len(found):
                raise
            say(f"{error}; going back to {found[i + 1].name}")
    return None


def expected(folder: Path, wanted: str) -> bool:
    """Whether `choose` will find something: what a scene starts from does not matter then."""
    return wanted != "scratch" and (wanted != "latest" or bool(newest_first(folder)))


def set_aside(folder: Path) -> None:
    """Move the checkpoints of an earlier run into `folder/previous`, where 'latest' does not find them (nothing is lost)."""
    found = newest_first(folder)
    if found:
        previous = make_folder(folder / "previous")
        for path in found:
            path.replace(previous / path.name)
        say(f"--ckpt scratch: the earlier checkpoints are now in {previous}")


def check_prompt(state: dict[str, Any], path: Path, text: str) -> None:
    """UserError if the checkpoint was trained on another prompt."""
    if state.get("text") != text:
        raise UserError(
            f'{path} holds "{state.get("text")}" (step {state.get("step")}), not "{text}": choose another --workspace, '
            "or start over with --ckpt scratch"
        )


def load_scene(scene: torch.nn.Module, values: dict[str, Any], path: Path) -> None:
    """Put the tensors `values` into `scene`; UserError, naming the first tensor that does not fit, if the scene was built differently."""
    if hasattr(scene, "adapt"):
        scene.adapt(values)
    own = scene.state_dict()
    for name in sorted(own.keys() | values.keys()):
        here, there = own.get(name), values.get(name)
        if here is None or there is None or here.shape != there.shape:
            shapes = [("none" if t is None else str(list(t.shape))) for t in (there, here)]
            raise UserError(
                f"{path}: does not fit these options ({name}: {shapes[0]} in the file, {shapes[1]} here): "
                "give the --backbone, --particles and grid flags it was trained with, or --ckpt scratch"
            )
    scene.load_state_dict(values)
