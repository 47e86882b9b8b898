"""The flat playground: methods side by side on a sheet, from a folder on the disk, through the script's own main function."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from tiny_models import build_folder

from toybox.sheet import GAP, LABEL, LINE, labelled_sheet, sheet_size

specification = importlib.util.spec_from_file_location("playground2d", ROOT / "scripts" / "playground2d.py")
playground = importlib.util.module_from_spec(specification)
specification.loader.exec_module(playground)

TILE = playground.TILES[0]
COLUMNS = len(playground.SHOWN)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    return {kind: build_folder(root / kind, kind) for kind in ("eps-tiny", "pix2pix", "if-eps")}


@pytest.fixture
def play(tmp_path, monkeypatch, models):
    """`play("eps-tiny", "--iters", 3)` -> the sheet as an array, or None if the script refused."""
    monkeypatch.setenv("SOMNIUM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(playground, "SAMPLE_STEPS", 10)

    def run(kind: str, *typed) -> np.ndarray | None:
        out = tmp_path / "sheets" / "sheet.png"
        out.unlink(missing_ok=True)
        text = ("--text", "a red chair", "--hf_key", models[kind], "--device", "cpu", "--out", out)
        status = playground.main([str(word) for word in (*text, *typed)])
        assert status == (0 if out.exists() else 2)
        return np.asarray(Image.open(out)).astype(int) if out.exists() else None

    return run


def tile(sheet: np.ndarray, row: int, column: int) -> np.ndarray:
    y, x = 2 * LINE + row * (TILE + GAP), LABEL + column * (TILE + GAP)
    return sheet[y : y + TILE, x : x + TILE]


def test_a_row_per_method_and_one_for_the_sample(play, capsys):
    sheet = play("eps-tiny", "--methods", "sds", "csd", "--iters", 3)
    assert sheet.shape == (*sheet_size(3, COLUMNS, TILE), 3)
    assert (tile(sheet, 0, 0) == tile(sheet, 1, 0)).all()  # all begin with the same picture
    assert np.abs(tile(sheet, 0, COLUMNS - 1) - tile(sheet, 1, COLUMNS - 1)).max() > 0
    for row in range(3):
        assert np.abs(tile(sheet, row, 0) - tile(sheet, row, COLUMNS - 1)).max() > 3
    assert "playground 16/16" in capsys.readouterr().err  # with the 10 steps of the sample


def test_the_same_call_makes_the_same_picture_and_another_seed_another(play):
    short = ("--methods", "sds", "--iters", 2)
    first, again, other = play("eps-tiny", *short), play("eps-tiny", *short), play("eps-tiny", *short, "--seed", 1)
    last = COLUMNS - 1
    assert (tile(first, 0, last) == tile(again, 0, last)).all() and (tile(first, 1, last) == tile(again, 1, last)).all()
    assert (tile(first, 0, last) != tile(other, 0, last)).any()


def test_flags_of_the_program_and_the_view_reach_the_method(play):
    short = ("--methods", "csd", "--iters", 2, "--lr", 0.5)
    plain = play("eps-tiny", *short)
    for more in (
        ("--view", "back"),
        ("--perpneg", "--view", "back"),
        ("--t_range", "0.9", "0.9"),
        ("--space", "pixels"),
    ):
        changed = play("eps-tiny", *short, *more)
        assert (tile(changed, 0, COLUMNS - 1) != tile(plain, 0, COLUMNS - 1)).any(), more


def test_particles_have_a_row_each(play):
    sheet = play("eps-tiny", "--methods", "vsd", "--iters", 1, "--particles", 2)
    assert sheet.shape == (*sheet_size(4, COLUMNS, TILE), 3)
    assert (tile(sheet, 0, 0) != tile(sheet, 1, 0)).any()


def test_a_model_of_pixels(play):
    assert play("if-eps", "--methods", "sds", "--iters", 1, "--IF") is not None
    assert play("if-eps", "--methods", "sds", "--iters", 1, "--IF", "--space", "latents") is None


def test_an_edit_begins_with_the_picture_to_edit(play, tmp_path):
    half = np.zeros((40, 60, 3), np.uint8)
    half[:, 30:] = 255
    Image.fromarray(half).save(tmp_path / "half.png")
    edit = ("--methods", "sds", "--iters", 1, "--space", "pixels")
    sheet = play("pix2pix", *edit, "--image", tmp_path / "half.png")
    begin = tile(sheet, 0, 0)
    assert (begin[:, : TILE // 4] == 0).all() and (begin[:, -TILE // 4 :] == 255).all()
    assert play("pix2pix", *edit) is None


@pytest.mark.parametrize("control", ["canny", "depth"])
def test_a_control_net_looks_at_the_picture(control, play, models, tmp_path):
    from diffusers import ControlNetModel, UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(models["eps-tiny"] / "unet")
    network = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 8, 16))
    for weight in network.parameters():
        weight.data.normal_(0, 0.2) if not weight.any() else None
    network.save_pretrained(tmp_path / "control")
    for name, left in (("left", 10), ("right", 40)):
        picture = np.zeros((64, 64, 3), np.uint8)
        picture[:, left:] = 255
        Image.fromarray(picture).save(tmp_path / f"{name}.png")
    typed = ("--methods", "sds", "--iters", 2, "--lr", 0.5, "--control", control, "--control_key", tmp_path / "control")
    left, right = (play("eps-tiny", *typed, "--image", tmp_path / f"{name}.png") for name in ("left", "right"))
    assert (tile(left, 0, COLUMNS - 1) != tile(right, 0, COLUMNS - 1)).any()
    assert play("eps-tiny", *typed) is None


@pytest.mark.parametrize(
    ("typed", "words"),
    [
        (["--methods", "sdss"], "--methods: invalid choice: 'sdss'"),
        (["--distill", "csd"], "--distill: name one or several methods with --methods"),
        (["--iters", "0"], "--iters 0: must be > 0"),
        (["--itters", "5"], "did you mean --iters?"),
        (["--lr", "0"], "--lr 0: must be > 0"),
        (["--W", "64"], "--W: has no meaning for a flat picture"),
        (["--out", "sheet.jpg"], "let its name end in .png"),
        (["--out", "/dev/null/sheet.png"], "cannot be written"),
        (["--image", "absent.png"], "this prior looks at no picture"),
        (["--text", "a dodecahedron"], 'does not know "dodecahedron"'),
    ],
)
def test_a_mistake_is_one_line(typed, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert playground.main(["--text", "a hamburger", "--methods", "sds", *typed]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and words in line
    assert not list(Path(tmp_path).iterdir())


def test_a_sheet_has_its_tiles_where_they_belong():
    red, small = np.zeros((8, 8, 3), np.uint8), np.full((2, 2, 3), 7, np.uint8)
    red[..., 0] = 200
    sheet = labelled_sheet(
        {"one\n3 s": [red, None], "a name that is far too long": [small, red]}, ["a", "b"], "title", 64
    )
    assert sheet.shape == (*sheet_size(2, 2, 64), 3)
    y, x = 2 * LINE, LABEL
    assert (sheet[y : y + 64, x : x + 64] == (200, 0, 0)).all()
    assert (sheet[y : y + 64, x + 64 + GAP :] == 255).all()
    assert (sheet[y + 64 + GAP : y + 128 + GAP, x : x + 64] == 7).all()
    assert (sheet[:, LABEL - 4 : LABEL][2 * LINE :] == 255).all() and sheet[
        :, :LABEL
    ].min() < 50  # names stay in their column
