"""The web viewer: a page that shows the scene and steers its training, served by viser. What it shows and does is the controller's (control.py).

All browsers share one picture: whoever moves last steers it, and its size fits that window. The mesh of an earlier or a new export stands
beside the scene (towards +x), drawn by the browser; the picture carries distances then, so that each hides the other where it should.
"""

import errno
import html
import math
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from errors import UserError, say
from nerf.control import Control, Frame
from nerf.interrupt import TERMINATED
from nerf.look import MODES

PORTS = 100  # tried, from the one asked for on
FASTEST = 1 / 30  # seconds between two pictures: a browser that is still decoding one throws it away for the next
REFRESH = 0.5  # seconds between two looks at what the panel says
MOVING, STILL = 70, 92  # JPEG quality
POINTS = 300  # of the loss curve
MESHES = ("glb", "obj", "ply", "stl")  # what an export may be shown from, the best first
EVEN_LIGHT = math.pi  # at which a matte material shows its own colour


def serve(trainer: Any, host: str, port: int) -> None:
    """Show `trainer`'s scene to browsers until Ctrl-C or SIGTERM; then save. Call it in the main thread.

    UserError if viser is missing or the port cannot be opened. SystemExit 143 after SIGTERM. Errors of the work itself are raised here.
    """
    free = need_server(host, port)
    import viser

    with _silent(), trainer.interrupts.watch(training=True):
        server = viser.ViserServer(host, free, label="Somnium", verbose=False)
        try:
            control = Control(trainer)
            page = Page(server, control)
            _tell(host, port, server.get_port())
            control.start()
            try:
                while not (trainer.interrupts.stop or control.ended):
                    page.follow()
            finally:
                control.close()
        finally:
            server.stop()
    if trainer.interrupts.terminate:
        trainer.metrics.close()
        raise SystemExit(TERMINATED)


def need_server(host: str, port: int) -> int:
    """The first free port from `port` on. UserError, in one line, if viser is missing or nothing can be opened there."""
    try:
        import viser  # noqa: F401
    except ModuleNotFoundError as error:
        raise UserError(f"--viewer: the package {error.name} is not installed: run scripts/setup.sh") from None
    try:
        family, _, _, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError:
        raise UserError(f"--viewer_host {host}: no such address; 127.0.0.1 is this machine alone") from None
    last = min(port + PORTS, 1 << 16) - 1
    for tried in range(port, last + 1):
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address[0], tried, *address[2:]))
                return tried
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    continue
                flag = f"--viewer_host {host}" if error.errno == errno.EADDRNOTAVAIL else f"--viewer_port {tried}"
                raise UserError(f"{flag}: {error.strerror}; choose another") from None
    raise UserError(f"--viewer_port {port}: all ports from {port} to {last} are taken; choose another")


def _tell(host: str, wanted: int, port: int) -> None:
    """Where the page is."""
    if port != wanted:
        say(f"port {wanted} is taken: {port}")
    alone = host in ("127.0.0.1", "localhost", "::1")
    shown = f"[{host}]" if ":" in host else host
    name = socket.gethostname()
    say(f"viewer: http://{shown if alone else name}:{port} (Ctrl-C ends it)")
    if alone:
        say(f"from another machine: ssh -L {port}:{shown}:{port} {name}, then open http://127.0.0.1:{port} there")


@contextmanager
def _silent() -> Iterator[None]:
    """Without the lines that viser prints about itself."""
    import rich

    console = rich.get_console()
    former, console.quiet = console.quiet, True
    try:
        yield
    finally:
        console.quiet = former


class Page:
    """The picture, the panel beside it, and the mesh. `follow` sends what is new, again and again."""

    def __init__(self, server: Any, control: Control) -> None:
        self.server, self.control, self.opt = server, control, control.trainer.opt
        self._sent, self._shown = 0, None  # the newest frame's number, and the frame that is in the browsers
        self._refreshed = 0.0
        self._curve_end = None
        self._mesh, self._mesh_of, self._beside = None, None, 0.0
        self._known = self._exported()
        self._place_camera()
        self._light_evenly()
        self._build()
        server.on_client_connect(self._welcome)

    def follow(self) -> None:
        """Wait a moment for the next picture and send it; now and then look after the panel."""
        frame = self.control.wait(self._sent, 0.1)
        if frame is not None:
            self._send(frame)
            time.sleep(FASTEST)
        if time.monotonic() - self._refreshed > REFRESH:
            self._refresh()
            self._refreshed = time.monotonic()

    # ---- the picture --------------------------------------------------------------------------------------------------------

    def _send(self, frame: Frame) -> None:
        self._sent, self._shown = frame.number, frame
        quality = STILL if frame.scale == 1 else MOVING
        meshes = self._mesh is not None and self._mesh.visible
        self.server.scene.set_background_image(
            frame.picture, "jpeg", jpeg_quality=quality, depth=frame.distance if meshes else None
        )
        self.server.flush()

    def _place_camera(self) -> None:
        """Browsers begin with the run's default view, y up."""
        look, camera = self.control.start_look, self.server.initial_camera
        self.server.scene.set_up_direction("+y")
        camera.position = look.cameras().position[0].numpy()
        camera.look_at = look.target
        camera.up = (0.0, 1.0, 0.0)
        camera.fov = math.radians(look.fovy)

    async def _welcome(self, client: Any) -> None:
        client.camera.on_update(self._steer)

    async def _steer(self, camera: Any) -> None:
        """The picture follows a browser's camera; its longer side is that of the window, at most --W or --H."""
        if min(camera.image_height, camera.image_width) < 8:
            return
        share = min(1.0, max(self.opt.W, self.opt.H) / max(camera.image_height, camera.image_width))
        height, width = (max(8, round(size * share)) for size in (camera.image_height, camera.image_width))
        position, target, fovy = camera.position, camera.look_at, math.degrees(camera.fov)
        self.control.move(lambda look: replace(look.seen_from(position, target), fovy=fovy, height=height, width=width))

    # ---- the panel ----------------------------------------------------------------------------------------------------------

    def _build(self) -> None:
        gui = self.server.gui
        gui.configure_theme(show_share_button=False, show_logo=False)
        gui.main_panel.dock_right()
        self._status = gui.add_html("")
        if self.control.can_train:
            self._build_training(gui)
        results = gui.add_button_group("Results", ("Picture", "Video", "Mesh"), hint="into results/ and mesh/")
        jobs = {"Picture": "picture", "Video": "video", "Mesh": "export"}
        _when(results, lambda name: self.control.do(jobs[name]))
        self._beside_box = gui.add_checkbox("Mesh beside", False, hint="the exported mesh, to the right of the scene")
        if self.control.can_train:
            self._build_prompt(gui)
        with gui.add_folder("View"):
            self._build_view(gui)
        with gui.add_folder("Light", expand_by_default=False):
            self._build_light(gui)
        with gui.add_folder("Rays", expand_by_default=False):
            self._build_rays(gui)

    def _build_training(self, gui: Any) -> None:
        self._curve = gui.add_uplot(
            (np.zeros(1), np.zeros(1)),
            ({"label": "step"}, {"label": "loss", "stroke": "#1c7ed6", "width": 1.5}),
            scales={"x": {"time": False}},
            legend={"show": False},
            height=120,
            visible=False,
        )
        self._train = gui.add_button("Pause", icon="player-pause", color="blue")
        _when(self._train, lambda _: self._show_training(self.control.toggle()))
        files = gui.add_button_group("Training", ("Save", "Load", "Restart"), hint="Load: the newest checkpoint")
        _when(files, lambda name: self._confirm() if name == "Restart" else self.control.do(name.lower()))

    def _confirm(self) -> None:
        gui = self.server.gui
        with gui.add_modal("Restart") as question:
            gui.add_markdown("Begin anew at step 0? The checkpoints so far are set aside in `checkpoints/previous`.")
            no, yes = gui.add_button("Cancel"), gui.add_button("Restart", color="red")

        def answer(restart: bool) -> None:
            question.close()
            if restart:
                self.control.do("restart")

        _when(yes, lambda _: answer(True))
        _when(no, lambda _: answer(False))

    def _build_prompt(self, gui: Any) -> None:
        with gui.add_form("Guidance") as form:
            text = gui.add_text("Prompt", self.opt.text or "", multiline=True)
            negative = gui.add_text("Negative", self.opt.negative or "")
            strength = gui.add_number("Scale", self._guidance_scale(), min=0.0, step=0.5)
            button = gui.add_button("Apply", hint="from the next step on")
        told = [text.value, negative.value]
        self._strength, self._strength_now = strength, strength.value

        async def apply(_: Any) -> None:
            wanted = [text.value.strip(), negative.value.strip()]
            if wanted != told:
                told[:] = wanted
                self.control.do("prompt", text=wanted[0], negative=wanted[1])
            if strength.value != self._strength_now:
                self._strength_now = strength.value
                self.control.do("strength", guidance_scale=strength.value)

        form.on_submit(apply)
        _when(button, lambda _: form.submit())

    def _guidance_scale(self) -> float:
        trainer = self.control.trainer
        return round(float(trainer.opt.guidance_scale(trainer.step)), 2)

    def _build_view(self, gui: Any) -> None:
        look = self.control.look_now
        _when(gui.add_dropdown("Mode", MODES, initial_value=look.mode), lambda mode: self.control.look(mode=mode))
        behind = tuple(round(255 * part) for part in look.background or (1.0, 1.0, 1.0))
        own = gui.add_checkbox("Scene's background", look.background is None, hint="what it was trained with")
        colour = gui.add_rgb("Background", behind)

        def paint(_: Any) -> None:
            self.control.look(background=None if own.value else tuple(part / 255 for part in colour.value))

        _when(own, paint)
        _when(colour, paint)
        _when(gui.add_slider("Field of view", 1.0, 120.0, 0.5, float(look.fovy), hint="degrees"), self._zoom)
        dynamic = gui.add_checkbox("Dynamic resolution", look.dynamic, hint="coarser pictures while something moves")
        _when(dynamic, lambda value: self.control.look(dynamic=value))
        samples = gui.add_slider("Smoothness", 1, 16, 1, look.samples, hint="pictures that a still one is the mean of")
        _when(samples, lambda value: self.control.look(samples=value))

    def _zoom(self, degrees: float) -> None:
        self.server.initial_camera.fov = math.radians(degrees)
        for client in self.server.get_clients().values():
            client.camera.fov = math.radians(degrees)
        self.control.look(fovy=degrees)

    def _build_light(self, gui: Any) -> None:
        gui.add_markdown("Seen in the modes *lambertian* and *textureless*, and in *image* once it stands still.")
        follows = gui.add_checkbox("Follows the camera", True)
        polar = gui.add_slider("Polar", 0.0, 180.0, 1.0, 60.0, hint="degrees from above")
        azimuth = gui.add_slider("Azimuth", -180.0, 180.0, 1.0, 0.0, hint="degrees from the front")
        ambient = gui.add_slider("Ambient", 0.0, 1.0, 0.01, self.control.look_now.ambient)

        def shine(_: Any) -> None:
            self.control.look(light=None if follows.value else (polar.value, azimuth.value), ambient=ambient.value)

        for handle in (follows, polar, azimuth, ambient):
            _when(handle, shine)

    def _build_rays(self, gui: Any) -> None:
        opt, bound = self.opt, float(self.opt.bound)
        steps = gui.add_slider("Samples", 16, max(1024, opt.max_steps), 1, max(16, opt.max_steps), hint="along a ray")
        _when(steps, lambda value: self.control.look(max_steps=value))
        gamma = gui.add_slider("Growth", 0.0, max(0.1, opt.dt_gamma), 0.001, float(opt.dt_gamma), hint="dt_gamma")
        _when(gamma, lambda value: self.control.look(dt_gamma=value))
        axes = [gui.add_multi_slider(name, -bound, bound, 0.02, (-bound, bound)) for name in "xyz"]

        def cut(_: Any) -> None:
            low, high = zip(*(axis.value for axis in axes), strict=True)
            whole = min(high) >= bound and max(low) <= -bound
            self.control.look(box=None if whole else (*low, *high))

        for axis in axes:
            _when(axis, cut)

    # ---- what the panel says ------------------------------------------------------------------------------------------------

    def _refresh(self) -> None:
        said = self._report()
        if self._status.content != said:
            self._status.content = said
        if self.control.can_train:
            self._show_training(self.control.training)
            self._draw_curve()
            self._follow_schedule()
        self._follow_mesh()

    def _report(self) -> str:
        control, frame = self.control, self._shown
        lines = [f"Step <b>{control.trainer.step}</b> of {self.opt.iters}"]
        if control.training and control.speed:
            lines[0] += f", {control.speed:.1f} a second"
        if "loss/total" in control.numbers:
            lines.append(f"Loss {control.numbers['loss/total']:.4g}")
        if frame is not None:
            size = f"{round(frame.look.width * frame.scale)} x {round(frame.look.height * frame.scale)}"
            lines.append(f"Picture {1000 * frame.seconds:.0f} ms, {size} of {frame.look.width} x {frame.look.height}")
        lines.append(f"<b>{html.escape(control.busy)} ...</b>" if control.busy else html.escape(control.message))
        return f'<div style="font-size:0.85em;line-height:1.5;padding:0.5em 0.75em">{"<br>".join(lines)}</div>'

    def _show_training(self, on: bool) -> None:
        label = "Pause" if on else "Train"
        if self._train.label != label:
            self._train.label, self._train.icon = label, "player-pause" if on else "player-play"

    def _follow_schedule(self) -> None:
        """Show the guidance scale of this step, unless another is being typed."""
        now = self._guidance_scale()
        if now != self._strength_now and self._strength.value == self._strength_now:
            self._strength.value = self._strength_now = now

    def _draw_curve(self) -> None:
        history = list(self.control.trainer.metrics.history.get("loss/total", ()))
        if (history[-1:], len(history)) == self._curve_end:
            return
        self._curve_end = history[-1:], len(history)
        every = -(-len(history) // POINTS) or 1
        points = np.array(history[::-every][::-1], float).reshape(-1, 2)
        if len(points) > 1:
            self._curve.data = (points[:, 0].copy(), points[:, 1].copy())
        if self._curve.visible != (len(points) > 1):
            self._curve.visible = len(points) > 1

    # ---- the mesh -----------------------------------------------------------------------------------------------------------

    def _light_evenly(self) -> None:
        """Show the mesh's own colours, as the scene's picture does."""
        scene = self.server.scene
        scene.configure_default_lights(False)
        scene.configure_environment_map(None)
        scene.add_light_ambient("/light", intensity=EVEN_LIGHT)

    def _exported(self) -> tuple[Path, int] | None:
        """The newest mesh that was exported into the workspace, and when it was written."""
        for kind in MESHES:
            path = self.control.trainer.workspace / "mesh" / f"mesh.{kind}"
            if path.exists():
                return path, path.stat().st_mtime_ns
        return None

    def _follow_mesh(self) -> None:
        """Show the mesh, or hide it, as the box says; a new export is shown without asking."""
        found, box = self._exported(), self._beside_box
        if found != self._known:
            self._known, box.value = found, found is not None
        if box.disabled != (found is None):
            box.disabled = found is None
        if box.value and found != self._mesh_of:
            self._load_mesh(found)
        if self._mesh is not None and self._mesh.visible != box.value:
            self._mesh.visible = box.value
            self._look_at_both(box.value)
            if self._shown is not None:  # with distances, or without
                self._send(self._shown)

    def _load_mesh(self, found: tuple[Path, int]) -> None:
        import trimesh

        path, shown = found[0], self._mesh is not None and self._mesh.visible
        loaded = trimesh.load_scene(str(path))
        data = path.read_bytes() if path.suffix == ".glb" else loaded.export(file_type="glb")
        self._beside, self._mesh_of = 1.15 * float(loaded.extents[0]), found
        self._mesh = self.server.scene.add_glb("/mesh", data, position=(self._beside, 0.0, 0.0), visible=shown)

    def _look_at_both(self, both: bool) -> None:
        """Move every camera so that scene and mesh fill its picture together, or the scene alone again."""
        shift = np.array([self._beside / 2, 0.0, 0.0])
        for client in self.server.get_clients().values():
            camera = client.camera
            away, distance = camera.position - camera.look_at, self.control.start_look.radius
            if both:  # from the middle both reach as far as they stand apart
                wide = math.tan(camera.fov / 2) * min(camera.aspect, 2.0)
                distance = max(float(np.linalg.norm(away)), self._beside * (0.5 + 1.0 / wide))
            target = camera.look_at + (shift if both else -shift)
            camera.position = target + away * distance / max(float(np.linalg.norm(away)), 1e-6)
            camera.look_at = target


def _when(handle: Any, action: Callable[[Any], Any]) -> None:
    """Call `action` with the value of a control whenever it changes or is pressed; in order, since that happens in one thread."""

    async def changed(event: Any) -> None:
        action(event.target.value)

    (handle.on_click if hasattr(handle, "on_click") else handle.on_update)(changed)
