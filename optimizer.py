"""Optimisers for a scene: Adan, Adam and its kin over parameter groups, and the learning rate as a function of the step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from errors import UserError

GROUPS = ("encoder", "trunk", "background", "material", "geometry", "beta")  # parts of a scene with a rate of their own
ADAN_FACTOR = 5.0  # Adan takes larger steps than Adam: one --lr serves both


class Adan(Optimizer):
    """Adan (Xie et al. 2022): Adam with Nesterov momentum, estimated from the difference of successive gradients.

    With gradient g_k, difference d_k = g_k - g_{k-1} (d_1 = 0) and step number k counted from 1:

        m_k = b1 m_{k-1} + (1 - b1) g_k
        v_k = b2 v_{k-1} + (1 - b2) d_k
        n_k = b3 n_{k-1} + (1 - b3) (g_k + b2 d_k)^2
        p  <- (p - lr (m_k / (1 - b1^k) + b2 v_k / (1 - b2^k)) / (sqrt(n_k / (1 - b3^k)) + eps)) / (1 + lr weight_decay)

    Before that all gradients together are scaled down to the norm `max_grad_norm`, if it is above 0; the norm stays on the device, so that
    a step waits for nothing. A gradient that is not finite spoils the step: the caller looks at the gradients first.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float, float] = (0.98, 0.92, 0.99),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_grad_norm: float = 0.0,
    ):
        """`params`: tensors or groups of them. Raises ValueError for numbers out of range."""
        if not all(0 <= beta < 1 for beta in betas):
            raise ValueError(f"betas must be in [0, 1): {betas}")
        if min(lr, eps, weight_decay, max_grad_norm) < 0:
            raise ValueError("lr, eps, weight_decay and max_grad_norm must not be negative")
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "max_grad_norm": max_grad_norm}
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step with the gradients that the parameters hold; parameters without one stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = [(group, [p for p in group["params"] if p.grad is not None]) for group in self.param_groups]
        grads = [p.grad for _, params in groups for p in params]
        if not grads:
            return loss
        scales = _clip_scales(grads, self.defaults["max_grad_norm"], self.defaults["eps"])
        for group, params in groups:
            # Parameters that got their first gradient later than others are at another k.
            for k in sorted({self._count(p) for p in params}):
                self._update(group, [p for p in params if self.state[p]["step"] == k], scales)
        return loss

    def _count(self, p: Tensor) -> int:
        """Advance the step number of one parameter, with fresh state at its first gradient."""
        state = self.state[p]
        if not state:
            state["step"] = 0
            for name in ("mean", "mean_difference", "mean_square"):
                state[name] = torch.zeros_like(p, memory_format=torch.preserve_format)
        state["step"] += 1
        return state["step"]

    def _update(self, group: dict, params: list[Tensor], scales: dict[torch.device, Tensor] | None) -> None:
        b1, b2, b3 = group["betas"]
        lr, states = group["lr"], [self.state[p] for p in params]
        k = states[0]["step"]
        if scales is None:
            grads = [p.grad.clone() for p in params]  # kept as the previous gradient; .grad will be overwritten
        else:
            grads = [p.grad * scales[p.device] for p in params]
        previous = [state.get("previous_gradient", grad) for state, grad in zip(states, grads, strict=True)]
        mean = [state["mean"] for state in states]
        mean_difference = [state["mean_difference"] for state in states]
        mean_square = [state["mean_square"] for state in states]

        difference = torch._foreach_sub(grads, previous)
        torch._foreach_lerp_(mean, grads, 1 - b1)
        torch._foreach_lerp_(mean_difference, difference, 1 - b2)
        torch._foreach_mul_(difference, b2)
        torch._foreach_add_(difference, grads)
        torch._foreach_mul_(mean_square, b3)
        torch._foreach_addcmul_(mean_square, difference, difference, 1 - b3)

        denominator = torch._foreach_div(mean_square, 1 - b3**k)
        torch._foreach_sqrt_(denominator)
        torch._foreach_add_(denominator, group["eps"])
        torch._foreach_addcdiv_(params, mean, denominator, -lr / (1 - b1**k))
        torch._foreach_addcdiv_(params, mean_difference, denominator, -lr * b2 / (1 - b2**k))
        if group["weight_decay"]:
            torch._foreach_div_(params, 1 + lr * group["weight_decay"])
        for state, grad in zip(states, grads, strict=True):
            state["previous_gradient"] = grad


def _clip_scales(grads: list[Tensor], limit: float, eps: float) -> dict[torch.device, Tensor] | None:
    """min(1, limit / |all gradients|), a scalar on each device; None without a limit."""
    if limit <= 0:
        return None
    norms = [norm.to(grads[0].device) for norm in torch._foreach_norm(grads)]
    scale = (limit / (torch.linalg.vector_norm(torch.stack(norms)) + eps)).clamp(max=1.0)
    return {device: scale.to(device) for device in {grad.device for grad in grads}}


def rate_factors(text: str) -> dict[str, float]:
    """`encoder=10,trunk=1` as factors by name; UserError naming --lr_scale for anything else."""
    found = {}
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        name, _, value = part.partition("=")
        try:
            found[name.strip()] = float(value)
        except ValueError:
            raise UserError(f"--lr_scale {text}: write it as encoder=10,trunk=1") from None
        if name.strip() not in GROUPS or not 0 <= found[name.strip()] < float("inf"):
            raise UserError(f"--lr_scale {text}: factors of 0 or more for {', '.join(GROUPS)}")
    return found


def build_optimizer(opt, groups: list[dict]) -> Optimizer:
    """The optimiser that `--optim` names, over groups whose rates were made for Adam: `scene.parameter_groups(opt.lr.max())`.

    Each group's rate is multiplied by the factor that `--lr_scale` gives its name. Adan gets five times those rates, decay 2e-5
    and a gradient norm of at most 5; the step's factor is `learning_rate_factor`.
    """
    factors = rate_factors(opt.lr_scale)
    groups = [{**group, "lr": group.get("lr", opt.lr.max()) * factors.get(group.get("name"), 1.0)} for group in groups]
    if opt.optim == "adamax":
        return torch.optim.Adamax(groups, lr=opt.lr.max(), betas=(0.9, 0.99), eps=1e-15)
    if opt.optim != "adan":
        # Fused: one pass over each table instead of eight, on a CPU too.
        kind = torch.optim.AdamW if opt.optim == "adamw" else torch.optim.Adam
        return kind(groups, lr=opt.lr.max(), betas=(0.9, 0.99), eps=1e-15, fused=True)
    raised = [{**group, "lr": ADAN_FACTOR * group.get("lr", opt.lr.max())} for group in groups]
    return Adan(raised, lr=ADAN_FACTOR * opt.lr.max(), weight_decay=2e-5, max_grad_norm=5.0)


def learning_rate_factor(opt) -> Callable[[int], float]:
    """The factor on every group's rate at a step: the schedule `--lr` over its maximum, times 0.1^(step / iters) for the plain network.

    Made for `torch.optim.lr_scheduler.LambdaLR`.
    """
    top = opt.lr.max() or 1.0
    decay = 0.1 if opt.backbone == "vanilla" else 1.0
    return lambda step: opt.lr(step) / top * decay ** (step / opt.iters)
