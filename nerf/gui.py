"""The desktop viewer: a window on the controller (control.py), which does the work. Nothing is rendered or trained here.

In the picture: left drag turns, right or middle drag shifts, the wheel goes nearer. Keys: space trains or pauses, s saves, r is the first camera.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from errors import UserError
from nerf.control import Control
from nerf.interrupt import TERMINATED
from nerf.panel import Panel

PANEL = 400  # pixels; what is left of the window is the picture's
SMALLEST, LARGEST = 700, 900  # pixels of the picture's height and width when the window opens
BOTTOM = 34  # pixels for the line of messages
TURN = 180.0  # degrees for a drag as long as the picture is high
PAUSE = 1 / 40  # seconds between two looks at mouse and keys when there is no new picture
LEFT, RIGHT, MIDDLE = 0, 1, 2  # mouse buttons


def need_display() -> None:
    """UserError, in one line, if there is no display for a window. (The window's library would abort the program.)"""
    instead = "take --viewer, which is looked at in a browser, also from another machine"
    if sys.platform.startswith("linux"):
        import ctypes

        name = os.environ.get("DISPLAY")
        if not name:
            raise UserError(f"--gui: there is no display here (DISPLAY is not set): {instead}")
        try:
            x11 = ctypes.CDLL("libX11.so.6")
        except OSError:
            raise UserError(f"--gui: the library libX11.so.6 is missing: install it, or {instead}") from None
        x11.XOpenDisplay.restype = ctypes.c_void_p
        display = x11.XOpenDisplay(None)
        if not display:
            raise UserError(f"--gui: the display {name} does not answer: {instead}")
        x11.XCloseDisplay(ctypes.c_void_p(display))
    try:
        import dearpygui.dearpygui  # noqa: F401
    except ModuleNotFoundError:
        raise
    except ImportError as error:  # libGL, on a machine that is not meant for windows
        raise UserError(f"--gui: windows cannot be drawn here ({error}): {instead}") from None


def show(trainer: Any) -> None:
    """A window on `trainer`'s scene until it is closed; what was trained is saved then. For the main thread.

    Ctrl-C closes it too; SIGTERM also ends the program: SystemExit 143.
    """
    control = Control(trainer)
    with trainer.interrupts.watch(training=True):
        control.start()
        try:
            window = _Window(control)
            try:
                while window.open and not control.ended and not trainer.interrupts.stop:
                    window.turn()
            finally:
                window.close()
        finally:
            control.close()
    if trainer.interrupts.terminate:
        trainer.metrics.close()
        raise SystemExit(TERMINATED)


class _Window:
    """The picture, the panel beside it, and the line below. `turn` is one round: what was done with mouse and keys, what is new to see."""

    def __init__(self, control: Control) -> None:
        import dearpygui.dearpygui as dpg

        self.dpg, self.control, self.opt = dpg, control, control.trainer.opt
        self._size = (0, 0)  # of the place for the picture
        self._number = 0  # of the frame on the screen
        self._drag: int | None = None  # the button that drags
        self._mouse, self._pressed = (0.0, 0.0), False
        self._image, self._texture, self._pixels, self._height = None, None, None, SMALLEST
        self._outdated: list[tuple[Any, Any]] = []  # textures of another size, and their pixels
        dpg.create_context()
        dpg.configure_app(manual_callback_management=True)  # they run in this thread
        wide, high = self._first_size()
        dpg.create_viewport(title="Somnium", width=wide + PANEL, height=high + BOTTOM, x_pos=20, y_pos=20)
        self._build()
        dpg.setup_dearpygui()
        dpg.show_viewport()

    def _first_size(self) -> tuple[int, int]:
        """Width and height of the picture: `--W` and `--H`, in their proportion neither tiny nor larger than a screen."""
        high, wide = self.opt.H, self.opt.W
        share = max(SMALLEST / min(wide, high), 1.0)
        share = min(share, LARGEST / max(wide, high))
        return max(round(wide * share), 200), max(round(high * share), SMALLEST)

    @property
    def open(self) -> bool:
        return self.dpg.is_dearpygui_running()

    def close(self) -> None:
        self.dpg.destroy_context()

    def turn(self) -> None:
        dpg, control = self.dpg, self.control
        frame = control.wait(self._number, PAUSE)
        if frame is not None:
            self._number = frame.number
            self._show_picture(frame.picture)
        self._panel.update()
        dpg.set_value(self._message, f"{control.busy} ..." if control.busy else control.message or "getting ready ...")
        self._lay_out()
        self._drag_camera()
        dpg.run_callbacks(dpg.get_callback_queue())
        dpg.render_dearpygui_frame()  # meanwhile the controller draws what was asked for just now

    # ---- what is in the window ----------------------------------------------------------------------------------------------

    def _build(self) -> None:
        dpg = self.dpg
        with dpg.theme() as theme, dpg.theme_component(dpg.mvAll):
            dpg.add_theme_style(dpg.mvStyleVar_WindowPadding, 8, 8)
            dpg.add_theme_style(dpg.mvStyleVar_FrameRounding, 3)
            dpg.add_theme_style(dpg.mvStyleVar_ItemSpacing, 7, 5)
        dpg.bind_theme(theme)
        with dpg.theme() as bare, dpg.theme_component(dpg.mvAll):
            dpg.add_theme_style(dpg.mvStyleVar_WindowPadding, 0, 0)
        with dpg.texture_registry() as self._textures:
            pass
        with dpg.window(no_scrollbar=True, no_scroll_with_mouse=True) as main:
            with dpg.group(horizontal=True, horizontal_spacing=0):
                self._place = dpg.add_child_window(border=False, no_scrollbar=True, no_scroll_with_mouse=True)
                self._side = dpg.add_child_window(width=PANEL, border=False, always_use_window_padding=True)
            with dpg.group(indent=8):
                self._message = dpg.add_text("getting ready ...")
        dpg.bind_item_theme(main, bare)
        dpg.bind_item_theme(self._place, bare)
        dpg.bind_item_theme(self._side, theme)
        dpg.set_primary_window(main, True)
        dpg.push_container_stack(self._side)
        self._panel = Panel(dpg, self.control)
        dpg.pop_container_stack()
        with dpg.handler_registry():
            dpg.add_mouse_wheel_handler(callback=self._wheel)
            for key, act in (
                (dpg.mvKey_Spacebar, self.control.toggle),
                (dpg.mvKey_S, partial(self.control.do, "save")),
                (dpg.mvKey_R, self._panel.reset_camera),
            ):
                dpg.add_key_release_handler(key, callback=self._key(act))

    # ---- what the user does -------------------------------------------------------------------------------------------------

    def _drag_camera(self) -> None:
        """Begun in the picture, a drag turns or shifts until the button is let go."""
        dpg = self.dpg
        mouse = tuple(dpg.get_mouse_pos(local=False))
        pressed = [button for button in (LEFT, RIGHT, MIDDLE) if dpg.is_mouse_button_down(button)]
        if self._drag in pressed:
            right, down = mouse[0] - self._mouse[0], mouse[1] - self._mouse[1]
            if self._drag == LEFT:
                degrees = TURN / self._height
                self.control.move(lambda look: look.orbited(degrees * right, degrees * down))
            else:
                self.control.move(lambda look: look.panned(*(d * look.height / self._height for d in (right, down))))
        elif pressed and not self._pressed and self._over_picture():
            self._drag = pressed[0]
        else:
            self._drag = None
        self._mouse, self._pressed = mouse, bool(pressed)

    def _over_picture(self) -> bool:
        return self._image is not None and self.dpg.is_item_hovered(self._image)

    def _wheel(self, _: Any, notches: float) -> None:
        if self._over_picture():
            self.control.move(lambda look: look.zoomed(notches))

    def _key(self, act: Callable[[], Any]) -> Callable[[], None]:
        """`act`, unless the key is a letter of something else."""

        def pressed() -> None:
            if not self._panel.typing:
                act()

        return pressed

    # ---- what the user sees -------------------------------------------------------------------------------------------------

    def _lay_out(self) -> None:
        """The picture takes what the panel and the line leave of the window."""
        dpg = self.dpg
        wide, high = dpg.get_viewport_client_width() - PANEL, dpg.get_viewport_client_height() - BOTTOM
        size = (max(wide, 64), max(high, 64))
        if size == self._size:
            return
        self._size = size
        dpg.configure_item(self._place, width=size[0], height=size[1])
        dpg.configure_item(self._side, height=size[1])
        self.control.look(width=size[0], height=size[1])

    def _show_picture(self, picture: np.ndarray) -> None:
        """Put it on the screen, as large as the place for it allows."""
        dpg, (height, width) = self.dpg, picture.shape[:2]
        if self._pixels is None or self._pixels.shape[:2] != (height, width):
            self._outdated.append((self._texture, self._pixels))
            self._pixels = np.ones((height, width, 4), np.float32)
            self._texture = dpg.add_raw_texture(
                width, height, self._pixels, format=dpg.mvFormat_Float_rgba, parent=self._textures
            )
        elif self._outdated:  # nothing on the screen shows them any more
            for texture, _ in self._outdated:
                if texture is not None:
                    dpg.delete_item(texture)
            self._outdated.clear()
        np.multiply(picture, np.float32(1 / 255), out=self._pixels[..., :3])
        share = min(self._size[0] / width, self._size[1] / height)
        wide, self._height = round(width * share), round(height * share)
        where = {
            "width": wide,
            "height": self._height,
            "pos": ((self._size[0] - wide) // 2, (self._size[1] - self._height) // 2),
        }
        if self._image is None:
            self._image = dpg.add_image(self._texture, parent=self._place, **where)
        else:
            dpg.configure_item(self._image, texture_tag=self._texture, **where)
