"""scripts/novel_view.py: the sheet, what the model is asked, and what is no picture or makes no sense."""

import importlib.util

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from zero123_models import SIZE, random_model

from guidance import zero123
from toybox.sheet import GAP, LABEL, LINE, sheet_size

specification = importlib.util.spec_from_file_location("novel_view", ROOT / "scripts" / "novel_view.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)
TILE = script.TILES[0]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return random_model(tmp_path_factory.mktemp("models") / "random")


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    """A red disc with an alpha channel; what lies under the transparent part is green."""
    y, x = np.mgrid[:48, :48] - 23.5
    inside = np.hypot(x, y) < 15
    pixels = np.zeros((48, 48, 4), np.uint8)
    pixels[...] = (0, 255, 0, 0)
    pixels[inside] = (255, 0, 0, 255)
    path = tmp_path_factory.mktemp("photos") / "disc.png"
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture
def view(tmp_path, model, photo):
    """`view("--azimuth", 90)` -> the sheet as an array, or None if the script refused."""
    out = tmp_path / "sheets" / "views.png"

    def run(*typed, image=photo) -> np.ndarray | None:
        out.unlink(missing_ok=True)
        words = (image, "--zero123", model, "--steps", 2, "--device", "cpu", "--out", out, *typed)
        status = script.main([str(word) for word in words])
        assert status == (0 if out.exists() else 2)
        return np.asarray(Image.open(out)).astype(int) if out.exists() else None

    return run


def tile(sheet: np.ndarray, column: int) -> np.ndarray:
    x = LABEL + column * (TILE + GAP)
    return sheet[2 * LINE : 2 * LINE + TILE, x : x + TILE]


def test_the_picture_on_white_and_an_answer_for_each_azimuth(view):
    sheet = view("--azimuth", -90, 90, 180)
    assert sheet.shape == (*sheet_size(1, 4, TILE), 3)
    shown = tile(sheet, 0)
    assert (shown[0, 0] == 255).all() and shown[TILE // 2, TILE // 2].tolist() == [255, 0, 0]
    assert not ((shown[..., 1] > 150) & (shown[..., 0] < 100)).any()  # nothing green
    assert np.abs(tile(sheet, 1) - tile(sheet, 2)).max() > 3 and np.abs(tile(sheet, 2) - tile(sheet, 3)).max() > 3


def test_the_same_call_draws_the_same_and_another_seed_another(view):
    first = view()
    assert (view() == first).all() and (view("--seed", 1) != first).any()


def test_the_model_is_asked_for_the_angles_that_were_typed(view, monkeypatch):
    poses = []
    known = zero123.relative_pose
    monkeypatch.setattr(zero123, "relative_pose", lambda *told: poses.append(known(*told)) or poses[-1])
    view("--azimuth", 90, -45, "--polar", -20, "--radius", 0.25)
    turn, polar = torch.deg2rad(torch.tensor([90.0, -45.0])), torch.deg2rad(torch.tensor([-20.0, -20.0]))
    expected = torch.stack([polar, turn.sin(), turn.cos(), torch.full((2,), 0.25)], -1)
    torch.testing.assert_close(poses[-1], expected, atol=1e-5, rtol=1e-5)


def test_a_picture_that_is_not_square_is_filled_up(view, photo, tmp_path):
    wide = Image.new("RGBA", (80, 48), (0, 0, 0, 0))
    wide.paste(Image.open(photo), (16, 0))
    wide.save(tmp_path / "wide.png")
    shown = tile(view(image=tmp_path / "wide.png"), 0)
    red = (shown[..., 0] > 200) & (shown[..., 1] < 100)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    assert abs(len(rows) - len(columns)) <= TILE // SIZE  # the disc is still round
    assert abs(rows.mean() - columns.mean()) <= TILE // SIZE


@pytest.mark.parametrize(
    ("typed", "said"),
    (
        (("--steps", 0), "--steps 0"),
        (("--eta", 2), "--eta 2"),
        (("--zero123", "/nowhere/at all"), "--zero123 /nowhere/at all"),
    ),
)
def test_what_makes_no_sense_is_said_in_one_line(typed, said, view, capsys):
    assert view(*typed) is None
    line = capsys.readouterr().err
    assert said in line and line.count("\n") == 1


def test_files_that_are_no_pictures_are_said_in_one_line(view, tmp_path, capsys):
    (tmp_path / "text.png").write_text("hello")
    for name in ("text.png", "missing.png"):
        assert view(image=tmp_path / name) is None
        line = capsys.readouterr().err
        assert name in line and line.count("\n") == 1
