"""What the training scripts share: progress lines, whole files, and a number for picture quality."""

import json
import math
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor


class Progress:
    """Prints the running mean of a loss and the time left, about every ten seconds; `minutes`: it ends after these, not after `steps`."""

    def __init__(self, name: str, steps: int, minutes: float | None = None, interval: float = 10.0) -> None:
        self.name, self.steps, self.minutes, self.interval = name, steps, minutes, interval
        self.step = self.count = 0
        self.total = 0.0
        self.start = self.last = time.time()

    def update(self, value: Tensor) -> None:
        """Count one step; `value` is its loss."""
        self.step += 1
        self.count += 1
        self.total += value.item()
        now = time.time()
        if now - self.last > self.interval or self.step == self.steps:
            pace = (now - self.last) / self.count
            whole, left = f"/{self.steps}", int(pace * (self.steps - self.step))
            if self.minutes:
                whole, left = "", max(0, int(self.start + 60 * self.minutes - now))
            print(
                f"{self.name} {self.step}{whole}  loss {self.total / self.count:.4f}  {pace:.3f} s a step"
                f"  {left // 60}:{left % 60:02d} left",
                flush=True,
            )
            self.last, self.count, self.total = now, 0, 0.0


def save_state(file: Path, state: dict[str, Tensor], facts: dict[str, float]) -> None:
    """Write tensors to `file` and facts beside it as JSON; files appear whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    torch.save(state, partial)
    partial.replace(file)
    file.with_suffix(".json").write_text(json.dumps(facts, indent=2) + "\n")


def load_state(file: Path) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What `save_state` wrote."""
    return torch.load(file, weights_only=True), json.loads(file.with_suffix(".json").read_text())


def psnr(a: Tensor, b: Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in dB."""
    return (10 * torch.log10(peak**2 / (a - b).square().mean())).item()


class Average:
    """Exponential moving average of a module's parameters, with a warm-up so that early steps are forgotten quickly."""

    def __init__(self, module: torch.nn.Module, decay: float = 0.999) -> None:
        self.decay, self.step = decay, 0
        self.values = {name: p.detach().clone() for name, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: torch.nn.Module, every: int = 1) -> None:
        """Move towards the module; call once in `every` steps."""
        self.step += every
        keep = min(self.decay, (1 + self.step) / (10 + self.step)) ** every
        torch._foreach_lerp_(list(self.values.values()), [p.detach() for p in module.parameters()], 1 - keep)


def descend(
    name: str,
    optimizer: torch.optim.Optimizer,
    loss: Callable[[], Tensor],
    steps: int,
    *,
    minutes: float | None = None,
    warm: int = 200,
    after: Callable[[int], None] = lambda step: None,
) -> int:
    """Go down a loss, for `steps` steps or for `minutes` instead -> the steps done.

    The learning rates of the optimizer's groups rise over `warm` steps and fall by half a cosine to 1 %. Gradients are clipped to a norm
    of 1. after: called with the number of steps done.
    """
    progress, step = Progress(name, steps, minutes), 0
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    peaks = [group["lr"] for group in optimizer.param_groups]

    def done() -> float:
        return (time.time() - progress.start) / (60 * minutes) if minutes else step / steps

    while (ratio := done()) < 1:
        fall = min(1.0, (step + 1) / warm) * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * ratio)))
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * fall
        value = loss()
        optimizer.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        after(step)
        progress.update(value.detach())
    print(f"{name}: {step} steps in {(time.time() - progress.start) / 60:.1f} minutes", flush=True)
    return step


class Keeper:
    """Averages a model's weights as it is trained, and writes them every five minutes: a STATE file to go on from, and what `save` makes
    of them."""

    def __init__(self, model: torch.nn.Module, file: Path, save: Callable[[dict[str, Tensor]], None]) -> None:
        self.model, self.file, self.save = model, file, save
        self.average, self.start = Average(model), time.time()
        self.kept = self.start

    def __call__(self, step: int) -> None:
        """After each step."""
        if step % 4 == 0:
            self.average.update(self.model, every=4)
        if time.time() - self.kept > 300:
            self.keep(step)

    def keep(self, step: int) -> None:
        """Write now."""
        weights = {**self.model.state_dict(), **self.average.values}
        save_state(self.file, weights, {"steps": step, "seconds": time.time() - self.start})
        self.save(weights)
        self.kept = time.time()
