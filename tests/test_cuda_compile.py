"""Every .cu file compiles, for two generations of GPUs and without a warning. Needs nvcc, but no GPU."""

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("*/src/*.cu"))
INCLUDES = [ROOT / "csrc", Path(torch.__file__).parent / "include"]
NAMES = [path.parts[-3] for path in SOURCES]
NVCC, CXX = shutil.which("nvcc"), shutil.which("c++")


def test_every_kernel_folder_is_found():
    assert set(NAMES) >= {"freqencoder", "gridencoder", "rasterizer"}


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """Every compilation of this file, started at once on all cores: {(compiler, folder): future of the finished run}."""
    folder = tmp_path_factory.mktemp("cuda")
    includes = [f"-I{path}" for path in INCLUDES]
    targets = [f"-gencode=arch=compute_{generation},code=sm_{generation}" for generation in (80, 90)]

    def run(command):
        return subprocess.run([*command, *includes], capture_output=True, text=True, cwd=folder)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        futures = {}
        for source in SOURCES:
            name = source.parts[-3]
            output = ["-c", str(source), "-o", str(folder / f"{name}.o")]
            if NVCC:
                command = [NVCC, "-std=c++20", "-DUSE_CUDA", "-Werror", "all-warnings", *targets, *output]
                futures["nvcc", name] = pool.submit(run, command)
            if CXX:
                command = [CXX, "-std=c++20", "-DUSE_CUDA", "-fsyntax-only", str(source.with_name("bindings.cpp"))]
                futures["c++", name] = pool.submit(run, command)
        yield futures
        pool.shutdown(cancel_futures=True)


@pytest.mark.skipif(NVCC is None, reason="nvcc is not on PATH: the CUDA sources are not compiled here")
@pytest.mark.parametrize("name", NAMES)
def test_compiles_without_warnings(name, compilations):
    run = compilations["nvcc", name].result()
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.skipif(CXX is None, reason="no C++ compiler: the CUDA side of the bindings is not checked")
@pytest.mark.parametrize("name", NAMES)
def test_bindings_compile_for_cuda(name, compilations):
    run = compilations["c++", name].result()
    assert run.returncode == 0, run.stderr
