"""What the training scripts share: progress lines, whole files, and a number for picture quality."""

import json
import time
from pathlib import Path

import torch
from torch import Tensor


class Progress:
    """Prints the running mean of a loss and the time left, about every ten seconds."""

    def __init__(self, name: str, steps: int, interval: float = 10.0) -> None:
        self.name, self.steps, self.interval = name, steps, interval
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
            left = int(pace * (self.steps - self.step))
            print(
                f"{self.name} {self.step}/{self.steps}  loss {self.total / self.count:.4f}  {pace:.3f} s a step"
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
