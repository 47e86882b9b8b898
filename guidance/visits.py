"""Weights that live in main memory and visit the GPU: `--offload`.

They are frozen, so a visit is one copy, from memory that the GPU can fetch by itself, and its end is none.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Visit:
    """Frozen weights that are on the device from `come` to `leave`. What is trained stays on the device."""

    def __init__(self, parameters: Iterable[nn.Parameter], device: torch.device):
        self.device, self.here = device, False
        self.homes = [(parameter, _home(parameter.detach())) for parameter in parameters if not parameter.requires_grad]
        self.leave()

    def come(self, *_: Any) -> None:
        """Fetches them, if they are not there."""
        if not self.here:
            for parameter, home in self.homes:
                parameter.data = home.to(self.device, copy=True, non_blocking=True)
            self.here = True

    def leave(self, *_: Any) -> None:
        """Drops the copies."""
        for parameter, home in self.homes:
            parameter.data = home
        self.here = False


def visit_by_layer(networks: Iterable[nn.Module], device: torch.device) -> list[Visit]:
    """Every module that owns weights fetches them when it is called and drops them when it is done; no backward pass is possible."""
    visits = []
    for network in networks:
        for module in network.modules():
            own = list(module.parameters(recurse=False))
            if own:
                visits.append(Visit(own, device))
                module.register_forward_pre_hook(visits[-1].come)
                module.register_forward_hook(visits[-1].leave, always_call=True)
    return visits


def visit_as_a_whole(networks: Iterable[nn.Module], prior) -> list[Visit]:
    """A network comes when it is called. All leave when the prior encodes a picture, and when a gradient comes back to what it was
    encoded to: the encoder needs the room. In between they may be asked many times, and have a backward pass of their own."""
    visits = []
    for network in networks:
        visits.append(Visit(network.parameters(), prior.device))
        network.register_forward_pre_hook(visits[-1].come)
    inner = prior.encode

    def leave(*_: Any) -> None:
        for visit in visits:
            visit.leave()

    def encode(image: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        leave()
        latents = inner(image, generator)
        if latents.requires_grad:
            latents.register_hook(leave)
        return latents

    prior.encode = encode
    return visits


def _home(tensor: torch.Tensor) -> torch.Tensor:
    """In main memory, where the GPU can fetch it by itself if the system allows that."""
    tensor = tensor.to("cpu")
    if not torch.cuda.is_available():
        return tensor
    try:
        return tensor.pin_memory()
    except RuntimeError:  # a limit on such memory: slower, and right all the same
        return tensor
