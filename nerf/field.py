"""What a radiance field is made of, whatever encodes its positions: density, albedo and normals from one small network."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd import grad
from torch.nn import functional as F

from nerf.renderer import NeRFRenderer

TAP = 0.01  # distance of the finite differences, world units


class _TruncatedExp(torch.autograd.Function):
    """exp(x) with the gradient exp(min(x, 15)): one dense sample cannot blow up a step. x > 40 counts as 40."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.exp(x.clamp(max=40))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return gradient * torch.exp(x.clamp(max=15))


trunc_exp = _TruncatedExp.apply


def density_blob(x: Float[Tensor, "M 3"], activation: str, height: float, radius: float) -> Float[Tensor, "M"]:
    """What is added to the raw density so that training starts with a ball at the origin and nearly nothing around it.

    exp       height (2 exp(-|x|^2 / (2 radius^2)) - 1): `height` in the middle, -`height` far away
    softplus  height max(1 - |x| / radius, -1)
    The published exp blob ends at 0 instead, a fog of density exp(0) = 1 that fills the box: small priors never get rid of it.
    The published softplus blob has no floor: far away its gradient vanishes, and nothing can grow there.
    """
    square = (x * x) @ x.new_ones(3)  # faster than a sum over three
    if activation == "exp":
        return height * (2 * torch.exp(square * (-0.5 / radius**2)) - 1)
    return height * (1 - torch.sqrt(square + 1e-8) / radius).clamp(
        min=-1
    )  # 1e-8: the root has no second derivative at 0


def mlp(width_in: int, hidden: int, width_out: int, layers: int) -> nn.Sequential:
    """`layers` linear layers with ReLU between them; the last bias starts at zero, so that the blob alone sets the start."""
    widths = [width_in, *[hidden] * (layers - 1), width_out]
    parts: list[nn.Module] = []
    for a, b in zip(widths, widths[1:], strict=False):
        parts += [nn.Linear(a, b), nn.ReLU(inplace=True)]
    nn.init.zeros_(parts[-2].bias)
    return nn.Sequential(*parts[:-1])


class Field(NeRFRenderer):
    """A field on an encoder and a trunk that turns features into the raw density and `channels` raw colours.

    sigma = act(raw + blob(x)) with act exp or softplus; albedo = sigmoid for 3 channels, else raw (latents).
    Normals point where the density falls fastest: n = -grad sigma / |grad sigma|, which is that of the raw density, by
    differentiation (`--normals analytic`) or six shifted evaluations (`finite`).
    """

    def __init__(self, opt: Any, channels: int, encoder: nn.Module, trunk: nn.Module):
        super().__init__(opt, channels)
        self.encoder, self.trunk = encoder, trunk
        self.max_level: float | None = None  # share of the encoder's levels in use; None is all of them
        self._progressive, self._levels, self._iters = opt.progressive_level, opt.max_level, opt.iters
        self._finite_normals = opt.normals == "finite"
        self._activation = opt.density_activation
        self._blob = (opt.blob_density, opt.blob_radius)

    def encode(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M F"]:
        raise NotImplementedError

    def query(
        self, x: Float[Tensor, "M 3"], normals: bool = False
    ) -> tuple[Float[Tensor, "M"], Float[Tensor, "M C"], Float[Tensor, "M 3"] | None]:
        """Density, albedo and, if asked for, unit normals."""
        if not normals:
            raw, hidden = self._raw(x)
            return self._sigma(raw), self._albedo(hidden), None
        with torch.autocast(x.device.type, enabled=False):  # a difference of half-precision numbers is noise
            x = x.float()
            if self._finite_normals:
                raw, hidden = self._raw(x)
                slope = self._finite_slope(x)
            else:
                learning = torch.is_grad_enabled()
                with torch.enable_grad():
                    x = x.detach().requires_grad_(True)
                    raw, hidden = self._raw(x)
                    slope = grad(raw, x, torch.ones_like(raw), create_graph=learning)[0]
                if not learning:
                    raw, hidden = raw.detach(), hidden.detach()
            return self._sigma(raw), self._albedo(hidden), _unit(-slope)

    def colour(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M C"], Float[Tensor, "M W"]]:
        """Albedo, and the features that it is made from, of points that are known to lie on a surface."""
        hidden = self.trunk[:-1](self.encode(x))
        return self._albedo(hidden), hidden

    def sigma(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M"]:
        """The density alone."""
        return self._sigma(self._raw(x)[0])

    def density(self, x: Float[Tensor, "N 3"]) -> dict[str, Tensor]:
        """`sigma` [N] (per world unit) and `albedo` [N, C] at points of the box."""
        sigma, albedo, _ = self.query(x)
        return {"sigma": sigma, "albedo": albedo}

    def normal(self, x: Float[Tensor, "N 3"]) -> Float[Tensor, "N 3"]:
        """Unit normals at points of the box, differentiable in the parameters unless gradients are off."""
        return self.query(x, normals=True)[2]

    def set_progress(self, ratio: float) -> None:
        """The share of the encoder's levels in use at ratio = step / iters: `--max_level`; with `--progressive_level` at most 0.25 + 2 ratio."""
        share = min(self._levels(round(ratio * self._iters)), 0.25 + 2 * ratio if self._progressive else 1.0)
        self.max_level = share if share < 1 else None

    def parameter_groups(self, lr: float) -> list[dict]:
        """Groups for an optimizer, all at lr: encoder, trunk, background (`--lr_scale` gives each its factor)."""
        groups = [{"name": "encoder", "params": list(self.encoder.parameters()), "lr": lr}]
        groups.append({"name": "trunk", "params": list(self.trunk.parameters()), "lr": lr})
        if self.background_network is not None:
            groups.append({"name": "background", "params": list(self.background_network.parameters()), "lr": lr})
        return [group for group in groups if group["params"]]

    def get_extra_state(self) -> Tensor:
        return torch.tensor(-1.0 if self.max_level is None else self.max_level)

    def set_extra_state(self, state: Tensor) -> None:
        self.max_level = None if float(state) < 0 else float(state)

    def _raw(self, x: Float[Tensor, "M 3"]) -> tuple[Float[Tensor, "M"], Float[Tensor, "M W"]]:
        """The raw density, blob included, and what the colours are made from."""
        hidden, last = self.trunk[:-1](self.encode(x)), self.trunk[-1]
        raw = F.linear(hidden, last.weight[:1], last.bias[:1]).float()[:, 0]
        return raw + density_blob(x, self._activation, *self._blob), hidden

    def _sigma(self, raw: Float[Tensor, "M"]) -> Float[Tensor, "M"]:
        return trunc_exp(raw) if self._activation == "exp" else F.softplus(raw)

    def _albedo(self, hidden: Float[Tensor, "M W"]) -> Float[Tensor, "M C"]:
        last = self.trunk[-1]
        colour = F.linear(hidden, last.weight[1:], last.bias[1:]).float()
        return torch.sigmoid(colour) if self.channels == 3 else colour

    def _finite_slope(self, x: Float[Tensor, "M 3"]) -> Float[Tensor, "M 3"]:
        """Central differences of the raw density; taps that would leave the box stop at its wall."""
        step = TAP * torch.eye(3, device=x.device)
        ahead = (x[:, None] + step).clamp(-self.bound, self.bound)
        behind = (x[:, None] - step).clamp(-self.bound, self.bound)
        raw, _ = self._raw(torch.stack([ahead, behind]).reshape(-1, 3))
        ahead_raw, behind_raw = raw.reshape(2, -1, 3)
        return (ahead_raw - behind_raw) / (ahead - behind).sum(-1)


def _unit(v: Float[Tensor, "M 3"]) -> Float[Tensor, "M 3"]:
    """v / |v|, and nearly zero instead of NaN where v vanishes."""
    return v * torch.rsqrt((v * v) @ v.new_ones(3, 1) + 1e-12)
