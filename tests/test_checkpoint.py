"""Checkpoints and atomic files: whole or absent, refused in words when they are broken, foreign or of another prompt."""

import pytest
import torch
from torch import nn

from errors import UserError
from files import atomic, make_folder
from nerf import checkpoint


def _state(step, text="a chair"):
    return {"step": step, "text": text, "weights": torch.full((200,), float(step))}


def test_atomic_replaces_or_leaves_the_old_file(tmp_path):
    path = tmp_path / "deep" / "file.txt"
    with atomic(path) as beside:
        beside.write_text("first")
    assert path.read_text() == "first"
    with pytest.raises(ZeroDivisionError), atomic(path) as beside:
        beside.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_text() == "first"
    assert [p.name for p in path.parent.iterdir()] == ["file.txt"]


def test_a_place_that_cannot_be_written_is_a_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file/deeper.*--workspace"):
        make_folder(tmp_path / "file" / "deeper")


def test_round_trip_and_what_is_kept(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, _state(step))
    checkpoint.save(tmp_path, _state(25), final=True)
    checkpoint.save(tmp_path, _state(30), final=True)
    names = [path.name for path in checkpoint.newest_first(tmp_path)]
    assert names == ["step_0000030_final.pt", "step_0000030.pt", "step_0000020.pt"]
    state, path = checkpoint.choose(tmp_path, "latest")
    assert path.name == names[0] and state["step"] == 30 and bool((state["weights"] == 30).all())
    assert checkpoint.choose(tmp_path / "nothing", "latest") is None
    assert checkpoint.choose(tmp_path, str(tmp_path / names[2]))[0]["step"] == 20


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_broken_file_is_named_and_latest_goes_back_one(tmp_path, capsys, damage):
    checkpoint.save(tmp_path, _state(10))
    newest = checkpoint.save(tmp_path, _state(20))
    whole = newest.read_bytes()
    newest.write_bytes({"cut": whole[: len(whole) // 2], "empty": b"", "noise": b"\x07" * 500}[damage])
    with pytest.raises(UserError, match=f"{newest.name}.*broken.*--ckpt scratch"):
        checkpoint.read(newest)
    assert checkpoint.choose(tmp_path, "latest")[0]["step"] == 10
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and newest.name in lines[0] and "step_0000010.pt" in lines[0]
    (tmp_path / "step_0000010.pt").write_bytes(b"PK")
    with pytest.raises(UserError, match="step_0000010.pt"):  # nothing is left to go back to
        checkpoint.choose(tmp_path, "latest")


class _Trap:
    """What a hostile file would hold: an object whose unpickling runs code."""

    def __reduce__(self):
        return exec, ("raise SystemExit(99)",)


def test_code_in_a_file_is_not_run_and_foreign_files_are_refused(tmp_path):
    torch.save({"format": 1, "step": _Trap()}, tmp_path / "trap.pt")
    with pytest.raises(UserError, match="trap.pt"):
        checkpoint.read(tmp_path / "trap.pt")
    torch.save({"model": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="other.pt: not a checkpoint of this program"):
        checkpoint.read(tmp_path / "other.pt")
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.choose(tmp_path, "missing.pt")


def test_another_prompt_is_refused_with_remedies(tmp_path):
    path = checkpoint.save(tmp_path, _state(10))
    state = checkpoint.read(path)
    checkpoint.check_prompt(state, path, "a chair")
    with pytest.raises(UserError, match='"a chair".*step 10.*"a table".*--workspace.*--ckpt scratch'):
        checkpoint.check_prompt(state, path, "a table")


def test_scratch_sets_the_old_run_aside(tmp_path, capsys):
    checkpoint.save(tmp_path, _state(10))
    assert checkpoint.choose(tmp_path, "scratch") is None
    assert checkpoint.choose(tmp_path, "latest") is None
    assert checkpoint.read(tmp_path / "previous" / "step_0000010.pt")["step"] == 10
    assert "previous" in capsys.readouterr().err


def test_what_is_set_aside_twice_is_there_twice(tmp_path):
    for step in (10, 20, 20):
        kept = checkpoint.save(tmp_path, _state(step))
        checkpoint.set_aside(tmp_path, 10, kept if step == 10 else None)
    assert [p.name for p in checkpoint.newest_first(tmp_path)] == ["step_0000010.pt"]
    assert [p.name for p in sorted(tmp_path.glob("previous*/*"))] == ["step_0000020.pt"] * 2
    checkpoint.set_aside(tmp_path, 5, tmp_path / "step_0000010.pt")  # what a run goes on from stays
    assert (tmp_path / "step_0000010.pt").is_file()


def test_what_lies_ahead_does_not_push_out_what_is_new(tmp_path):
    """Two broken checkpoints of more steps: the run went on from an earlier one, and is killed again."""
    for step in (30, 40):
        (tmp_path / f"step_{step:07d}.pt").write_bytes(b"broken")
    for step in (10, 20, 25):
        checkpoint.save(tmp_path, _state(step))
    assert checkpoint.choose(tmp_path, "latest")[0]["step"] == 25
    assert not (tmp_path / "step_0000010.pt").exists()


def test_a_scene_of_another_shape_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"x.pt.*weight: \[2, 3\] in the file, \[2, 4\] here"):
        checkpoint.load_scene(nn.Linear(4, 2), nn.Linear(3, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(UserError, match=r"bias: none in the file, \[2\] here"):
        checkpoint.load_scene(nn.Linear(3, 2), nn.Linear(3, 2, bias=False).state_dict(), tmp_path / "x.pt")
