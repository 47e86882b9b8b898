"""Several scenes trained together: samples of one distribution of answers to the prompt instead of a single one.

Each has its own initial weights; a step renders and updates one of them, drawn at random; the guidance is shared, and with it what an
adaptation learns of all their pictures (VSD's particles: Wang et al. 2023, ProlificDreamer, algorithm 1). `opt.iters` counts all steps.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class Particles(nn.Module):
    """To the trainer one scene: whatever is asked of it is asked of the active one, but what concerns all (parameters, progress).

    Only the active one gets gradients; the optimiser leaves parameters without one alone, their moments included.
    Attributes: `active`, its number; `turns`, the steps that each has had (an occupancy grid follows the steps of its own scene).
    """

    def __init__(self, scenes: Sequence[nn.Module]):
        super().__init__()
        self.scenes = nn.ModuleList(scenes)
        self.turns = [0] * len(scenes)
        self.active = 0

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "scenes":  # not there yet
                raise
            return getattr(self.scenes[self.active], name)

    def take_turn(self, generator: torch.Generator) -> int:
        """Draws the scene that is active from now on, each as likely as the others; returns how many steps it had before this one."""
        self.active = int(torch.randint(len(self.scenes), (), generator=generator))
        self.turns[self.active] += 1
        return self.turns[self.active] - 1

    def set_progress(self, ratio: float) -> None:
        """Of the whole run, for all."""
        for scene in self.scenes:
            scene.set_progress(ratio)

    def reset_occupancy(self) -> None:
        """Of all."""
        for scene in self.scenes:
            scene.reset_occupancy()

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """A scene's groups, each with the parameters of all."""
        groups, *others = (scene.parameter_groups(lr) for scene in self.scenes)
        for other in others:
            for group, more in zip(groups, other, strict=True):
                group["params"] = [*group["params"], *more["params"]]
        return groups

    def get_extra_state(self) -> Tensor:
        return torch.tensor(self.turns)

    def set_extra_state(self, state: Tensor) -> None:
        self.turns = state.tolist()


def each(scene: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """What there is to show: every scene, and the folder for its results, below the usual one for all but the first."""
    scenes = scene.scenes if isinstance(scene, Particles) else [scene]
    for number, one in enumerate(scenes, 1):
        yield one, "" if number == 1 else f"particle_{number}"
