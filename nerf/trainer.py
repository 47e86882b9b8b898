"""The loop: cameras -> light and shading -> background -> render -> guidance and regularisers -> backward -> optimizer -> average.

It knows no method: the scene and the guidance meet here as tensors. Generators, one per purpose: `cameras` (cameras and lights), `shading`
(ambient, texture, background; both on the CPU) and `render` (jitter and occupancy, on the device); with several particles `particles` (whose
turn it is), with photographs `known` (which of them are looked at, and how).
"""

import math
import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import ranks
from errors import UserError, leads
from files import make_folder
from nerf import batch, checkpoint, media, results
from nerf.batch import Batch
from nerf.ema import MovingAverage
from nerf.gradients import gradient_norms, limit_gradient
from nerf.guard import GAVE_UP, Guard
from nerf.interrupt import TERMINATED, Interrupts
from nerf.losses import regularise_gradients
from nerf.metrics import Metrics
from nerf.particles import each
from nerf.photos import References, is_known_step
from nerf.progress import Bar, Log
from optimizer import build_optimizer, learning_rate_factor

AUTOSAVE = 600.0  # seconds between checkpoints when --eval_interval is longer


class Trainer:
    """Trains `scene` with `guidance` (None: only results are wanted) and writes results and report into `opt.workspace`."""

    def __init__(
        self,
        opt: Any,
        scene: Any,
        guidance: Any,
        device: torch.device | str,
        anew: Callable[[int], dict] | None = None,
        references: References | None = None,
    ) -> None:
        """anew: see `Guard`; references: what photographs tell."""
        self.opt, self.guidance, self.references, self.device = opt, guidance, references, torch.device(device)
        self.scene = scene.to(self.device)
        self.workspace = make_folder(Path(opt.workspace))
        self.checkpoints = self.workspace / "checkpoints"
        self.log = Log(self.workspace / "log.txt" if leads() else None)
        self.optimizer = build_optimizer(opt, self.scene.parameter_groups(opt.lr.max()))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rate_factor = learning_rate_factor(opt)
        # Of N particles each moves every N-th step: the average goes back over as many steps of its own.
        self.average = MovingAverage(self.scene, opt.ema_decay ** (1 / opt.particles))
        self.guard = Guard(self.scene, self.optimizer, self.average, self.log, opt.retry, anew)
        self.half = bool(opt.fp16) and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.metrics = Metrics(self.workspace / "run" if leads() else None)
        self.interrupts = Interrupts()
        places = {"cameras": "cpu", "shading": "cpu", "render": self.device}
        places |= {"particles": "cpu"} if opt.particles > 1 else {}
        places |= {"known": "cpu"} if references is not None else {}
        self.generators = {
            name: torch.Generator(place).manual_seed(zlib.crc32(f"{opt.seed} {name}".encode()))
            for name, place in places.items()
        }
        self.step = 0  # steps done
        self.times: dict[str, float] = {}  # seconds, by phase
        self.latest: dict[str, float] = {}  # means of the last window of steps
        self._loaded = False

    # ---- the loop -----------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to `opt.iters`, or until asked to stop; ends with a checkpoint and validation pictures.

        SystemExit 130 on the second Ctrl-C, 143 on SIGTERM, 1 for a scene that stays empty (both after a checkpoint).
        """
        if not self.begin():
            return
        with self.interrupts.watch(training=True):
            with Bar("training", self.opt.iters, self.step, lines=True) as bar:
                while self.unfinished:
                    self.advance(bar)
            self.conclude()
        if self.interrupts.terminate:
            self.log(f"terminated at step {self.step}: the same command goes on from there")
            self.metrics.close()
            raise SystemExit(TERMINATED)
        if self.guard.gave_up:
            self.metrics.close()
            raise SystemExit(GAVE_UP)
        if self._validated != self.step:
            with self.interrupts.watch(training=False):
                self.validate()

    def begin(self) -> bool:
        """Load what there is to go on from; False if this run is finished."""
        self._ready()
        opt = self.opt
        self._saved_at, self._validated, self._stopping = time.monotonic(), -1, False
        self._first, self._before = self.step, self.times.get("training", 0.0)
        if self.step >= opt.iters:
            self.log(
                f"this run is finished ({self.step} steps): going on to the results (more: --iters; anew: --ckpt scratch)"
            )
            return False
        if leads():
            opt.save(self.workspace / "config.yaml")
        self.log.keep(f'"{self.subject}": step {self.step} to {opt.iters} on {self.device}')
        if opt.fp16 and not self.half:
            self.log("--fp16 needs a GPU: the scene stays in float32 on the CPU")
        return True

    @property
    def subject(self) -> str:
        """What is being made: the prompt, else the name of the photographs."""
        return results.subject(self.opt)

    @property
    def unfinished(self) -> bool:
        """Whether there is another step to take."""
        return self.step < self.opt.iters and not self._stopping and not self.guard.hopeless

    def advance(self, bar: Bar | None = None) -> None:
        """One step, and what is due after it: a look at the measurements, a checkpoint, validation pictures, a turntable."""
        opt = self.opt
        with self._timed("training"):
            self._train_step()
            if self.metrics.full:
                self._look(bar)
            late = time.monotonic() - self._saved_at > AUTOSAVE
            # whatever one process wants, all do, at the same step
            *stopping, late = ranks.largest([self.interrupts.interrupts > 0, self.interrupts.terminate, late])
            self._stopping = any(stopping)
            if self.step == opt.iters or self._stopping:
                return
            if _due(opt.eval_interval, self.step):
                self.save()
                self.validate()
                self._validated = self.step
            elif late:
                self.save()
            if _due(opt.test_interval, self.step):
                self._turntable()

    def conclude(self) -> None:
        """A checkpoint, and a line about the training so far."""
        self.save(final=self.step >= self.opt.iters)
        state = "interrupted" if self.step < self.opt.iters else "done"
        speed = (self.step - self._first) / max(self.times.get("training", 0.0) - self._before, 1e-9)
        self.log(
            f"training {state}: {self.step} of {self.opt.iters} steps, {speed:.1f} steps/s, {self.guard.skipped} skipped"
        )

    def change(self, **values: Any) -> None:
        """Other values for some options from here on: what the guidance is told. UserError, and nothing changed, if they make no sense."""
        opt = self.opt.changed(**values)
        self.guidance.follow(opt)
        self.opt = opt
        opt.save(self.workspace / "config.yaml")
        self.save(self.step >= opt.iters)  # config.yaml and the newest checkpoint agree about the prompt

    def restart(self) -> None:
        """Begin anew: the scene as it was before the first step, step 0. The checkpoints so far are set aside."""
        checkpoint.set_aside(self.checkpoints)
        self.guard.revive()
        self.step = self._first = 0
        self.metrics.history.clear()

    def _train_step(self) -> None:
        """One step. The device is waited for once, to learn whether the gradient is finite (as a gradient scaler would)."""
        opt, step = self.opt, self.step
        turn = self.scene.take_turn(self.generators["particles"]) if opt.particles > 1 else step
        self.scene.train()
        self.scene.set_progress(step / opt.iters)
        if opt.cuda_ray and turn % opt.update_extra_interval == 0:
            self.scene.update_occupancy(turn, self.generators["render"])
            ranks.share(list(self.scene.buffers()))
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.rate_factor(step) * self.guard.lr_factor
        self.optimizer.zero_grad(set_to_none=True)
        batches = self._batches(step)
        loss = torch.stack([one.loss.detach() for one in batches]).sum() / opt.accumulate  # not finite if one is not
        values = {name: value for one in batches for name, value in one.values.items()}
        nonfinite = sum((one.log.get("nonfinite", 0) for one in batches), torch.zeros_like(loss))
        loss, nonfinite = ranks.mean(torch.stack([loss, nonfinite]))
        ranks.average_gradients([p for group in self.optimizer.param_groups for p in group["params"]])
        norms = gradient_norms(self.optimizer) if self._scaled() else {}
        values |= {"loss/total": loss, "lr": self.optimizer.param_groups[0]["lr"], **norms}
        self.step += 1
        if norms:
            self._update(loss, nonfinite, norms, step, values)
        self.average.update()
        self.metrics.add(self.step, values)

    def _batches(self, step: int) -> list[Batch]:
        """What this step learns from - views that the prior judges, known views, or both - with their gradient added up."""
        opt, found = self.opt, []
        alone = getattr(self.guidance, "silent", False)  # nobody judges
        known = self.references is not None and (alone or is_known_step(opt, step))
        saving = opt.save_guidance and step % opt.save_guidance_interval == 0
        for i in range(opt.accumulate):
            judged = not known or (opt.known_view_sum and not alone)
            for make in [self._judged] * judged + [self._known] * known:
                with torch.autocast(self.device.type, torch.float16, enabled=self.half):
                    one = make(step, saving and i == 0)
                    loss = one.loss
                if loss.requires_grad:
                    self.scaler.scale(loss / opt.accumulate).backward()
                found.append(one)
        return found

    def _judged(self, step: int, saving: bool) -> Batch:
        where = (self.scene, self.guidance, self.generators, self.device)
        limit = self.opt.grad_clip_rgb
        save = partial(self._save_guidance, step) if saving else None
        return batch.judged(self.opt, step, *where, lambda image: limit_gradient(image, limit, self.scaler), save)

    def _known(self, step: int, saving: bool) -> Batch:
        return batch.known(self.opt, step, self.scene, self.references, self.generators, self.device)

    def _scaled(self) -> bool:
        """Take the gradient scaler's factor out of the gradients; False if there are none, because no ray met anything."""
        if all(p.grad is None for group in self.optimizer.param_groups for p in group["params"]):
            return False
        self.scaler.unscale_(self.optimizer)
        return True

    def _update(
        self, loss: Tensor, nonfinite: Tensor, norms: dict[str, Tensor], step: int, values: dict[str, Any]
    ) -> None:
        """Take the step if everything is finite; else skip it, and keep its values out of the curves."""
        opt = self.opt
        sound = torch.isfinite(loss) & (nonfinite == 0)
        usable = torch.isfinite(norms["grad_norm/all"])
        sound, usable = torch.stack([sound, usable]).tolist()
        values["skipped"] = float(not (sound and usable))
        if sound and usable:
            self.guard.good()
            if opt.grad_clip >= 0:
                torch.nn.utils.clip_grad_value_(self.scene.parameters(), opt.grad_clip)
            regularise_gradients(opt, step, self.scene)
            self.scaler.step(self.optimizer)
        else:
            for name in [name for name in values if name != "skipped"]:
                del values[name]
            self.optimizer.zero_grad(set_to_none=True)
            self.guard.bad(step, "the gradient" if sound else "the loss", overflow=sound and self.half)
        self.scaler.update()

    def _look(self, bar: Bar | None) -> None:
        """Once per window of steps: read what was measured, show it, see whether the scene is well."""
        means = self.latest = self.metrics.read()
        (largest,) = ranks.largest([means.get("alpha/largest", math.inf)])
        self.guard.inspect(self.step, largest)
        shown = {"loss": "loss/total", "gradient": "guidance/grad_norm", "alpha": "alpha/mean"}
        if bar is not None:
            bar.update(self.step, "  ".join(f"{k} {means[name]:.3g}" for k, name in shown.items() if name in means))

    def _save_guidance(self, step: int, *seen: Any, **meaning: Any) -> None:
        path = make_folder(self.workspace / "guidance") / f"step_{step:07d}.png"
        if leads():
            media.save_png(path, media.sheet(media.pixels(self.guidance.debug_images(*seen, **meaning)), columns=1))

    # ---- checkpoints --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the future depends on."""
        state = {
            "text": self.subject,
            "step": self.step,
            "scene": dict(self.scene.state_dict()),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "metrics": self.metrics.state_dict(),
            "times": self.times,
            **checkpoint.random_state(self.generators, self.device),
        }
        if self.guidance is not None:
            state["guidance"] = self.guidance.state()
        return state

    def save(self, final: bool = False) -> Path:
        """Write a checkpoint."""
        self._saved_at = time.monotonic()
        self.guard.settle(self.step)
        return checkpoint.save(self.checkpoints, self.state(), final) if leads() else self.checkpoints

    def load(self, ckpt: str | None = None) -> None:
        """Go on from `ckpt` (default `opt.ckpt`): 'latest' (nothing there: start at 0), 'scratch' or a file.

        UserError for a broken file, another prompt, or another scene; with --test also when there is none.
        """
        self._loaded = True
        with ranks.first_before_others():  # it moves files out of the way
            found = checkpoint.choose(self.checkpoints, ckpt or self.opt.ckpt)
        if found is None:
            if self.guidance is None:
                raise UserError(f"{self.checkpoints}: no checkpoint to show: train first, or name one with --ckpt")
            return
        state, path = found
        checkpoint.check_prompt(state, path, self.subject)
        checkpoint.load_scene(self.scene, state["scene"], path)
        if getattr(self.scene, "blank", False):  # it has no beginning but this
            self.guard.begin()
        self.average.load_state_dict(state["average"])
        self.step, self.times = state["step"], state["times"]
        self.metrics.load_state_dict(state["metrics"])
        self.metrics.start = self.step + 1
        self.guard.load_state_dict(state["guard"])
        if self.guidance is not None:
            self._load_training(state, path)
            if (ckpt or self.opt.ckpt) != "latest":
                with ranks.first_before_others():
                    checkpoint.set_aside(self.checkpoints, self.step, path)  # those of more steps are of another future
            self.log(f"going on from {path.name} (step {self.step})")
        self.guard.snapshot(self.step)

    def _load_training(self, state: dict[str, Any], path: Path) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise UserError(f"{path}: made by another optimizer: give its --optim, or --ckpt scratch") from None
        if self.half and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        checkpoint.set_random(state, self.generators, self.device)
        if "guidance" in state:
            self.guidance.load_state(state["guidance"])

    def _ready(self) -> None:
        if not self._loaded:
            self.load()

    # ---- results ------------------------------------------------------------------------------------------------------------

    @contextmanager
    def showing(self, phase: str):
        """The scene as it is shown: averaged weights, eval mode, the progress of this step; the time counts for `phase`."""
        self._ready()
        training = self.scene.training
        self.scene.set_progress(self.step / self.opt.iters)
        self.scene.eval()
        try:
            with self._timed(phase), self.average.applied(), torch.no_grad():
                with torch.autocast(self.device.type, torch.float16, enabled=self.half):
                    yield self.scene
        finally:
            self.scene.train(training)

    @contextmanager
    def _timed(self, phase: str):
        before = sum(self.times.values())
        start = time.perf_counter()
        try:
            yield
        finally:
            inner = sum(self.times.values()) - before  # phases may contain others
            self.times[phase] = self.times.get(phase, 0.0) + time.perf_counter() - start - inner

    def validate(self) -> list[Path]:
        """Pictures from all around into validation/."""
        if not leads():
            return []
        with self.showing("validation") as scene:
            folder, paths = self.workspace / "validation", []
            for one, name in each(scene):
                paths += results.validation(one, self.opt, folder / name, self.step, lambda: self.interrupts.terminate)
            return paths

    def _turntable(self) -> list[Path]:
        return self._results(results.turntable_videos)

    def test(self) -> list[Path]:
        """The turntable videos, or with --six_views six pictures, into results/."""
        with self.interrupts.watch(training=False):
            return self._results(results.six_pictures) if self.opt.six_views else self._turntable()

    def _results(self, make: Callable[..., list[Path]]) -> list[Path]:
        if not leads():
            return []
        with self.showing("video") as scene:
            folder, paths = self.workspace / "results", []
            for one, name in each(scene):
                paths += make(one, self.opt, folder / name, self.step)
            return paths

    def export_mesh(self) -> list[Path]:
        """The files that `--mesh_format` asks for, in mesh/; an empty list, with a line said, if the scene is empty."""
        from mesh.export import export

        formats = [name.strip().lower() for name in self.opt.mesh_format.split(",")]
        with self.interrupts.watch(training=False):
            with self.showing("mesh") as scene:
                paths = []
                for one, name in each(scene):
                    if name:
                        self.log(f"{name}:")
                    found = results.finished_mesh(one, self.opt, self.step, self.log)
                    if found is not None:
                        surface, measured = found
                        self.metrics.record(self.step, {f"{name}/{key}".strip("/"): v for key, v in measured.items()})
                        paths += export(surface, self.workspace / "mesh" / name, self.subject, formats)
                return paths

    def report(self) -> Path:
        """report.html, from what lies in the workspace; then say where everything is."""
        from nerf.report import write_report

        self._ready()
        with self.interrupts.watch(training=False), self._timed("report"):
            memory = torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None
            path = write_report(
                self.opt, self.workspace, self.step, self.metrics.history, self.times, self.device, memory
            )
        self.metrics.close()
        for line in results.places(self.workspace, self.step, self.opt.particles, path):
            self.log(line)
        self.log.keep("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.times.items()))
        return path


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0
