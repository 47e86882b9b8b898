"""The desktop viewer, with a hand on its mouse: a window on a virtual display, or none and one line that says so."""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT, TINY

from errors import UserError
from nerf import checkpoint
from nerf.gui import need_display

# A window in a process of its own. After every round it tells in state.json what the controller knows and where everything is.
DRIVER = """
import json, os, sys, time
sys.path[:0] = [{root!r}, {root!r} + "/tests"]
import nerf.gui
from options import parse
from standins import BallGuidance, VoxelScene
from nerf.trainer import Trainer

turn = nerf.gui._Window.turn
told = 0.0

def telling(window):
    global told
    turn(window)
    control, dpg, frame = window.control, window.dpg, window.control.frame
    if told == 0.0:
        control.look(height=140, width=140)  # so many pixels are enough here: the window stretches them
    if frame is None or window._image is None or time.monotonic() - told < 0.05:
        return
    told = time.monotonic()
    look = control.look_now
    state = dict(polar=look.polar, azimuth=look.azimuth, radius=look.radius, target=look.target, light=look.light,
                 step=control.trainer.step, training=control.training, message=control.message,
                 size=frame.picture.shape, drawn=frame.look == look and not control.training and frame.samples == look.samples,
                 picture=frame.picture[::4, ::4].tolist(), items={{}})
    for item in dpg.get_all_items():
        label = dpg.get_item_label(item)
        if label and "rect_min" in dpg.get_item_state(item):
            state["items"][label] = (dpg.get_item_rect_min(item), dpg.get_item_rect_size(item))
    state["items"]["PICTURE"] = (dpg.get_item_rect_min(window._image), dpg.get_item_rect_size(window._image))
    with open("state.part", "w") as file:
        json.dump(state, file)
    os.replace("state.part", "state.json")

nerf.gui._Window.turn = telling
opt = parse(["--workspace", "run", *{typed!r}])
nerf.gui.show(Trainer(opt, VoxelScene(opt), BallGuidance(), "cpu"))
"""


@pytest.fixture(scope="module")
def display():
    """A virtual one."""
    if not shutil.which("Xvfb") or not shutil.which("xdotool"):
        pytest.skip("needs Xvfb and xdotool (apt install xvfb xdotool libgl1 libglx-mesa0 libgl1-mesa-dri)")
    pytest.importorskip("dearpygui")
    command = ["Xvfb", "-displayfd", "1", "-screen", "0", "1400x900x24", "-nolisten", "tcp"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    number = server.stdout.readline().strip()
    if not number:
        pytest.skip("Xvfb does not start here")
    yield f":{number}"
    server.terminate()
    server.wait()


class Hand:
    """What a user does with the window, and what comes of it."""

    def __init__(self, folder, display):
        typed = [*TINY, "--iters", "100000", "--eval_interval", "0"]
        self.folder, self.environment = folder, {**os.environ, "DISPLAY": display}
        code = DRIVER.format(root=str(ROOT), typed=typed)
        command = [sys.executable, "-c", code]
        self.process = subprocess.Popen(command, cwd=folder, env=self.environment, stderr=subprocess.PIPE, text=True)
        self.until(lambda state: True)
        found = self.x("search", "--name", "^Somnium$").split()[0]
        place = dict(line.split("=") for line in self.x("getwindowgeometry", "--shell", found).split())
        self.window, self.corner = found, (int(place["X"]), int(place["Y"]))
        self.x("windowfocus", found)

    def x(self, *command):
        done = subprocess.run(["xdotool", *map(str, command)], env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    @property
    def state(self):
        return json.loads((self.folder / "state.json").read_text())

    def until(self, true, seconds=180):
        end = time.monotonic() + seconds
        while not ((self.folder / "state.json").exists() and true(self.state)):
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < end, "this takes too long"
            time.sleep(0.05)
        return self.state

    def move(self, item, right=0.5, down=0.5):
        """The mouse, to a place in an item, as shares of its width and height."""
        (x, y), (width, height) = self.state["items"][item]
        self.x("mousemove", round(self.corner[0] + x + right * width), round(self.corner[1] + y + down * height))
        time.sleep(0.15)

    def press(self, button, up=False):
        self.x("mouseup" if up else "mousedown", button)
        time.sleep(0.15)

    def click(self, item, right=0.5):
        self.move(item, right)
        self.press(1)
        self.press(1, up=True)

    def drag(self, button, start, end):
        self.move("PICTURE", *start)
        self.press(button)
        for share in (0.25, 0.5, 0.75, 1.0):
            self.move("PICTURE", *(a + share * (b - a) for a, b in zip(start, end, strict=True)))
        self.press(button, up=True)

    def close(self):
        """What a click on the cross in the title bar sends; there is no window manager to do it."""
        long, pointer = ctypes.c_long, ctypes.c_void_p

        class Message(ctypes.Structure):
            _fields_ = [
                *(("type", ctypes.c_int), ("serial", long), ("sent", ctypes.c_int), ("display", pointer)),
                *(("window", long), ("kind", long), ("format", ctypes.c_int), ("data", long * 5), ("rest", long * 12)),
            ]

        x11 = ctypes.CDLL("libX11.so.6")
        x11.XOpenDisplay.restype = pointer
        display = pointer(x11.XOpenDisplay(self.environment["DISPLAY"].encode()))
        protocols, delete = (x11.XInternAtom(display, name, 0) for name in (b"WM_PROTOCOLS", b"WM_DELETE_WINDOW"))
        message = Message(33, window=int(self.window), kind=protocols, format=32, data=(long * 5)(delete))
        x11.XSendEvent(display, long(int(self.window)), 0, long(0), ctypes.byref(message))
        x11.XCloseDisplay(display)

    def still(self):
        """The picture when it has become full."""
        return np.asarray(self.until(lambda state: state["drawn"])["picture"], np.int64)

    def ended(self):
        self.process.wait(60)
        return self.process.returncode, self.process.stderr.read()


@pytest.fixture
def hand(tmp_path, display):
    hand = Hand(tmp_path, display)
    yield hand
    if hand.process.poll() is None:
        hand.process.kill()
        hand.process.wait()
    hand.process.stderr.close()


def test_a_window_to_look_and_to_steer(hand, tmp_path):
    from PIL import Image

    begun = hand.until(lambda state: state["step"] > 10)  # it trains
    assert begun["training"] and begun["size"] == [140, 140, 3]
    hand.click("pause")
    hand.until(lambda state: not state["training"])
    first = hand.still()
    assert first.std() > 10 and begun["items"]["PICTURE"] == [[0, 0], [700, 700]]

    hand.drag(1, (0.3, 0.4), (0.6, 0.6))  # the left button turns: 0.3 of 180 degrees
    state = hand.until(
        lambda state: state["drawn"] and abs(state["azimuth"] + 54) < 8 and state["polar"] < begun["polar"] - 20
    )
    assert state["target"] == [0, 0, 0]
    turned = hand.still()
    assert abs(turned - first).max() > 2
    hand.drag(3, (0.3, 0.5), (0.5, 0.5))  # the right one shifts: what is seen stands further to the right
    hand.until(lambda state: state["target"] != [0, 0, 0] and state["polar"] > 0)
    shifted = hand.still()
    columns = np.arange(shifted.shape[1])
    middle = [((255 - seen).sum((0, 2)) * columns).sum() / (255 - seen).sum() for seen in (turned, shifted)]
    assert middle[1] - middle[0] > 0.1 * len(columns)
    hand.x("click", 4)  # the wheel, forwards: nearer
    hand.until(lambda state: state["radius"] < begun["radius"])

    hand.drag(1, (1.2, 0.5), (0.9, 0.5))  # what begins outside of the picture moves nothing
    time.sleep(0.3)
    assert hand.state["azimuth"] == state["azimuth"]
    hand.move("PICTURE")
    hand.x("key", "r")
    hand.until(lambda state: state["target"] == [0, 0, 0] and state["radius"] == begun["radius"])
    assert hand.state["azimuth"] == 0

    unlit = hand.still()
    hand.click("polar angle, degrees", 0.1 * 190 / 330)  # of the light: the label counts as a part of the slider
    hand.until(lambda state: state["light"] is not None)
    above = hand.still()
    hand.click("polar angle, degrees", 0.95 * 190 / 330)
    hand.until(lambda state: state["light"][0] > 140)
    below = hand.still()
    half = len(unlit) // 2
    assert abs(above - unlit).max() > 20
    assert above[:half].sum() > below[:half].sum() and above[half:].sum() < below[half:].sum()

    hand.click("picture")
    message = hand.until(lambda state: state["message"].startswith("picture: "))["message"]
    (path,) = (tmp_path / "run" / "results").iterdir()
    assert path.name in message
    picture = np.asarray(Image.open(path))
    assert picture.shape == (140, 140, 3) and picture.std() > 10

    hand.x("key", "space")  # trains again
    step = hand.until(lambda state: state["training"])["step"]
    step = hand.until(lambda state: state["step"] > step + 5)["step"]
    hand.close()
    code, said = hand.ended()
    assert code == 0, said
    (saved,) = checkpoint.newest_first(tmp_path / "run" / "checkpoints")
    assert checkpoint.read(saved)["step"] >= step


def test_sigterm_closes_the_window_and_saves(hand, tmp_path):
    hand.until(lambda state: state["step"] > 2)
    hand.process.send_signal(signal.SIGTERM)
    code, said = hand.ended()
    assert code == 143, said
    assert checkpoint.read(checkpoint.newest_first(tmp_path / "run" / "checkpoints")[0])["step"] > 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems always have a display")
def test_without_a_display_one_line_says_what_to_take_instead(main, tmp_path, monkeypatch):
    for display, words in (("", "DISPLAY is not set"), (":4711", "the display :4711 does not answer")):
        monkeypatch.setenv("DISPLAY", display)
        with pytest.raises(UserError, match=f"--gui: .*{words}.*--viewer"):
            need_display()
    done = main(*TINY, "--gui", env={"DISPLAY": ""})
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "--gui" in line and "--viewer" in line
    assert list(tmp_path.iterdir()) == []
