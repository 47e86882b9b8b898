"""Run prompts through main.py and measure the results against the objects they name.

python -m toybox.evaluate                          the 25 prompts, table into docs/toybox.md
python -m toybox.evaluate --janus                  12 runs of objects with a face, with view words and without
python -m toybox.evaluate --only "a hamburger" -- --iters 500      what follows -- goes to main.py
"""

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from guidance.weights import quiet
from toybox.models import MODELS
from toybox.objects import COLORS, OBJECTS
from toybox.render import compose, orbit_cameras, trace

ROOT = Path(__file__).parent.parent
PROMPTS = (
    "a hamburger,a red chair,a green car,a pink teddy,a blue mug,a table,a mushroom,a snowman,a rocket,a yellow duck,a house,a tree,a lamp,"
    "a purple sofa,a fish,a robot,a cactus,a cupcake,a white boat,a castle,a penguin,an orange teapot,a truck,a brown elephant,a pumpkin"
).split(",")
JANUS = [
    f"a {words}" for words in ("teddy", "pink teddy", "blue teddy", "white teddy", "snowman", "yellow snowman")
] + [f"a {words}" for words in ("green snowman", "pink snowman", "car", "blue car", "yellow car", "purple car")]
POLAR, RADIUS, FOVY, SIZE = 80.0, 3.2, 30.0, 128  # the view that configs/embedded.yaml shows results from
BEHIND = 90  # degrees from the front beyond which a face must not be seen
CANDIDATES = torch.arange(-165.0, 181.0, 15.0)  # azimuths that pictures are compared with
FACE = 60  # a view that looks most like a true view within this angle of the front shows the face
EXPLAINED = """
- IoU: silhouettes against the true object's, mean over 8 azimuths; color error: mean absolute RGB difference (0 to 1) where both have the object.
- rank: place of the prompt among all prompts for tiny-clip, shown 8 views; R-Precision is the share of first places.
- face: "front only" if the view from the front looks most like a true view within 60 degrees of the front, and no view from the side
  or behind does (12 views, each compared with 24 true ones by what sets it apart from the mean of all views).
- seconds: training and results of one run, by its own log.
"""


def split_prompt(prompt: str) -> tuple[str, str | None]:
    """`a red chair` -> ("chair", "red")."""
    *_, kind = words = prompt.split()
    return kind, next((word for word in words if word in COLORS), None)


def truth(
    prompt: str, azimuth: Float[Tensor, "B"], size: int = SIZE
) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W"]]:
    """Unlit pictures on white, and masks, of the object that a prompt names."""
    kind, color = split_prompt(prompt)
    c2w = orbit_cameras(POLAR, azimuth, RADIUS)
    layers = trace(OBJECTS[kind], c2w, FOVY, size, c2w[:, :3, 2], torch.ones(len(azimuth)))
    return compose(layers, torch.tensor(COLORS[color] if color else OBJECTS[kind].default), torch.ones(3)), layers.alpha


def views(
    workspace: Path, azimuth: Float[Tensor, "B"], size: int = SIZE
) -> tuple[Float[Tensor, "B H W 3"], Float[Tensor, "B H W"]]:
    """The same of what a finished run made."""
    import nerf
    from nerf.provider import orbit
    from nerf.trainer import Trainer
    from options import parse

    opt = parse(["--workspace", str(workspace), "--test"])
    trainer = Trainer(opt, nerf.build_scene(opt), None, "cpu")
    with trainer.showing("evaluation") as scene:
        cameras = orbit(torch.full_like(azimuth, POLAR), azimuth, RADIUS, FOVY, size, size)
        render = scene.show(cameras, torch.ones(3), trainer.step)
    return render.image.clamp(0, 1), render.alpha[..., 0]


def intersection_over_union(a: Float[Tensor, "B H W"], b: Float[Tensor, "B H W"]) -> float:
    """Mean over views of the IoU of the masks where coverage exceeds one half."""
    a, b = a > 0.5, b > 0.5
    return ((a & b).sum((1, 2)) / (a | b).sum((1, 2)).clamp(min=1)).mean().item()


def color_error(image: Tensor, alpha: Tensor, true_image: Tensor, true_alpha: Tensor) -> float:
    """Mean absolute RGB difference where both have the object."""
    both = (alpha > 0.5) & (true_alpha > 0.5)
    return (image - true_image).abs().mean(-1)[both].mean().item() if both.any() else 1.0


def nearest_view(image: Float[Tensor, "B H W 3"], prompt: str) -> Float[Tensor, "B"]:
    """Azimuth (-180, 180] of the true view that each picture looks most like: least squared difference at 32 pixels."""
    small = F.adaptive_avg_pool2d(image.permute(0, 3, 1, 2), 32).flatten(1)
    return CANDIDATES[torch.cdist(small, _candidates(prompt)).argmin(-1)]


@lru_cache(maxsize=64)
def _candidates(prompt: str) -> Float[Tensor, "24 P"]:
    return truth(prompt, CANDIDATES, 32)[0].permute(0, 3, 1, 2).flatten(1)


def nearest_turn(image: Float[Tensor, "B H W 3"], prompt: str) -> Float[Tensor, "B"]:
    """The same for pictures from evenly all around, by what sets each apart from the others: cosine similarity of the differences from
    the mean picture. A windscreen that came out too dark is still what only the front has.
    """
    small = F.adaptive_avg_pool2d(image.permute(0, 3, 1, 2), 32).flatten(1)
    apart = [F.normalize(views - views.mean(0), dim=-1) for views in (small, _candidates(prompt))]
    return CANDIDATES[(apart[0] @ apart[1].T).argmax(-1)]


def face_in_front_only(image: Float[Tensor, "12 H W 3"], azimuth: Float[Tensor, "12"], prompt: str) -> bool:
    """No Janus: the front looks like a front, and no picture from the side or behind looks like one."""
    seen = nearest_turn(image, prompt).abs() < FACE
    front = azimuth.abs() < 1
    return bool(seen[front].all() and not seen[azimuth.abs() >= BEHIND].any())


class Judge:
    """Ranks prompts for pictures with tiny-clip."""

    def __init__(self, prompts: Sequence[str]) -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.prompts = list(prompts)
        with quiet():
            model = CLIPModel.from_pretrained(MODELS / "tiny-clip", dtype=torch.float32, local_files_only=True)
        self.model = model.eval()
        tokens = CLIPTokenizer.from_pretrained(MODELS / "tiny-clip")(
            self.prompts, padding="max_length", return_tensors="pt"
        )
        with torch.no_grad():
            self.text = F.normalize(
                self.model.text_projection(self.model.text_model(tokens.input_ids).pooler_output), dim=-1
            )

    @torch.no_grad()
    def rank(self, image: Float[Tensor, "B H W 3"], prompt: str) -> int:
        """Place (1 is best) of the prompt among all prompts, by mean similarity over the views."""
        from toybox.train_clip import MEAN, SPREAD

        small = F.interpolate(image.permute(0, 3, 1, 2), (64, 64), mode="area")
        seen = self.model.visual_projection(self.model.vision_model((small - MEAN) / SPREAD).pooler_output)
        score = (F.normalize(seen, dim=-1) @ self.text.T).mean(0)
        return int((score > score[self.prompts.index(prompt)]).sum()) + 1


def logged_times(workspace: Path) -> dict[str, float]:
    """Seconds of each phase of the last run (training, validation, ...), by its own log."""
    lines = [line for line in (workspace / "log.txt").read_text().splitlines() if "seconds: " in line]
    phases = re.findall(r"([a-z ]+) ([0-9.]+)", lines[-1].split("seconds: ")[1]) if lines else []
    return {name.strip(): float(number) for name, number in phases}


def logged_seconds(workspace: Path) -> float:
    """What training and results took, by the run's own log."""
    return sum(logged_times(workspace).values())


def finished(workspace: Path) -> bool:
    """Whether a run came to its end there."""
    return any((workspace / "checkpoints").glob("step_*_final.pt"))


def run(prompt: str, workspace: Path, extra: Sequence[str], one_thread: bool = False) -> None:
    """One training with small pictures and no mesh; RuntimeError with the end of the output if it fails."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} if one_thread else None
    command = [sys.executable, "main.py", "--text", prompt, "--workspace", str(workspace), "-O", "--ckpt", "scratch"]
    quick = ["--W", "96", "--H", "96", "--dataset_size_test", "8", "--eval_interval", "0"]
    done = subprocess.run([*command, *quick, *extra], cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{prompt}: exit status {done.returncode}\n{done.stdout[-500:]}{done.stderr[-1500:]}")


def measure(prompt: str, workspace: Path, judge: Judge | None) -> dict:
    """IoU over 8 azimuths, color error, rank among the prompts, face check over 12 azimuths, and the 8 views side by side."""
    eight, twelve = torch.arange(8) * 45.0, torch.arange(-150.0, 181.0, 30.0)
    image, alpha = views(workspace, eight)
    true_image, true_alpha = truth(prompt, eight)
    found: dict = {
        "picture": torch.cat(list(image), 1),
        "iou": intersection_over_union(alpha, true_alpha),
        "color": color_error(image, alpha, true_image, true_alpha),
        "face": face_in_front_only(views(workspace, twelve)[0], twelve, prompt),
    }
    if judge:
        found["rank"] = judge.rank(image, prompt)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", help="a prompt instead of all of them; may be repeated")
    parser.add_argument(
        "--janus", action="store_true", help="the 12 runs of objects with a face, with and without view words"
    )
    parser.add_argument(
        "--jobs", type=int, default=1, help="runs at the same time, with one thread each if more than one"
    )
    parser.add_argument("--folder", type=Path, default=Path("evaluation"), help="where the workspaces go")
    parser.add_argument("--out", type=Path, help="Markdown file for the table")
    parser.add_argument(
        "--reuse", action="store_true", help="measure the workspaces that are there, train only the missing ones"
    )
    parser.add_argument("--gallery", type=Path, help="picture file: a row of 8 views per prompt")
    parser.add_argument("extra", nargs="*", metavar="-- flags", help="for main.py")
    args = parser.parse_args()

    prompts = args.only or (JANUS if args.janus else PROMPTS)
    cases = [(prompt, "", []) for prompt in prompts]
    if args.janus:
        cases += [(prompt, "no view words", ["--view_words", "0"]) for prompt in prompts]
    judge = Judge(prompts if args.only is None else list(dict.fromkeys([*PROMPTS, *prompts])))

    def work(case: tuple[str, str, list[str]]) -> dict:
        prompt, name, flags = case
        workspace = args.folder / f"{prompt} {name}".strip().replace(" ", "_")
        if not (args.reuse and finished(workspace)):
            run(prompt, workspace, [*flags, *args.extra], args.jobs > 1)
        return {"prompt": prompt, "case": name, "seconds": logged_seconds(workspace), "workspace": workspace}

    rows = []
    if args.jobs > 1:
        # threads that wait for each other while the runs have the cores take ten times as long
        torch.set_num_threads(1)
    with ThreadPoolExecutor(args.jobs) as pool:
        for row in pool.map(work, cases):
            row |= measure(row["prompt"], row["workspace"], judge)
            rows.append(row)
            print(format_row(row), flush=True)
    text = table(rows)
    print(text)
    if args.gallery:
        from PIL import Image

        rows_of_views = torch.cat([row["picture"] for row in rows])
        Image.fromarray((rows_of_views * 255).round().byte().numpy()).save(args.gallery)
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        title = "Faces where they belong" if args.janus else "The toybox prompts"
        command = " ".join(
            [
                "python -m toybox.evaluate",
                *(["--janus"] if args.janus else []),
                *(["--", *args.extra] if args.extra else []),
            ]
        )
        args.out.write_text(f"# {title}\n\nMade by `{command}`.\n{EXPLAINED}\n{text}")


def format_row(row: dict) -> str:
    """One line of the table."""
    face = (
        ""
        if not OBJECTS[split_prompt(row["prompt"])[0]].has_face
        else ("front only" if row["face"] else "**elsewhere**")
    )
    return f"| {row['prompt']} | {row['case']} | {row['iou']:.3f} | {row['color']:.3f} | {row['rank']} | {face} | {row['seconds']:.0f} |"


def table(rows: list[dict]) -> str:
    """Markdown: all rows, then the means of each case."""
    lines = ["| prompt | case | IoU | color error | rank | face | seconds |", "|---|---|---|---|---|---|---|"]
    lines += [format_row(row) for row in rows]
    lines.append("")
    for case in dict.fromkeys(row["case"] for row in rows):
        mine = [row for row in rows if row["case"] == case]
        faces = [row["face"] for row in mine if OBJECTS[split_prompt(row["prompt"])[0]].has_face]
        lines.append(
            f"- {case or 'all'}: {len(mine)} prompts, mean IoU {sum(r['iou'] for r in mine) / len(mine):.3f}, "
            f"R-Precision {sum(r['rank'] == 1 for r in mine) / len(mine):.2f}, "
            f"face in front only {sum(faces)} of {len(faces)}"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
