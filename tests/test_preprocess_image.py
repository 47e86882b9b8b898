"""Photographs are prepared: cut out, centred, with depth and normals, through the script's own main function."""

import importlib.util
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from test_photos import make_options
from tiny_models import _unet, autoencoder_of, clip_encoder, word_tokenizer

from errors import UserError
from guidance.depth import DepthModel, NormalModel
from nerf.cutout import box_of, centred, cut_out
from nerf.photos import load_references
from nerf.relief import normals_of, within
from toybox.objects import OBJECTS
from toybox.render import orbit_cameras, trace

specification = importlib.util.spec_from_file_location("preprocess_image", ROOT / "scripts" / "preprocess_image.py")
script = importlib.util.module_from_spec(specification)
specification.loader.exec_module(script)


def toy(kind="teddy", size=160, azimuth=20.0):
    """Premultiplied colour, mask, depth and normals in the camera's frame of a toybox object, [size, size, C] each."""
    c2w = orbit_cameras(75.0, azimuth, 3.2)
    layers = trace(OBJECTS[kind], c2w, 30.0, size, c2w[:, :3, 2], torch.full((1,), 0.6))
    colour = layers.fixed + layers.main[..., None] * torch.tensor(OBJECTS[kind].default)
    local = torch.einsum("bhwi,bij->bhwj", layers.normal, c2w[:, :3, :3])
    return colour[0], layers.alpha[0, ..., None], layers.depth[0, ..., None], local[0]


def photograph(kind="teddy", size=160, seed=0):
    """The object in front of a wall with a gradient and a floor, and noise: no alpha; and its true mask."""
    colour, alpha, *_ = toy(kind, size)
    down, across = torch.linspace(0, 1, size)[:, None, None], torch.linspace(0, 1, size)[None, :, None]
    wall = torch.tensor([0.75, 0.8, 0.7]) - 0.15 * across * torch.ones(3)
    floor = torch.tensor([0.55, 0.5, 0.42]) + 0.1 * down * torch.ones(3)
    picture = colour + (1 - alpha) * torch.where(down > 0.7, floor, wall)
    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(seed))
    return (picture + 0.02 * noise).clamp(0, 1), alpha


def save(path, rgb):
    Image.fromarray((rgb * 255).round().byte().numpy()).save(path)
    return path


@pytest.fixture(scope="module")
def depth_folder(tmp_path_factory):
    """A tiny random Depth Anything in transformers' layout."""
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config, DPTImageProcessorPil

    torch.manual_seed(0)
    stages = {"out_features": [f"stage{i}" for i in range(1, 5)], "reshape_hidden_states": False}
    backbone = Dinov2Config(
        hidden_size=16, num_hidden_layers=4, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=1, **stages
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        patch_size=14,
        reassemble_hidden_size=16,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=4,
    )
    folder = tmp_path_factory.mktemp("depth")
    DepthAnythingForDepthEstimation(config).save_pretrained(folder)
    DPTImageProcessorPil(
        size={"height": 70, "width": 70}, keep_aspect_ratio=True, ensure_multiple_of=14
    ).save_pretrained(folder)
    return folder


def run(*typed) -> int:
    return script.main([str(word) for word in typed])


# -- the mask ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["teddy", "car", "mushroom", "chair"])
def test_grabcut_finds_the_object(kind):
    rgb, true = photograph(kind)
    found = cut_out(rgb, "photo") > 0.5
    true = true > 0.5
    assert (found & true).sum() / (found | true).sum() > 0.9


def test_a_large_photograph_keeps_its_size_and_a_soft_edge():
    rgb, true = photograph("car", 700)
    found = cut_out(rgb, "photo")
    assert found.shape == (700, 700, 1) and ((found > 0.1) & (found < 0.9)).any()
    assert ((found > 0.5) & (true > 0.5)).sum() / ((found > 0.5) | (true > 0.5)).sum() > 0.95


def test_specks_go_and_holes_close_but_handles_stay():
    rgb = torch.full((200, 200, 3), 0.9)
    rgb[60:140, 60:140] = torch.tensor([0.1, 0.2, 0.7])
    rgb[90:110, 90:110] = 0.9  # as large as a mug's handle lets one see through
    rgb[70:72, 70:72] = 0.9
    rgb[20:24, 180:184] = torch.tensor([0.1, 0.2, 0.7])
    rgb[60:120, 170:200] = torch.tensor([0.8, 0.3, 0.1])  # something else, half in the picture
    found = cut_out(rgb, "photo")[..., 0] > 0.5
    assert found[65, 65] and found[71, 71] and not found[100, 100] and not found[22, 182]
    assert not found[60:120, 165:].any()


def test_a_box_tells_which_thing_is_meant_and_that_it_may_reach_the_border():
    rgb = torch.full((200, 200, 3), 0.9)
    rgb[40:100, 0:60] = torch.tensor([0.1, 0.2, 0.7])  # cut off on the left
    rgb[120:190, 100:190] = torch.tensor([0.8, 0.3, 0.1])  # larger
    true = torch.zeros(200, 200, dtype=torch.bool)
    true[40:100, 0:60] = True
    alone = cut_out(rgb, "photo")[..., 0] > 0.5
    told = cut_out(rgb, "photo", (0.0, 0.1, 0.4, 0.55))[..., 0] > 0.5
    assert not (alone & true).any()
    assert (told & true).sum() / (told | true).sum() > 0.95


def test_rembg_sees_the_box_alone(monkeypatch):
    seen = []

    def remove(pixels, only_mask):
        seen.append(pixels.shape)
        return np.full(pixels.shape[:2], 255, np.uint8)

    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(remove=remove, __spec__=SimpleNamespace()))
    found = cut_out(torch.rand(40, 80, 3), "photo", (0.25, 0.5, 0.5, 1.0))[..., 0]
    assert seen == [(20, 20, 3)] and found[20:, 20:40].all() and found.sum() == 400


def test_rembg_is_asked_first_where_it_is_installed(monkeypatch, capsys):
    half = np.zeros((40, 40), np.uint8)
    half[:, 20:] = 255
    fake = SimpleNamespace(remove=lambda pixels, only_mask: half, __spec__=SimpleNamespace())
    monkeypatch.setitem(sys.modules, "rembg", fake)
    found = cut_out(torch.rand(40, 40, 3), "photo")
    assert torch.equal(found[..., 0], torch.from_numpy(half / 255).float()) and "rembg" in capsys.readouterr().err

    def fail(pixels, only_mask):
        raise ConnectionError("no weights\nfar away")

    fake.remove = fail
    rgb, true = photograph()
    found = cut_out(rgb, "photo") > 0.5
    text = capsys.readouterr().err
    assert "cannot be used (no weights)" in text and "GrabCut" in text
    assert (found & (true > 0.5)).sum() / (found | (true > 0.5)).sum() > 0.9


def test_nothing_to_cut_out_is_one_line():
    with pytest.raises(UserError, match="photo: no object stands out"):
        cut_out(torch.full((64, 64, 3), 0.5), "photo")


def test_without_opencv_it_says_what_to_do(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(UserError, match="pip install opencv-python-headless"):
        cut_out(photograph()[0], "photo")


# -- in the middle -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("box, size", [((10, 50, 5, 25), 100), ((0, 100, 80, 120), 64), ((90, 99, 3, 14), 512)])
def test_the_longer_side_fills_four_fifths(box, size):
    top, bottom, left, right = box
    mask = torch.zeros(100, 120, 1)
    mask[top:bottom, left:right] = 1
    (found,) = centred(mask, mask, size=size)
    assert found.shape == (size, size, 1)
    t, b, x0, x1 = box_of(found)
    pixel = max(2.5, 1.5 * 0.8 * size / max(bottom - top, right - left))
    assert max(b - t, x1 - x0) == pytest.approx(0.8 * size, abs=pixel)
    assert (t + b) / 2 == pytest.approx(size / 2, abs=pixel) and (x0 + x1) / 2 == pytest.approx(size / 2, abs=pixel)


# -- depth and normals -------------------------------------------------------------------------------------------------------


def test_depth_runs_from_nearest_to_farthest_within_the_mask():
    _, mask, depth, _ = toy()
    found = within(7 * depth - 100, mask)
    inside = mask > 0.5
    assert found[inside].min() == 0 and found[inside].max() == 1 and found[~inside].abs().max() == 0
    assert torch.corrcoef(torch.stack([found[inside], depth[inside]]))[0, 1] > 0.999
    assert within(torch.zeros_like(depth), mask)[inside].eq(0.5).all()


def test_normals_of_a_ball():
    """Its depth is known up to scale and shift; half its width deep is what is assumed."""
    at = (torch.arange(200) + 0.5) / 100 - 1
    y, x = torch.meshgrid(-at, at, indexing="ij")
    r2 = (x * x + y * y) / 0.7**2
    mask = (r2 < 1).float()[..., None]
    z = (1 - r2).clamp(min=0).sqrt()
    found = normals_of(within(-z[..., None], mask), mask)
    true = torch.stack([x / 0.7, y / 0.7, z], -1)
    inner = r2 < 0.6
    angle = torch.rad2deg(torch.acos((found * true).sum(-1).clamp(-1, 1)))
    assert angle[inner].mean() < 5 and angle[inner].max() < 12
    assert torch.allclose(found.norm(dim=-1), torch.ones(200, 200), atol=1e-5)
    assert torch.equal(found[0, 0], torch.tensor([0.0, 0, 1]))


def test_a_depth_model_from_a_folder(depth_folder):
    rgb, _ = photograph(size=90)
    near, far = DepthModel(str(depth_folder)), DepthModel(str(depth_folder), larger="farther")
    depth = near(rgb[:60])
    assert depth.shape == (60, 90, 1) and torch.isfinite(depth).all()
    assert torch.equal(depth, -far(rgb[:60])) and near.nearer and not far.nearer
    assert not torch.equal(near(rgb), near(1 - rgb))


def test_metric_models_are_known(depth_folder):
    model = DepthModel(str(depth_folder))
    from guidance.depth import _grows_towards_viewer

    config = model.model.config
    assert _grows_towards_viewer(config, "Intel/dpt-large") and not _grows_towards_viewer(config, "x/dpt-small-nyu")
    config.depth_estimation_type = "metric"
    assert not _grows_towards_viewer(config, "x/y")
    assert not _grows_towards_viewer(SimpleNamespace(model_type="glpn"), "x/y")


def test_a_normal_model_from_a_folder(tmp_path):
    from diffusers import DDIMScheduler, MarigoldNormalsPipeline

    torch.manual_seed(0)
    tokenizer = word_tokenizer(tmp_path, ["a"], 4)
    pipe = MarigoldNormalsPipeline(
        unet=_unet(8, 8, 4, 16),
        vae=autoencoder_of("kl"),
        scheduler=DDIMScheduler(prediction_type="v_prediction"),
        text_encoder=clip_encoder(tokenizer),
        tokenizer=tokenizer,
        use_full_z_range=True,
        default_denoising_steps=2,
        default_processing_resolution=0,
    )
    pipe.save_pretrained(tmp_path / "marigold")
    model = NormalModel(str(tmp_path / "marigold"), steps=2)
    rgb, _ = photograph(size=64)
    found = model(rgb)
    assert found.shape == (64, 64, 3) and torch.allclose(found.norm(dim=-1), torch.ones(64, 64), atol=1e-4)
    assert torch.equal(found, model(rgb))
    with pytest.raises(UserError, match="--normal_model .*MarigoldNormalsPipeline"):
        (tmp_path / "bare").mkdir()
        NormalModel(str(tmp_path / "bare"))


# -- the script --------------------------------------------------------------------------------------------------------------


def test_three_files_appear_and_are_found_again(tmp_path, depth_folder, capsys):
    """With the true depth in the place of a guess: what main.py --image then loads agrees with the truth."""
    rgb, _ = photograph("snowman", 200)
    path = save(tmp_path / "snow.png", rgb)
    assert run(path, "--out", tmp_path / "out", "--depth_model", depth_folder, "--size", 96) == 0
    out = tmp_path / "out"
    assert sorted(p.name for p in out.iterdir()) == ["snow_depth.png", "snow_normal.png", "snow_rgba.png"]
    assert Image.open(out / "snow_rgba.png").size == (96, 96) and Image.open(out / "snow_rgba.png").mode == "RGBA"
    assert Image.open(out / "snow_depth.png").mode.startswith("I;16")
    found = load_references(make_options(image=str(out / "snow_rgba.png")))
    assert found.depth is not None and found.normal is not None and found.rgb.shape == (1, 96, 96, 3)
    assert "turned round" not in capsys.readouterr().err


def test_the_true_depth_gives_true_normals(tmp_path, monkeypatch):
    colour, mask, depth, normal = toy("pumpkin", 200)
    rgba = torch.cat([colour / mask.clamp(min=1e-4), mask], -1)
    path = save(tmp_path / "pumpkin.png", rgba.clamp(0, 1))
    far = torch.where(mask > 0.5, depth, 9.0)
    monkeypatch.setattr(script, "DepthModel", lambda *_: lambda rgb: far)
    assert run(path, "--size", 128) == 0
    found = load_references(make_options(image=str(tmp_path / "pumpkin_rgba.png")))
    mask, depth, normal = centred(mask, mask, depth, normal, size=128)
    inside = (found.mask[0] > 0.99)[..., 0] & (mask > 0.99)[..., 0]
    pair = torch.stack([found.depth[0][inside][:, 0], depth[inside][:, 0]])
    assert torch.corrcoef(pair)[0, 1] > 0.99
    cosine = (found.normal[0] * torch.nn.functional.normalize(normal, dim=-1)).sum(-1)[inside]
    assert cosine.mean() > 0.85  # the relief is assumed
    assert box_of(found.mask[0])[1] - box_of(found.mask[0])[0] <= 0.8 * 128 + 2


def test_without_depth_one_file_and_no_network(tmp_path, monkeypatch):
    monkeypatch.setattr(script, "DepthModel", None)
    path = save(tmp_path / "a.png", photograph("car")[0])
    assert run(path, "--no_depth") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.png", "a_rgba.png"]
    rgba = np.asarray(Image.open(tmp_path / "a_rgba.png"))
    assert rgba.shape == (512, 512, 4) and rgba[..., 3].max() == 255 and rgba[0, 0, 3] == 0


def test_left_where_it_is(tmp_path):
    colour, mask, *_ = toy(size=100)
    path = save(tmp_path / "a.png", torch.cat([colour / mask.clamp(min=1e-4), mask], -1).clamp(0, 1)[:80])
    assert run(path, "--no_depth", "--dont_recenter", "--size", 100) == 0
    rgba = torch.from_numpy(np.asarray(Image.open(tmp_path / "a_rgba.png")).copy()).float() / 255
    assert torch.allclose(rgba[10:90, :, 3:], mask[:80], atol=0.01) and rgba[:10, :, 3].max() == 0


def test_nothing_is_overwritten_without_force(tmp_path, capsys):
    path = save(tmp_path / "a.png", photograph()[0])
    (tmp_path / "a_rgba.png").write_text("precious")
    other = save(tmp_path / "b.png", photograph()[0])
    assert run(other, path, "--no_depth") == 2
    assert "a_rgba.png: is there already" in capsys.readouterr().err
    assert (tmp_path / "a_rgba.png").read_text() == "precious" and not (tmp_path / "b_rgba.png").exists()
    assert run(path, "--no_depth", "--force") == 0 and Image.open(tmp_path / "a_rgba.png").size == (512, 512)


def test_mistakes_are_one_line(tmp_path, capsys, depth_folder):
    path = save(tmp_path / "a.png", photograph()[0])

    def refused(match, *typed):
        assert run(*typed) == 2
        text = capsys.readouterr().err
        assert match in text and text.count("\n") == 1
        assert sorted(p.name for p in tmp_path.iterdir() if p.suffix == ".png" and "_" in p.name) == []

    refused("no such file", tmp_path / "none.png")
    refused("would both become", path, tmp_path / "." / "a.jpg") if (tmp_path / "a.jpg").write_bytes(b"x") else None
    refused("--no_depth", path)  # the default model, offline
    refused("no such folder", path, "--depth_model", "not a model")
    refused("cannot be read as", path, "--depth_model", tmp_path)
    refused("--size 3", path, "--size", 3, "--no_depth")
    refused("--border_ratio", path, "--border_ratio", 1, "--no_depth")
    refused("--box 0.5 0 0.2 1: must be", path, "--box", 0.5, 0, 0.2, 1, "--no_depth")
    (depth_folder / "preprocessor_config.json").rename(depth_folder / "away.json")
    try:
        refused("no preprocessor_config.json", path, "--depth_model", depth_folder)
    finally:
        (depth_folder / "away.json").rename(depth_folder / "preprocessor_config.json")


def test_an_object_that_is_cut_off_is_said(tmp_path, capsys):
    colour, mask, *_ = toy(size=100)
    rgba = torch.cat([colour / mask.clamp(min=1e-4), mask], -1).clamp(0, 1)
    path = save(tmp_path / "a.png", rgba[:, : box_of(mask)[3] - 8])
    assert run(path, "--no_depth") == 0
    assert "touches the picture's right" in capsys.readouterr().err
