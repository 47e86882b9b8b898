"""The scripts of the systems with several stages, against a stand-in for Python, and the commands in docs/systems.md."""

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest
from systems import ALSO, NAMES, STAGES

from options import ROOT, parse

# ---- scripts ------------------------------------------------------------------------------------------------------------

STAND_IN = """#!/usr/bin/env bash
# Notes how main.py was called; "trains" unless told to be stopped.
cd "$(dirname "$0")/../.."
printf '%q ' "$@" >>calls
echo >>calls
while [[ $1 != --workspace ]]; do shift; done
if [[ -e stopped ]]; then exit 0; fi
mkdir -p "$2/checkpoints"
touch -d '1 minute ago' "$2/checkpoints/step_0000004_final.pt"
if [[ ! -e killed ]]; then touch "$2/report.html"; fi
"""


@pytest.fixture
def house(tmp_path):
    """A copy of the scripts beside a stand-in for Python: `house(script, *args)` -> (exit status, calls of main.py since the last time, stderr)."""
    for folder in ("scripts", ".venv/bin"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (ROOT / "scripts").glob("*.sh"):
        (tmp_path / "scripts" / path.name).write_text(path.read_text())
    for name, text in (("scripts/setup.sh", "#!/bin/sh\n"), (".venv/bin/python", STAND_IN)):
        (tmp_path / name).write_text(text)
    for path in (*(tmp_path / "scripts").iterdir(), tmp_path / ".venv/bin/python"):
        path.chmod(0o755)

    def run(script, *args):
        calls = tmp_path / "calls"
        calls.unlink(missing_ok=True)
        done = subprocess.run([tmp_path / "scripts" / script, *args], capture_output=True, text=True, cwd=tmp_path)
        made = [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return done.returncode, made, done.stderr

    run.folder = tmp_path
    for name in ("my mug.png", "views.csv", "other.png"):
        (tmp_path / name).touch()
    (tmp_path / "photos").mkdir()
    return run


def after(call, flag):
    return call[call.index(flag) + 1] if flag in call else None


IMAGE = {"zero123.sh": ["my mug.png"], "magic123.sh": ["my mug.png"], "image.sh": ["my mug.png"]}
SHOWN = {  # script -> the words before its folder
    script: IMAGE.get(script, []) + (["a red chair"] if script != "zero123.sh" else []) for script in STAGES
}


def runs_once(house, script, words, stages):
    """Each stage from the one before, with the flags; the same command again does nothing, another subject is refused."""
    more = ["--guide_shape", "my shape.obj", "--sd_version", "embedded"]
    status, calls, _ = house(script, *words, "made/", *more)
    assert status == 0
    assert [Path(after(call, "--config")).stem for call in calls] == stages
    assert all((ROOT / after(call, "--config")).is_file() for call in calls)
    assert [after(call, "--workspace") for call in calls] == [f"made/{name}" for name in stages]
    starts = [after(call, "--init_with") for call in calls]
    assert starts == [None, *(f"made/{name}" for name in stages[:-1])]
    assert ["--save_mesh" in call for call in calls] == [False] * (len(calls) - 1) + [True]
    assert all(call[-4:] == more for call in calls)
    for call in calls:
        parse([*call[1:], "--workspace", str(house.folder / "none")])
    assert house(script, *words, "made", *more)[:2] == (0, [])
    status, again, line = house(
        script, *words[:-1], "other.png" if words == ["my mug.png"] else "another", "made", *more
    )
    assert (status, again) == (2, []) and f'made is of "{": ".join(words)}"' in line
    return calls


@pytest.mark.parametrize("script", STAGES)
def test_a_script_runs_the_stages_one_after_the_other_and_only_once(script, house):
    words = SHOWN[script]
    for call in runs_once(house, script, words, STAGES[script]):
        assert after(call, "--text") == ("a red chair" if "a red chair" in words else None)
        assert after(call, "--image") == ("my mug.png" if script in IMAGE else None)


def test_a_script_begins_otherwise_where_it_is_told_so(house, monkeypatch):
    (stable,), (alone,) = (
        [stages for (script, _), stages in ALSO.items() if script == s] for s in ("zero123.sh", "image.sh")
    )
    assert not any(after(call, "--text") for call in runs_once(house, "image.sh", ["my mug.png"], alone))
    monkeypatch.setenv("PRIOR", "stable")
    _, calls, _ = house("zero123.sh", "my mug.png", "stable")
    assert [Path(after(call, "--config")).stem for call in calls] == stable
    monkeypatch.setenv("PRIOR", "if")
    assert house("zero123.sh", "my mug.png", "other")[:2] == (2, [])


@pytest.mark.parametrize(
    ("shown", "flag"), [("my mug.png", "image"), ("views.csv", "image_config"), ("photos", "photos")]
)
def test_a_script_is_shown_a_picture_a_list_or_a_folder(shown, flag, house):
    _, calls, _ = house("magic123.sh", shown, "a mug", "made")
    assert [after(call, f"--{flag}") for call in calls] == [shown, shown]
    assert [sum(word in ("--image", "--image_config", "--photos") for word in call) for call in calls] == [1, 1]


@pytest.mark.parametrize("script", IMAGE)
def test_a_script_says_in_one_line_what_is_wrong_with_its_picture(script, house):
    words = SHOWN[script][1:]
    for args in (("no.png", *words, "made"), ("my mug.png", *words, "made", "--image", "other.png"), ("my mug.png",)):
        status, calls, line = house(script, *args)
        assert status == 2 and not calls and line.startswith("error: ") and line.count("\n") == 1
    assert "no.png: no such picture" in house(script, "no.png", *words, "made")[2]


def test_a_stopped_stage_goes_on_and_the_next_one_waits(house):
    (house.folder / "stopped").touch()
    status, calls, line = house("magic3d.sh", "a chair", "made")
    assert status == 130 and len(calls) == 1 and "the same command goes on" in line
    (house.folder / "stopped").unlink()
    (house.folder / "killed").touch()  # trained, but without results
    assert [status, len(calls)] == [130, 1] and house("magic3d.sh", "a chair", "made")[0] == 0
    (house.folder / "killed").unlink()
    assert len(house("magic3d.sh", "a chair", "made")[1]) == 2
    assert house("magic3d.sh", "a chair", "made")[:2] == (0, [])


@pytest.mark.parametrize("script", STAGES)
def test_a_script_refuses_what_it_cannot_do_and_explains_itself(script, house):
    words = SHOWN[script]
    for args in ((), words[:1], (*words, "--sd_version"), (*words, "made", "--guide_shape", "x", "--text=b")):
        if script == "image.sh" and args == (*words, "--sd_version"):
            continue  # without a prompt this is a picture and a folder
        status, calls, line = house(script, *args)
        assert status == 2 and not calls and line.startswith("error: ") and line.count("\n") == 1
    assert not (house.folder / "made").exists()
    status, calls, _ = house(script, "--help")
    assert status == 0 and not calls
    assert os.access(ROOT / "scripts" / script, os.X_OK)


def test_sketchshape_wants_its_shape_and_magic3d_knows_deepfloyd(house, monkeypatch):
    assert house("sketchshape.sh", "a chair", "made")[:2] == (2, [])
    monkeypatch.setenv("PRIOR", "if")
    _, calls, _ = house("magic3d.sh", "a chair", "made")
    assert (
        after(calls[0], "--config").endswith("magic3d-coarse-if.yaml")
        and after(calls[1], "--init_with") == "made/magic3d-coarse-if"
    )


# ---- docs/systems.md ----------------------------------------------------------------------------------------------------


def commands() -> list[list[str]]:
    """The commands of ours: those in the last column of the tables of docs/systems.md."""
    rows = [line for line in (ROOT / "docs" / "systems.md").read_text().splitlines() if line.startswith("| ")]
    texts = [
        text for row in rows for text in re.findall(r"`((?:main\.py|scripts/\w+\.sh) [^`]*)`", row.split(" | ")[-1])
    ]
    assert len(texts) > 40
    return [shlex.split(text) for text in texts]


def test_the_documented_commands_are_understood(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for command in commands():
        program, *words = command
        assert (ROOT / program).is_file(), command
        if program == "main.py" and "--test" not in words and not any("lib:" in word for word in words):
            shown = {"--text", "--image", "--image_config", "--photos"} & {*words}
            parse([*words, *([] if shown else ["--text", "x"])])


def test_every_system_is_documented():
    text = (ROOT / "docs" / "systems.md").read_text()
    assert not [name for name in NAMES if f"`{name}`" not in text]
    assert not [script for script in STAGES if f"scripts/{script}" not in text]
    assert text.count("<!-- table of benchmarks/systems.py -->") == text.count("<!-- end of the table -->") == 1


# ---- prompts, one after the other ---------------------------------------------------------------------------------------


def test_a_list_of_prompts_is_made_one_after_the_other_and_only_once(house):
    (house.folder / "prompts.txt").write_text(
        "# mine\na red chair\n\n  a  'quoted' \"mug\" $HOME *  \na red  chair\nlast without a newline"
    )
    status, calls, told = house("run_prompts.sh", "prompts.txt", "made", "-O", "--iters", "5")
    assert status == 0 and "4 prompts, 0 failed" in told
    texts = [after(call, "--text") for call in calls]
    assert texts == ["a red chair", "a  'quoted' \"mug\" $HOME *", "a red  chair", "last without a newline"]
    folders = [after(call, "--workspace") for call in calls]
    assert len(set(folders)) == 4 and all(call[-3:] == ["-O", "--iters", "5"] for call in calls)
    status, calls, told = house("run_prompts.sh", "prompts.txt", "made")
    assert (status, calls) == (0, []) and told.count("finished already") == 4


def test_a_prompt_that_fails_does_not_stop_the_others_but_a_hand_does(house):
    (house.folder / "prompts.txt").write_text("one\ntwo\nthree\n")
    python = house.folder / ".venv/bin/python"
    python.write_text(STAND_IN.replace("while [[", "if [[ $3 == two ]]; then exit ${FAIL:-3}; fi\nwhile [[", 1))
    status, calls, told = house("run_prompts.sh", "prompts.txt", "made")
    assert status == 1 and len(calls) == 3 and "failed: two" in told
    python.write_text(python.read_text().replace("FAIL:-3", "FAIL:-130"))
    status, calls, _ = house("run_prompts.sh", "prompts.txt", "other")
    assert status == 130 and len(calls) == 2
    assert house("run_prompts.sh", "nothing.txt", "made")[0] == 2 and house("run_prompts.sh")[0] == 2
