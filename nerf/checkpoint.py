"""Checkpoints: everything that the future of a run depends on, in files that are whole or absent.

A checkpoint is a dict of tensors, numbers, strings, lists and dicts (`Trainer.state`), written by torch.save and read back with weights_only,
so that a file from a stranger cannot run code. Names: `step_0000500.pt` while the run goes on, `step_0000500_final.pt` at its end.
"""

import io
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from errors import UserError, say
from files import atomic, make_folder

FORMAT = 1
KEEP = 2  # besides the final one


def save(folder: Path, state: dict[str, Any], final: bool = False) -> Path:
    """Write `state` (its 'step' names the file) and drop all but the newest `KEEP` checkpoints and the newest final one up to this step.

    UserError if it cannot be written; then everything is as it was.
    """
    path = folder / f"step_{state['step']:07d}{'_final' if final else ''}.pt"
    try:
        with atomic(path) as beside:
            write({"format": FORMAT, **state}, beside)
    except UserError as error:
        found = newest_first(folder)
        last = f"; the same command then goes on from {found[0].name}" if found else ""
        raise UserError(f"{error}{last}") from None
    # What has more steps is broken or of another future: it must not push this one out.
    found = [p for p in newest_first(folder) if p.stem <= path.stem]
    finals = [p for p in found if p.stem.endswith("_final")]
    others = [p for p in found if p not in finals]
    for old in others[KEEP:] + finals[1:]:
        old.unlink(missing_ok=True)
    return path


def write(state: dict[str, Any], path: Path) -> None:
    """By way of the memory: of a full disk torch.save knows only that some position was not the one it expected."""
    whole = io.BytesIO()
    torch.save(state, whole)
    path.write_bytes(whole.getbuffer())


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


def set_aside(folder: Path, beyond: int = -1, keep: Path | None = None) -> None:
    """Move the checkpoints of more than `beyond` steps, but not `keep`, into a new folder `previous` in `folder`, where 'latest' does not find
    them (nothing is lost)."""
    found = [p for p in newest_first(folder) if _step(p) > beyond and not (keep and keep.exists() and p.samefile(keep))]
    if not found:
        return
    previous, number = folder / "previous", 1
    while previous.exists():
        number += 1
        previous = folder / f"previous_{number}"
    make_folder(previous)
    for path in found:
        path.replace(previous / path.name)
    say(f"the earlier checkpoints from {found[-1].name} on are now in {previous}")


def _step(path: Path) -> int:
    digits = path.stem.removeprefix("step_").removesuffix("_final")
    return int(digits) if digits.isdigit() else 0


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


def random_state(generators: dict[str, torch.Generator], device: torch.device) -> dict[str, Any]:
    """Where the random numbers stand: those of the generators and torch's own."""
    state: dict[str, Any] = {"generators": {name: generator.get_state() for name, generator in generators.items()}}
    state["torch_random"] = torch.get_rng_state()
    return state | ({"cuda_random": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random(state: dict[str, Any], generators: dict[str, torch.Generator], device: torch.device) -> None:
    """Go on from there; numbers of another kind of device cannot go on here, and begin anew."""
    for name, generator in generators.items():
        with suppress(RuntimeError, KeyError):  # it may also be one that has been added since
            generator.set_state(state["generators"][name])
    torch.set_rng_state(state["torch_random"])
    if device.type == "cuda" and "cuda_random" in state:
        torch.cuda.set_rng_state(state["cuda_random"], device)
