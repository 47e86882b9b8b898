"""The exponential moving average of a scene's parameters: what every result is rendered from."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class MovingAverage:
    """`average <- d average + (1 - d) parameter`, with d = min(decay, (1 + n) / (10 + n)) after n updates.

    The warm-up lets the average follow the fast first steps; without it a short run would show its initial fog. Decay 0 keeps the last values.
    Buffers (the occupancy grid) are not averaged.
    """

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.module, self.decay, self.updates = module, decay, 0
        self.names = [name for name, _ in module.named_parameters()]
        self.average = [p.detach().clone() for p in module.parameters()]

    @torch.no_grad()
    def update(self) -> None:
        """Take in the parameters as they are now."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.module.parameters()], 1 - decay)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the module has the averaged parameters; afterwards its own again."""
        parameters = [p.detach() for p in self.module.parameters()]
        own = [p.clone() for p in parameters]
        torch._foreach_copy_(parameters, self.average)
        try:
            yield
        finally:
            torch._foreach_copy_(parameters, own)

    def restart(self) -> None:
        """Forget the past: the average becomes the parameters as they are now."""
        self.updates = 0
        torch._foreach_copy_(self.average, [p.detach() for p in self.module.parameters()])

    def state_dict(self) -> dict[str, int | dict[str, Tensor]]:
        return {"updates": self.updates, "average": dict(zip(self.names, self.average, strict=True))}

    def load_state_dict(self, state: dict[str, int | dict[str, Tensor]]) -> None:
        self.updates = state["updates"]
        for name, average in zip(self.names, self.average, strict=True):
            average.copy_(state["average"][name])
