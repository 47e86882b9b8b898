#!/usr/bin/env python3
"""Every system, from its first stage to its last, on prompts whose objects are known: the table and the picture of docs/systems.md.

benchmarks/systems.py                                   all of them, five prompts, the embedded models' own number of steps
benchmarks/systems.py --systems magic3d sjc --prompts 2 --reuse
benchmarks/systems.py -- --iters 150                    what follows -- goes to every stage
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from errors import say, status_of  # noqa: E402
from files import atomic, fill  # noqa: E402
from options import Parser  # noqa: E402

PROMPTS = ("a hamburger", "a red chair", "a pink teddy", "a green car", "a mushroom")
SYSTEMS: dict[str, tuple[str, ...]] = {  # stages: files in configs/systems, each started from the one before
    "dreamfusion": ("dreamfusion-sd",),
    "dreamfusion-if": ("dreamfusion-if",),
    "nemo": ("nemo-dreamfusion", "nemo-dmtet"),
    "magic3d": ("magic3d-coarse-sd", "magic3d-refine-sd"),
    "sjc": ("sjc",),
    "latentnerf": ("latentnerf", "latentnerf-refine"),
    "sketchshape": ("sketchshape", "sketchshape-refine"),
    "fantasia3d": ("fantasia3d", "fantasia3d-texture"),
    "prolificdreamer": ("prolificdreamer", "prolificdreamer-geometry", "prolificdreamer-texture"),
    "hifa": ("hifa",),
    "sdi": ("sdi",),
    "textmesh": ("textmesh-if",),
}
GUIDED = ("sketchshape",)  # stages that want a guide shape: a plain body of the object's own proportions
BEGIN, END = "<!-- table of benchmarks/systems.py -->", "<!-- end of the table -->"
QUICK = ("--W", "96", "--H", "96", "--dataset_size_test", "8", "--dataset_size_valid", "4", "--eval_interval", "0")


def stage_workspace(folder: Path, system: str, prompt: str, stage: str) -> Path:
    return folder / system / prompt.replace(" ", "_") / stage


def guide_shape(folder: Path, prompt: str) -> Path:
    """A coarse mesh of the prompt's object, as somebody might sketch it."""
    from mesh.export import write_ply
    from toybox.evaluate import split_prompt
    from toybox.mesh import object_mesh
    from toybox.objects import OBJECTS

    path = folder / f"{prompt.replace(' ', '_')}.ply"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_ply(object_mesh(OBJECTS[split_prompt(prompt)[0]], resolution=24, faces=600), path)
    return path


def run_stage(command: Sequence[str], log: Path) -> tuple[float, float]:
    """One process to its end: seconds and peak memory in GB. RuntimeError with the end of its output if it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with open(log, "wb") as sink:
        pid = os.posix_spawn(
            command[0],
            list(command),
            os.environ,
            file_actions=[(os.POSIX_SPAWN_DUP2, sink.fileno(), 1), (os.POSIX_SPAWN_DUP2, sink.fileno(), 2)],
        )
        _, status, usage = os.wait4(pid, 0)
    if status:
        raise RuntimeError(f"{' '.join(command[1:])}: " + log.read_text(errors="replace")[-800:])
    unit = 1 if sys.platform == "darwin" else 1024
    return time.monotonic() - start, usage.ru_maxrss * unit / 1e9


def run_system(folder: Path, system: str, prompt: str, extra: Sequence[str], judge: Any) -> list[dict[str, Any]]:
    """All stages of a system, and what each of them reached."""
    from toybox import evaluate

    rows, before = [], None
    for stage in SYSTEMS[system]:
        workspace = stage_workspace(folder, system, prompt, stage)
        command = [
            sys.executable,
            str(ROOT / "main.py"),
            "--text",
            prompt,
            "--workspace",
            str(workspace),
            "-O",
            "--ckpt",
            "scratch",
        ]
        command += ["--config", f"configs/systems/{stage}.yaml", "--sd_version", "embedded", *QUICK, *extra]
        command += ["--init_with", str(before)] if before else []
        if stage.startswith(GUIDED):
            command += ["--guide_shape", str(guide_shape(folder / "guides", prompt))]
        seconds, memory = run_stage(command, workspace.with_suffix(".log"))
        found = evaluate.measure(prompt, workspace, judge)
        rows.append(
            {
                "stage": stage,
                "iou": found["iou"],
                "rank": found["rank"],
                "seconds": seconds,
                "memory": memory,
                "face": found["face"] if evaluate.OBJECTS[evaluate.split_prompt(prompt)[0]].has_face else None,
            }
        )
        before = workspace
    return rows


def markdown(results: dict[str, dict[str, list[dict[str, Any]]]], extra: Sequence[str]) -> str:
    """The table: a row for every stage, means over the prompts."""
    command = " ".join(["benchmarks/systems.py", *(["--", *extra] if extra else [])])
    lines = [f"Made by `{command}`, with the embedded models; flags after -- go to every stage.", ""]
    lines += [
        "| system | stage | IoU | R-Precision | two faces | seconds | memory, GB |",
        "|---|---|---:|---:|---:|---:|---:|",
    ]
    for system, prompts in results.items():
        for i, stage in enumerate(SYSTEMS[system]):
            rows = [rows[i] for rows in prompts.values() if len(rows) > i]
            if not rows:
                continue
            faces = [row["face"] for row in rows if row["face"] is not None]
            janus = f"{sum(not good for good in faces)} of {len(faces)}" if faces else ""
            mean = {name: sum(row[name] for row in rows) / len(rows) for name in ("iou", "seconds")}
            first = sum(row["rank"] == 1 for row in rows)
            memory = max(row["memory"] for row in rows)
            cells = (
                f"`{stage}`",
                f"{mean['iou']:.3f}",
                f"{first} of {len(rows)}",
                janus,
                f"{mean['seconds']:.0f}",
                f"{memory:.1f}",
            )
            lines.append(f"| {system if i == 0 else ''} | {' | '.join(cells)} |")
    return "\n".join(lines)


def save_picture(path: Path, folder: Path, results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """The last stage of every system from the front, a column for each prompt."""
    import numpy as np
    from PIL import Image

    from toybox.sheet import labelled_sheet, save_sheet

    def front(system: str, prompt: str) -> Any:
        found = stage_workspace(folder, system, prompt, SYSTEMS[system][-1]).glob("validation/*_rgb.png")
        pictures = sorted(found) if prompt in results[system] else []
        if not pictures:
            return None
        sheet = np.asarray(Image.open(pictures[-1]).convert("RGB"))
        return sheet[: sheet.shape[0], : sheet.shape[0]]  # its views stand side by side, the front first

    shown = [prompt for prompt in PROMPTS if any(prompt in prompts for prompts in results.values())]
    rows = {
        SYSTEMS[system][-1].replace("-", "\n", 1): [front(system, prompt) for prompt in shown] for system in results
    }
    save_sheet(path, labelled_sheet(rows, shown, "The last stage of each system, from the front", 96))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and table; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS), help="default: all")
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of: {', '.join(PROMPTS)}")
    parser.add_argument("--reuse", action="store_true", help="systems that were measured before count")
    parser.add_argument("--folder", type=Path, default=Path("evaluation/systems"), help="where the workspaces go")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "systems.md", help="the file with the marks")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)

    def work() -> int:
        failures = 0
        args, extra = parser.parse_args(argv[:cut]), argv[cut + 1 :]
        from toybox import evaluate

        judge, folder = evaluate.Judge(evaluate.PROMPTS), args.folder.absolute()
        results: dict[str, dict[str, list[dict[str, Any]]]] = {}
        for system in SYSTEMS:
            for prompt in PROMPTS:
                record = folder / system / f"{prompt.replace(' ', '_')}.json"
                known = json.loads(record.read_text()) if record.exists() else None
                if system in args.systems and prompt in PROMPTS[: args.prompts] and not (args.reuse and known):
                    try:
                        known = run_system(folder, system, prompt, extra, judge)
                    except RuntimeError as error:
                        failures += 1
                        say(f"{system}: {error}")
                        continue
                    with atomic(record) as part:
                        part.write_text(json.dumps(known, indent=1))
                    say(
                        f"{system}, {prompt}: "
                        + ", ".join(f"{r['stage']} {r['iou']:.3f} rank {r['rank']}" for r in known)
                    )
                if known:
                    results.setdefault(system, {})[prompt] = known
        text = markdown(results, extra)
        print(text)
        save_picture(args.out.with_suffix(".png"), folder, results)
        fill(args.out, (BEGIN, END), text)
        return 1 if failures else 0

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
