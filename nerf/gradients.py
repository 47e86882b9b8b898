"""What the trainer does with gradients before the optimiser sees them."""

import torch
from torch import Tensor


def limit_gradient(image: Tensor, limit: float, scaler: torch.amp.GradScaler) -> Tensor:
    """`--grad_clip_rgb`: every element of the gradient at the picture within +-limit, whatever the scaler's factor."""
    if limit >= 0 and image.requires_grad:
        bound = limit * scaler.get_scale()
        image.register_hook(lambda gradient: gradient.clamp(-bound, bound))
    return image


def gradient_norms(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
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
