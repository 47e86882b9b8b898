"""What the mesh stage gains over the field that it starts from, measured against the true objects; the table goes into docs/mesh.md.

python -m toybox.refine                        five prompts: a field, then --dmtet --init_with it
python -m toybox.refine --reuse --prompts 2    runs that are there count
python -m toybox.refine -- --iters 100         what follows -- goes to the mesh stage
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from errors import say, status_of
from files import fill
from options import Parser
from toybox import evaluate
from toybox.training import psnr

PROMPTS = ("a hamburger", "a red chair", "a pink teddy", "a green car", "a mushroom")
SIZE = 512  # pixels
AZIMUTHS = torch.arange(8) * 45.0 + 22.5
BEGIN, END = "<!-- table of toybox.refine -->", "<!-- end of the table -->"


def compare(prompt: str, coarse: Path, fine: Path) -> dict[str, float]:
    """IoU of the outlines and PSNR (dB) of the unlit pictures on white, 512 pixels, 8 azimuths, before and after."""
    image, alpha = evaluate.truth(prompt, AZIMUTHS, SIZE)
    found = {}
    for name, workspace in (("field", coarse), ("mesh", fine)):
        picture, mask = evaluate.views(workspace, AZIMUTHS, SIZE)
        found[f"iou {name}"] = evaluate.intersection_over_union(mask, alpha)
        found[f"psnr {name}"] = psnr(picture, image)
    return found


def refine(prompt: str, coarse: Path, fine: Path, extra: Sequence[str]) -> None:
    """One mesh stage, from the command line; RuntimeError with the end of its output if it fails."""
    command = [sys.executable, "main.py", "--text", prompt, "--workspace", str(fine), "-O", "--ckpt", "scratch"]
    quick = ["--W", "96", "--H", "96", "--dataset_size_test", "8", "--eval_interval", "0"]
    stage = ["--dmtet", "--init_with", str(coarse), *quick, *extra]
    done = subprocess.run([*command, *stage], cwd=evaluate.ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{prompt}: exit status {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")


def markdown(rows: dict[str, dict[str, float]], extra: Sequence[str]) -> str:
    """The table."""
    command = " ".join(["python -m toybox.refine", *(["--", *extra] if extra else [])])
    lines = [f"Made by `{command}`.", "", "| prompt | IoU field | IoU mesh | PSNR field | PSNR mesh | seconds |"]
    lines += ["|---|---:|---:|---:|---:|---:|"]
    names = ("iou field", "iou mesh", "psnr field", "psnr mesh", "seconds")
    rows = {**rows, "mean": {name: sum(row[name] for row in rows.values()) / len(rows) for name in names}}
    for prompt, row in rows.items():
        cells = [f"{row[n]:.3f}" if "iou" in n else f"{row[n]:.1f}" if "psnr" in n else f"{row[n]:.0f}" for n in names]
        lines.append(f"| {prompt} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs and table; returns the exit status."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS), help=f"how many of: {', '.join(PROMPTS)}")
    parser.add_argument("--reuse", action="store_true", help="only the runs that are missing")
    parser.add_argument("--folder", type=Path, default=Path("evaluation/refine"), help="where the workspaces go")
    parser.add_argument("--out", type=Path, default=evaluate.ROOT / "docs" / "mesh.md", help="the file with the marks")
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)

    def work() -> None:
        args, extra = parser.parse_args(argv[:cut]), argv[cut + 1 :]
        rows = {}
        for prompt in PROMPTS[: args.prompts]:
            name = prompt.replace(" ", "_")
            coarse, fine = (args.folder.absolute() / stage / name for stage in ("field", "mesh"))
            if not (args.reuse and evaluate.finished(coarse)):
                evaluate.run(prompt, coarse, [])
            if not (args.reuse and evaluate.finished(fine)):
                refine(prompt, coarse, fine, extra)
            rows[prompt] = {**compare(prompt, coarse, fine), "seconds": evaluate.logged_seconds(fine)}
            say(f"{prompt}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[prompt].items()))
        text = markdown(rows, extra)
        print(text)
        fill(args.out, (BEGIN, END), text)

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
