#!/usr/bin/env python3
"""Many prompts at once, on one machine or a cluster, with Ray: every prompt of a file has a run of main.py and a GPU of its own.

    python scripts/batch.py prompts.txt FOLDER -- -O --save_mesh
    python scripts/batch.py prompts.txt FOLDER --address auto --retries 5 -- --sd_version 2.1 -O
    python scripts/batch.py --index FOLDER                                    # FOLDER/index.html alone, of what lies there

A line of the file is a prompt; empty lines and lines that begin with # are left out. What is finished is left alone, what was stopped goes
on, what dies is tried again from its last checkpoint. FOLDER/index.html shows all results, also while the work goes on. What stands
after -- are flags of main.py, for every prompt. docs/batch.md tells more.
"""

import argparse
import os
import re
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from batch_ray import PATIENCE, attempt, connected, in_use  # noqa: E402

from errors import MISTAKE, UserError, say, status_of  # noqa: E402
from files import claimed, make_folder  # noqa: E402
from nerf.batch_page import OUTPUT, Entry, entries, finished, last_error, write_index  # noqa: E402
from nerf.progress import Bar  # noqa: E402
from options import Parser, parse  # noqa: E402

OURS = ("--text", "--workspace", "--ckpt")  # flags of main.py that this script sets, or that would undo a retry
NEWS = 10.0  # seconds between two looks at runs that say nothing, for the page


@dataclass
class Job:
    """One prompt. `state` and `note` as on the page; `attempts`: those begun."""

    prompt: str
    workspace: Path
    state: str = "waiting"
    note: str = ""
    attempts: int = 0


# -- what was typed ----------------------------------------------------------------------------------------------------


def read_arguments(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    """What concerns the batch, and the flags of main.py. Raises UserError for what makes no sense."""
    words = list(sys.argv[1:] if argv is None else argv)
    at = words.index("--") if "--" in words else len(words)
    words, flags = words[:at], words[at + 1 :]
    parser = Parser(
        description=__doc__,
        usage="batch.py prompts.txt FOLDER [options] [-- flags of main.py]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("prompts", nargs="?", type=Path, help="a prompt a line")
    parser.add_argument(
        "folder", nargs="?", type=Path, help="for the results; on a cluster, one that all machines share"
    )
    parser.add_argument("--address", help="a Ray cluster: auto, or HOST:PORT (default: this machine alone)")
    parser.add_argument("--jobs", type=int, help="runs at once, at most (default: as many as there is room for)")
    parser.add_argument("--gpus_per_job", type=float, help="may be a fraction (default 1; 0 where there is no GPU)")
    parser.add_argument("--cpus_per_job", type=int, default=1, help="also the number of threads (default 1)")
    parser.add_argument("--retries", type=int, default=2, help="attempts more for a run that dies (default 2)")
    parser.add_argument("--index", type=Path, metavar="FOLDER", help="only write FOLDER/index.html, of the runs there")
    args, unknown = parser.parse_known_args(words)
    if unknown:
        raise UserError(f"{unknown[0]}: unknown; flags of main.py stand behind -- (--help tells more)")
    if args.index is not None:
        if args.prompts is not None or flags:
            raise UserError("--index: takes a folder and nothing else")
        return args, []
    if args.folder is None:
        raise UserError("batch.py prompts.txt FOLDER [-- flags of main.py]; --help tells more")
    for name, least in (("jobs", 1), ("gpus_per_job", 0), ("cpus_per_job", 1), ("retries", 0)):
        value = getattr(args, name)
        if value is not None and value < least:
            raise UserError(f"--{name} {value:g}: must be >= {least}")
    gpus = args.gpus_per_job or 0
    if gpus > 1 and gpus % 1:
        raise UserError(f"--gpus_per_job {gpus:g}: above 1 it must be a whole number")
    for flag in flags:
        if flag.partition("=")[0] in OURS:
            raise UserError(f"{flag.partition('=')[0]}: is chosen for each prompt by this script; leave it out")
    return args, flags


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, each once. Bytes that are not UTF-8 go through as they are. UserError if there is none."""
    try:
        text = path.read_bytes().decode("utf-8", "surrogateescape")
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name a file with a prompt a line") from None
    lines = [line.strip(" \t\r\f\v") for line in text.split("\n")]
    prompts = [line for line in dict.fromkeys(lines) if line and not line.startswith("#")]
    if not prompts:
        raise UserError(f"{path}: there is no prompt in it; write one a line")
    return prompts


def workspace_name(prompt: str) -> str:
    """The folder of a prompt, as scripts/run_prompts.sh names it: its words, and a checksum, since prompts may differ in other characters."""
    line = prompt.encode("utf-8", "surrogateescape") + b"\n"
    words = re.sub(rb"[^A-Za-z0-9]+", b"_", line)[:60].removeprefix(b"_").removesuffix(b"_")
    return f"{words.decode()}_{cksum(line)}"


def cksum(data: bytes) -> int:
    """The checksum of POSIX' cksum: CRC-32 with polynomial 0x04C11DB7, bits from the left, of the data and of its length."""
    crc, length = 0, len(data)
    for byte in data + length.to_bytes((length.bit_length() + 7) // 8, "little"):
        crc ^= byte << 24
        for _ in range(8):
            crc = (crc << 1) ^ (0x104C11DB7 if crc & 0x80000000 else 0)
    return crc ^ 0xFFFFFFFF


# -- Ray ---------------------------------------------------------------------------------------------------------------


def places(args: argparse.Namespace) -> tuple[float, int]:
    """GPUs of each run, and how many runs there is room for, with a line said; UserError if there is none for even one."""
    import ray

    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    there = {kind: int(sum(machine.get(kind, 0) for machine in machines)) for kind in ("GPU", "CPU")}
    gpus = args.gpus_per_job
    if gpus is None:
        gpus = 1.0 if there["GPU"] else 0.0
    cpus = args.cpus_per_job
    room = [int(min(m.get("CPU", 0) // cpus, m.get("GPU", 0) / gpus + 1e-6 if gpus else 10**9)) for m in machines]
    where = "this machine" if len(machines) == 1 else f"{len(machines)} machines"
    found = f"{there['GPU'] or 'no'} GPU{'s' if there['GPU'] > 1 else ''} and {there['CPU']} CPUs on {where}"
    if not sum(room):
        flag = f"--gpus_per_job {gpus:g}" if gpus > max(m.get("GPU", 0) for m in machines) else f"--cpus_per_job {cpus}"
        raise UserError(f"{flag}: no machine has as many ({found}); less, or --gpus_per_job 0 for CPUs alone")
    at_once = min(sum(room), args.jobs or sum(room))
    each = (f"{gpus:g} GPU{'s' if gpus > 1 else ''} and " if gpus else "") + f"{cpus} CPU{'s' if cpus > 1 else ''}"
    say(f"{found}: {at_once} run{'s' if at_once > 1 else ''} at once, {each} each")
    return gpus, at_once


# -- the batch ---------------------------------------------------------------------------------------------------------


def work(jobs: list[Job], args: argparse.Namespace, flags: list[str], program: Path, gpus: float) -> None:
    """Run what waits, at most `--jobs` at once, and what died again; the page is written anew when something happens."""
    import ray

    task = ray.remote(attempt).options(
        num_cpus=args.cpus_per_job, num_gpus=gpus, max_retries=0, scheduling_strategy="SPREAD"
    )
    waiting = deque(job for job in jobs if job.state == "waiting")
    flying = {}
    page = Page(args.folder, jobs)
    with Bar("batch", len(jobs), len(jobs) - len(waiting)) as bar:
        while waiting or flying:
            while waiting and len(flying) < (args.jobs or len(jobs)):
                job = waiting.popleft()
                words = [str(program), f"--text={job.prompt}", "--workspace", str(job.workspace), *flags]
                job.attempts += 1
                flying[task.remote(words, str(job.workspace), args.cpus_per_job, os.getcwd())] = job
            ready, _ = ray.wait(list(flying), num_returns=1, timeout=NEWS)
            for run in ready:
                job = flying[run]
                try:
                    kind, told = ray.get(next(run))
                except ray.exceptions.RayError as error:
                    kind, told = "died", _why(error)
                if kind == "started":
                    job.state, job.note = "running", ""
                    say(f'"{job.prompt}": started on {told}')
                    continue
                del flying[run]
                judge(job, kind, told, args.retries)
                if job.state == "waiting":
                    waiting.appendleft(job)
            states = [job.state for job in jobs]
            done = states.count("finished") + states.count("failed")
            bar.update(done, f"{states.count('running')} running, {states.count('failed')} failed")
            page.write(bool(ready))


def judge(job: Job, kind: str, told: Any, retries: int) -> None:
    """Set what follows from the end of an attempt, and say it: finished, failed, or waiting for another attempt.

    kind, told: an event of `attempt`, or ("died", why) if its Ray worker is gone. What cannot be mended is not tried again.
    """
    status, seconds = told if kind == "ended" else (None, 0.0)
    if status == 0 and finished(job.workspace):
        job.state = "finished"
        say(f'"{job.prompt}": finished, {seconds:.0f} s')
        return
    if kind == "died":
        reason = f"its Ray worker died ({told})"
    elif kind == "misplaced":
        reason = told
    elif status < 0:
        reason = f"killed by {signal.Signals(-status).name}"
    else:
        reason = last_error(job.workspace) or (f"exit status {status}" if status else "stopped before its end")
    if kind == "misplaced" or status == MISTAKE or job.attempts > retries:
        job.state, job.note = "failed", reason
        say(f'"{job.prompt}": failed: {reason}')
    else:
        job.state, job.note = "waiting", reason
        say(f'"{job.prompt}": {reason}; once more ({job.attempts} of {retries})')


def _why(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    return type(cause).__name__ + (f" ({cause})" if not type(cause).__module__.startswith("ray") else "")


class Page:
    """index.html, when something happened and now and then. That it cannot be written is said, and ends nothing."""

    def __init__(self, folder: Path, jobs: list[Job]) -> None:
        self.folder, self.jobs, self.written, self.complaint = folder, jobs, 0.0, ""

    def write(self, news: bool = True) -> Path | None:
        """Write it if there is `news`, or if it is old; its path, if it was written."""
        if not news and time.monotonic() - self.written < NEWS:
            return None
        self.written = time.monotonic()
        try:
            runs = [Entry(job.workspace, job.prompt, job.state, job.note) for job in self.jobs]
            return write_index(self.folder, runs)
        except (UserError, OSError) as error:
            if str(error) != self.complaint:
                self.complaint = str(error)
                say(self.complaint)
            return None


def batch(args: argparse.Namespace, flags: list[str], program: Path, gpus: int | None = None) -> int:
    """Make what the list asks for; returns the exit status: 0 if all is finished, else 1."""
    args.folder = args.folder.absolute()
    jobs = [Job(prompt, args.folder / workspace_name(prompt)) for prompt in read_prompts(args.prompts)]
    for job in jobs:
        try:
            parse([f"--text={job.prompt}", "--workspace", str(job.workspace), *flags])
        except UserError as error:
            raise UserError(f'"{job.prompt}": {error}') from None
        if finished(job.workspace):
            job.state = "finished"
            say(f'"{job.prompt}": finished already in {job.workspace}')
    make_folder(args.folder)
    with alone(args.folder):
        page = Page(args.folder, jobs)
        page.write()
        try:
            if any(job.state == "waiting" for job in jobs):
                with connected(args.address, gpus), terminable():
                    work(jobs, args, flags, program, places(args)[0])
        except (KeyboardInterrupt, SystemExit):
            stop(jobs)
            raise
        finally:
            for job in jobs:
                job.state = "unfinished" if job.state in ("waiting", "running") else job.state
            path = page.write()
    failed = [job for job in jobs if job.state != "finished"]
    for job in failed:
        say(f'failed: "{job.prompt}" ({job.note}); {job.workspace / OUTPUT}')
    say(f"{len(jobs)} prompt{'s' if len(jobs) > 1 else ''}, {len(failed)} failed" + (f": {path}" if path else ""))
    return 1 if failed else 0


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Inside the block no other batch may work in `folder`; UserError if one does."""
    claim = claimed(folder)
    try:
        claim.__enter__()
    except UserError:
        raise UserError(f"{folder}: another batch is at work there; wait for it, or choose another folder") from None
    try:
        yield
    finally:
        claim.__exit__(None, None, None)


@contextmanager
def terminable() -> Iterator[None]:
    """Inside the block SIGTERM raises SystemExit 143, so that the runs are stopped too."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    came = []

    def leave(signum, frame):
        came.append(signum)
        raise KeyboardInterrupt  # Ray hands on no other exception as it is

    former = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    except KeyboardInterrupt:
        if came:
            raise SystemExit(128 + came[0]) from None
        raise
    finally:
        signal.signal(signal.SIGTERM, former)


def stop(jobs: list[Job]) -> None:
    """After Ray is gone, and the runs have been asked to stop: wait until they have saved where they are."""
    until = time.monotonic() + PATIENCE
    running = [job for job in jobs if job.state == "running"]
    if running:
        say(f"stopping {len(running)} run{'s' if len(running) > 1 else ''}; the same command goes on")
    while any(in_use(job.workspace) for job in running) and time.monotonic() < until:
        time.sleep(0.1)


def main(argv: Sequence[str] | None = None, program: Path = ROOT / "main.py", gpus: int | None = None) -> int:
    """Do the batch; returns the exit status. `program` and `gpus` are for tests: what to run, and GPUs to pretend."""

    def work() -> int:
        args, flags = read_arguments(argv)
        if args.index is None:
            return batch(args, flags, program, gpus)
        if not args.index.is_dir():
            raise UserError(f"--index {args.index}: no such folder")
        say(f"index: {write_index(args.index, entries(args.index))}")
        return 0

    return status_of(work)


if __name__ == "__main__":
    sys.exit(main())
