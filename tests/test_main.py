"""The program from outside: exit status, the one line of an error, what is written; and the order in which it does things."""

import os
import resource
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY

import main as program
from errors import UserError


def python(code: str, cwd) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, text=True, capture_output=True, timeout=60)


# ---- from outside -----------------------------------------------------------------------------------------------------------


def test_help_answers_at_once_and_imports_nothing_heavy(tmp_path, main):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = main("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0 and "--text TEXT" in done.stdout and not done.stderr
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert used < 0.3  # processor time: the clock also counts what else the machine does
    code = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import main, options
options.parse(["--text", "a hamburger", "-O"])
heavy = {{"torch", "numpy", "diffusers", "transformers", "trimesh", "rich", "tensorboardX"}} & set(sys.modules)
sys.exit(f"imported: {{heavy}}" if heavy else 0)
"""
    done = python(code, tmp_path)
    assert done.returncode == 0, done.stderr


def test_version(main):
    done = main("--version")
    assert done.returncode == 0 and done.stdout.startswith("Somnium ")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ([], "--text is missing"),
        (["--text", "a hamburger", "--itters", "3"], "did you mean --iters?"),
        (["--text", "a hamburger", "--w", "0"], "--w 0: must be > 0"),
        (["--text", "a hamburger", "--config", "absent.yaml"], "no such file"),
        (["--text", "a hamburger", "--workspace", "taken"], "taken is a file, not a folder"),
        (["--text", "a hamburger", "--workspace", "taken/below"], "taken is a file, not a folder"),
        (["--workspace", "absent", "--test"], "no config.yaml"),
    ],
)
def test_a_mistake_is_one_line_and_status_2_and_nothing_is_written(main, tmp_path, argv, words):
    (tmp_path / "taken").write_text("mine")
    done = main(*argv)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ") and words in line
    assert done.stdout == "" and [path.name for path in tmp_path.iterdir()] == ["taken"]


@pytest.mark.slow
def test_a_whole_run_and_its_restoration(main, tmp_path):
    """With a random model, from an empty folder to video, mesh and report; then once more from the folder alone."""
    from tiny_models import build_folder

    model = build_folder(tmp_path / "model", "v-tiny")
    done = main(*TINY, "--hf_key", model, "--workspace", "trial", "-O", "--save_mesh", "--background", "random")
    assert done.returncode == 0, done.stderr
    trial = tmp_path / "trial"
    assert {path.name for path in trial.iterdir()} >= {
        "config.yaml",
        "log.txt",
        "run",
        "checkpoints",
        "results",
        "report.html",
    }
    videos = {path.name for path in (trial / "results").glob("*.mp4")}
    assert any("rgb" in name for name in videos)
    for video in (trial / "results").glob("*.mp4"):
        video.unlink()
    saved = (trial / "config.yaml").read_text()
    done = main("--workspace", "trial", "--test", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (trial / "results").glob("*.mp4")} == videos
    assert (trial / "config.yaml").read_text() == saved


# ---- from inside ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def calls(monkeypatch):
    """The steps that `run` takes, with a trainer that only writes them down."""
    done = []

    def build(opt):
        steps = {name: (lambda name=name: done.append(name)) for name in ("train", "test", "export_mesh", "report")}
        return SimpleNamespace(guidance=None if opt.test or opt.six_views else object(), **steps)

    monkeypatch.setattr(program, "build", build)
    return done


def test_the_order_of_things(calls, options, tmp_path):
    program.run(options("--save_mesh"))
    assert calls == ["train", "test", "export_mesh", "report"]
    calls.clear()
    opt = options()
    program.run(opt)
    assert calls == ["train", "test", "report"]
    calls.clear()
    opt.save(Path(opt.workspace) / "config.yaml")
    program.run(options("--test"))
    assert calls == ["test", "report"]


def test_no_guidance_is_built_for_results_alone(options, monkeypatch):
    import guidance
    import nerf
    import nerf.trainer

    order = []
    monkeypatch.setattr(nerf, "build_scene", lambda opt, **more: order.append(torch.initial_seed()) or "scene")
    told = SimpleNamespace(wants=())
    monkeypatch.setattr(guidance, "build_guidance", lambda opt, device: order.append(str(device)) or told)
    monkeypatch.setattr(nerf.trainer, "Trainer", lambda *parts: parts)
    opt = options("--seed", 11)
    assert program.build(opt)[:4] == (opt, "scene", told, torch.device("cpu"))
    assert order == [11, "cpu"]  # the scene's weights follow from --seed
    opt.save(Path(opt.workspace) / "config.yaml")
    for action in ("--test", "--six_views"):
        assert program.build(options(action))[2] is None
    assert order.count("cpu") == 1


def test_what_presets_changed_is_said(calls, options, capsys):
    program.run(options("-O"))
    assert "somnium: -O: fp16 on, cuda_ray on" in capsys.readouterr().err


def test_the_device(monkeypatch):
    from devices import choose_device

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto").type == "cpu"
    with pytest.raises(UserError, match="--device cuda"):
        choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert choose_device("auto").type == "cuda" and choose_device("cpu").type == "cpu"


def test_a_workspace_that_cannot_be_written_is_noticed_before_anything_slow(tmp_path, monkeypatch):
    program.check_workspace(str(tmp_path / "new" / "folders"))
    assert not (tmp_path / "new").exists()
    monkeypatch.setattr(program.os, "access", lambda path, mode: False)
    with pytest.raises(UserError, match="cannot be written"):
        program.check_workspace(str(tmp_path / "new"))


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("can't allocate memory: x")]
)
def test_out_of_memory_names_the_flags_that_help_in_order(calls, options, monkeypatch, error):
    def build(opt):
        raise error

    monkeypatch.setattr(program, "build", build)
    with pytest.raises(UserError) as caught:
        program.run(options("--batch_size", 2, "--save_mesh"))
    line = str(caught.value)
    flags = ["--vram_O", "--fp16", "--batch_size 1", "--w and --h", "--max_ray_batch", "--mcubes_resolution"]
    places = [line.index(flag) for flag in flags]
    assert places == sorted(places)
    with pytest.raises(UserError) as caught:
        program.run(options("--vram_O", "--fp16"))
    assert not any(flag in str(caught.value) for flag in ("--vram_O", "--fp16", "--batch_size", "--mcubes"))


def test_a_bug_keeps_its_traceback(calls, options, monkeypatch):
    def build(opt):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(program, "build", build)
    with pytest.raises(RuntimeError, match="shapes"):
        program.main(["--text", "a hamburger"])


@pytest.mark.parametrize(
    ("error", "status", "words"),
    [
        (UserError("--text: two\nlines"), 2, "error: --text: two lines\n"),
        (KeyboardInterrupt(), 130, ""),
        (ModuleNotFoundError("", name="trimesh.util"), 2, "error: the package trimesh is not installed"),
    ],
)
def test_exit_status(monkeypatch, capsys, error, status, words):
    def run(opt):
        raise error

    monkeypatch.setattr(program, "run", run)
    assert program.main(["--text", "a hamburger"]) == status
    written = capsys.readouterr().err
    assert written.startswith(words) and bool(written) == bool(words)


def test_a_missing_part_of_this_program_is_a_bug(monkeypatch):
    def run(opt):
        raise ModuleNotFoundError("", name="nerf.absent")

    monkeypatch.setattr(program, "run", run)
    with pytest.raises(ModuleNotFoundError):
        program.main(["--text", "a hamburger"])


def test_two_runs_do_not_share_a_workspace(main, tmp_path):
    """The second is told who is there; one that died leaves nothing behind."""
    from files import claimed

    with claimed(tmp_path / "busy"):
        done = main("--text", "hamburger", "--workspace", "busy", "--iters", 2)
        assert done.returncode == 2 and not (tmp_path / "busy" / "config.yaml").exists()
        assert f"another run is at work there (process {os.getpid()})" in done.stderr and "Traceback" not in done.stderr
    with claimed(tmp_path / "busy"):
        pass
