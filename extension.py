"""Builds and loads the compiled kernels of a folder, once per machine; without a compiler the PyTorch twins serve.

A kernel folder holds `src/cpu.cpp`, `src/cuda.cu`, `src/bindings.cpp` and `src/kernel.h`; headers that folders share lie
in `csrc/`. The first use compiles them (a few seconds) into `$SOMNIUM_CACHE` or `~/.cache/somnium/kernels`, in a folder
whose name is a hash of everything that the result depends on, so a stale build cannot be loaded.

`SOMNIUM_KERNELS` chooses: `auto` (default: CPU, and CUDA where torch has it), `cpu` (no CUDA build), `reference` (the
PyTorch twins everywhere).
"""

import hashlib
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from errors import UserError, say

try:  # a lock that dies with its owner; where there is none (Windows), two processes just build side by side
    import fcntl
except ImportError:
    fcntl = None

SHARED = Path(__file__).resolve().parent / "csrc"
FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-Wno-psabi"]
CUDA_FLAGS = ["-O3", "-DUSE_CUDA"]
MODES = ("auto", "cpu", "reference")
LOCK_SECONDS = 300.0  # how long to wait for another process's build before building anyway

_loaded: dict[Path, "Kernels | None"] = {}
_said: set[str] = set()
_lock = threading.Lock()


@dataclass(frozen=True)
class Kernels:
    """The compiled operators of one folder: `ops` is the namespace `torch.ops.somnium_<name>`."""

    ops: Any
    cuda: bool

    def cover(self, device: torch.device) -> bool:
        """Whether there is a compiled kernel for tensors on this device."""
        return device.type == "cpu" or (device.type == "cuda" and self.cuda and _mode() == "auto")


def load(folder: Path, name: str) -> Kernels | None:
    """The compiled kernels of `folder`, built on first use; None where the twins must serve (said once, in one line)."""
    if _mode() == "reference":
        return None
    folder = Path(folder).resolve()
    if folder not in _loaded:
        with _lock:
            if folder not in _loaded:
                _loaded[folder] = _build_and_load(folder, name)
    return _loaded[folder]


def ops_for(tensor: torch.Tensor, folder: Path, name: str) -> Any | None:
    """The operators `torch.ops.somnium_<name>` if they run on this tensor's device, else None: use the twin."""
    kernels = load(folder, name)
    return kernels.ops if kernels is not None and kernels.cover(tensor.device) else None


def backend() -> str:
    """What the kernels run on: `reference` (PyTorch twins), `cpu` or `cuda` (compiled)."""
    if _mode() == "reference" or None in _loaded.values() or (not _loaded and _compiler() is None):
        return "reference"
    if _loaded:
        return "cuda" if all(kernels.cuda for kernels in _loaded.values()) and _mode() == "auto" else "cpu"
    return "cuda" if _wants_cuda() else "cpu"


def will_compute(node: Any) -> bool:
    """Inside a custom backward: whether autograd will use the gradient that goes to `node` (`ctx.next_functions[i][0]`).

    `ctx.needs_input_grad` tells only whether an input requires a gradient at all. `autograd.grad(y, x)` for normals
    would pay for the table's gradient, too, and throw it away.
    """
    if node is None:
        return False
    try:
        return torch._C._will_engine_execute_node(node)
    except RuntimeError:  # a leaf that autograd.grad was asked for: torch refuses to answer, the answer is yes
        return True
    except AttributeError:  # a torch without this query: compute everything
        return True


def _mode() -> str:
    mode = os.environ.get("SOMNIUM_KERNELS", "auto")
    if mode not in MODES:
        raise UserError(f"SOMNIUM_KERNELS={mode} is not one of {', '.join(MODES)}")
    return mode


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        say(text)


def _compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "c++")) or (None if "CXX" in os.environ else shutil.which("g++"))


def _nvcc() -> str | None:
    return shutil.which("nvcc") or shutil.which("/usr/local/cuda/bin/nvcc")


def _wants_cuda() -> bool:
    return _mode() == "auto" and torch.cuda.is_available() and torch.version.cuda is not None


def cache_folder() -> Path:
    """Where built kernels live: `$SOMNIUM_CACHE` or `~/.cache/somnium/kernels`."""
    return Path(os.environ.get("SOMNIUM_CACHE") or Path.home() / ".cache" / "somnium" / "kernels")


def _build_and_load(folder: Path, name: str) -> Kernels | None:
    for cuda in [True, False] if _wants_cuda() else [False]:
        if cuda and _nvcc() is None:
            _say_once("no nvcc: on the GPU the (slower) PyTorch twins of the kernels are used")
            continue
        target = cache_folder() / f"{name}-{_fingerprint(folder, cuda)}"
        try:
            if not _library(target) and _compiler() is None:
                _say_once("no C++ compiler: the (slower) PyTorch twins of the kernels are used")
                return None
            with nullcontext() if _library(target) else _locked(target):
                library = _library(target)  # perhaps another process built it while this one waited
                if library:
                    torch.ops.load_library(str(library))
                else:
                    _build(folder, name, cuda, target)
        except (OSError, RuntimeError, ImportError) as error:
            kind = "CUDA kernels" if cuda else "kernels"
            _say_once(f"the {kind} of {name} did not build, PyTorch twins are used: {_keep_log(target, error)}")
            continue
        return Kernels(getattr(torch.ops, f"somnium_{name}"), cuda)
    return None


def _library(target: Path) -> Path | None:
    return next(target.glob("*.so"), None)


def _fingerprint(folder: Path, cuda: bool) -> str:
    """A hash of all that the machine code depends on: sources, flags, torch, the compiler's name and the CPU."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("src/*"), *SHARED.glob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    facts = [torch.__version__, torch.version.cuda, cuda, FLAGS, CUDA_FLAGS, _compiler(), _cpu()]
    if cuda:
        facts += [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
        facts.append(os.environ.get("TORCH_CUDA_ARCH_LIST"))
    digest.update(repr(facts).encode())
    return digest.hexdigest()[:16]


def _cpu() -> str:
    """The CPU's instruction sets: what -march=native depends on (a cache on a network disk meets many machines)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine() + platform.processor()
    return next((line for line in lines if line.lower().startswith(("flags", "features"))), platform.machine())


@contextmanager
def _locked(target: Path) -> Iterator[None]:
    """Keeps a second process from doing the same build; never waits for ever.

    The kernel frees the lock when its owner ends, however it ends, so a lock file that was left behind holds nobody up.
    Correctness does not hang on it: every build happens in a folder of its own and is renamed into place when complete.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    with open(target.with_suffix(".lock"), "w") as file:
        deadline = time.monotonic() + LOCK_SECONDS
        while time.monotonic() < deadline:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield


def _build(folder: Path, name: str, cuda: bool, target: Path) -> None:
    """Compiles in a private folder, loads the result and renames the folder to `target`. Raises RuntimeError with the compiler's words."""
    _say_once("compiling the kernels (a few seconds each, only this once)")
    paths = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:  # a venv's python, called by its path, does not see the venv's ninja
        os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), paths])
    nvcc = _nvcc()
    if cuda and nvcc and "CUDA_HOME" not in os.environ and Path("/usr/local/cuda/bin/nvcc").exists():
        os.environ["CUDA_HOME"] = "/usr/local/cuda"  # torch would guess the parent of a wrapper script on PATH
    from torch.utils import cpp_extension  # 0.1 s, and only builds need it

    for ruin in target.parent.glob("*.build"):  # what killed builds left behind
        if time.time() - ruin.stat().st_mtime > 24 * 3600:
            shutil.rmtree(ruin, ignore_errors=True)
    private = Path(tempfile.mkdtemp(prefix=f"{target.name}.", suffix=".build", dir=target.parent))
    try:
        with _without_spaces(cpp_extension, folder / "src", SHARED, private) as (source, shared, output):
            cpp_extension.load(
                f"somnium_{name}",
                [str(source / file) for file in ("bindings.cpp", "cpu.cpp", *(["cuda.cu"] if cuda else []))],
                extra_cflags=[*FLAGS, *(["-DUSE_CUDA"] if cuda else [])],
                extra_cuda_cflags=CUDA_FLAGS if cuda else None,
                extra_include_paths=[str(shared), str(source)],
                build_directory=str(output),
                with_cuda=cuda,
                is_python_module=False,
            )
        try:
            private.rename(target)
        except OSError:  # another process was faster, its result is the same
            if not _library(target):
                raise
    finally:
        os.environ["PATH"] = paths
        shutil.rmtree(private, ignore_errors=True)


@contextmanager
def _without_spaces(cpp_extension: Any, *folders: Path) -> Iterator[list[Path]]:
    """The folders, or where one (or torch itself) has a space in its path, links to them: torch's build files do not quote paths."""
    torch_folder = Path(cpp_extension._TORCH_PATH)
    if not any(" " in str(path) for path in (torch_folder, *folders)):
        yield list(folders)
        return
    with tempfile.TemporaryDirectory(prefix="somnium-") as place:
        links = [Path(place) / f"{i}-{path.name}" for i, path in enumerate((torch_folder, *folders))]
        for link, path in zip(links, (torch_folder, *folders), strict=True):
            link.symlink_to(path, target_is_directory=True)
        before = cpp_extension._TORCH_PATH, cpp_extension.TORCH_LIB_PATH
        cpp_extension._TORCH_PATH, cpp_extension.TORCH_LIB_PATH = str(links[0]), str(links[0] / "lib")
        try:
            yield links[1:]
        finally:
            cpp_extension._TORCH_PATH, cpp_extension.TORCH_LIB_PATH = before


def _keep_log(target: Path, error: BaseException) -> str:
    """Writes the compiler's words beside the build; returns where, for the one line that the user sees."""
    log = target.with_suffix(".log")
    try:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(str(error))
    except OSError:
        return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"see {log}"
