"""What a viewer does, without a window: one controller for the desktop viewer (gui.py) and the web viewer (viewer.py).

All work on the scene - training, pictures, files - happens in one thread, the controller's. A viewer changes how the scene is looked at
(`move`, `look`), switches the training on and off, orders jobs (`do`), and takes the newest `frame` whenever it likes.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor
from torch.nn import functional as F

from errors import UserError
from flags import show
from nerf import media
from nerf.look import SHIFTS, Look, ignored
from nerf.provider import Cameras, sphere_point
from nerf.renderer import NeRFRenderer, Render
from nerf.results import plain_background

MOVING = 0.035  # seconds that a picture may take while the camera moves
WATCHING = 0.2  # the same while the scene trains
LATE = 4  # times as long: then a coarser picture is begun instead
BURST = 0.25  # seconds of training between two looks at what is wanted
REST = 0.3  # seconds after the last movement until the full picture is made and training goes on
SMALLEST = 0.2  # share of the width and height, and of the samples along a ray, that a quick picture has at least,
ENOUGH = 48  # unless it has so many pixels along its shorter edge


@dataclass(frozen=True)
class Frame:
    """A picture and what was known when it was made. `number` counts them; `scale` is its share of the full width; `seconds` it took.

    `distance`, of the pixels that were rendered: how far in front of the camera, along its axis, lies what is seen; infinite where nothing is.
    """

    number: int
    picture: UInt8[np.ndarray, "H W 3"]
    distance: Float[np.ndarray, "h w"]
    look: Look
    scale: float
    samples: int
    seconds: float
    step: int


class Control:
    """Trains `trainer`'s scene and shows it. `start`, then the rest from any thread, at the end `close`.

    Attributes for viewers: `look_now` (a Look), `frame` (the newest Frame or None), `training` (is it on), `message` (the last line said),
    `numbers` (what training measured last, by name), `written` (files that the last job made), `speed` (steps a second), `error`; `ignored`:
    the fields of a Look that make no difference to this scene.
    """

    def __init__(self, trainer: Any) -> None:
        opt = trainer.opt
        self.trainer = trainer
        self.can_train = trainer.guidance is not None
        self.training = self.can_train
        self.start_look = Look(
            opt.default_polar, opt.default_azimuth, opt.default_radius, opt.default_fovy, opt.H, opt.W
        )
        behind = plain_background(opt)
        if behind is not None:
            self.start_look = replace(self.start_look, background=tuple(behind.tolist()))
        self.look_now, self.frame = self.start_look, None
        self.message, self.error = "", None
        self.numbers: dict[str, float] = {}
        self.written: list[Path] = []
        self.speed = 0.0
        self.busy = ""  # the job under way
        self.ignored = ignored(trainer.scene)
        self._wake = threading.Condition()
        self._jobs: deque[tuple[str, Callable[[], Any]]] = deque()
        self._closing = False
        self._moved = 0.0  # when the look changed last
        self._drawn: Look | None = None  # of the newest frame
        self._sharp, self._sum = 0, None  # pictures in the mean of a still one
        self._scales = {MOVING: 0.3, WATCHING: 0.5}  # of quick pictures, for each limit of their time
        self._shown = self._pause = (
            0.0  # when the last frame of a training scene was made, and how long there need be no other
        )
        self._concluded = -1  # the step of the last line about the training so far
        self._thread = threading.Thread(target=self._work, name="somnium", daemon=True)

    # ---- what viewers call --------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Stop working; what was trained is saved. Raises the error that work ended with, if it did."""
        with self._wake:
            self._closing = True
            self._wake.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        if self.error is not None:
            raise self.error

    @property
    def ended(self) -> bool:
        """Whether work has ended, by `close` or by an error."""
        return self._closing or self.error is not None

    def move(self, change: Callable[[Look], Look]) -> None:
        """Change the look: `control.move(lambda look: look.orbited(5, 0))`."""
        with self._wake:
            now = change(self.look_now)
            if now != self.look_now:
                self.look_now, self._moved = now, time.monotonic()
                self._wake.notify_all()

    def look(self, **values: Any) -> None:
        """Set some fields of the look."""
        self.move(lambda now: replace(now, **values))

    def toggle(self) -> bool:
        """Training on or off; returns which. Says a line if there is nothing to train."""
        with self._wake:
            if not self.can_train:
                self.message = "only results are shown here (--test): start without it to train"
            self.training = self.can_train and not self.training
            self._wake.notify_all()
            return self.training

    def do(self, job: str, **values: Any) -> None:
        """Order a job: save, load, export, video, picture, restart; prompt (text, negative), strength (guidance_scale). One after the other."""
        names = ("save", "load", "export", "video", "picture", "restart", "prompt", "strength")
        if job not in names:
            raise ValueError(f"{job}: no such job; {', '.join(names)}")
        with self._wake:
            self._jobs.append((job, lambda: getattr(self, f"_{job}")(**values)))
            self._wake.notify_all()

    def wait(self, number: int, seconds: float) -> Frame | None:
        """The newest frame as soon as it has another number; None if that takes longer, or work has ended."""
        with self._wake:
            self._wake.wait_for(lambda: self.ended or (self.frame is not None and self.frame.number != number), seconds)
            return self.frame if self.frame is not None and self.frame.number != number else None

    # ---- the thread ---------------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        try:
            if self.can_train:
                self.training = self.trainer.begin() and self.training
            else:
                self.training = False
                self.trainer.load()
            self._tell(f"step {self.trainer.step} of {self.trainer.opt.iters}")
            while not self._closing:
                self._next()
            if self.can_train and self._concluded != self.trainer.step:
                self.trainer.conclude()
        except BaseException as error:  # it belongs to the thread that called `close`
            self.error = error
        finally:
            with self._wake:
                self._wake.notify_all()

    def _next(self) -> None:
        """Whatever is most urgent."""
        moving = time.monotonic() - self._moved < REST
        if self._jobs:
            self._obey()
        elif self.look_now != self._drawn and (moving or self.frame is None):
            self._draw(MOVING)
        elif moving:
            with self._wake:
                self._wake.wait_for(lambda: self._closing or self._jobs or self.look_now != self._drawn, 0.02)
        elif self.training:
            self._train()
        elif self._sharp < max(1, self.look_now.samples) or self.look_now != self._drawn:
            self._draw(None)
        else:
            with self._wake:
                self._wake.wait_for(self._wanted, 1.0)

    def _wanted(self, look: Look | None = None) -> bool:
        """Whether there is something to do, other than draw `look` (as drawn last)."""
        return self._closing or self.training or bool(self._jobs) or self.look_now != (look or self._drawn)

    def _train(self) -> None:
        trainer, began, first = self.trainer, time.monotonic(), self.trainer.step
        while trainer.unfinished and not self._closing and not self._jobs and self.look_now == self._drawn:
            trainer.advance()
            if time.monotonic() - began > BURST:
                break
        taken = time.monotonic() - began
        if trainer.step > first:
            rate = (trainer.step - first) / taken
            self.speed = rate if self.speed == 0 else 0.8 * self.speed + 0.2 * rate
        self.numbers = trainer.latest
        if not trainer.unfinished:
            self.training = False
            if self._concluded != trainer.step:
                trainer.conclude()
                self._concluded = trainer.step
            done = trainer.step >= trainer.opt.iters
            self._tell("training is done (more: --iters)" if done else "training has ended early")
        moving = time.monotonic() - self._moved < REST  # then a quicker picture is due
        if not moving and (self.look_now != self._drawn or time.monotonic() - self._shown > self._pause):
            began = time.monotonic()
            self._draw(WATCHING)
            self._shown = time.monotonic()
            self._pause = 3 * (self._shown - began)  # pictures take a quarter of the time at most
        self._sharp = 0

    def _obey(self) -> None:
        self.busy, job = self._jobs[0]
        try:
            job()
        except UserError as error:  # a wish that cannot be met ends nothing
            self._tell(str(error))
        finally:
            self.busy, self._sharp, self._concluded = "", 0, -1
            self._jobs.popleft()

    def _tell(self, text: str) -> None:
        self.message = text
        self.trainer.log(text)

    # ---- pictures -----------------------------------------------------------------------------------------------------------

    def _draw(self, limit: float | None) -> None:
        """Make a frame, within about `limit` seconds, or (None) in full, one of the several that a still picture is the mean of."""
        look, began = self.look_now, time.monotonic()
        quick = limit is not None and look.dynamic
        scale = self._scales[limit] if quick else 1.0
        still = limit is None and look == self._drawn and self._sharp > 0
        shift = SHIFTS[self._sharp % len(SHIFTS)] if still else (0.0, 0.0)
        least = min(SMALLEST, ENOUGH / min(look.height, look.width))

        def stop() -> bool:
            if limit is None:  # nobody waits for such a picture
                return self._wanted(look)
            late = quick and scale > least and time.monotonic() - began > LATE * limit
            return self._closing or late or (limit == WATCHING and look != self.look_now)

        try:
            picture, distance = self._seen(look, scale, shift, stop)
        except _Abandoned:
            if quick and time.monotonic() - began > LATE * limit:
                self._scales[limit] = max(scale / 2, least)
            return
        taken = time.monotonic() - began
        if quick and not 0.8 < taken / limit < 1.2:
            factor = min(max((limit / max(taken, 1e-6)) ** (1 / 3), 0.6), 1.3)  # as if both pixels and samples counted
            self._scales[limit] = min(max(scale * factor, least), 1.0)
        self._sharp = (self._sharp if still else 0) + 1 if limit is None else 0
        self._sum = self._sum + picture if still else picture
        shown = media.pixels(_sized(self._sum / max(self._sharp, 1), look.height, look.width))
        number = self.frame.number + 1 if self.frame else 1
        self._drawn = look
        with self._wake:
            self.frame = Frame(number, shown, distance, look, scale, max(self._sharp, 1), taken, self.trainer.step)
            self._wake.notify_all()

    def picture(
        self,
        look: Look,
        scale: float = 1.0,
        shift: tuple[float, float] = (0.0, 0.0),
        stop: Callable[[], bool] | None = None,
    ) -> Tensor:
        """What `look` shows, [h, w, 3] in [0, 1], `scale` times as large; while it is made `stop()` is asked whether to abandon it."""
        return self._seen(look, scale, shift, stop)[0]

    def _seen(
        self, look: Look, scale: float, shift: tuple[float, float], stop: Callable[[], bool] | None
    ) -> tuple[Tensor, Float[np.ndarray, "h w"]]:
        """A `picture` and the distances that a `Frame` has."""
        trainer = self.trainer
        with trainer.showing("viewer") as scene, _steered(scene, look, scale, stop):
            scene = getattr(scene, "scenes", [scene])[0]  # of several particles the first
            render = _render(scene, look, look.cameras(scale, shift).to(trainer.device), trainer.step)
        if look.mode == "depth":
            picture = media.depth_picture(render.depth, render.alpha, look.radius, trainer.opt.bound)
        else:
            picture = render.image[..., :3]
        return picture[0].float().cpu(), _distance(render)

    # ---- jobs ---------------------------------------------------------------------------------------------------------------

    def _save(self) -> None:
        self._needs_training("save")
        self.written = [self.trainer.save()]
        self._tell(f"saved {self.written[0]}")

    def _load(self, path: str = "latest") -> None:
        self.trainer.load(path)
        self._tell(f"step {self.trainer.step} of {self.trainer.opt.iters}")

    def _export(self) -> None:
        self.written = self.trainer.export_mesh()
        if self.written:
            self._tell(f"mesh: {self.written[-1]}")

    def _video(self) -> None:
        self.written = self.trainer.test()
        self._tell(f"video: {self.written[0]}")

    def _picture(self) -> None:
        """What is seen, in full, into results/."""
        folder, number = self.trainer.workspace / "results", 1
        while (path := folder / f"step_{self.trainer.step:07d}_view_{number}.png").exists():
            number += 1
        self.written = [media.save_png(path, media.pixels(self.picture(self.look_now)))]
        self._tell(f"picture: {path}")

    def _restart(self) -> None:
        self._needs_training("restart")
        self.trainer.restart()
        self._tell("step 0: begun anew; the earlier checkpoints are in checkpoints/previous")

    def _needs_training(self, job: str) -> None:
        if not self.can_train:
            raise UserError(f"{job}: only results are shown here (--test): start without it")

    def _prompt(self, text: str, negative: str) -> None:
        self._needs_training("prompt")
        self.trainer.change(text=text, negative=negative)
        self._tell(f'from step {self.trainer.step} on: "{text}"' + (f', not "{negative}"' if negative else ""))

    def _strength(self, guidance_scale: float | str) -> None:
        self._needs_training("strength")
        self.trainer.change(guidance_scale=guidance_scale)
        self._tell(f"from step {self.trainer.step} on: guidance scale {show(self.trainer.opt.guidance_scale)}")


class _Abandoned(Exception):
    """A picture that nobody waits for any more."""


def _render(scene: Any, look: Look, cameras: Cameras, step: int) -> Render:
    behind = None if look.background is None else torch.tensor(look.background)
    if look.mode in ("image", "depth") and look.light is None:
        return (scene.show if _shows_itself(scene) else scene.render)(cameras, background=behind, step=step)
    if look.light is None:
        light = F.normalize(cameras.position - torch.tensor(look.target).to(cameras.c2w), dim=-1)
    else:
        light = sphere_point(*(torch.tensor([angle]) for angle in look.light)).to(cameras.c2w)
    mode = {"image": "lambertian", "depth": "albedo"}.get(look.mode, look.mode)
    return scene.render(cameras, mode, light, look.ambient, behind, step)


def _distance(render: Render) -> Float[np.ndarray, "h w"]:
    _, directions = render.cameras.rays()
    along = -(directions * render.cameras.c2w[:, None, None, :3, 2]).sum(-1, keepdim=True)
    distance = torch.where(render.alpha > 0.5, render.depth / render.alpha.clamp(min=0.5) * along, torch.inf)
    return distance[0, ..., 0].float().cpu().numpy()


def _shows_itself(scene: Any) -> bool:
    """Whether its pictures are made otherwise than by rendering colours alone: latents, which are decoded, and physical materials."""
    return not isinstance(scene, NeRFRenderer)


@contextmanager
def _steered(scene: Any, look: Look, scale: float, stop: Callable[[], bool] | None) -> Iterator[None]:
    """Inside the block the fields in `scene` are drawn as `look` says, with `scale` times the samples along a ray."""

    def between() -> None:
        if stop is not None and stop():
            raise _Abandoned

    fields = [module for module in scene.modules() if isinstance(module, NeRFRenderer)]
    former = [field.sampling for field in fields]
    try:
        for field, own in zip(fields, former, strict=True):
            number = own.max_steps if field.occupancy is not None else own.num_steps + own.upsample_steps
            share = max(16, round((look.max_steps or number) * scale)) / number
            steps = {name: round(getattr(own, name) * share) for name in ("max_steps", "num_steps", "upsample_steps")}
            gamma = own.dt_gamma if look.dt_gamma is None else look.dt_gamma
            box = own.box if look.box is None else look.box
            field.sampling = replace(own, **steps, dt_gamma=gamma, box=box, between=between)
        yield
    finally:
        for field, own in zip(fields, former, strict=True):
            field.sampling = own


def _sized(picture: Tensor, height: int, width: int) -> Tensor:
    """[h, w, 3] at the size of the window."""
    if picture.shape[:2] == (height, width):
        return picture
    return F.interpolate(picture.permute(2, 0, 1)[None], (height, width), mode="bilinear", antialias=False)[0].permute(
        1, 2, 0
    )
