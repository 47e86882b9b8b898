"""Kills a run again and again: `python killing.py FOLDER KILLS main.py's flags`; prints what happened as JSON.

A new Python needs seconds to import everything, so this one imports it once, and every run is a fork of it. First FOLDER/straight is
trained without a disturbance; then FOLDER/killed is started, killed (SIGKILL) and started again KILLS times, and left alone once more.
A third of the kills wait until it trains, a third until a checkpoint is written, which is slowed down for them; the others do not wait.
"""

import io
import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch  # noqa: E402

import main as program  # noqa: E402
from nerf import checkpoint  # noqa: E402
from nerf.trainer import Trainer  # noqa: E402
from options import parse  # noqa: E402

PAUSE = 0.02  # seconds, between the parts of a checkpoint that is written slowly
PARTS = 5


def start(flags: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """A run in a process of its own, in which `prepare` is called first; its number. Its lines go into `log`."""
    process = os.fork()
    if process:
        return process
    status = 70
    try:
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), 2)
        prepare()
        status = program.main(flags)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(status)


def tell_training(tell: int) -> None:
    """From now on a byte in `tell` says that the training begins."""
    begin = Trainer.begin

    def told(self):
        os.write(tell, b".")
        return begin(self)

    Trainer.begin = told


def write_slowly(tell: int) -> None:
    """From now on checkpoints appear on the disk piece by piece, with time between all that happens to them; a byte in `tell` says when."""

    def write(state, path):
        buffer = io.BytesIO()
        torch.save(state, buffer)
        data = buffer.getvalue()
        os.write(tell, b".")
        with open(path, "wb") as file:
            for i in range(PARTS):
                file.write(data[i * len(data) // PARTS : (i + 1) * len(data) // PARTS])
                file.flush()
                time.sleep(PAUSE)

    def with_pauses(act):
        def call(*arguments, **named):
            time.sleep(PAUSE)
            result = act(*arguments, **named)
            time.sleep(PAUSE)
            return result

        return call

    checkpoint.write = write
    os.fsync, os.replace, os.unlink = map(with_pauses, (os.fsync, os.replace, os.unlink))


def finish(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def newest(workspace: Path) -> int:
    """The steps of the newest checkpoint, -1 without one; an error if that is broken."""
    found = checkpoint.newest_first(workspace / "checkpoints")
    return checkpoint.read(found[0])["step"] if found else -1


def kill_often(flags: list[str], folder: Path, kills: int, times: dict[str, float]) -> dict:
    """See above; `times`: how long the phases of a run last, in seconds."""
    chance, workspace, log = random.Random(5), folder / "killed", folder / "killed.txt"
    flags = [*flags, "--workspace", str(workspace)]
    preparations = [lambda tell: None, tell_training, write_slowly]
    told = {"kills": 0, "kinds": [0] * 4, "halves": 0, "steps": [], "failed": []}
    while told["kills"] < kills and len(told["failed"]) < 3:
        done = bool(list(workspace.glob("checkpoints/*_final.pt")))
        kind = 0 if done else told["kills"] % 3
        listen, tell = os.pipe()
        process = start(flags, log, partial(preparations[kind], tell))
        os.close(tell)
        for _ in range([0, 1, chance.randint(1, 2)][kind]):
            os.read(listen, 1)  # returns, too, when the run has ended
        longest = [times["start"], 3 * times["training"] / kills, (PARTS + 6) * PAUSE][kind]
        time.sleep(chance.uniform(0, longest + done * times["results"]))
        os.kill(process, signal.SIGKILL)
        os.close(listen)
        status = finish(process)
        if status == -signal.SIGKILL:
            told["kills"] += 1
            told["kinds"][kind if not done else 3] += 1
            told["halves"] += bool(list(workspace.glob("checkpoints/.*.part.pt")))
        elif status != 0:
            told["failed"].append(status)
        told["steps"].append(newest(workspace))
    told["last"] = finish(start(flags, log))
    return told


def main() -> None:
    folder, kills, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    program.build(parse([*flags, "--workspace", str(folder / "warm")]))  # what is imported late is imported now
    began = time.perf_counter()
    status = finish(start([*flags, "--workspace", str(folder / "straight")], folder / "straight.txt"))
    whole = time.perf_counter() - began
    if status != 0:
        sys.exit((folder / "straight.txt").read_text())
    state = checkpoint.read(checkpoint.newest_first(folder / "straight" / "checkpoints")[0])
    training, results = sum(state["times"].values()), 0.3 * whole
    times = {"training": training, "results": results, "start": max(whole - training - results, 0.5)}
    print(json.dumps({"times": times, **kill_often(flags, folder, kills, times)}))


if __name__ == "__main__":
    main()
