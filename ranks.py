"""Several processes that train one scene (`torchrun main.py ...`): each sees other views of one larger batch, and their gradients are averaged.

Every process draws the random numbers of the whole batch, from the same generators, and takes its own rows: N processes do what one does with
N times the batch. Alone (no torchrun) everything here does nothing.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from errors import leads

PATIENCE = timedelta(hours=2)  # that the others wait while the first one writes pictures


def launched() -> bool:
    """Whether torchrun started this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def local_rank() -> int:
    """The number of this process on its machine: which GPU is its own."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def count() -> int:
    """How many processes train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextmanager
def together() -> Iterator[None]:
    """Inside the block the processes that torchrun started can talk: over nccl between GPUs, over gloo between main memories."""
    if not launched():
        yield
        return
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def first_before_others() -> Iterator[None]:
    """The first process goes through the block, then the others do."""
    if count() > 1 and not leads():
        dist.barrier()
    yield
    if count() > 1 and leads():
        dist.barrier()


def mine(draw: Callable[[int], Tensor], rows: int) -> Tensor:
    """This process's `rows` rows of `draw(total)`, the random numbers of the whole batch."""
    if count() == 1:
        return draw(rows)
    first = dist.get_rank() * rows
    return draw(rows * count())[first : first + rows]


def part(rows: int) -> slice:
    """The same rows as a slice, of a whole batch of `rows` times as many processes."""
    first = dist.get_rank() * rows if count() > 1 else 0
    return slice(first, first + rows)


def average_gradients(parameters: Sequence[torch.nn.Parameter]) -> None:
    """Put the mean over the processes into every gradient. Where some processes have none it counts as 0; where none has, there stays none."""
    if count() == 1:
        return
    here = torch.tensor([float(p.grad is not None) for p in parameters], device=parameters[0].device)
    dist.all_reduce(here, dist.ReduceOp.MAX)
    some = [p for p, known in zip(parameters, here.tolist(), strict=True) if known]
    for p in some:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    if some:
        flat = torch.cat([p.grad.reshape(-1) for p in some])
        dist.all_reduce(flat)
        flat /= count()
        for p, mean in zip(some, flat.split([p.numel() for p in some]), strict=True):
            p.grad.copy_(mean.view_as(p))


def mean(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes; where one is not finite, neither is the mean."""
    if count() > 1:
        value = value.detach().clone()
        dist.all_reduce(value)
        value /= count()
    return value


def largest(values: Sequence[float]) -> list[float]:
    """Of each number the largest that any process has."""
    if count() == 1:
        return list(values)
    table = torch.tensor(values, dtype=torch.float64)
    dist.all_reduce(table, dist.ReduceOp.MAX)
    return table.tolist()


def share(tensors: Sequence[Tensor]) -> None:
    """Put the first process's values into everybody's."""
    if count() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)
