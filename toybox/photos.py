"""Photographs of toybox objects, and how well scenes that were made from them show what the photographs do not.

python -m toybox.photos "a red chair" FOLDER       front_rgba.png and, with four views, views.csv and transforms.json
python -m toybox.photos --measure                  ten objects from their front, three from four sides: the table and the
                                                    picture of docs/photos.md
python -m toybox.photos --measure --reuse -- --iters 300      what follows -- goes to main.py
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from errors import UserError, say, status_of
from files import atomic, fill, make_folder
from nerf import media
from options import Parser
from toybox import evaluate
from toybox.objects import COLORS, OBJECTS
from toybox.render import compose, orbit_cameras, trace
from toybox.sheet import labelled_sheet, save_sheet
from toybox.training import psnr

PROMPTS = (
    "a hamburger,a red chair,a green car,a pink teddy,a blue mug,a mushroom,a snowman,a rocket,a house,a yellow duck"
).split(",")
AZIMUTHS = torch.arange(8) * 45.0
SIDES = (0.0, 90.0, 180.0, -90.0)
SIZE = 256  # pixels
BEGIN, END = "<!-- table of toybox.photos -->", "<!-- end of the table -->"
QUICK = ("--W", "96", "--H", "96", "--dataset_size_test", "8", "--eval_interval", "0", "--ckpt", "scratch")
# Our world, y up and front +z, as Blender's: z up and front -y.
TO_Z_UP = torch.tensor([[1.0, 0, 0, 0], [0, 0, -1, 0], [0, 1, 0, 0], [0, 0, 0, 1]])


def photograph(
    prompt: str, azimuth: Float[Tensor, "B"], size: int = SIZE
) -> tuple[Float[Tensor, "B H W 4"], Float[Tensor, "B 4 4"]]:
    """Unlit RGBA pictures of the object that a prompt names, colours not multiplied by alpha, and their cameras."""
    kind, color = evaluate.split_prompt(prompt)
    c2w = orbit_cameras(evaluate.POLAR, azimuth, evaluate.RADIUS)
    layers = trace(OBJECTS[kind], c2w, evaluate.FOVY, size, c2w[:, :3, 2], torch.ones(len(azimuth)))
    tint = torch.tensor(COLORS[color] if color else OBJECTS[kind].default)
    on_black, alpha = compose(layers, tint, torch.zeros(3)), layers.alpha[..., None]
    return torch.cat([(on_black / alpha.clamp(min=1e-3)).clamp(0, 1), alpha], -1), c2w


def write_photos(prompt: str, folder: Path, azimuths: Sequence[float] = SIDES) -> Path:
    """NAME_rgba.png for every azimuth (degrees), the first being front_rgba.png; views.csv and transforms.json tell their cameras."""
    pictures, c2w = photograph(prompt, torch.tensor(list(azimuths)))
    rows, frames = ["image, polar, azimuth, radius"], []
    for i, azimuth in enumerate(azimuths):
        name = "front_rgba.png" if i == 0 else f"view_{i}_rgba.png"
        media.save_png(folder / name, media.pixels(pictures[i]))
        rows.append(f"{name}, {evaluate.POLAR:g}, {azimuth:g}, {evaluate.RADIUS:g}")
        frames.append({"file_path": name, "transform_matrix": (TO_Z_UP @ c2w[i]).tolist()})
    angle = float(torch.deg2rad(torch.tensor(evaluate.FOVY)))
    for name, text in (
        ("views.csv", "\n".join(rows) + "\n"),
        ("transforms.json", json.dumps({"camera_angle_x": angle, "frames": frames}, indent=1)),
    ):
        with atomic(folder / name) as beside:
            beside.write_text(text)
    return folder


def measure(prompt: str, workspace: Path) -> tuple[dict[str, float], Float[Tensor, "8 H W 3"]]:
    """PSNR of the view from the front, IoU over 8 azimuths, PSNR of the views that show nothing of the front (90 degrees and more from it),
    and what the picture of the front would get in their place; and what to look at: the true front, the scene from the 7 other sides."""
    image, alpha = evaluate.views(workspace, AZIMUTHS)
    truth, mask = evaluate.truth(prompt, AZIMUTHS)
    hidden = torch.tensor([2, 3, 4, 5, 6])
    numbers = {
        "front": psnr(image[:1], truth[:1]),
        "iou": evaluate.intersection_over_union(alpha, mask),
        "hidden": psnr(image[hidden], truth[hidden]),
        "copied": psnr(truth[:1].expand(len(hidden), -1, -1, -1), truth[hidden]),
    }
    return numbers, torch.cat([truth[:1], image[1:]])


def run(workspace: Path, flags: Sequence[str]) -> float:
    """One training, from the command line; seconds. RuntimeError with the end of its output if it fails."""
    command = [sys.executable, "main.py", "--workspace", str(workspace), "-O", *QUICK, *flags]
    begun = time.monotonic()
    done = subprocess.run(command, cwd=evaluate.ROOT, capture_output=True, text=True, env=os.environ)
    if done.returncode:
        raise RuntimeError(f"{workspace}: exit status {done.returncode}\n{done.stderr[-1500:]}")
    return time.monotonic() - begun


def markdown(rows: Sequence[dict], extra: Sequence[str]) -> str:
    """The table, with the means of each kind of input."""
    lines = [f"Made by `{' '.join(['python -m toybox.photos --measure', *(['--', *extra] if extra else [])])}`.", ""]
    lines += ["| object | input | PSNR front | IoU | PSNR hidden sides | the front in their place | seconds |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|"]
    names = ("front", "iou", "hidden", "copied", "seconds")
    means = []
    for kind in dict.fromkeys(row["input"] for row in rows):
        mine = [row for row in rows if row["input"] == kind]
        means.append({"prompt": "mean", "input": kind, **{n: sum(r[n] for r in mine) / len(mine) for n in names}})
    for row in [*rows, *means]:
        values = [
            f"{row[n]:.3f}" if n == "iou" else f"{row[n]:.0f}" if n == "seconds" else f"{row[n]:.1f}" for n in names
        ]
        lines.append(f"| {row['prompt']} | {row['input']} | {' | '.join(values)} |")
    return "\n".join(lines)


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", help="an object, perhaps with a color")
    parser.add_argument("folder", nargs="?", type=Path)
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--objects", type=int, default=len(PROMPTS), help="of the ten, seen from the front")
    parser.add_argument("--sides", type=int, default=3, help="of the ten, seen from four sides")
    parser.add_argument("--workspaces", type=Path, default=Path("evaluation/photos"))
    parser.add_argument(
        "--reuse", action="store_true", help="measure the runs that are there, train only the missing ones"
    )
    parser.add_argument("--out", type=Path, default=evaluate.ROOT / "docs" / "photos.md")
    words = sys.argv[1:]
    at = words.index("--") if "--" in words else len(words)
    args, extra = parser.parse_args(words[:at]), words[at + 1 :]
    if not args.measure:
        if args.folder is None or evaluate.split_prompt(args.prompt)[0] not in OBJECTS:
            raise UserError(f"toybox.photos PROMPT FOLDER: the prompt ends in one of {', '.join(OBJECTS)}")
        say(f"pictures: {write_photos(args.prompt, make_folder(args.folder))}")
        return
    cases = [(prompt, "front") for prompt in PROMPTS[: args.objects]]
    cases += [(prompt, kind) for kind in ("views.csv", "transforms.json") for prompt in PROMPTS[: args.sides]]
    rows, shown = [], {}
    for prompt, kind in cases:
        base = args.workspaces / prompt.replace(" ", "_")
        folder, workspace = write_photos(prompt, base / "photos"), base / kind.partition(".")[0]
        given = {
            "front": ["--image", str(folder / "front_rgba.png")],
            "views.csv": ["--image_config", str(folder / kind)],
        }
        seconds = 0.0
        if not (args.reuse and evaluate.finished(workspace)):
            seconds = run(workspace, [*given.get(kind, ["--photos", str(folder)]), *extra])
        else:
            seconds = evaluate.logged_seconds(workspace)
        numbers, image = measure(prompt, workspace)
        rows.append({"prompt": prompt, "input": kind, "seconds": seconds, **numbers})
        if kind == "front":
            shown[prompt] = list(media.pixels(image))
        say(
            " ".join(
                f"{name} {value:.3f}" if isinstance(value, float) else str(value) for name, value in rows[-1].items()
            )
        )
    fill(args.out, (BEGIN, END), markdown(rows, extra))
    if not shown:
        return
    columns = ["photograph", *(f"{azimuth:.0f}" for azimuth in AZIMUTHS[1:].tolist())]
    title = "What became of one photograph, seen from the other sides"
    save_sheet(args.out.with_suffix(".png"), labelled_sheet(shown, columns, title, 80))


if __name__ == "__main__":
    sys.exit(status_of(main))
