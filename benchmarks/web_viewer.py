"""Milliseconds from a moved camera to the first picture of the new view in the browser's hands, with main.py and its web viewer as they are.

    python benchmarks/web_viewer.py                      (a tiny scene from its beginning)
    python benchmarks/web_viewer.py --run trial          (a trained run; a copy of it is shown)

Measured by a client that speaks the browser's protocol: decoding the JPEG is included, drawing it is not. A single move: the camera stood still
before, so with training on the step under way must end first. A drag: twenty moves a second for three seconds.
"""

import argparse
import os
import random
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from math import cos, sin
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from browsers import Client  # noqa: E402

TINY = """--text hamburger --seed 1 --max_steps 32 --num_steps 16 --upsample_steps 8 --num_levels 4 --log2_hashmap_size 10
    --desired_resolution 32 --hidden_dim 16 --grid_size 16""".split()


def start(arguments: list[str], port: int) -> subprocess.Popen:
    """main.py with the viewer; returns once it listens and has loaded."""
    command = [sys.executable, str(ROOT / "main.py"), *arguments, "--iters", "1000000", "--eval_interval", "0"]
    command += ["--viewer", "--viewer_port", str(port), "--device", "cpu"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    for line in process.stderr:
        if " of 1000000" in line:
            return process
    raise SystemExit("main.py has ended")


class Viewpoints:
    """Moves a camera round the scene. Every view has a width of its own, so that a picture tells which view it is of."""

    def __init__(self, client: Client, size: int) -> None:
        self.client, self.size, self.count = client, size, 0

    def move(self) -> float:
        """To the next view; returns when that was."""
        self.count += 1
        angle = 0.1 * self.count
        now = time.perf_counter()
        self.client.look((3.2 * sin(angle), 0.8, 3.2 * cos(angle)), width=self.width, height=self.size)
        return now

    @property
    def width(self) -> int:
        return self.size - self.count % 40

    def seen(self) -> bool:
        return self.client.picture is not None and self.client.picture.shape[1] == self.width


def single(views: Viewpoints, moves: int) -> list[float]:
    """Milliseconds of each of so many moves, with pauses of 0.8 to 1.6 s between them."""
    taken = []
    for _ in range(moves):
        time.sleep(random.uniform(0.8, 1.6))
        began = views.move()
        views.client.wait(views.seen, 60)
        taken.append(1000 * (time.perf_counter() - began))
    return taken


def drag(views: Viewpoints, seconds: float) -> float:
    """Pictures a second while the camera never stands still."""
    before, began = views.client.pictures, time.perf_counter()
    while time.perf_counter() - began < seconds:
        views.move()
        time.sleep(0.05)
    return (views.client.pictures - before) / (time.perf_counter() - began)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, help="workspace of a trained run")
    parser.add_argument("--moves", type=int, default=20)
    parser.add_argument("--size", type=int, default=256, help="pixels of the window's height")
    args = parser.parse_args()
    random.seed(0)
    with tempfile.TemporaryDirectory() as folder, socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        workspace = Path(folder) / "run"
        arguments = ["--workspace", str(workspace), "--W", str(args.size), "--H", str(args.size)]
        if args.run:
            shutil.copytree(args.run, workspace)
            arguments += ["--config", str(workspace / "config.yaml")]
        else:
            arguments += TINY
        process = start(arguments, port)
        try:
            client = Client(port)
            views = Viewpoints(client, args.size)
            views.move()
            client.wait(views.seen, 60)
            print(f"{args.run or 'tiny scene'}, {args.size} pixels; load of the machine {os.getloadavg()[0]:.1f}")
            print(
                "| training | median, ms | 90 %, ms | worst, ms | pictures a second in a drag |\n|---|---:|---:|---:|---:|"
            )
            for training in ("on", "off"):
                if training == "off":
                    client.set("Pause", True)
                    time.sleep(1)
                taken = sorted(single(views, args.moves))
                rate = drag(views, 3.0)
                ninth = taken[round(0.9 * (len(taken) - 1))]
                print(
                    f"| {training} | {statistics.median(taken):.0f} | {ninth:.0f} | {taken[-1]:.0f} | {rate:.1f} |",
                    flush=True,
                )
        finally:
            process.kill()
            process.wait()


if __name__ == "__main__":
    main()
