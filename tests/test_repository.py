"""The rules of the house: who may import whom, what a file may hold, and that no flag is without effect."""

import ast
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
from conftest import CHECKED

from flags import FLAGS, PRESETS
from options import ROOT, Options

KERNELS = ("raymarching", "gridencoder", "freqencoder", "shencoder", "rasterizer")
STEER_PARSING = {*PRESETS, "config", "file", "prompt_library"}
TEXTS = {
    ".py",
    ".md",
    ".sh",
    ".txt",
    ".toml",
    ".yaml",
    ".yml",
    ".json",
    ".html",
    ".js",
    ".css",
    ".cpp",
    ".cu",
    ".h",
    ".cfg",
    "",
}


@cache
def files() -> tuple[Path, ...]:
    """What belongs to the repository: tracked, or new and not ignored."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    found = tuple(ROOT / name for name in listed if name and (ROOT / name).is_file())
    assert ROOT / "main.py" in found
    return found


@cache
def modules() -> dict[str, ast.Module]:
    """Every Python file by its path from the root, parsed."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in files() if path.suffix == ".py"}


def imports(tree: ast.Module) -> set[str]:
    """The top-level names of everything a file imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are written from the root"
            found.add(node.module.partition(".")[0])
    return found


def room(name: str) -> str:
    """The room a file belongs to: its folder, or its own name at the root."""
    return name.partition("/")[0].removesuffix(".py")


def ours() -> set[str]:
    return {room(name) for name in modules()}


@pytest.mark.parametrize(
    ("rooms", "forbidden"),
    [
        (("nerf", "mesh"), {"guidance", "toybox"}),
        (("guidance",), {"nerf", "mesh", "toybox"}),
        (("options", "flags", "schedule", "errors", "files"), {"torch", "numpy", "nerf", "mesh", "guidance", "toybox"}),
    ],
)
def test_imports_point_down(rooms, forbidden):
    wrong = {name: imports(tree) & forbidden for name, tree in modules().items() if room(name) in rooms}
    assert wrong and not any(wrong.values()), {name: found for name, found in wrong.items() if found}


def test_kernels_know_only_the_builder():
    for name, tree in modules().items():
        if room(name) in KERNELS:
            assert imports(tree) & ours() <= {"extension", "errors", room(name)}, name


def test_only_clients_know_the_toybox_and_nobody_imports_main():
    clients = {"toybox", "tests", "benchmarks", "scripts", "guidance/weights.py"}
    for name, tree in modules().items():
        if not clients & {room(name), name}:
            assert "toybox" not in imports(tree), name
        assert room(name) == "tests" or "main" not in imports(tree), name


def test_everything_imported_is_listed_with_a_version():
    def listed(name: str) -> set[str]:
        lines = [line.split("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
        assert all(re.fullmatch(r"[\w-]+==[\d.]+", line) for line in lines if line)
        return {line.partition("==")[0].lower().replace("-", "_") for line in lines if line}

    packages = {"yaml": "pyyaml", "PIL": "pillow", "mcubes": "pymcubes", "igl": "libigl", "pxr": "usd_core"}
    packages |= {"cv2": "opencv_python_headless"}
    run, test = listed("requirements.txt"), listed("requirements-test.txt")
    # what comes with transformers and viser, and what is used where a user has it
    optional = {"tokenizers", "huggingface_hub", "msgspec", "websockets", "zstandard", "nvdiffrast", "rembg"}
    for name, tree in modules().items():
        foreign = imports(tree) - ours() - set(sys.stdlib_module_names) - optional
        beside = {"tests": ("tests", "scripts"), "benchmarks": ("tests",), "scripts": ("scripts",)}.get(room(name), ())
        foreign -= {path.stem for folder in beside for path in (ROOT / folder).glob("*.py")}
        foreign = {packages.get(package, package).lower() for package in foreign}
        known = run | test if room(name) in ("tests", "benchmarks") else run
        assert foreign <= known, f"{name}: {foreign - known}"
    assert "torchvision" not in run | test  # cannot be had for every build of torch


def test_no_file_is_too_large():
    for path in files():
        assert path.stat().st_size < 20 * 2**20, path


def test_a_file_is_one_room():
    long = {name: n for name in modules() if (n := len((ROOT / name).read_text().splitlines())) > 450}
    assert not long


def test_no_registry_and_no_path_of_a_machine_is_written_down():
    hosts = ("pypi" + ".org", "python" + "hosted", "download" + ".pytorch", "ana" + "conda", "npm" + "js", "unp" + "kg")
    folders = [rf"(?<![\w.~]){'/' + folder}/\w" for folder in ("work", "root", "home", "Users", "mnt")]
    pattern = re.compile("|".join([*map(re.escape, hosts), *folders]))
    found = [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path in files()
        if path.suffix in TEXTS and "vocab" not in path.name
        for match in pattern.finditer(path.read_text(errors="ignore"))
    ]
    assert not found


def test_models_hold_no_path_of_where_they_were_made():
    def texts(value):
        if isinstance(value, dict):
            return [text for item in value.values() for text in texts(item)]
        return [text for item in value for text in texts(item)] if isinstance(value, list) else [value]

    for path in files():
        if path.suffix == ".json" and "models" in path.parts:
            content = json.loads(path.read_text())
            assert not isinstance(content, dict) or "/" not in str(content.get("_name_or_path", "")), path
            if "vocab" not in path.name and "tokenizer" not in path.name:
                assert not [text for text in texts(content) if isinstance(text, str) and os.path.isabs(text)], path


def test_every_flag_has_an_effect_and_every_option_that_is_read_exists():
    read = {}
    for name, tree in modules().items():
        if room(name) in ("tests", "options", "flags"):
            continue
        for node in ast.walk(tree):
            owner = (
                getattr(node.value, "id", getattr(node.value, "attr", "")) if isinstance(node, ast.Attribute) else ""
            )
            if owner == "opt" or (owner == "settings" and node.attr in FLAGS and room(name) == "guidance"):
                read.setdefault(node.attr, name)  # guidance's settings are the options by the same names
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "Measure" and len(node.args) > 1:
                read.setdefault(node.args[1].value, name)  # a row of memory.py names the flag that asks for it
    unread = set(FLAGS) - set(read) - STEER_PARSING
    assert not unread, f"flags that do nothing: {unread}"
    unknown = {
        attribute: name
        for attribute, name in read.items()
        if attribute not in FLAGS and attribute != "origins" and not hasattr(Options, attribute)
    }
    assert not unknown, f"read, but no flag: {unknown}"


def test_checkpoints_of_strangers_run_no_code():
    for name, tree in modules().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", name


def test_annotations_with_shapes_can_be_checked():
    for name, tree in modules().items():
        if room(name) in CHECKED and "jaxtyping" in imports(tree):
            assert "__future__" not in imports(tree), f"{name}: postponed annotations are not checked at run time"


def test_scripts_run_and_continuous_integration_runs_the_tests():
    scripts = [path for path in files() if path.suffix == ".sh" or path == ROOT / ".ci" / "run"]
    assert {"demo.sh", "test.sh", "setup.sh", "run"} <= {path.name for path in scripts}
    for path in scripts:
        assert os.access(path, os.X_OK), f"{path} is not executable"
        subprocess.run(["bash", "-n", str(path)], check=True)
    assert "scripts/test.sh" in (ROOT / ".ci" / "run").read_text()
