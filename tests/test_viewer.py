"""The web viewer: where it listens, what a browser is sent and may ask for, how it ends; and all of it in a real browser."""

import math
import os
import shutil
import signal
import socket
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from browsers import Chromium, Client, until
from standins import BallGuidance, FormulaScene, VoxelScene, lopsided

from errors import UserError
from nerf import viewer
from nerf.control import Control
from nerf.trainer import Trainer

FRONT, RIGHT = (0.0, 0.0, 3.2), (3.2, 0.0, 0.0)
QUICK = """--iters 100000 --lr 0.05 --optim adam --batch_size 1 --num_steps 12 --upsample_steps 0 --background white --default_fovy 30
    --default_polar 90 --default_radius 3.2 --eval_interval 0 --no_cuda_ray --bg_radius 0 --W 96 --H 96 --mcubes_resolution 24
    --texture_size 0""".split()


class Guidance(BallGuidance):
    """Writes down what it is told."""

    def follow(self, opt):
        self.told = opt.text, opt.negative, opt.guidance_scale(0)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def served(options, monkeypatch):
    """`served(*typed, scene=, guidance=)`: `serve` at work in a thread; its controller and its port."""
    stops = []

    def begin(*typed, scene=VoxelScene):
        controls = []

        class Kept(Control):
            def __init__(self, trainer):
                super().__init__(trainer)
                controls.append(self)

        monkeypatch.setattr(viewer, "Control", Kept)
        torch.manual_seed(0)
        opt = options(*QUICK, *typed)
        trainer = Trainer(opt, scene(opt), Guidance(), "cpu")
        port = free_port()
        thread = threading.Thread(target=viewer.serve, args=(trainer, "127.0.0.1", port))
        thread.start()
        stops.append((trainer, thread))
        return until(lambda: controls and controls[0].frame and controls[0]), port

    yield begin
    for trainer, thread in stops:
        trainer.interrupts.interrupts = 1
        thread.join(30)
        assert not thread.is_alive()


def lop(opt):
    return FormulaScene(opt, lopsided)


def mean_colours(picture):
    """Of the left, middle and right third of the middle rows."""
    height, width = picture.shape[:2]
    rows = picture[height * 2 // 5 : height * 3 // 5].astype(float)
    return [part.mean((0, 1)) for part in np.array_split(rows, 3, axis=1)] if width else []


# ---- where it listens -------------------------------------------------------------------------------------------------------


def test_a_taken_port_is_said_and_the_next_free_one_is_used(served, capsys):
    control, port = served()
    assert viewer.need_server("127.0.0.1", port) != port
    assert f"viewer: http://127.0.0.1:{port} " in capsys.readouterr().err
    viewer._tell("127.0.0.1", port, port + 3)
    said = capsys.readouterr().err
    assert f"port {port} is taken: {port + 3}\n" in said and f"ssh -L {port + 3}:127.0.0.1:{port + 3} " in said


def test_where_nothing_can_be_opened_one_line_says_so(monkeypatch):
    with pytest.raises(UserError, match="--viewer_host no.such.host.invalid: no such address"):
        viewer.need_server("no.such.host.invalid", 8080)
    with pytest.raises(UserError, match="--viewer_host 203.0.113.7: Cannot assign"):
        viewer.need_server("203.0.113.7", 8080)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        monkeypatch.setattr(viewer, "PORTS", 1)
        with pytest.raises(UserError, match=f"--viewer_port {port}: all ports from {port} to {port} are taken"):
            viewer.need_server("127.0.0.1", port)
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(UserError, match="--viewer: the package viser is not installed"):
        viewer.need_server("127.0.0.1", 8080)


# ---- what a browser gets and may ask for ------------------------------------------------------------------------------------


def test_the_picture_follows_the_camera_of_whoever_moved_last(served):
    control, port = served(scene=lop)
    control.toggle()
    first, second = Client(port), Client(port)
    first.look(FRONT)
    first.wait(lambda: first.picture is not None and control.frame.look.width == 64)
    until(lambda: control.frame.scale == 1)
    look = control.look_now
    assert (look.height, look.width) == (48, 64) and look.fovy == pytest.approx(30)
    assert look.polar == pytest.approx(90) and look.azimuth == pytest.approx(0) and look.radius == pytest.approx(3.2)
    left, middle, right = mean_colours(control.frame.picture)
    assert middle[1] > middle[0] + 30  # the green nose
    assert right[0] > right[1] + 20 and left.min() > right.min()  # the red arm is at +x, which is on the right
    second.look(RIGHT, width=400, height=200, fovy=40)
    until(lambda: control.frame.look.azimuth > 80)
    assert (control.look_now.height, control.look_now.width) == (48, 96)  # the longer side is --W
    until(lambda: control.frame.scale == 1)
    shown = control.frame.picture
    first.wait(lambda: first.picture.shape == shown.shape and abs(first.picture.astype(int) - shown).mean() < 4)
    second.look((0, 3.2, 1e-4), target=(0, 1, 0))
    until(lambda: control.frame.look.polar < 2)
    assert control.look_now.target == (0, 1, 0) and control.look_now.radius == pytest.approx(2.2)


def test_a_moved_camera_is_answered_within_a_fifth_of_a_second_while_the_scene_trains(served):
    control, port = served()
    client = Client(port)
    client.look(FRONT)
    until(lambda: control.trainer.step > 3)
    taken = []
    for i in range(9):
        time.sleep(0.5)  # so that it trains again
        began = time.perf_counter()
        client.look((0.3 * i, 0, 3.2), width=63 - i)  # the width tells which view a picture is of
        client.wait(lambda width=63 - i: client.picture is not None and client.picture.shape[1] == width)
        taken.append(time.perf_counter() - began)
    assert control.training and sorted(taken)[4] < 0.2


def test_the_panel_steers_training_light_and_view(served):
    control, port = served()
    client = Client(port)
    client.look(FRONT)
    until(lambda: control.trainer.step > 3)
    client.set("Pause", True)
    until(lambda: not control.training)
    client.wait(lambda: any(m.get("updates", {}).get("label") == "Train" for m in client.messages))
    client.set("Pause", True)  # the same button
    until(lambda: control.training)
    client.set("Mode", "normal")
    client.set("Background", (255, 0, 0))
    client.set("Smoothness", 2)
    client.set("Dynamic resolution", False)
    client.set("Follows the camera", False)
    client.set("Azimuth", 45)
    client.set("Ambient", 0.5)
    client.set("Samples", 100)
    client.set("Growth", 0.05)
    client.set("x", (-0.5, 1.0))
    look = until(lambda: control.look_now.box and control.look_now)
    assert (look.mode, look.background, look.samples, look.dynamic) == ("normal", (1.0, 0.0, 0.0), 2, False)
    assert look.light == (60.0, 45.0) and look.ambient == 0.5
    assert look.max_steps == 100 and look.dt_gamma == 0.05
    assert look.box == (-0.5, -1, -1, 1, 1, 1)
    client.set("x", (-1.0, 1.0))
    client.set("Scene's background", True)
    until(lambda: control.look_now.box is None and control.look_now.background is None)
    client.set("Field of view", 60)
    moved = client.wait(lambda: [m for m in client.messages if m["type"] == "SetCameraFovMessage" and not m["initial"]])
    assert moved[-1]["fov"] == pytest.approx(math.radians(60)) and control.look_now.fovy == 60


def test_prompt_guidance_scale_and_files(served, monkeypatch):
    control, port = served()
    client = Client(port)
    client.look(FRONT)
    until(lambda: control.trainer.step > 0)
    client.set("Prompt", "a red <ball> ")
    client.set("Negative", "blue")
    client.set("Apply", True)
    guidance = control.trainer.guidance
    until(lambda: getattr(guidance, "told", ())[:2] == ("a red <ball>", "blue"))
    client.wait(lambda: any("&lt;ball&gt;" in m.get("updates", {}).get("content", "") for m in client.messages) or None)
    client.set("Scale", 7.5)
    client.set("Apply", True)
    until(lambda: guidance.told[2] == 7.5)
    orders = []
    monkeypatch.setattr(control, "do", lambda job, **values: orders.append((job, values)))
    client.set("Apply", True)  # nothing has changed
    client.set("Scale", 8)
    client.set("Apply", True)
    client.set("Training", "Save")
    client.set("Results", "Video")
    client.set("Training", "Restart")
    client.wait(lambda: any(m["type"] == "GuiModalMessage" for m in client.messages))
    until(lambda: len(orders) == 3)
    assert dict(orders) == {"strength": {"guidance_scale": 8}, "save": {}, "video": {}}
    client.set("Restart", True)
    until(lambda: orders[-1] == ("restart", {}))


def test_an_exported_mesh_stands_beside_the_scene_and_hides_what_is_behind_it(served):
    control, port = served("--mesh_format", "glb")
    client = Client(port)
    client.look(FRONT)
    assert client.wait(lambda: client.picture is not None) and client.depth is None
    client.set("Pause", True)
    client.set("Results", "Mesh")
    mesh = client.wait(lambda: [m for m in client.messages if m["type"] == "GlbMessage"])[-1]
    assert mesh["name"] == "/mesh"
    place = client.wait(
        lambda: [m for m in client.messages if m["type"] == "SetPositionMessage" and m["name"] == "/mesh"]
    )
    assert 0.5 < place[-1]["position"][0] < 2.5 and place[-1]["position"][1:] == [0, 0]
    client.wait(lambda: any(m["type"] == "SetCameraLookAtMessage" and not m["initial"] for m in client.messages))
    client.look((0.5, 0, 4))
    until(lambda: control.frame.look.radius > 4)
    client.wait(lambda: client.depth is not None)
    distance = control.frame.distance
    middle = distance[distance.shape[0] // 2]
    assert np.isinf(middle[-1]) and 3.2 < middle.min() < 4  # the ball's front, and nothing beside it
    client.set("Mesh beside", False)
    client.wait(
        lambda: [m for m in client.messages if m["type"] == "SetSceneNodeVisibilityMessage" and not m["visible"]]
    )
    client.look((0.6, 0, 4))
    client.wait(lambda: client.depth is None)


def test_an_error_of_the_work_ends_the_server(options, monkeypatch):
    opt = options(*QUICK)
    trainer = Trainer(opt, VoxelScene(opt), Guidance(), "cpu")
    monkeypatch.setattr(trainer, "advance", lambda: 1 / 0)
    port = free_port()
    with pytest.raises(ZeroDivisionError):
        viewer.serve(trainer, "127.0.0.1", port)
    assert viewer.need_server("127.0.0.1", port) == port  # it is free again


def test_sigterm_saves_and_leaves_with_143(options, capsys):
    opt = options(*QUICK)
    trainer = Trainer(opt, VoxelScene(opt), Guidance(), "cpu")

    def terminate():
        until(lambda: trainer.step > 2)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate).start()
    with pytest.raises(SystemExit) as left:
        viewer.serve(trainer, "127.0.0.1", free_port())
    assert left.value.code == 143
    (saved,) = (trainer.workspace / "checkpoints").glob("step_*.pt")
    assert saved.stem == f"step_{trainer.step:07d}"
    assert capsys.readouterr().out == ""  # not a word from viser


# ---- in a browser -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def chromium():
    """`chromium(url)`: a page. Skipped, in words, where something is missing."""
    playwright = Path(sys.prefix) / "node" / "node_modules" / "playwright-core"
    if not (shutil.which("node") and playwright.exists()):
        pytest.skip("needs node and playwright-core: scripts/setup.sh --tests installs it where there is npm")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        pytest.skip("needs Chromium: apt-get install chromium")
    pages = []

    def begin(url):
        pages.append(Chromium(playwright, program, url))
        return pages[0]

    yield begin
    for page in pages:
        page.close()


def test_the_page_shows_the_scene_turns_it_and_toggles_training(served, chromium, tmp_path):
    control, port = served(scene=lop)
    page = chromium(f"http://127.0.0.1:{port}")

    def thirds():
        return mean_colours(page.screenshot(tmp_path / "page.png")[:, :560])  # left of the panel

    def nose():
        return (found := thirds())[1][1] > found[1][0] + 30 and found

    left, middle, right = until(nose, 30)
    assert right[0] > right[1] + 20 > left[0] - left[1] + 30  # the red arm on the right alone
    assert "Guidance" in page.do("text") and "of 100000" in page.do("text")
    before = control.look_now.azimuth
    page.do("drag", 150, 300, 330, 300)  # to the right: the object's right side comes to the front
    until(lambda: abs(control.look_now.azimuth - before) > 30)
    assert control.look_now.azimuth < before  # the camera goes the other way
    assert until(lambda: not nose())
    assert control.training
    page.do("press", "Pause")
    until(lambda: not control.training)
    until(lambda: "Train" in page.do("text").split("\n"))
    page.do("press", "Train")
    until(lambda: control.training)
    assert page.do("strangers") == [] and page.do("errors") == []
