"""The comparison of methods: what is run, what is taken from earlier runs, and the document that the table goes into."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from errors import UserError
from guidance.methods import METHODS
from toybox import compare, evaluate

DOCUMENT = ROOT / "docs" / "distillation.md"


def result(case, prompt, extra=(), iou=0.9, rank=1):
    figures = {"iou": iou, "color": 0.1, "rank": rank, "face": True, "seconds": 40.0, "speed": 15.0}
    return {"method": case, "prompt": prompt, "flags": compare.arguments(case, extra), **figures}


def keep(folder, case, prompt, extra=(), **figures):
    """Puts a result where a run would have left it."""
    workspace = compare.workspace_of(folder, case, prompt)
    workspace.mkdir(parents=True, exist_ok=True)
    compare.beside(workspace, "json").write_text(json.dumps(result(case, prompt, extra, **figures)))
    Image.new("RGB", (64, 64), "red").save(compare.beside(workspace, "png"))


@pytest.fixture
def document(tmp_path):
    path = tmp_path / "docs" / "methods.md"
    path.parent.mkdir()
    path.write_text(f"# Title\n\nprose\n\n{compare.BEGIN}\n\nold table\n\n{compare.END}\n\nmore prose\n")
    return path


# -- what is run -------------------------------------------------------------------------------------------------------


def test_every_method_and_every_variant_is_a_command_line_that_the_program_takes():
    from options import parse

    assert list(METHODS) == list(compare.CASES)[: len(METHODS)]
    for case in compare.CASES:
        opt = parse(["--text", "a hamburger", *compare.arguments(case, ["--iters", "7"])])
        assert opt.distill == case.split()[0] and opt.iters == 7
    assert all(" ".join(flags) == f"--distill {case}" for case, flags in compare.VARIANTS.items())
    assert len(set(map(compare.slug, compare.CASES))) == len(compare.CASES)


def test_the_prompts_are_among_those_that_are_ranked():
    assert set(compare.PROMPTS) <= set(evaluate.PROMPTS) and len(set(compare.PROMPTS)) == 5


def test_what_was_typed():
    typed = ["--methods", "csd", "sds --IF", "--prompts", "2", "--reuse", "--", "--iters", "300", "--perpneg"]
    args = compare.read_arguments(typed)
    assert args.methods == ["csd", "sds --IF"] and args.prompts == 2 and args.reuse and args.out == DOCUMENT
    assert args.extra == ["--iters", "300", "--perpneg"]
    assert compare.read_arguments([]).methods == list(compare.CASES) and compare.read_arguments([]).extra == []


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--methods", "ddpm"], "invalid choice: 'ddpm'"),
        (["--prompts", "6"], r"--prompts 6: must be in \[1, 5\]"),
        (["--jobs", "0"], "--jobs 0"),
        (["--iters", "3"], "unrecognized arguments"),
    ],
)
def test_what_must_not_be_typed(typed, words):
    with pytest.raises(UserError, match=words):
        compare.read_arguments(typed)


@pytest.fixture
def runs(monkeypatch):
    """The runs that are started, which only leave a checkpoint and a log behind; the measures are made up."""
    started = []

    def run(prompt, workspace, extra, one_thread=False):
        started.append((prompt, *extra))
        if "--fail" in extra:
            raise RuntimeError(f"{prompt}: exit status 2")
        (workspace / "checkpoints").mkdir(parents=True, exist_ok=True)
        (workspace / "checkpoints" / f"step_0000600{'' if '--stop' in extra else '_final'}.pt").touch()
        (workspace / "log.txt").write_text("12:00  seconds: training 40.0, validation 3.5, report 0.5\n")

    picture = torch.zeros(evaluate.SIZE, 8 * evaluate.SIZE, 3)
    picture[:, : evaluate.SIZE, 0] = 1
    measured = {"picture": picture, "iou": 0.87654, "color": 0.1, "face": True, "rank": 3}
    monkeypatch.setattr(evaluate, "run", run)
    monkeypatch.setattr(evaluate, "measure", lambda prompt, workspace, judge: dict(measured))
    monkeypatch.setattr(evaluate.Judge, "__init__", lambda self, prompts: None)
    return started


def compare_now(document, folder, *typed):
    argv = ["--out", document, "--folder", folder, *typed]
    return compare.main([str(word) for word in argv])


def test_a_run_leaves_its_figures_and_the_document_its_table(runs, document, tmp_path, capsys):
    folder = tmp_path / "runs"
    assert compare_now(document, folder, "--methods", "csd", "--prompts", "2", "--", "--iters", "9") == 0
    assert runs == [(prompt, "--distill", "csd", "--iters", "9") for prompt in compare.PROMPTS[:2]]
    text = document.read_text()
    assert "| `csd` | 0.877 (3) | 0.877 (3) | 0.877 | 0.100 | 0 of 2 | 40 | 15.0 |" in text and "old table" not in text
    assert "python -m toybox.compare -- --iters 9" in text and text.endswith("\n\nmore prose\n")
    assert f"]({document.with_suffix('.png').name})" in text
    kept = json.loads((folder / "csd" / "a_red_chair.json").read_text())
    assert kept["seconds"] == 40 and kept["speed"] == 15 and kept["flags"] == ["--distill", "csd", "--iters", "9"]
    front = np.asarray(Image.open(folder / "csd" / "a_red_chair.png"))
    assert front.shape == (evaluate.SIZE, evaluate.SIZE, 3) and (front == (255, 0, 0)).all()


def test_the_table_can_be_made_in_pieces(runs, document, tmp_path):
    folder = tmp_path / "runs"
    one = ("--prompts", "1", "--reuse")
    assert compare_now(document, folder, "--methods", "csd", *one) == 0
    assert compare_now(document, folder, "--methods", "sds", *one) == 0
    assert compare_now(document, folder, "--methods", "sds", "csd", *one) == 0
    assert len(runs) == 2
    assert re.findall(r"^\| `(\w+)`", document.read_text(), re.M) == ["sds", "csd"]  # in the order of METHODS
    (folder / "csd" / "a_hamburger.json").unlink()  # measured again, but not trained
    assert compare_now(document, folder, "--methods", "csd", *one) == 0 and len(runs) == 2
    assert (folder / "csd" / "a_hamburger.json").exists()
    assert compare_now(document, folder, "--methods", "csd", "--prompts", "1") == 0 and len(runs) == 3  # no --reuse
    assert compare_now(document, folder, "--methods", "csd", *one, "--", "--iters", "9") == 0 and len(runs) == 4
    assert re.findall(r"^\| `(\w+)`", document.read_text(), re.M) == ["csd"]  # the row of other flags stays out
    assert compare_now(document, folder, "--rewrite") == 0 and len(runs) == 4
    assert re.findall(r"^\| `(\w+)`", document.read_text(), re.M) == ["sds"]


@pytest.mark.parametrize("ending", ["--fail", "--stop"])
def test_a_run_that_fails_is_said_and_the_others_go_on(runs, document, tmp_path, ending, monkeypatch, capsys):
    monkeypatch.setitem(compare.CASES, "csd", ("--distill", "csd", ending))
    folder = tmp_path / "runs"
    keep(folder, "csd", "a hamburger")  # of a run that the failed one was to replace
    assert compare_now(document, folder, "--methods", "csd", "sds", "--prompts", "1") == 1
    assert "1/2  csd: a hamburger" in capsys.readouterr().err
    assert re.findall(r"^\| `(\w+)`", document.read_text(), re.M) == ["sds"]


# -- the document ------------------------------------------------------------------------------------------------------


def test_the_table_from_results_alone(document, tmp_path, capsys):
    folder = tmp_path / "runs"
    keep(folder, "sds --IF", "a hamburger", iou=0.5, rank=4)
    keep(folder, "sds", "a hamburger", iou=0.9)
    keep(folder, "sds", "a pink teddy", iou=0.8)
    assert compare_now(document, folder, "--rewrite") == 0
    lines = [line for line in document.read_text().splitlines() if line.startswith("| ")]
    assert lines == [
        "| method | a hamburger | a pink teddy | mean IoU | color error | R-Precision | seconds | steps/s |",
        "| `sds` | 0.900 | 0.800 | 0.850 | 0.100 | 2 of 2 | 40 | 15.0 |",
        "| `sds --IF` | 0.500 (4) |  | 0.500 | 0.100 | 0 of 1 | 40 | 15.0 |",
    ]
    sheet = Image.open(document.with_suffix(".png")).convert("RGB")
    assert sheet.size[::-1] == compare.sheet_size(2, 2, compare.TILES[0])


def test_the_picture_is_kept_small(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "LARGEST", 100_000)
    table = {
        case: {prompt: result(case, prompt) for prompt in compare.PROMPTS}
        for case in ("sds", "csd", "nfsd", "sds --IF")
    }
    random = np.random.default_rng(0)
    for case, results in table.items():
        for prompt in results:
            keep(tmp_path, case, prompt)
            noise = random.integers(0, 255, (128, 128, 3), np.uint8)  # the worst to compress
            Image.fromarray(noise).save(compare.beside(compare.workspace_of(tmp_path, case, prompt), "png"))
    compare.save_small(tmp_path / "sheet.png", tmp_path, table)
    assert 50_000 < (tmp_path / "sheet.png").stat().st_size <= 100_000


@pytest.mark.parametrize(
    "text",
    [
        "no marks",
        compare.BEGIN,
        f"{compare.END}\n{compare.BEGIN}",
        f"{compare.BEGIN}\n{compare.BEGIN}\n{compare.END}",
        f"{compare.BEGIN}\n{compare.END}\n{compare.END}",
    ],
)
def test_wrong_marks_are_noticed_before_anything_is_run(text, runs, document, tmp_path, capsys):
    document.write_text(text)
    assert compare_now(document, tmp_path / "runs") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --out") and compare.BEGIN in line and document.read_text() == text and not runs


def test_nothing_to_make_a_table_of_and_broken_results(document, tmp_path, capsys):
    before = document.read_text()
    assert compare_now(document, tmp_path / "runs", "--rewrite") == 2 and "no results" in capsys.readouterr().err
    keep(tmp_path / "runs", "sds", "a hamburger")
    (tmp_path / "runs" / "sds" / "a_hamburger.json").write_text("{")
    assert compare_now(document, tmp_path / "runs", "--rewrite") == 2
    assert "a_hamburger.json: cannot be read" in capsys.readouterr().err and document.read_text() == before


def test_phases_of_a_log(tmp_path):
    log = (
        "12:00  seconds: training 1.0\n12:01  seconds: training 40.5, six views 3.25, report 0.5\n12:02  all is well\n"
    )
    (tmp_path / "log.txt").write_text(log)
    assert evaluate.logged_times(tmp_path) == {"training": 40.5, "six views": 3.25, "report": 0.5}
    assert evaluate.logged_seconds(tmp_path) == 44.25
    (tmp_path / "log.txt").write_text("12:00  nothing yet\n")
    assert evaluate.logged_seconds(tmp_path) == 0


# -- docs/distillation.md says what is so -----------------------------------------------------------------------------


def test_the_document_can_take_the_table_and_names_every_method():
    text = compare.read_document(DOCUMENT)
    assert list(rows_of(text)) == list(METHODS)


def test_its_excerpts_are_those_of_the_files():
    text = DOCUMENT.read_text()
    places = {"python": ROOT / "guidance" / "methods.py", "yaml": ROOT / "configs" / "distill" / "published.yaml"}
    excerpts = re.findall(r"^```(\w+)\n(.*?)^```", text, re.M | re.S)
    assert len(excerpts) == 3
    for language, excerpt in excerpts:
        assert excerpt in places[language].read_text(), excerpt


@pytest.mark.parametrize("method", METHODS)
def test_its_numbers_of_calls_are_counted(method, tmp_path_factory, tmp_path, monkeypatch):
    from tiny_models import build_folder

    from guidance import build_guidance
    from options import parse

    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path))
    folder = tmp_path_factory.getbasetemp() / "counted"
    if not folder.exists():
        build_folder(folder, "eps-tiny")
    opt = parse(["--text", "a chair", "--hf_key", str(folder), "--distill", method, "--t_range", "0.5", "0.5"])
    guidance = build_guidance(opt, "cpu")
    samples = []
    guidance.prior.denoiser.register_forward_pre_hook(lambda module, inputs: samples.append(len(inputs[0])))
    guidance(torch.rand(1, 32, 32, 3), torch.tensor([80.0]), torch.tensor([0.0]), 1)
    assert sum(samples) == int(rows_of(DOCUMENT.read_text())[method][6])


def rows_of(text):
    """The first table: the cells of a method's row after its name."""
    table = text.partition("| `sds`")[2].partition("\n\n")[0]
    lines = [line.strip("| ").split(" | ") for line in f"| `sds`{table}".splitlines()]
    return {cells[0].strip("`"): [None, *cells[1:]] for cells in lines}
