"""Every .cu file compiles, for two generations of GPUs and without a warning. Needs nvcc, but no GPU."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("*/src/*.cu"))
INCLUDES = [ROOT / "csrc", Path(torch.__file__).parent / "include"]
NVCC = shutil.which("nvcc")


def test_every_kernel_folder_is_found():
    assert {path.parts[-3] for path in SOURCES} >= {"freqencoder", "gridencoder"}


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: the CUDA sources are not compiled here")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parts[-3])
def test_compiles_without_warnings(source, tmp_path):
    targets = [f"arch=compute_{generation},code=sm_{generation}" for generation in (80, 90)]
    command = [NVCC, "-std=c++20", "-DUSE_CUDA", "-Werror", "all-warnings", "-t", "2", "-c", str(source)]
    command += [f"-gencode={target}" for target in targets] + [f"-I{path}" for path in INCLUDES]
    run = subprocess.run([*command, "-o", str(tmp_path / "kernel.o")], capture_output=True, text=True, cwd=tmp_path)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler: the CUDA side of the bindings is not checked")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.parts[-3])
def test_bindings_compile_for_cuda(source):
    command = ["c++", "-std=c++20", "-DUSE_CUDA", "-fsyntax-only", str(source.with_name("bindings.cpp"))]
    run = subprocess.run([*command, *(f"-I{path}" for path in INCLUDES)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
