"""The panel beside the picture in the desktop viewer (gui.py): what the controller says, and inputs for what it can be told."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Any

from flags import show as shown
from nerf.control import Control
from nerf.look import MODES, Look

FIELD = 190  # pixels of an input's width; its label stands to the right
WHITE = (1.0, 1.0, 1.0)
THIN = 0.01  # world units that a box has at least
CAMERA = ("polar", "azimuth", "radius", "fovy", "target")


class Panel:
    """Built into the container on top of the stack of `dpg` (dearpygui); `update` brings it up to date, once a round."""

    def __init__(self, dpg: Any, control: Control) -> None:
        self.dpg, self.control, self.opt = dpg, control, control.trainer.opt
        self._inputs: dict[Any, Callable[[Look], Any]] = {}  # and what they show of a look
        self._texts: dict[str, Any] = {}  # inputs of words
        self._look: Look | None = None  # that the inputs show
        self._points = -1  # of the loss curve
        self._build_status()
        self._build_training()
        self._build_look()
        self._build_light()
        self._build_box()
        self._build_camera()

    @property
    def typing(self) -> bool:
        """Whether what is typed belongs to an input or a dialog."""
        typed = any(self.dpg.is_item_active(item) for item in (*self._inputs, *self._texts.values()))
        return typed or any(self.dpg.is_item_shown(item) for item in self._dialogs)

    def reset_camera(self) -> None:
        """The camera of the beginning; the rest of the look stays."""
        first = self.control.start_look
        self.control.move(lambda look: replace(look, **{name: getattr(first, name) for name in CAMERA}))

    # ---- what there is ------------------------------------------------------------------------------------------------------

    def _build_status(self) -> None:
        dpg = self.dpg
        self._status = [dpg.add_text("") for _ in range(3)]
        with dpg.plot(height=150, width=-1, no_menus=True, no_box_select=True, no_mouse_pos=True):
            self._axes = [
                dpg.add_plot_axis(dpg.mvXAxis, label="step"),
                dpg.add_plot_axis(dpg.mvYAxis, label="loss"),
            ]
            self._curve = dpg.add_line_series([], [], parent=self._axes[1])

    def _build_training(self) -> None:
        dpg, control, opt = self.dpg, self.control, self.opt
        with dpg.collapsing_header(label="Train and export" if control.can_train else "Export", default_open=True):
            with dpg.group(horizontal=True):
                self._button = dpg.add_button(label="start", width=70, callback=lambda: control.toggle())
                self._restart = dpg.add_button(label="restart")
                self._save = dpg.add_button(label="save", callback=lambda: control.do("save"))
                dpg.add_button(label="load ...", callback=lambda: dpg.show_item(self._files))
            with dpg.group(horizontal=True):
                dpg.add_button(label="export mesh", callback=lambda: control.do("export"))
                dpg.add_button(label="video", callback=lambda: control.do("video"))
                dpg.add_button(label="picture", callback=lambda: control.do("picture"))
            with dpg.group(show=control.can_train):
                words = {
                    "prompt": opt.text or "",
                    "negative prompt": opt.negative,
                    "guidance scale": shown(opt.guidance_scale),
                }
                for label, value in words.items():
                    self._texts[label] = dpg.add_input_text(label=label, default_value=value, width=FIELD + 60)
                dpg.add_button(label="apply to the steps to come", callback=self._apply)
        for item in (self._button, self._restart, self._save):
            dpg.configure_item(item, show=control.can_train)
        with dpg.popup(self._restart, mousebutton=dpg.mvMouseButton_Left, modal=True) as sure:
            dpg.add_text("Begin anew at step 0? The checkpoints so far are kept in checkpoints/previous.")
            with dpg.group(horizontal=True):
                dpg.add_button(label="begin anew", callback=lambda: (dpg.hide_item(sure), control.do("restart")))
                dpg.add_button(label="no", callback=lambda: dpg.hide_item(sure))
        with dpg.file_dialog(
            label="Load a checkpoint", show=False, modal=True, width=640, height=400, callback=self._load,
            default_path=str(control.trainer.checkpoints.resolve()),
        ) as self._files:  # fmt: skip
            dpg.add_file_extension(".pt")
        self._dialogs = (sure, self._files)

    def _build_look(self) -> None:
        dpg, control, opt = self.dpg, self.control, self.opt
        with dpg.collapsing_header(label="Look", default_open=True):
            self._input(dpg.add_combo, *self._field("mode"), items=MODES, label="what is shown")
            self._input(
                dpg.add_color_edit,
                lambda look: [round(255 * part) for part in look.background or WHITE],
                lambda value: control.look(background=tuple(min(max(part / 255, 0.0), 1.0) for part in value[:3])),
                label="background",
                no_alpha=True,
            )
            self._input(
                dpg.add_checkbox,
                lambda look: look.background is None,
                lambda own: control.look(background=None if own else WHITE),
                label="the scene's own background",
            )
            self._slider("field of view, degrees", 1.0, 120.0, *self._field("fovy"), format="%.1f")
            self._input(dpg.add_checkbox, *self._field("dynamic"), label="coarse pictures while something moves")
            self._slider("pictures in a still one", 1, 16, *self._field("samples"))
            number = opt.max_steps if opt.cuda_ray else opt.num_steps + opt.upsample_steps
            if "max_steps" not in control.ignored:
                read, write = self._field("max_steps")
                self._slider("samples along a ray", 16, max(1024, number), lambda look: read(look) or number, write)
            if "dt_gamma" not in control.ignored:
                read, write = self._field("dt_gamma")
                self._slider(
                    "growth of the step",
                    *(0.0, 0.1, lambda look: opt.dt_gamma if look.dt_gamma is None else look.dt_gamma, write),
                    format="%.3f",
                )

    def _build_light(self) -> None:
        dpg, control = self.dpg, self.control

        def light(look: Look) -> tuple[float, float]:
            return look.light or (look.polar, look.azimuth)

        def turn(polar: float | None = None, azimuth: float | None = None) -> None:
            now = light(control.look_now)
            control.look(light=(now[0] if polar is None else polar, now[1] if azimuth is None else azimuth))

        with dpg.collapsing_header(label="Light (lambertian, textureless)", default_open=True):
            self._input(
                dpg.add_checkbox,
                lambda look: look.light is None,
                lambda follows: control.look(light=None if follows else light(control.look_now)),
                label="it stands where the camera is",
            )
            degrees = {"format": "%.0f"}
            self._slider("polar angle, degrees", 0.0, 180.0, lambda l: light(l)[0], lambda v: turn(polar=v), **degrees)
            self._slider("azimuth, degrees", -180.0, 180.0, lambda l: light(l)[1], lambda v: turn(azimuth=v), **degrees)
            self._slider("ambient share", 0.0, 1.0, *self._field("ambient"), format="%.2f")

    def _build_box(self) -> None:
        dpg, control, bound = self.dpg, self.control, float(self.opt.bound)
        whole = (-bound,) * 3 + (bound,) * 3

        def cut(i: int, value: float) -> None:
            box = list(control.look_now.box or whole)
            other = box[(i + 3) % 6]
            box[i] = min(value, other - THIN) if i < 3 else max(value, other + THIN)
            control.look(box=None if tuple(box) == whole else tuple(box))

        with dpg.collapsing_header(label="Box: nothing is shown outside", show="box" not in control.ignored):
            for i, label in enumerate(("x from", "y from", "z from", "x to", "y to", "z to")):
                self._slider(
                    label, -bound, bound, lambda look, i=i: (look.box or whole)[i], partial(cut, i), format="%.2f"
                )
            dpg.add_button(label="everything", callback=lambda: control.look(box=None))

    def _build_camera(self) -> None:
        dpg = self.dpg
        with dpg.collapsing_header(label="Camera"):
            dpg.add_text("camera to world (x right, y up, it looks along -z)")
            self._pose = dpg.add_text("")
            dpg.add_text("as flags, to copy")
            self._flags = dpg.add_input_text(width=-1, readonly=True)
            dpg.add_button(label="first camera (r)", callback=self.reset_camera)

    def _input(self, make: Callable[..., Any], read: Callable[[Look], Any], write: Callable, **options: Any) -> None:
        """An input that shows `read(look)` and calls `write(value)`."""
        if make is not self.dpg.add_checkbox:
            options["width"] = FIELD
        item = make(callback=lambda sender: write(self.dpg.get_value(sender)), **options)
        self._inputs[item] = read

    def _slider(self, label: str, low: float, high: float, read: Callable, write: Callable, **options: Any) -> None:
        make = self.dpg.add_slider_int if isinstance(low, int) else self.dpg.add_slider_float
        self._input(make, read, write, label=label, min_value=low, max_value=high, clamped=True, **options)

    def _field(self, name: str) -> tuple[Callable, Callable]:
        """How a field of the look is read and written."""
        return attrgetter(name), lambda value: self.control.look(**{name: value})

    # ---- what happens -------------------------------------------------------------------------------------------------------

    def _apply(self) -> None:
        """Order what differs from what training follows now."""
        opt = self.control.trainer.opt
        text, negative, strength = (self.dpg.get_value(item).strip() for item in self._texts.values())
        if (text, negative) != (opt.text, opt.negative):
            self.control.do("prompt", text=text, negative=negative)
        if strength != shown(opt.guidance_scale):
            self.control.do("strength", guidance_scale=strength)

    def _load(self, _: Any, chosen: dict[str, Any]) -> None:
        for path in chosen["selections"].values():
            self.control.do("load", path=path)

    def update(self) -> None:
        """Bring words, curve and inputs up to date."""
        dpg, control, frame = self.dpg, self.control, self.control.frame
        step, numbers = control.trainer.step, control.numbers
        words = "" if control.can_train else "only shown"
        if control.can_train:
            words = f"{control.speed:.1f} steps/s" if control.training else "paused"
        lines = [f"step {step} of {self.opt.iters}, {words}", "", ""]
        if "loss/total" in numbers:
            lines[1] = f"loss {numbers['loss/total']:.4g}, learning rate {numbers.get('lr', 0.0):.3g}"
        if frame is not None:
            height, width = frame.picture.shape[:2]
            lines[2] = f"picture: {1000 * frame.seconds:.0f} ms, "
            if frame.scale < 1:
                lines[2] += f"{max(8, round(width * frame.scale))} x {max(8, round(height * frame.scale))} of "
            lines[2] += f"{width} x {height} pixels"
            if frame.samples > 1:
                lines[2] += f", mean of {frame.samples}"
        for item, line in zip(self._status, lines, strict=True):
            dpg.set_value(item, line)
        dpg.set_item_label(self._button, "pause" if control.training else "train")
        points = list(control.trainer.metrics.history.get("loss/total", ()))
        if len(points) != self._points:
            self._points = len(points)
            dpg.set_value(self._curve, [[point[0] for point in points], [point[1] for point in points]])
            for axis in self._axes:
                dpg.fit_axis_data(axis)
        if control.look_now != self._look:
            self._follow_look(control.look_now)

    def _follow_look(self, look: Look) -> None:
        dpg, self._look = self.dpg, look
        for item, read in self._inputs.items():
            if not dpg.is_item_active(item):
                dpg.set_value(item, read(look))
        rows = look.cameras().c2w[0].tolist()
        dpg.set_value(self._pose, "\n".join(" ".join(f"{value:8.3f}" for value in row) for row in rows))
        pairs = ("polar", "azimuth", "radius", "fovy")
        dpg.set_value(self._flags, " ".join(f"--default_{name} {getattr(look, name):.4g}" for name in pairs))
