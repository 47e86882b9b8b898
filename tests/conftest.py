"""What every test gets: shapes checked at run time, one thread, no network, and options small enough to run anything.

Fixtures: `tiny` (an Options object), `options(*typed)` (the same with more flags), `main(*typed)` (main.py, a process).
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests run side by side
os.environ["HF_HUB_OFFLINE"] = "1"

from jaxtyping import install_import_hook  # noqa: E402

CHECKED = (
    *("encoding", "optimizer", "schedule", "nerf", "mesh", "guidance", "toybox"),
    *("raymarching", "gridencoder", "freqencoder", "shencoder", "rasterizer"),
)
# Annotated shapes become assertions; an int passes where a float is asked for.
_hook = install_import_hook(CHECKED, "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")

# A whole run in a second or two: few rays, few samples, a small grid.
TINY = """
    --text hamburger --seed 1 --iters 4 --w 16 --h 16 --W 24 --H 24 --max_steps 32 --num_steps 16 --upsample_steps 8
    --num_levels 4 --log2_hashmap_size 10 --desired_resolution 32 --hidden_dim 16 --grid_size 16
    --mcubes_resolution 24 --decimate_target 200 --dataset_size_valid 2 --dataset_size_test 3 --device cpu
""".split()


def pytest_collection_modifyitems(items):
    """Skip in words what needs a CUDA device where there is none."""
    if not any(item.get_closest_marker("cuda") for item in items):
        return
    import torch

    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("cuda"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def write_photos(folder, count=3):
    """Pictures of noise, as photographs of some subject."""
    import torch
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        picture = torch.rand(32, 32, 3, generator=torch.Generator().manual_seed(number))
        Image.fromarray((picture * 255).byte().numpy()).save(folder / f"{number}.png")
    return folder


@pytest.fixture
def options(tmp_path):
    """`options("--lambda_tv", 0.1)`: the options of a tiny run in a fresh workspace, with more flags typed."""
    from options import parse

    return lambda *typed: parse(["--workspace", str(tmp_path / "workspace"), *TINY, *map(str, typed)])


@pytest.fixture
def tiny(options):
    """The options of a tiny run in a fresh workspace."""
    return options()


@pytest.fixture
def main(tmp_path):
    """`main("--text", "a chair")`: runs main.py in an empty folder, returns the finished process with its texts."""

    def run(*typed, timeout=600, env=None):
        command = [sys.executable, str(ROOT / "main.py"), *map(str, typed)]
        environment = {**os.environ, **(env or {})}
        return subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=timeout)

    return run
