"""What one step learns from: views rendered and judged, by the prior or by the photographs that show them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from nerf.losses import regularisers
from nerf.photos import References, known_background, known_view
from nerf.reference_losses import reference_terms, wants_normals
from nerf.renderer import Render
from nerf.view import View, draw_view


@dataclass
class Batch:
    """Rendered views and the weighted terms of their loss, by name; `log`: what the guidance says of itself."""

    render: Render
    terms: dict[str, Tensor]
    log: dict[str, Tensor] = field(default_factory=dict)

    @cached_property
    def loss(self) -> Tensor:
        """All of them together; added up once."""
        return torch.stack([term.float() for term in self.terms.values()]).sum()

    @property
    def values(self) -> dict[str, Any]:
        """For the curves."""
        seen = {"alpha/mean": self.render.alpha, "alpha/largest": self.render.alpha.detach().amax()}
        values = {f"loss/{name}": term for name, term in self.terms.items()}
        values |= {f"guidance/{name}": value for name, value in self.log.items()}
        return {**values, **seen, "samples": float(self.render.num_samples)}


def judged(
    opt: Any,
    step: int,
    scene: Any,
    guidance: Any,
    generators: dict[str, torch.Generator],
    device: torch.device,
    bridle: Callable[[Tensor], Tensor],
    save: Callable[..., None] | None = None,
) -> Batch:
    """Random views, as the prior sees them. `bridle`: what the picture goes through before it is judged (its gradient on the way back);
    `save`: called with what the guidance is called with."""
    network = getattr(scene, "background_network", None) is not None
    view = draw_view(opt, step, generators, scene.channels, network).to(device)
    normals = True if "normal" in guidance.wants else None
    lit = (view.shading, view.light, view.ambient, view.background)
    render = scene.render(view.cameras, *lit, step, generators["render"], normals=normals)
    image = bridle(torch.cat([render.image, render.alpha], -1) if view.with_mask else render.image)
    seen, meaning = (view.cameras.polar, view.cameras.azimuth, step), _meaning(view, render)
    if save is not None:
        save(image.detach(), *seen, **meaning)
    guided, log = guidance(image, *seen, **meaning)
    return Batch(render, {"guidance": guided, **regularisers(opt, step, scene, render)}, log)


def known(
    opt: Any,
    step: int,
    scene: Any,
    references: References,
    generators: dict[str, torch.Generator],
    device: torch.device,
) -> Batch:
    """Views that there are photographs of, against these, in front of random colours."""
    shown, cameras = known_view(references, step, opt, generators["known"])
    shown = shown.to(device)
    background = known_background(shown, generators["known"])
    normals = wants_normals(opt, step, shown) or None
    albedo = ("albedo", None, 1.0, background)
    render = scene.render(cameras.to(device), *albedo, step, generators["render"], normals=normals)
    terms = reference_terms(opt, step, shown, render, background)
    return Batch(render, {**terms, **regularisers(opt, step, scene, render)} or {"none": render.alpha.sum() * 0})


def _meaning(view: View, render: Render) -> dict[str, Any]:
    """How the guidance is to read the picture, and what else it may know, without gradients."""
    known = {"c2w": render.cameras.c2w, "alpha": render.alpha, "depth": render.depth, "normal": render.normal}
    known["background"] = view.background  # None: what a network paints
    hints = {name: value.detach().float() for name, value in known.items() if value is not None}
    return {"as_latent": view.as_latent, "unit_range": view.with_mask or not view.as_latent, "hints": hints}
