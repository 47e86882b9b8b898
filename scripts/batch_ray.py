"""What scripts/batch.py does with Ray: start it or find it, and, on its workers, run main.py so that nothing outlives its parent."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from errors import UserError
from nerf.batch_page import OUTPUT

PATIENCE = 60.0  # seconds that a run which was stopped may take to save where it is
KNOCK = 10.0  # seconds to wait for a cluster's machine to answer
STORE = 80 * 2**20  # bytes of Ray's object store: nothing but a few words goes through it

# Becomes main.py, after it has asked for SIGTERM when its parent, the Ray worker, is gone: a run without a parent would hold its workspace
# against the next attempt. Ray's processes ignore Ctrl-C; main.py should not.
_BECOME = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
if os.getppid() != int(sys.argv[1]):
    sys.exit(143)
signal.pthread_sigmask(signal.SIG_SETMASK, ())
os.execv(sys.executable, [sys.executable, *sys.argv[2:]])
"""


@contextmanager
def connected(address: str | None, gpus: int | None = None) -> Iterator[None]:
    """Ray, on this machine alone or at `address`; afterwards what was started is stopped, the runs by SIGTERM.

    `gpus` pretends, for tests, that this machine has as many. UserError if nobody answers at `address`.
    """
    quiet = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    # Ray listens on every network interface: a secret that nobody else knows. A cluster has rules of its own.
    secret = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    # A worker that leaves would kill its children at once; they are to save first.
    patient = {"RAY_kill_child_processes_on_worker_exit": "false"}
    for name, value in {**quiet, **({} if address else {**secret, **patient})}.items():
        os.environ.setdefault(name, value)
    import ray

    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # on other machines there is no such module
    folder = None
    try:
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):  # what Ray says of dead workers is said here
            if address is None:
                folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")  # names of sockets must be short
                place = {"address": "local", "_temp_dir": folder, "object_store_memory": STORE, "num_gpus": gpus}
                ray.init(**place, include_dashboard=False, log_to_driver=False, logging_level="error")
            else:
                _knock(address)
                try:
                    ray.init(address=address, log_to_driver=False, logging_level="error")
                except (ConnectionError, ValueError, RuntimeError) as error:
                    reason = str(error).strip().split("\n")[0]
                    raise UserError(f"--address {address}: no Ray cluster answers there ({reason})") from None
            yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _knock(address: str) -> None:
    """UserError if nobody listens at HOST:PORT: Ray would look for minutes. Other forms (auto, ray://...) are left to Ray."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or "/" in address:
        return
    try:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"--address {address}: no Ray cluster answers there ({error})") from None


def attempt(words: list[str], workspace: str, threads: int, cwd: str) -> Iterator[tuple]:
    """On a Ray worker: one run of main.py with everything that it says in the workspace's `output.txt`.

    words: the program and its arguments; cwd: where it runs. Yields ("started", where), then ("ended", (exit status, a signal's is negative;
    seconds)) or, where the files are not those of the driver, ("misplaced", why).
    """
    folder, machine, began = Path(workspace), socket.gethostname(), time.monotonic()
    gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
    yield "started", machine + (f", GPU {gpus}" if gpus else "")
    if not (folder.parent.is_dir() and Path(words[0]).is_file()):
        yield "misplaced", f"{folder.parent} or {words[0]} is not there on {machine}: all machines must share it"
        return
    folder.mkdir(exist_ok=True)
    while in_use(folder) and time.monotonic() - began < PATIENCE:  # by the attempt before this one, which saves
        time.sleep(0.2)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment = {**inherited, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
    with open(folder / OUTPUT, "ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, str(os.getpid()), *words],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=cwd if Path(cwd).is_dir() else None,
            env=environment,
            start_new_session=True,
        )
        try:
            status = process.wait()
        finally:
            if process.poll() is None:
                process.terminate()
    yield "ended", (status, time.monotonic() - began)


def in_use(workspace: Path) -> bool:
    """Whether a run is at work there (`files.claimed`)."""
    try:
        import fcntl
    except ImportError:
        return False
    try:
        with open(workspace / ".lock", "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
