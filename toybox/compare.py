"""Run every distillation method on a few prompts and measure what it makes of them; the table goes into docs/distillation.md.

python -m toybox.compare                                   every method and variant, five prompts each
python -m toybox.compare --methods csd "sds --IF" --reuse  some of them; what has been measured before stays in the table
python -m toybox.compare --rewrite                         no runs: the table again from the results that are there
python -m toybox.compare --methods csd -- --iters 300      what follows -- goes to main.py

A run is main.py's own, as in toybox.evaluate. Its figures lie beside its workspace (JSON, and a picture from the front), so that the
table can be made in pieces. Results with other flags after -- are not mixed in.
"""

import argparse
import json
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import UInt8

import files
from errors import UserError, say, status_of
from files import atomic
from guidance.methods import METHODS
from options import Parser
from toybox import evaluate
from toybox.sheet import labelled_sheet, sheet_size

PROMPTS = ("a hamburger", "a red chair", "a pink teddy", "a green car", "a mushroom")
# What is measured beside the plain methods: the name of a row is its flags.
VARIANTS: dict[str, tuple[str, ...]] = {
    "sds --perpneg": ("--distill", "sds", "--perpneg"),
    "sds --t_schedule dreamtime": ("--distill", "sds", "--t_schedule", "dreamtime"),
    "sds --weighting fantasia3d": ("--distill", "sds", "--weighting", "fantasia3d"),
    "sds --IF": ("--distill", "sds", "--IF"),
    "csd --perpneg": ("--distill", "csd", "--perpneg"),
    "vsd --lora_scale 0.5": ("--distill", "vsd", "--lora_scale", "0.5"),
}
CASES: dict[str, tuple[str, ...]] = {name: ("--distill", name) for name in METHODS} | VARIANTS
BEGIN, END = "<!-- table of toybox.compare -->", "<!-- end of the table -->"
LARGEST = 400_000  # bytes of the picture
TILES = (112, 96, 80, 64, 48)  # pixels a side, the first that keeps the picture small enough

Result = dict[str, Any]  # of a run: method, prompt, flags, iou, color, rank, face, seconds, speed (steps per second)


# -- runs --------------------------------------------------------------------------------------------------------------


def slug(text: str) -> str:
    """A name for files."""
    return re.sub(r"[^A-Za-z0-9.]+", "_", text).strip("_")


def workspace_of(folder: Path, case: str, prompt: str) -> Path:
    """Where a run's own files go; its figures lie beside it, with the ending .json and .png."""
    return folder / slug(case) / slug(prompt)


def beside(workspace: Path, ending: str) -> Path:
    """The file of results that belongs to a workspace."""
    return workspace.with_name(f"{workspace.name}.{ending}")


def arguments(case: str, extra: Sequence[str]) -> list[str]:
    """What main.py is told besides the prompt and what toybox.evaluate says."""
    return [*CASES[case], *extra]


def known_result(folder: Path, case: str, prompt: str, extra: Sequence[str]) -> Result | None:
    """What was measured before with the same flags, if anything. Raises UserError for a file that cannot be read."""
    path = beside(workspace_of(folder, case, prompt), "json")
    if not path.is_file():
        return None
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it and measure again with --reuse") from None
    return result if result["flags"] == arguments(case, extra) else None


def train(folder: Path, case: str, prompt: str, extra: Sequence[str], reuse: bool, one_thread: bool) -> str:
    """One run; "" or why it failed. With `reuse` nothing happens if it was finished with the same flags."""
    workspace = workspace_of(folder, case, prompt)
    asked, note = arguments(case, extra), beside(workspace, "flags")
    if reuse and evaluate.finished(workspace) and note.is_file() and note.read_text() == shlex.join(asked):
        return ""
    for stale in (note, beside(workspace, "json")):
        stale.unlink(missing_ok=True)
    try:
        evaluate.run(prompt, workspace, asked, one_thread)
    except RuntimeError as error:
        return str(error)
    if not evaluate.finished(workspace):
        return f"{prompt}: stopped before its end"
    with atomic(note) as part:  # only now: what an interrupted run left behind is not what was asked for
        part.write_text(shlex.join(asked), encoding="utf-8")
    return ""


def judge_run(folder: Path, case: str, prompt: str, extra: Sequence[str], judge: evaluate.Judge) -> Result:
    """Measures a finished run and writes its figures and its picture from the front."""
    workspace = workspace_of(folder, case, prompt)
    found = evaluate.measure(prompt, workspace, judge)
    seconds = evaluate.logged_times(workspace).get("training", 0.0)
    steps = max(int(path.stem.split("_")[1]) for path in (workspace / "checkpoints").glob("step_*_final.pt"))
    result = {"method": case, "prompt": prompt, "flags": arguments(case, extra)}
    result |= {name: found[name] for name in ("iou", "color", "rank", "face")}
    result |= {"seconds": seconds, "speed": steps / max(seconds, 1e-9)}
    front = found["picture"][:, : evaluate.SIZE]
    save(beside(workspace, "png"), (front * 255).round().byte().numpy())
    with atomic(beside(workspace, "json")) as part:
        part.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return result


def collect(folder: Path, extra: Sequence[str]) -> dict[str, dict[str, Result]]:
    """All results that were measured with these flags, by case and prompt."""
    table: dict[str, dict[str, Result]] = {}
    for case in CASES:
        results = {prompt: known_result(folder, case, prompt, extra) for prompt in PROMPTS}
        results = {prompt: result for prompt, result in results.items() if result is not None}
        if results:
            table[case] = results
    return table


# -- what is shown -----------------------------------------------------------------------------------------------------


def markdown(table: Mapping[str, Mapping[str, Result]], extra: Sequence[str] = (), picture: str = "") -> str:
    """The table, what its columns mean, and the picture of that name."""
    if not table:
        raise UserError("no results to make a table of; run some methods first (leave out --rewrite)")
    prompts = [prompt for prompt in PROMPTS if any(prompt in results for results in table.values())]
    columns = ["method", *prompts, "mean IoU", "color error", "R-Precision", "seconds", "steps/s"]
    lines = ["| " + " | ".join(columns) + " |", "|---|" + "---:|" * (len(columns) - 1)]
    for case, results in table.items():
        rows = list(results.values())
        cells = [_cell(results.get(prompt)) for prompt in prompts]
        means = [sum(row[name] for row in rows) / len(rows) for name in ("iou", "color", "seconds", "speed")]
        first = sum(row["rank"] == 1 for row in rows)
        figures = [
            f"{means[0]:.3f}",
            f"{means[1]:.3f}",
            f"{first} of {len(rows)}",
            f"{means[2]:.0f}",
            f"{means[3]:.1f}",
        ]
        lines.append("| " + " | ".join([f"`{case}`", *cells, *figures]) + " |")
    flags = f" -- {shlex.join(extra)}" if extra else ""
    return f"""\
Made by `python -m toybox.compare{flags}`: the embedded model, one seed for all, its presets.

{chr(10).join(lines)}

- Under each prompt: IoU of the silhouettes with the true object's (mean over 8 azimuths), and in brackets the place of the prompt among
  {len(evaluate.PROMPTS)} for tiny-clip, shown 8 views, where that is not the first. R-Precision: how many prompts come first.
- color error: mean absolute RGB difference (0 to 1) where both have the object.
- seconds, steps/s: of the training, mean over the prompts.

![What each method made of each prompt, from the front]({picture})
"""


def _cell(result: Result | None) -> str:
    if result is None:
        return ""
    return f"{result['iou']:.3f}" + ("" if result["rank"] == 1 else f" ({result['rank']})")


def put_between(text: str, content: str, place: str = "the file") -> str:
    """The text with `content` between its two marks. Raises UserError if it has not exactly one of each, in order."""
    return files.put_between(text, (BEGIN, END), content, place)


def read_document(path: Path) -> str:
    """The file that receives the table; UserError if it cannot be read or lacks its marks."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: cannot be read ({error.strerror})") from None
    put_between(text, "", f"--out {path}")
    return text


def draw_sheet(folder: Path, table: Mapping[str, Mapping[str, Result]], tile: int) -> UInt8[np.ndarray, "H W 3"]:
    """A row per case, a column per prompt: what was made, from the front."""
    from PIL import Image

    prompts = [prompt for prompt in PROMPTS if any(prompt in results for results in table.values())]

    def front(case: str, prompt: str) -> np.ndarray | None:
        path = beside(workspace_of(folder, case, prompt), "png")
        return np.asarray(Image.open(path).convert("RGB")) if prompt in table[case] and path.is_file() else None

    rows = {case.replace(" ", "\n", 1): [front(case, prompt) for prompt in prompts] for case in table}
    return labelled_sheet(rows, prompts, "What each method made, seen from the front", tile)


def save(path: Path, picture: UInt8[np.ndarray, "H W 3"], colors: int = 0) -> int:
    """Write a PNG, with so many colors at most if that is not 0; returns its size in bytes."""
    from PIL import Image

    image = Image.fromarray(picture)
    with atomic(path) as part:
        (image.quantize(colors, dither=Image.Dither.NONE) if colors else image).save(part, optimize=True)
    return path.stat().st_size


def save_small(path: Path, folder: Path, table: Mapping[str, Mapping[str, Result]]) -> None:
    """The sheet, with tiles as large as the limit on its size allows."""
    for tile in TILES:
        if save(path, draw_sheet(folder, table, tile), colors=256) <= LARGEST:
            return
    raise UserError(f"{path}: larger than {LARGEST} bytes even with the smallest tiles {sheet_size(1, 1, TILES[-1])}")


# -- the program -------------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """What was typed; `extra` is what goes to main.py."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--methods", nargs="+", choices=CASES, default=list(CASES), metavar="NAME", help="default: " + ", ".join(CASES)
    )
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of: {', '.join(PROMPTS)}")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time, one thread each if more than one")
    parser.add_argument(
        "--reuse", action="store_true", help="only what is missing: results and runs that are there count"
    )
    parser.add_argument(
        "--rewrite", action="store_true", help="no runs: table and pictures from the results that are there"
    )
    parser.add_argument("--folder", type=Path, default=Path("evaluation/methods"), help="where the workspaces go")
    parser.add_argument(
        "--out",
        type=Path,
        default=evaluate.ROOT / "docs" / "distillation.md",
        help="the file with the marks for the table",
    )
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    args = parser.parse_args(argv[:cut])
    args.extra, args.folder = argv[cut + 1 :], args.folder.absolute()
    for name, most in (("prompts", len(PROMPTS)), ("jobs", 64)):
        if not 1 <= getattr(args, name) <= most:
            raise UserError(f"--{name} {getattr(args, name)}: must be in [1, {most}]")
    return args


def make_results(args: argparse.Namespace) -> int:
    """Runs and measures what was asked for; returns how many runs failed (each is said, the others go on)."""
    missing = [
        (case, prompt)
        for case in dict.fromkeys(args.methods)
        for prompt in PROMPTS[: args.prompts]
        if not (args.reuse and known_result(args.folder, case, prompt, args.extra))
    ]
    if not missing:
        return 0
    judge, failures = evaluate.Judge(evaluate.PROMPTS), 0

    def work(task: tuple[str, str]) -> str:
        return train(args.folder, *task, args.extra, args.reuse, args.jobs > 1)

    if args.jobs > 1:
        # threads that wait for each other while the runs have the cores take ten times as long
        torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        for number, ((case, prompt), problem) in enumerate(zip(missing, pool.map(work, missing), strict=True), 1):
            if problem:
                failures += 1
                say(f"{number}/{len(missing)}  {case}: {problem}")
                continue
            found = judge_run(args.folder, case, prompt, args.extra, judge)
            say(f"{number}/{len(missing)}  {case}, {prompt}: {_cell(found)}, {found['seconds']:.0f} s")
    return failures


def main(argv: Sequence[str] | None = None) -> int:
    """Runs, table and pictures; returns the exit status."""

    def work() -> int:
        args = read_arguments(argv)
        read_document(args.out)
        failures = 0 if args.rewrite else make_results(args)
        table = collect(args.folder, args.extra)
        sheet = args.out.with_suffix(".png")
        text = markdown(table, args.extra, sheet.name)
        print(text)
        save_small(sheet, args.folder, table)
        files.fill(args.out, (BEGIN, END), text)  # read again: hours may have passed
        return 1 if failures else 0

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
