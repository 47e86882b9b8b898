"""Building and loading kernels: cached, safe beside other builds, never stuck, never silent about the slow path."""

import fcntl
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

import extension
import freqencoder
from errors import UserError
from freqencoder import FreqEncoder, reference

ROOT = Path(extension.__file__).resolve().parent


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """A process that has loaded nothing and said nothing, with an empty cache."""
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("SOMNIUM_KERNELS", "cpu")
    monkeypatch.setattr(extension, "_loaded", {})
    monkeypatch.setattr(extension, "_said", set())
    return tmp_path


@pytest.fixture
def compiler(fresh):
    if extension._compiler() is None:
        pytest.skip("no C++ compiler on this machine")
    return fresh


def kernel_folder(path: Path, body: str = "int answer() { return 42; }") -> Path:
    """A kernel folder that compiles in a fraction of a second: no torch header."""
    (path / "src").mkdir(parents=True)
    (path / "src" / "cpu.cpp").write_text(body)
    (path / "src" / "bindings.cpp").write_text("int bound() { return 7; }")
    return path


def built(cache: Path) -> list[Path]:
    return sorted(cache.glob("*/*.so"))


def test_builds_once_and_again_when_a_source_changes(compiler, capsys):
    folder = kernel_folder(compiler / "kernels")
    kernels = extension.load(folder, "once")
    assert kernels is not None and not kernels.cuda
    assert len(built(compiler / "cache")) == 1
    assert capsys.readouterr().err.count("compiling") == 1
    assert extension.load(folder, "once") is kernels

    extension._loaded.clear()
    extension._said.clear()
    assert extension.load(folder, "once") is not None
    assert "compiling" not in capsys.readouterr().err, "a second process must find the first one's build"

    before = extension._fingerprint(folder, cuda=False)
    (folder / "src" / "cpu.cpp").write_text("int answer() { return 43; }")
    assert extension._fingerprint(folder, cuda=False) != before


def test_spaces_in_paths(compiler, tmp_path, monkeypatch):
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "a cache"))
    assert extension.load(kernel_folder(tmp_path / "my kernels"), "spaced") is not None
    assert len(built(tmp_path / "a cache")) == 1


def test_fingerprint_knows_the_cpu_and_torch(compiler, monkeypatch):
    folder = kernel_folder(compiler / "kernels")
    prints = {extension._fingerprint(folder, cuda=False)}
    monkeypatch.setattr(extension, "_cpu", lambda: "another machine")
    prints.add(extension._fingerprint(folder, cuda=False))
    monkeypatch.setattr(torch, "__version__", "9.9")
    prints.add(extension._fingerprint(folder, cuda=False))
    assert len(prints) == 3


def test_leftovers_of_a_killed_build_hold_nobody_up(compiler):
    folder = kernel_folder(compiler / "kernels")
    target = extension.cache_folder() / f"stale-{extension._fingerprint(folder, cuda=False)}"
    ruin = target.parent / f"{target.name}.xyz.build"
    ruin.mkdir(parents=True)
    (ruin / "lock").touch()  # what torch leaves behind, and waits for, for ever
    target.with_suffix(".lock").touch()
    os.utime(ruin, (0, 0))
    done = threading.Thread(target=extension.load, args=(folder, "stale"), daemon=True)
    done.start()
    done.join(60)
    assert not done.is_alive() and len(built(compiler / "cache")) == 1
    assert not ruin.exists()


def test_a_lock_that_is_never_freed_is_given_up(compiler, monkeypatch):
    folder = kernel_folder(compiler / "kernels")
    monkeypatch.setattr(extension, "LOCK_SECONDS", 0.3)
    target = extension.cache_folder() / f"held-{extension._fingerprint(folder, cuda=False)}"
    target.parent.mkdir(parents=True)
    with open(target.with_suffix(".lock"), "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        started = time.monotonic()
        assert extension.load(folder, "held") is not None
        assert time.monotonic() - started >= 0.3


def test_two_processes_at_once(compiler):
    folder = kernel_folder(compiler / "kernels")
    code = f"import extension, pathlib; assert extension.load(pathlib.Path({str(folder)!r}), 'race')"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    processes = [subprocess.Popen([sys.executable, "-c", code], env=environment) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert len(built(compiler / "cache")) == 1
    assert not list((compiler / "cache").glob("*.build"))


def test_ninja_of_the_environment_is_found(compiler, monkeypatch):
    if not (Path(sys.executable).parent / "ninja").exists():
        pytest.skip("this environment has no ninja of its own")
    tools = compiler / "tools"
    tools.mkdir()
    for tool in ("c++", "g++", "as", "ld", "which"):
        source = next((Path(p) / tool for p in os.environ["PATH"].split(os.pathsep) if (Path(p) / tool).exists()), None)
        if source is None:
            pytest.skip(f"{tool} is not on PATH")
        (tools / tool).symlink_to(source)
    monkeypatch.setenv("PATH", str(tools))
    assert extension.load(kernel_folder(compiler / "kernels"), "ninja") is not None
    assert os.environ["PATH"] == str(tools)


def test_without_a_compiler_one_line_and_the_twin(fresh, monkeypatch, capsys):
    monkeypatch.setenv("CXX", "/nowhere/c++")
    x = torch.rand(5, 3)
    result = FreqEncoder(degree=4)(x)
    assert extension.load(fresh / "other", "other") is None
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "compiler" in lines[0]
    torch.testing.assert_close(result, reference.frequency_encode(x, 4, 4), rtol=0, atol=0)
    assert extension.backend() == "reference"


def test_a_failed_build_is_said_once_and_logged(compiler, capsys):
    folder = kernel_folder(compiler / "kernels", "this is not C++;")
    assert extension.load(folder, "broken") is None
    assert extension.load(folder, "broken") is None
    lines = [line for line in capsys.readouterr().err.splitlines() if "broken" in line]
    assert len(lines) == 1
    log = Path(lines[0].split("see ")[1])
    assert "this is not C++" in log.read_text()
    assert not built(compiler / "cache") and not list((compiler / "cache").glob("*.build"))


def test_reference_can_be_forced(fresh, monkeypatch, capsys):
    monkeypatch.setenv("SOMNIUM_KERNELS", "reference")
    assert extension.load(freqencoder.FOLDER, "freqencoder") is None
    assert extension.backend() == "reference"
    assert capsys.readouterr().err == "", "what was asked for needs no notice"
    monkeypatch.setenv("SOMNIUM_KERNELS", "fast")
    with pytest.raises(UserError, match="SOMNIUM_KERNELS=fast"):
        extension.load(freqencoder.FOLDER, "freqencoder")


def test_cuda_tensors_need_cuda_kernels(monkeypatch):
    cpu_only = extension.Kernels(ops=None, cuda=False)
    assert cpu_only.cover(torch.device("cpu")) and not cpu_only.cover(torch.device("cuda"))
    both = extension.Kernels(ops=None, cuda=True)
    monkeypatch.setenv("SOMNIUM_KERNELS", "auto")
    assert both.cover(torch.device("cuda", 1))
    monkeypatch.setenv("SOMNIUM_KERNELS", "cpu")
    assert not both.cover(torch.device("cuda", 1))
