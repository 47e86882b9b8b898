"""DreamBooth3D, measured: the subject of toybox/subject.py from six photographs, by the command that anybody would type.

python -m toybox.personal                      the pipeline, plain DreamFusion beside it, the table and the picture of docs/dreambooth.md
python -m toybox.personal --reuse              what is there is measured again
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from errors import say, status_of
from files import fill
from nerf.media import pixels
from options import Parser
from toybox import evaluate, subject
from toybox.render import orbit_cameras
from toybox.sheet import labelled_sheet, save_sheet

PROMPT, CLASS, CONTEXT, SHARE = "a sks teddy", "a teddy", "a green sks teddy", 0.3
AZIMUTHS = torch.arange(8) * 45.0
SCENES = ("plain", "nerf", "final", "mesh", "context")
NAMED = {
    "plain": f'DreamFusion, "{CLASS}"',
    "nerf": "the first scene",
    "final": "the final scene",
    "mesh": "its surface",
    "context": f'"{CONTEXT}"',
}
COLUMNS = ("iou", "color", "psnr", "heart", "scarf", "ear", "behind", "clip", "green")
QUICK = ("--W", "128", "--H", "128", "--dataset_size_test", "30", "--eval_interval", "0")
BEGIN, END = "<!-- table of toybox.personal -->", "<!-- end of the table -->"


def run(folder: Path, extra: Sequence[str]) -> dict[str, float]:
    """The pipeline and the plain run, from their command lines, unless they are complete -> minutes and the machine's load meanwhile."""
    photographs = folder / "photos"
    if not photographs.is_dir():
        subject.photos(photographs)
    words = [
        "--instance_dir",
        str(photographs),
        "--prompt",
        PROMPT,
        "--class_prompt",
        CLASS,
        "--workspace",
        str(folder / "work"),
    ]
    words += ["--context", CONTEXT, "--context_weight", str(SHARE), "--", *QUICK, *extra]
    begun = time.monotonic()
    _call(["scripts/dreambooth3d.py", *words], folder / "pipeline.log")
    found = {"minutes": (time.monotonic() - begun) / 60, "load": os.getloadavg()[2]}
    if not evaluate.finished(folder / "work" / "plain"):
        plain = ["main.py", "--text", CLASS, "--workspace", str(folder / "work" / "plain"), "-O", *QUICK, *extra]
        _call(plain, folder / "plain.log")
    return found


def _call(words: Sequence[str], log: Path) -> None:
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "wb") as sink:
        status = subprocess.run([sys.executable, *words], cwd=evaluate.ROOT, stdout=sink, stderr=sink).returncode
    if status:
        raise RuntimeError(f"{words[0]}: exit status {status}\n{log.read_text(errors='replace')[-1500:]}")


def measure(workspace: Path, taken: Float[Tensor, "N h w 3"]) -> tuple[dict[str, float], Float[Tensor, "8 H W 3"]]:
    """(numbers by the names of `COLUMNS`, the eight views). green: what tiny-clip sees of the context's colour, the similarity to "a green
    teddy" less that to "a teddy"."""
    c2w = orbit_cameras(evaluate.POLAR, AZIMUTHS, evaluate.RADIUS)
    image, alpha = evaluate.views(workspace, AZIMUTHS)
    found = {"iou": evaluate.intersection_over_union(alpha, subject.truth(c2w, image.shape[1])[1])}
    found |= subject.identity(image, c2w, taken)
    judge = evaluate.Judge(["a teddy", CONTEXT.replace("sks ", "")])
    seen = (subject.look(image) @ judge.text.T).mean(0)
    return found | {"green": (seen[1] - seen[0]).item()}, image


def markdown(rows: dict[str, dict[str, float]], seconds: dict[str, float], told: dict[str, float]) -> str:
    """The table, the stages' times below it."""
    lines = [
        "Made by `python -m toybox.personal`; eight views against the truth (toybox/subject.py). color: mean absolute difference of RGB; heart, "
        "scarf, ear: F1 score of these features; behind: the heart where none should be; clip: similarity to the nearest photograph for "
        'tiny-clip; green: similarity to "a green teddy" less that to "a teddy".',
        "",
        "| | IoU | color | PSNR | heart | scarf | ear | behind | clip | green |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for name, row in rows.items():
        cells = (f"{row[column]:.1f}" if column == "psnr" else f"{row[column]:.2f}" for column in COLUMNS)
        lines.append(f"| {NAMED[name]} | {' | '.join(cells)} |")
    lines += ["", "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in seconds.items()) + "."]
    if told:
        lines[-1] += (
            f" All of it from the command line: {told['minutes']:.1f} minutes on two hyper-threads, with a load of {told['load']:.1f} on them "
            "(1 is this program alone)."
        )
    return "\n".join(lines)


def picture(views: dict[str, Float[Tensor, "8 H W 3"]], path: Path) -> None:
    """A row of eight views for the truth and each scene."""
    truth, _ = subject.truth(orbit_cameras(evaluate.POLAR, AZIMUTHS, evaluate.RADIUS), evaluate.SIZE)
    rows = {"the truth": truth, **{NAMED[name].replace(", ", "\n"): image for name, image in views.items()}}
    tiles: dict[str, list[np.ndarray]] = {name: list(pixels(image)) for name, image in rows.items()}
    title = f'"{PROMPT}" from six photographs, the embedded model'
    save_sheet(path, labelled_sheet(tiles, [f"{azimuth:.0f}" for azimuth in AZIMUTHS.tolist()], title, 80))


def main() -> None:
    """Runs, measures, writes."""
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("evaluation/personal"), help="where everything goes")
    parser.add_argument("--reuse", action="store_true", help="run nothing")
    parser.add_argument(
        "--out", type=Path, default=evaluate.ROOT / "docs" / "dreambooth.md", help="the file with the marks"
    )
    args, extra = parser.parse_args(words[:at]), words[at + 1 :]
    folder = args.folder.absolute()
    record = folder / "time.json"
    if not args.reuse:
        told = run(folder, extra)
        if not record.exists():  # a later call finds it complete
            record.write_text(json.dumps(told))
    told = json.loads(record.read_text()) if record.exists() else {}
    taken = torch.stack([_read(path) for path in sorted((folder / "photos").glob("*.jpg"))])
    rows, views = {}, {}
    for name in SCENES:
        if evaluate.finished(folder / "work" / name):
            rows[name], views[name] = measure(folder / "work" / name, taken)
            say(f"{name}: " + ", ".join(f"{key} {value:.3f}" for key, value in rows[name].items()))
    stages = json.loads((folder / "work" / "dreambooth3d.json").read_text())["stages"]
    seconds = {name: stage["seconds"] for name, stage in stages.items() if "seconds" in stage}
    fill(args.out, (BEGIN, END), markdown(rows, seconds, told))
    picture(views, args.out.with_suffix(".png"))


def _read(path: Path) -> Float[Tensor, "h w 3"]:
    from PIL import Image

    return torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float() / 255


if __name__ == "__main__":
    sys.exit(status_of(main))
