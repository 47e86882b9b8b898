"""Pictures and videos: values, sizes and the meaning of grey."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from nerf import media


def test_pixels_round_and_clip():
    values = torch.tensor([-1.0, 0.0, 0.499, 0.5, 1.0, 2.0, float("nan")])
    assert media.pixels(values.reshape(1, 1, 7, 1)).reshape(-1).tolist() == [0, 0, 127, 128, 255, 255, 0]


def test_depth_is_bright_near_the_camera_and_fades_with_alpha():
    alpha = torch.tensor([1.0, 1.0, 1.0, 0.5, 0.0]).reshape(1, 1, 5, 1)
    distance = torch.tensor([2.2, 3.2, 4.2, 2.2, 3.0]).reshape(1, 1, 5, 1)
    grey = media.depth_picture(distance * alpha, alpha, radius=3.2, reach=1.0)
    assert torch.allclose(grey[0, 0, :, 0], torch.tensor([1.0, 0.5, 0.0, 0.5, 0.0]), atol=1e-6)


def test_normals_show_their_direction_on_white():
    normal = torch.tensor([[0.0, 0.0, 1.0], [0.0, -0.5, 0.0], [0.0, 0.0, 0.0]]).reshape(1, 1, 3, 3)
    alpha = torch.tensor([1.0, 0.5, 0.0]).reshape(1, 1, 3, 1)
    expected = torch.tensor([[0.5, 0.5, 1.0], [0.75, 0.5, 0.75], [1.0, 1.0, 1.0]])
    assert torch.allclose(media.normal_picture(normal, alpha)[0, 0], expected, atol=1e-6)
    render = SimpleNamespace(image=torch.zeros(1, 1, 3, 3), alpha=alpha, depth=alpha, normal=None)
    assert set(media.pictures(render, 3.0, 1.0)) == {"rgb", "depth"}


def test_colour_in_files_is_not_multiplied_by_alpha(tmp_path):
    color, alpha = torch.tensor([0.8, 0.4, 0.2]), torch.tensor([0.5]).reshape(1, 1, 1, 1)
    path = media.save_png(tmp_path / "a.png", media.with_alpha(color * alpha, alpha)[0])
    assert Image.open(path).getpixel((0, 0)) == (204, 102, 51, 128)


def test_sheet_lays_tiles_row_by_row():
    views = np.stack([np.full((2, 3, 3), i, np.uint8) for i in range(3)])
    sheet = media.sheet(views, columns=2)
    assert sheet.shape == (4, 6, 3)
    assert [sheet[0, 0, 0], sheet[1, 5, 0], sheet[3, 2, 0], sheet[3, 5, 0]] == [0, 1, 2, 255]


def test_video_streams_frames_of_odd_size_in_order(tmp_path):
    path = tmp_path / "turn.mp4"
    with media.video(path, height=31, width=47) as append:
        for value in (20, 120, 220):
            append(np.full((31, 47, 3), value, np.uint8))
    frames = media.read_video(path, most=10)
    assert [frame.shape for frame in frames] == [(32, 48, 3)] * 3
    assert np.allclose([frame.mean() for frame in frames], [20, 120, 220], atol=6)
    assert np.allclose([frame.mean() for frame in media.read_video(path, most=2)], [20, 120], atol=6)


def test_a_video_that_breaks_off_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError, match="renderer"), media.video(tmp_path / "turn.mp4", 16, 16) as append:
        append(np.zeros((16, 16, 3), np.uint8))
        raise RuntimeError("renderer")
    assert list(tmp_path.iterdir()) == []
