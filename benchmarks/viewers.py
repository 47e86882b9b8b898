"""How many pictures a second a viewer shows while the camera turns, at 256 x 256 pixels.

    xvfb-run -a python benchmarks/viewers.py                       # the scene of the tests, untrained
    xvfb-run -a python benchmarks/viewers.py --run trial           # a finished run (it is only looked at)

Coarse pictures may have fewer pixels: the table says what share of the full width they had, and how long a full one takes.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from threading import Thread

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from nerf import build_scene, gui  # noqa: E402
from nerf.control import Control, Frame  # noqa: E402
from nerf.trainer import Trainer  # noqa: E402
from options import parse  # noqa: E402

SIZE = 256  # pixels
WARM = 4.0  # seconds for the share of the pixels to settle
TINY = """
    --text hamburger --seed 1 --max_steps 32 --num_steps 16 --upsample_steps 8 --num_levels 4 --log2_hashmap_size 10
    --desired_resolution 32 --hidden_dim 16 --grid_size 16 --device cpu
""".split()  # as in the tests


def controller(typed: list[str]) -> Control:
    """Of the scene of these flags; one without a checkpoint gets one as it begins."""
    opt = parse(typed)
    torch.manual_seed(opt.seed)
    trainer = Trainer(opt, build_scene(opt), None, opt.device if opt.device != "auto" else "cpu")
    if not list(trainer.checkpoints.glob("*.pt")):
        trainer.save()
    return Control(trainer)


def desktop(control: Control, seconds: float) -> list[Frame]:
    """The frames that a window showed in so many seconds."""
    gui.need_display()
    window = gui._Window(control)
    window.turn()
    return turning(control, seconds, window.turn, window.close)


def alone(control: Control, seconds: float) -> list[Frame]:
    """The same without any window: the controller's own speed."""
    number = 0

    def turn() -> None:
        nonlocal number
        frame = control.wait(number, 1.0)
        number = number if frame is None else frame.number

    return turning(control, seconds, turn, lambda: None)


def turning(control: Control, seconds: float, turn: Callable[[], None], close: Callable[[], None]) -> list[Frame]:
    """Turns the camera a hundred times a second, as a mouse does; the frames after the warm-up, and at last a full one."""
    control.start()
    control.look(height=SIZE, width=SIZE)
    frames: list[Frame] = []
    begun = time.monotonic()

    def hand() -> None:
        while time.monotonic() < begun + WARM + seconds:
            control.move(lambda look: look.orbited(0.5, 0.0))
            time.sleep(0.01)

    Thread(target=hand, daemon=True).start()
    while time.monotonic() < begun + WARM + seconds and not control.ended:
        turn()
        new = control.frame is not None and (not frames or control.frame.number != frames[-1].number)
        if new and time.monotonic() > begun + WARM:
            frames.append(control.frame)
    while not control.ended and control.frame.samples < 2:
        turn()
    close()
    frames.append(control.frame)
    control.close()
    return frames


def row(viewer: Callable[[Control, float], list[Frame]], typed: list[str], seconds: float, threads: int) -> str:
    """What is measured of one viewer and one scene, as cells of a table."""
    torch.set_num_threads(threads)
    *frames, full = viewer(controller(typed), seconds)
    share, taken = median(frame.scale for frame in frames), median(frame.seconds for frame in frames)
    return f"{len(frames) / seconds:.1f} | {100 * share:.0f} % | {1000 * taken:.0f} | {1000 * full.seconds:.0f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", help="the workspace of a finished run")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=1, help="of the pictures; the window has its own")
    args = parser.parse_args()
    print("| scene | viewer | pictures a second | of the full width | one picture, ms | a full one, ms |")
    print("|---|---|---:|---:|---:|---:|")
    with TemporaryDirectory() as folder:
        scenes = {
            "tiny": [*TINY, "--workspace", f"{folder}/1"],
            "tiny, -O": [*TINY, "-O", "--workspace", f"{folder}/2"],
        }
        if args.run:
            scenes = {Path(args.run).name: ["--test", "--workspace", args.run]}
        for name, typed in scenes.items():
            for viewer in (alone, desktop):  # a process has one window
                with ProcessPoolExecutor(1, get_context("spawn")) as process:
                    cells = process.submit(row, viewer, typed, args.seconds, args.threads).result()
                print(f"| {name} | {viewer.__name__} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
