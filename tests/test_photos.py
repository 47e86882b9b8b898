"""Pictures become references: one, several by a CSV file, with their companions; repairs are said, mistakes are one line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from errors import UserError
from nerf.photo_files import read_grey, read_picture, resized
from nerf.photos import (
    default_view,
    is_known_step,
    known_background,
    known_size,
    known_view,
    load_references,
)
from schedule import Schedule


def make_options(**more):
    base = {
        "image": None,
        "image_config": None,
        "photos": None,
        "photo_views": "all",
        "photo_align": "auto",
        "default_radius": 3.2,
        "default_polar": 90.0,
        "default_azimuth": 0.0,
        "default_fovy": 20.0,
        "bound": 1.0,
        "batch_size": 1,
        "known_view_interval": 4,
        "known_view_scale": 1.5,
        "known_view_noise_scale": 2e-3,
        "size_scale": Schedule(1.0),
        "h": 64,
        "w": 64,
        "dmtet": False,
        "dmtet_reso_scale": 8,
    }
    return SimpleNamespace(**{**base, **more})


def disc(size=64, radius=0.35, colour=(200, 60, 40), alpha=True):
    """A coloured disc, transparent around it (or on grey-blue)."""
    at = (np.arange(size) + 0.5) / size - 0.5
    inside = (at[:, None] ** 2 + at**2) < radius**2
    picture = np.full((size, size, 3), (120, 140, 160), np.uint8)
    picture[inside] = colour
    return np.dstack([picture, np.where(inside, 255, 0).astype(np.uint8)]) if alpha else picture


def save(path, array, **more):
    Image.fromarray(array).save(path, **more)
    return path


# -- one picture -------------------------------------------------------------------------------------------------------------


def test_nothing_named_is_no_references():
    assert load_references(make_options()) is None


def test_one_picture_stands_at_the_default_view(tmp_path):
    path = save(tmp_path / "x_rgba.png", disc())
    found = load_references(make_options(image=str(path), default_polar=70.0, default_azimuth=30.0))
    assert len(found) == 1 and found.rgb.shape == (1, 64, 64, 3) and found.weight.tolist() == [1.0]
    camera = found.cameras
    assert (camera.polar.item(), camera.azimuth.item(), camera.height) == (70.0, 30.0, 64)
    assert camera.radius.item() == pytest.approx(3.2) and camera.fovy.item() == 20.0
    assert torch.allclose(found.rgb[0, 32, 32] * 255, torch.tensor([200.0, 60, 40]))
    assert found.mask[0, 32, 32] == 1 and found.mask[0, 0, 0] == 0
    assert found.depth is None and found.normal is None
    shown = found.picture(0)
    assert shown.shape == (3, 64, 64) and torch.equal(shown[:, 0, 0], torch.ones(3))
    assert torch.equal(found.picture(0, torch.tensor([0.0, 0, 1]))[:, 0, 0], torch.tensor([0.0, 0, 1]))


def test_companions_are_found_and_turned_towards_the_viewer(tmp_path, capsys):
    path = save(tmp_path / "x_rgba.png", disc())
    ramp = np.broadcast_to(np.linspace(0, 65535, 64).astype(np.uint16), (64, 64))
    save(tmp_path / "x_depth.png", np.ascontiguousarray(ramp))
    away = np.broadcast_to(np.array([127, 127, 0], np.uint8), (64, 64, 3))  # Omnidata's sign: z = -1 faces the viewer
    save(tmp_path / "x_normal.png", np.ascontiguousarray(away))
    found = load_references(make_options(image=str(path)))
    assert found.depth[0, 30, 60] > found.depth[0, 30, 4]
    assert found.depth.amax() == 1
    assert found.normal[0, 32, 32, 2] > 0.99
    assert "turned round" in capsys.readouterr().err
    save(tmp_path / "x_normal.png", np.ascontiguousarray(255 - away))
    assert load_references(make_options(image=str(path))).normal[0, 32, 32, 2] > 0.99
    assert "turned round" not in capsys.readouterr().err


def test_without_alpha_it_is_cut_out_and_centred(tmp_path, capsys):
    wide = np.full((120, 200, 3), (90, 130, 90), np.uint8)
    wide[30:70, 20:60] = (220, 30, 30)
    path = save(tmp_path / "x.png", wide)
    found = load_references(make_options(image=str(path)))
    assert "cut out with" in capsys.readouterr().err
    inside = found.mask[0, ..., 0] > 0.5
    rows, columns = inside.any(1).nonzero(), inside.any(0).nonzero()
    assert abs(float(rows.float().mean()) - 255.5) < 8 and abs(float(columns.float().mean()) - 255.5) < 8
    assert len(rows) / 512 == pytest.approx(0.8, abs=0.03)


# -- every kind of file ------------------------------------------------------------------------------------------------------


def test_a_wide_picture_gets_transparent_borders(tmp_path, capsys):
    path = save(tmp_path / "x.png", disc()[16:48])
    found = load_references(make_options(image=str(path)))
    assert found.mask.shape == (1, 64, 64, 1)
    assert found.mask[0, :16].amax() == 0 and found.mask[0, 20, 32] == 1
    assert "make it square" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name, mode, said",
    [("x.png", "P", ""), ("x.png", "LA", "grey"), ("x.jpg", "CMYK", "CMYK converted"), ("x.jpg", "L", "grey")],
)
def test_other_kinds_of_pixels(tmp_path, capsys, name, mode, said):
    picture = Image.fromarray(disc())
    if mode != "LA":
        picture = picture.convert("RGB")
    picture.convert(mode).save(tmp_path / name)
    rgb, alpha = read_picture(tmp_path / name, name)
    assert rgb.shape == (64, 64, 3) and 0 <= rgb.min() and rgb.max() <= 1
    assert (alpha is not None) == (mode == "LA")
    assert said in capsys.readouterr().err
    if mode in ("CMYK", "P"):
        assert (rgb[32, 32] - torch.tensor([200.0, 60, 40]) / 255).abs().max() < 0.1


def test_a_palette_with_a_transparent_colour(tmp_path):
    picture = Image.fromarray(disc()[..., 3] // 255).convert("P")
    picture.putpalette([0, 0, 0, 250, 10, 10])
    picture.save(tmp_path / "x.png", transparency=0)
    rgb, alpha = read_picture(tmp_path / "x.png", "x.png")
    assert alpha[0, 0] == 0 and alpha[32, 32] == 1
    assert rgb[32, 32, 0] > 0.9


def test_sixteen_bits(tmp_path, capsys):
    values = np.linspace(0, 65535, 64 * 64).reshape(64, 64).astype(np.uint16)
    save(tmp_path / "x.png", values)
    rgb, alpha = read_picture(tmp_path / "x.png", "x.png")
    assert alpha is None and rgb[-1, -1, 0] == 1 and rgb[32, 0, 1] == pytest.approx(0.5, abs=0.01)
    assert "grey" in capsys.readouterr().err
    assert read_grey(tmp_path / "x.png", "x.png")[32, 0].item() == pytest.approx(0.5, abs=0.01)


def test_exif_turns_the_picture(tmp_path, capsys):
    wide = np.zeros((32, 64, 3), np.uint8)
    wide[:, :32] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter clockwise: the left side comes to the top
    save(tmp_path / "x.jpg", wide, exif=exif, quality=95)
    rgb, _ = read_picture(tmp_path / "x.jpg", "x.jpg")
    assert rgb.shape == (64, 32, 3) and rgb[4].mean() > 0.9 and rgb[-4].mean() < 0.1
    assert "EXIF" in capsys.readouterr().err
    assert read_picture(tmp_path / "x.jpg", "x.jpg", turn=False)[0].shape == (32, 64, 3)


def test_large_pictures_are_averaged(tmp_path, capsys):
    save(tmp_path / "x.png", np.full((30, 5000, 3), 77, np.uint8))
    rgb, _ = read_picture(tmp_path / "x.png", "x.png")
    assert max(rgb.shape) <= 2048 and torch.allclose(rgb, torch.tensor(77 / 255))
    assert "averaged" in capsys.readouterr().err


def test_what_is_no_picture_is_one_line(tmp_path):
    def refused(name, match):
        with pytest.raises(UserError, match=match) as caught:
            load_references(make_options(image=str(tmp_path / name)))
        assert "--image" in str(caught.value) and "\n" not in str(caught.value)

    (tmp_path / "text.png").write_text("hello")
    whole = save(tmp_path / "whole.png", disc()).read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    save(tmp_path / "dot.png", np.zeros((1, 1, 3), np.uint8))
    save(tmp_path / "empty.png", np.zeros((64, 64, 4), np.uint8))
    save(tmp_path / "flat.png", np.full((64, 64, 3), 99, np.uint8))
    refused("missing.png", "no such file")
    refused(".", "no such file")
    refused("text.png", "cannot be read")
    refused("cut.png", "cannot be read")
    refused("dot.png", "1 x 1 pixels")
    refused("empty.png", "alpha channel is empty")
    refused("flat.png", "no object stands out")


# -- several pictures --------------------------------------------------------------------------------------------------------


def write_csv(folder, text):
    path = folder / "views.csv"
    path.write_text(text)
    return make_options(image_config=str(path))


def test_a_csv_names_views(tmp_path):
    save(tmp_path / "a_rgba.png", disc())
    save(tmp_path / "b_rgba.png", disc(96, colour=(10, 20, 250)))
    opt = write_csv(
        tmp_path,
        "zero123_weight, radius, polar, azimuth, image\n1, 3, 80, 10, a_rgba.png\n0.5, 3.5, 70, -90, b_rgba.png\n",
    )
    found = load_references(opt)
    assert found.cameras.azimuth.tolist() == [10, -90] and found.cameras.polar.tolist() == [80, 70]
    assert torch.allclose(found.cameras.radius, torch.tensor([3.0, 3.5])) and found.weight.tolist() == [1, 0.5]
    assert found.rgb.shape == (2, 96, 96, 3)
    assert default_view(opt) == {"default_polar": 80, "default_azimuth": 10, "default_radius": 3}
    opt.image = str(tmp_path / "a_rgba.png")
    assert default_view(opt) == {} and len(load_references(opt)) == 3
    second = found[torch.tensor([1])]
    assert len(second) == 1 and second.cameras.azimuth.item() == -90 and second.rgb[0, 48, 48, 2] > 0.9


def test_semicolons_comments_and_field_of_view(tmp_path):
    save(tmp_path / "a.png", disc())
    found = load_references(
        write_csv(tmp_path, "\ufeffImage;Polar;Azimuth;Radius;Fovy\n# front\n\na.png;90;0;3.2;33\n")
    )
    assert found.cameras.fovy.item() == 33 and found.weight.item() == 1


@pytest.mark.parametrize(
    "text, match",
    [
        ("image,polar,azimuth\na.png,90,0\n", "column radius is missing"),
        ("", "column image is missing"),
        ("image,polar,azimuth,radius\n", "no pictures"),
        ("image,polar,azimuth,radius\nb.png,90,0,3\n", "line 2.*no such file"),
        ("image,polar,azimuth,radius\na.png,90,0\n", "line 2.*3 values for 4"),
        ("image,polar,azimuth,radius\na.png,high,0,3\n", "polar 'high' is no number"),
        ("image,polar,azimuth,radius\na.png,190,0,3\n", "polar 190 is not within"),
        ("image,polar,azimuth,radius\na.png,nan,0,3\n", "polar nan is not within"),
        ("image,polar,azimuth,radius,weight\na.png,90,0,3,-1\n", "weight -1 is not within"),
    ],
)
def test_a_wrong_csv_is_one_line(tmp_path, text, match):
    save(tmp_path / "a.png", disc())
    with pytest.raises(UserError, match=match):
        load_references(write_csv(tmp_path, text))


def test_a_missing_or_binary_csv(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        load_references(make_options(image_config=str(tmp_path / "none.csv")))
    (tmp_path / "x.csv").write_bytes(b"\xff\xfe\x00\x81\x9d")
    with pytest.raises(UserError, match="cannot be read"):
        load_references(make_options(image_config=str(tmp_path / "x.csv")))


# -- size --------------------------------------------------------------------------------------------------------------------


def test_colours_do_not_bleed_into_the_object_when_it_shrinks():
    rgb, mask = torch.zeros(1, 8, 8, 3), torch.zeros(1, 8, 8, 1)
    rgb[:, :, :3, 0], mask[:, :, :3] = (
        1.0,
        1.0,
    )  # red within, black without; the edge is inside a pixel of the small picture
    small, cover = resized(rgb, 4, mask), resized(mask, 4)
    assert torch.allclose(small[0, :, :2, 0], torch.ones(4, 2)) and torch.allclose(
        cover[0, 0, :, 0], torch.tensor([1.0, 0.5, 0, 0])
    )
    assert resized(mask, 16).shape == (1, 16, 16, 1)


def test_references_shrink_and_grow(tmp_path):
    path = save(tmp_path / "x_rgba.png", disc())
    save(tmp_path / "x_depth.png", np.ascontiguousarray(np.broadcast_to(np.arange(64, dtype=np.uint8) * 4, (64, 64))))
    found = load_references(make_options(image=str(path)))
    for size in (24, 96):
        other = found.at(size)
        assert other.rgb.shape == (1, size, size, 3) and other.cameras.height == size and other.depth is not None
        if size < 64:  # at the edge, too, the disc has its own colour
            assert torch.allclose(other.rgb[other.mask[..., 0] > 0.1] * 255, torch.tensor([200.0, 60, 40]), atol=0.1)
        assert other.mask.mean().item() == pytest.approx(found.mask.mean().item(), abs=0.01)
    assert found.at(64) is found


# -- known views -------------------------------------------------------------------------------------------------------------


def test_every_fourth_step_shows_a_known_view():
    opt = make_options()
    assert [step for step in range(12) if is_known_step(opt, step)] == [3, 7, 11]
    assert not any(is_known_step(make_options(known_view_interval=0), step) for step in range(9))
    assert known_size(opt, 0) == 96
    assert known_size(make_options(dmtet=True, known_view_scale=1.0), 0) == 512


def four_views(tmp_path, **more):
    lines = ["image,polar,azimuth,radius"]
    for i in range(4):
        save(tmp_path / f"{i}.png", disc(colour=(60 * i, 20, 20)))
        lines.append(f"{i}.png,80,{90 * i - 90},3.2")
    (tmp_path / "v.csv").write_text("\n".join(lines))
    return make_options(image_config=str(tmp_path / "v.csv"), **more)


def test_known_views_are_drawn_and_shaken(tmp_path):
    opt = four_views(tmp_path, batch_size=2, known_view_noise_scale=0.01)
    references, generator = load_references(opt), torch.Generator().manual_seed(3)
    seen = set()
    for _ in range(12):
        some, cameras = known_view(references, 3, opt, generator)
        assert len(some) == len(cameras) == 2 and cameras.height == 96 and some.rgb.shape == (2, 96, 96, 3)
        order = some.cameras.azimuth.tolist()
        seen.update(order)
        assert len(set(order)) == 2
        for i, azimuth in enumerate(order):  # picture and camera stay together
            assert some.rgb[i, 48, 48, 0].item() == pytest.approx(60 * (azimuth + 90) / 90 / 255, abs=1e-3)
        moved = (cameras.c2w - some.cameras.c2w).abs()
        assert 0 < moved.amax() < 0.06
        turn = cameras.c2w[:, :3, :3]
        assert torch.allclose(turn @ turn.mT, torch.eye(3).expand(2, 3, 3), atol=1e-5)
    assert seen == {-90, 0, 90, 180}
    opt.batch_size = 8
    assert len(known_view(references, 3, opt, generator)[0]) == 4
    opt.known_view_noise_scale = 0.0
    some, cameras = known_view(references, 3, opt, generator)
    assert torch.allclose(cameras.c2w, some.cameras.c2w)
    assert known_background(some, generator).shape == some.rgb.shape


def test_several_images_need_their_views():
    with pytest.raises(UserError, match="--image_config"):
        load_references(make_options(image=["a.png", "b.png"]))


def test_a_run_from_other_photographs_is_not_gone_on_with(tmp_path, options):
    from nerf import checkpoint
    from nerf.results import subject

    opt = options("--text", "hamburger")
    assert subject(opt) == "hamburger"
    pictures = SimpleNamespace(text=None, image="photos/mug_rgba.png", image_config=None, photos=None)
    assert subject(pictures) == "mug_rgba.png"
    checkpoint.check_prompt({"text": "mug_rgba.png"}, tmp_path, subject(pictures))
    with pytest.raises(UserError, match="chair_rgba"):
        checkpoint.check_prompt({"text": "chair_rgba.png"}, tmp_path, subject(pictures))
