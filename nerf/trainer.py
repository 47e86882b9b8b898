"""The loop: cameras -> light and shading -> background -> render -> guidance and regularisers -> backward -> optimizer -> average.

It knows no method: the scene and the guidance meet here as tensors. Generators, one per purpose: `cameras` (cameras and lights), `shading`
(ambient, texture, background; both on the CPU) and `render` (jitter and occupancy, on the device); with several particles `particles` (whose
turn it is).
"""

import time
import zlib
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from errors import UserError
from files import make_folder
from nerf import checkpoint, media, results
from nerf.ema import MovingAverage
from nerf.guard import Guard
from nerf.interrupt import TERMINATED, Interrupts
from nerf.losses import regularise_gradients, regularisers
from nerf.metrics import Metrics
from nerf.particles import each
from nerf.progress import Bar, Log
from nerf.renderer import Render
from nerf.view import View, draw_view
from optimizer import build_optimizer, learning_rate_factor

AUTOSAVE = 600.0  # seconds between checkpoints when --eval_interval is longer


class Trainer:
    """Trains `scene` with `guidance` (None: only results are wanted) and writes results and report into `opt.workspace`."""

    def __init__(self, opt: Any, scene: Any, guidance: Any, device: torch.device | str) -> None:
        self.opt, self.guidance, self.device = opt, guidance, torch.device(device)
        self.scene = scene.to(self.device)
        self.workspace = make_folder(Path(opt.workspace))
        self.checkpoints = self.workspace / "checkpoints"
        self.log = Log(self.workspace / "log.txt")
        self.optimizer = build_optimizer(opt, self.scene.parameter_groups(opt.lr.max()))
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.rate_factor = learning_rate_factor(opt)
        # Of N particles each moves every N-th step: the average goes back over as many steps of its own.
        self.average = MovingAverage(self.scene, opt.ema_decay ** (1 / opt.particles))
        self.guard = Guard(self.scene, self.optimizer, self.average, self.log)
        self.half = bool(opt.fp16) and self.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.half)
        self.metrics = Metrics(self.workspace / "run")
        self.interrupts = Interrupts()
        places = {"cameras": "cpu", "shading": "cpu", "render": self.device}
        if opt.particles > 1:
            places["particles"] = "cpu"
        self.generators = {
            name: torch.Generator(place).manual_seed(zlib.crc32(f"{opt.seed} {name}".encode()))
            for name, place in places.items()
        }
        self.step = 0  # steps done
        self.times: dict[str, float] = {}  # seconds, by phase
        self._loaded = False

    # ---- the loop -----------------------------------------------------------------------------------------------------------

    def train(self) -> None:
        """Train to `opt.iters`, or until asked to stop; ends with a checkpoint and validation pictures.

        SystemExit 130 on the second Ctrl-C, 143 on SIGTERM (after a checkpoint).
        """
        self._ready()
        opt = self.opt
        if self.step >= opt.iters:
            self.log(
                f"this run is finished ({self.step} steps): going on to the results (more: --iters; anew: --ckpt scratch)"
            )
            return
        opt.save(self.workspace / "config.yaml")
        self.log.keep(f'"{opt.text}": step {self.step} to {opt.iters} on {self.device}')
        if opt.fp16 and not self.half:
            self.log("--fp16 needs a GPU: the scene stays in float32 on the CPU")
        self._saved_at = time.monotonic()
        first, before, validated = self.step, self.times.get("training", 0.0), -1
        with self.interrupts.watch(training=True):
            with self._timed("training"), Bar("training", opt.iters, self.step, lines=True) as bar:
                while self.step < opt.iters and not self.interrupts.stop and not self.guard.hopeless:
                    self._train_step()
                    if self.metrics.full:
                        self._look(bar)
                    if self.step == opt.iters or self.interrupts.stop:
                        break
                    if _due(opt.eval_interval, self.step):
                        self.save()
                        self.validate()
                        validated = self.step
                    elif time.monotonic() - self._saved_at > AUTOSAVE:
                        self.save()
                    if _due(opt.test_interval, self.step):
                        self._turntable()
            self.save(final=self.step >= opt.iters)
        if self.interrupts.terminate:
            self.log(f"terminated at step {self.step}: the same command goes on from there")
            self.metrics.close()
            raise SystemExit(TERMINATED)
        state = "interrupted" if self.step < opt.iters else "done"
        speed = (self.step - first) / max(self.times["training"] - before, 1e-9)
        self.log(
            f"training {state}: {self.step} of {opt.iters} steps, {speed:.1f} steps/s, {self.guard.skipped} skipped"
        )
        if validated != self.step:
            with self.interrupts.watch(training=False):
                self.validate()

    def _train_step(self) -> None:
        """One step. The device is waited for once, to learn whether the gradient is finite (as a gradient scaler would)."""
        opt, step = self.opt, self.step
        turn = self.scene.take_turn(self.generators["particles"]) if opt.particles > 1 else step
        self.scene.train()
        self.scene.set_progress(step / opt.iters)
        if opt.cuda_ray and turn % opt.update_extra_interval == 0:
            self.scene.update_occupancy(turn, self.generators["render"])
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * self.rate_factor(step) * self.guard.lr_factor
        self.optimizer.zero_grad(set_to_none=True)
        batches = [self._batch(step, first=i == 0) for i in range(opt.accumulate)]
        loss = torch.stack([loss.detach() for loss, _, _ in batches]).mean()  # not finite if one of them is not
        _, values, log = batches[-1]
        norms: dict[str, Tensor] = {}
        if any(loss.requires_grad for loss, _, _ in batches):  # not if no ray met anything
            self.scaler.unscale_(self.optimizer)
            norms = _gradient_norms(self.optimizer)
        values |= {"loss/total": loss, "lr": self.optimizer.param_groups[0]["lr"], **norms}
        self.step += 1
        if norms:
            self._update(loss, log, norms, step, values)
        self.average.update()
        self.metrics.add(self.step, values)

    def _batch(self, step: int, first: bool) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
        """Views drawn, rendered, judged, and their part of the gradient added: the loss, what the curves show, what the guidance says."""
        opt = self.opt
        network = getattr(self.scene, "background_network", None) is not None
        view = draw_view(opt, step, self.generators, self.scene.channels, network).to(self.device)
        with torch.autocast(self.device.type, torch.float16, enabled=self.half):
            render = self.scene.render(
                view.cameras,
                view.shading,
                view.light,
                view.ambient,
                view.background,
                step,
                self.generators["render"],
                normals=True if "normal" in self.guidance.wants else None,
            )
            image = torch.cat([render.image, render.alpha], -1) if view.with_mask else render.image
            image = _limit_gradient(image, opt.grad_clip_rgb, self.scaler)
            if first and opt.save_guidance and step % opt.save_guidance_interval == 0:
                self._save_guidance(image, view, render, step)
            guided, log = self.guidance(
                image,
                view.cameras.polar,
                view.cameras.azimuth,
                step,
                as_latent=view.as_latent,
                unit_range=view.with_mask or not view.as_latent,
                hints=_hints(render),
            )
            terms = {"guidance": opt.lambda_guidance(step) * guided, **regularisers(opt, step, self.scene, render)}
            loss = torch.stack([term.float() for term in terms.values()]).sum()
        if loss.requires_grad:
            self.scaler.scale(loss / opt.accumulate).backward()
        values: dict[str, Any] = {f"loss/{name}": term for name, term in terms.items()}
        values |= {f"guidance/{name}": value for name, value in log.items()}
        values |= {"alpha/mean": render.alpha, "alpha/largest": render.alpha.detach().amax()}
        return loss, {**values, "samples": float(render.num_samples)}, log

    def _update(self, loss: Tensor, log: dict, norms: dict[str, Tensor], step: int, values: dict[str, Any]) -> None:
        """Take the step if everything is finite; else skip it, and keep its values out of the curves."""
        opt = self.opt
        sound = torch.isfinite(loss) & (torch.as_tensor(log.get("nonfinite", 0), device=loss.device) == 0)
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

    def _look(self, bar: Bar) -> None:
        """Once per window of steps: read what was measured, show it, see whether the scene is well."""
        means = self.metrics.read()
        self.guard.inspect(self.step, means.get("alpha/largest"))
        shown = {"loss": "loss/total", "gradient": "guidance/grad_norm", "alpha": "alpha/mean"}
        bar.update(self.step, "  ".join(f"{k} {means[name]:.3g}" for k, name in shown.items() if name in means))

    def _save_guidance(self, image: Tensor, view: View, render: Render, step: int) -> None:
        cameras = view.cameras
        pictures = self.guidance.debug_images(
            image.detach(),
            cameras.polar,
            cameras.azimuth,
            step,
            view.as_latent,
            unit_range=view.with_mask or not view.as_latent,
            hints=_hints(render),
        )
        path = make_folder(self.workspace / "guidance") / f"step_{step:07d}.png"
        media.save_png(path, media.sheet(media.pixels(pictures), columns=1))

    # ---- checkpoints --------------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Everything that the future depends on."""
        state = {
            "text": self.opt.text,
            "step": self.step,
            "scene": dict(self.scene.state_dict()),
            "average": self.average.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "guard": self.guard.state_dict(),
            "metrics": self.metrics.state_dict(),
            "times": self.times,
            "generators": {name: generator.get_state() for name, generator in self.generators.items()},
            "torch_random": torch.get_rng_state(),
        }
        if self.device.type == "cuda":
            state["cuda_random"] = torch.cuda.get_rng_state(self.device)
        if self.guidance is not None:
            state["guidance"] = self.guidance.state()
        return state

    def save(self, final: bool = False) -> Path:
        """Write a checkpoint."""
        self._saved_at = time.monotonic()
        return checkpoint.save(self.checkpoints, self.state(), final)

    def load(self, ckpt: str | None = None) -> None:
        """Go on from `ckpt` (default `opt.ckpt`): 'latest' (nothing there: start at 0), 'scratch' or a file.

        UserError for a broken file, another prompt, or another scene; with --test also when there is none.
        """
        self._loaded = True
        found = checkpoint.choose(self.checkpoints, ckpt or self.opt.ckpt)
        if found is None:
            if self.guidance is None:
                raise UserError(f"{self.checkpoints}: no checkpoint to show: train first, or name one with --ckpt")
            return
        state, path = found
        checkpoint.check_prompt(state, path, self.opt.text)
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
            self.log(f"going on from {path.name} (step {self.step})")
        self.guard.snapshot()

    def _load_training(self, state: dict[str, Any], path: Path) -> None:
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except ValueError:
            raise UserError(f"{path}: made by another optimizer: give its --optim, or --ckpt scratch") from None
        if self.half and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name, generator in self.generators.items():
            _set_random(generator.set_state, state["generators"][name])
        torch.set_rng_state(state["torch_random"])
        if self.device.type == "cuda" and "cuda_random" in state:
            torch.cuda.set_rng_state(state["cuda_random"], self.device)
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
                        paths += export(surface, self.workspace / "mesh" / name, self.opt.text or "", formats)
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
        self._tell_where(path)
        self.log.keep("seconds: " + ", ".join(f"{name} {value:.1f}" for name, value in self.times.items()))
        return path

    def _tell_where(self, report: Path) -> None:
        """The last lines of a run: what lies where."""
        step = f"step_{self.step:07d}"
        places = {
            "report": [report],
            "video": sorted((self.workspace / "results").glob(f"{step}_*.mp4")),
            "particles": sorted((self.workspace / "results").glob("particle_*"))[: self.opt.particles - 1],
            "pictures": sorted((self.workspace / "results").glob(f"{step}_*.png"))[:1],
            "mesh": sorted((self.workspace / "mesh").glob("mesh.*")),
            "checkpoint": checkpoint.newest_first(self.checkpoints)[:1],
        }
        for name, paths in places.items():
            if paths:
                shown = [str(paths[0])] + [p.name for p in paths[1:]]
                self.log(f"{name + ':':<12}{', '.join(shown)}")


def _due(interval: int, step: int) -> bool:
    return interval > 0 and step % interval == 0


def _hints(render: Render) -> dict[str, Tensor]:
    """What the guidance may know of the pictures besides their colours, without gradients."""
    known = {"c2w": render.cameras.c2w, "alpha": render.alpha, "depth": render.depth, "normal": render.normal}
    return {name: value.detach().float() for name, value in known.items() if value is not None}


def _set_random(put: Any, state: Tensor) -> None:
    try:
        put(state)
    except RuntimeError:  # a checkpoint from another kind of device: its random numbers cannot go on there
        pass


def _limit_gradient(image: Tensor, limit: float, scaler: torch.amp.GradScaler) -> Tensor:
    """`--grad_clip_rgb`: every element of the gradient at the picture within +-limit, whatever the scaler's factor."""
    if limit >= 0 and image.requires_grad:
        bound = limit * scaler.get_scale()
        image.register_hook(lambda gradient: gradient.clamp(-bound, bound))
    return image


def _gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The norm of each parameter group's gradient and of all, by name, on the device; empty if there is no gradient at all."""
    norms = {}
    for i, group in enumerate(optimizer.param_groups):
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        if gradients:
            norms[f"grad_norm/{group.get('name', i)}"] = torch.linalg.vector_norm(
                torch.stack(torch._foreach_norm(gradients))
            )
    if norms:
        norms["grad_norm/all"] = torch.linalg.vector_norm(torch.stack(list(norms.values())))
    return norms
