"""The page at the end of a run: complete in itself, true to the workspace, safe against odd prompts."""

import base64
import io
import json
import re

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from mesh import Mesh
from mesh.export import export
from mesh.extract import vertex_normals
from nerf import media, report

PROMPT = 'a "<b>hamburger</b>" & chips</script>'


@pytest.fixture
def workspace(options):
    """A workspace with a turntable of 12 frames that get brighter, a mesh and two validations, and its options."""
    opt = options("--text", PROMPT, "--guidance_scale", 33)
    folder = report.Path(opt.workspace)
    for kind in media.KINDS:
        with media.video(folder / "results" / f"step_0000004_{kind}.mp4", 24, 32) as append:
            for i in range(12):
                append(np.full((24, 32, 3), 20 * i, np.uint8))
    ball = trimesh.creation.icosphere(2, radius=0.5)
    vertices, faces = np.asarray(ball.vertices, np.float32), np.asarray(ball.faces, np.int64)
    colors = np.tile([0.9, 0.1, 0.5], (len(vertices), 1))
    export(Mesh(vertices, faces, colors, vertex_normals(vertices, faces)), folder / "mesh", PROMPT)
    for step in (2, 4):
        media.save_png(folder / "validation" / f"step_000000{step}_rgb.png", np.full((8, 16, 3), 200, np.uint8))
    (folder / "log.txt").write_text("a line\n")
    return opt, folder


def _write(opt, folder, history=None):
    times = {"training": 75.0, "video": 2.5}
    return report.write_report(opt, folder, 4, history or {}, times, torch.device("cpu")).read_text(encoding="utf-8")


def _data(page):
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])


def _picture(url):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.split(",")[1]))))


def test_it_needs_no_network_and_no_other_file(workspace):
    page = _write(*workspace)
    assert not re.search(r"https?:|//cdn|@import|src=\"(?!data:)|<link", page)
    assert "{{" not in page and page.count("<script") == page.count("</script>") == 2


def test_the_prompt_cannot_break_the_page(workspace):
    page = _write(*workspace)
    assert "<b>hamburger" not in page
    assert "a &quot;&lt;b&gt;hamburger&lt;/b&gt;&quot; &amp; chips&lt;/script&gt;" in page


def test_the_turntable_is_inside(workspace):
    strip = _data(_write(*workspace))["strip"]
    assert [kind["name"] for kind in strip["kinds"]] == list(media.KINDS)
    assert (strip["count"], strip["columns"], strip["width"], strip["height"]) == (12, 8, 32, 24)
    sheet = _picture(strip["kinds"][0]["sheet"])
    assert sheet.shape == (48, 256, 3)
    assert abs(int(sheet[12, 16, 0]) - 0) < 10 and abs(int(sheet[36, 112, 0]) - 220) < 10  # first and last frame


def test_the_mesh_is_inside(workspace):
    mesh = _data(_write(*workspace))["mesh"]
    ball = trimesh.creation.icosphere(2, radius=0.5)
    positions = np.frombuffer(base64.b64decode(mesh["positions"]), np.uint16).reshape(-1, 4)[:, :3]
    assert np.allclose(positions / 65535 * mesh["size"] + mesh["low"], ball.vertices, atol=1e-4)
    faces = np.frombuffer(base64.b64decode(mesh["faces"]), np.uint32).reshape(-1, 3)
    assert (faces == ball.faces).all() and mesh["count"] == 320
    colors = np.frombuffer(base64.b64decode(mesh["colors"]), np.uint8).reshape(-1, 4)[:, :3]
    assert np.allclose(colors / 255, [0.9, 0.1, 0.5], atol=0.003)  # the colours of the picture, not linear ones
    normals = np.frombuffer(base64.b64decode(mesh["normals"]), np.int8).reshape(-1, 4)[:, :3] / 127
    assert (normals * ball.vertices * 2).sum(1).min() > 0.97


def test_a_big_mesh_is_made_lighter(workspace, monkeypatch):
    monkeypatch.setattr(report, "FACES", 100)
    mesh = _data(_write(*workspace))["mesh"]
    assert 60 <= mesh["count"] <= 100 and mesh["label"] == "320 faces (here 100)"


def test_a_mesh_of_another_prompt_and_a_missing_video_are_left_out(workspace, options):
    _, folder = workspace
    for path in (folder / "results").iterdir():
        path.unlink()
    assert _data(_write(options("--text", "mug"), folder)) == {"strip": None, "mesh": None}


def test_settings_show_what_differs_and_fold_the_rest(workspace):
    page = _write(*workspace)
    shown, _, folded = page[page.index("Settings") :].partition("<details>")
    assert "<td>--guidance_scale</td><td>33</td><td>typed</td>" in shown
    assert "--lambda_wd" not in shown and "<td>--lambda_wd</td>" in folded


def test_curves_have_axes_and_leave_out_what_never_changes(workspace):
    history = {
        "loss/guidance": [[10, 100.0], [20, 10.0], [30, 1.0]],
        "alpha/mean": [[10, 0.2], [20, float("nan")], [30, 0.4]],
        "skipped": [[10, 0.0], [20, 0.0]],
        "mesh/iou": [[30, 0.97]],
    }
    page = _write(*workspace, history)
    charts = re.findall(r"<figure.*?</figure>", page, re.S)
    assert len(charts) == 2 and "loss/guidance" in charts[0] and "alpha/mean" in charts[1]
    assert "log" in charts[0] and ">100<" in charts[0] and ">10<" in charts[0] and ">30<" in charts[0]
    points = re.search(r'points="([^"]*)"', charts[0])[1].split()
    heights = [float(point.split(",")[1]) for point in points]
    assert len(points) == 3 and heights[1] == pytest.approx((heights[0] + heights[2]) / 2, abs=0.1)  # logarithmic
    assert "mesh outline IoU</span><strong>0.970" in page
    assert "1 min 15 s" in page and "2.5 s" in page


def test_files_are_listed_with_links(workspace):
    page = _write(*workspace)
    assert (
        '<a href="results/step_0000004_rgb.mp4">' in page and '<a href="mesh/mesh.glb">' in page and "log.txt" in page
    )
    assert page.count("<h2>How it grew</h2>") == 1 and "step 2</span>" in page and "step 4</span>" in page


def test_numbers_stay_short():
    numbers = (0, 0.01234, 12.34, 1234, 101325, 2.5e6, 8.23e-5, -1.654e-10)
    assert [report._number(n) for n in numbers] == [*("0 0.0123 12.3 1234 101k 2.5M 8.2e-5 -1.7e-10".split())]
