"""How a render of a known view must look: like the photograph.

Weights follow the step; 0 means that nothing is computed. All losses are means, over pixels and then over views, as in the systems that the
published weights come from:

| | rgb | mask | depth | normal |
|---|---|---|---|---|
| stable-dreamfusion | 1000 | 500 | 10 | 0 |
| threestudio zero123 | 500 | 50 | 0 | 0 |
| threestudio stable-zero123 | [100, 500, 1000, 400] | 50 | 0 | 0 |
| threestudio magic123 | 1000 | 100 (cross entropy) | | |
| threestudio image-condition | 10 | 1 | [0, 0, 1, 10000] | 0 |

Depth and normal count times min(1, step / iters), as in stable-dreamfusion: they are guesses of another network.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional as F

from nerf.photos import References
from nerf.renderer import Render

PAIRS = 4096  # drawn per view for the ranking
RANK_MARGIN = 1e-4  # by which the farther point must be farther, world units
CLEAR = 0.02  # depths of the photograph that differ by less, as a share of their range, are not ranked


def rgb_loss(references: References, render: Render, background: Float[Tensor, "*any"]) -> Float[Tensor, ""]:
    """mean (I - (m C + (1 - m) b))^2 over what the photograph shows and the channels: render I, photograph C, mask m in [0, 1], and b the
    very background of this render ([3], [N, 3] or [N, H, W, 3])."""
    behind = background[:, None, None] if background.dim() == 2 else background
    target = references.rgb * references.mask + behind * (1 - references.mask)
    return _mean((render.image - target).square().mean(-1, keepdim=True), references.seen)


def mask_loss(references: References, render: Render) -> Float[Tensor, ""]:
    """mean (alpha - m)^2 over what the photograph shows."""
    return _mean((render.alpha - references.mask).square(), references.seen)


def depth_loss(references: References, render: Render) -> Float[Tensor, ""]:
    """1 - Pearson's correlation of the two depths within the mask, mean over the views: whatever scale and shift a guessed depth has
    (threestudio calls it the relative depth loss). 0 where either is flat."""
    return _per_view(references, render, _uncorrelated)


def depth_rank_loss(references: References, render: Render) -> Float[Tensor, ""]:
    """mean max(0, z_near - z_far + 1e-4) over random pairs of pixels within the mask, `near` being nearer in the photograph's depth: only
    the order counts, not even a linear relation (Wang et al. 2023, SparseNeRF, equation 5)."""
    return _per_view(references, render, lambda known, z: _disordered(known, z, render.generator))


def normal_loss(references: References, render: Render) -> Float[Tensor, ""]:
    """mean (1 - n . R^T n') within the mask: the photograph's normal n in its camera's frame (x right, y up, z towards the viewer), the
    render's n' in the world, turned into that frame by the camera's rotation R."""
    turn = render.cameras.c2w[:, :3, :3].to(render.normal)
    local = F.normalize(torch.einsum("bhwi,bij->bhwj", render.normal, turn), dim=-1)
    cosine = (local * references.normal).sum(-1, keepdim=True)
    return _mean(1 - cosine, references.mask * references.seen * (render.alpha.detach() > 0.5))


def wants_normals(opt: Any, step: int, references: References) -> bool:
    """Whether a known view of this step must be rendered with normals for these losses."""
    return references.normal is not None and opt.lambda_normal(step) > 0


def reference_terms(
    opt: Any, step: int, references: References, render: Render, background: Float[Tensor, "*any"]
) -> dict[str, Float[Tensor, ""]]:
    """The weighted losses active at this step, by name. `references`: the views that were rendered, at the render's size; `background`:
    what is behind the scene in the render. Losses on what the photographs or the render lack are left out."""
    ramp = min(1.0, step / opt.iters)
    depth, normal = references.depth is not None, references.normal is not None and render.normal is not None
    table = {
        "rgb": (opt.lambda_rgb(step), True, lambda: rgb_loss(references, render, background)),
        "mask": (opt.lambda_mask(step), True, lambda: mask_loss(references, render)),
        "depth": (ramp * opt.lambda_depth(step), depth, lambda: depth_loss(references, render)),
        "depth_rank": (ramp * opt.lambda_depth_rank(step), depth, lambda: depth_rank_loss(references, render)),
        "normal": (ramp * opt.lambda_normal(step), normal, lambda: normal_loss(references, render)),
    }
    return {name: weight * loss() for name, (weight, possible, loss) in table.items() if possible and weight > 0}


def axial_depth(render: Render) -> Float[Tensor, "B H W 1"]:
    """Distance along the optical axis of what a render shows: its mean distance along the ray times the ray's cosine."""
    _, directions = render.cameras.rays()
    cosine = -(directions * render.cameras.c2w[:, None, None, :3, 2]).sum(-1, keepdim=True)
    return render.depth / render.alpha.clamp(min=1e-3) * cosine.to(render.depth)


def _per_view(references: References, render: Render, loss: Any) -> Float[Tensor, ""]:
    """The mean over the views of `loss(known depths, rendered depths)` at the pixels that both show."""
    z = axial_depth(render)
    both = (references.mask * references.seen > 0.5) & (render.alpha.detach() > 0.5)
    losses = [loss(references.depth[i][both[i]], z[i][both[i]]) for i in range(len(references)) if _enough(both[i])]
    return torch.stack(losses).sum() / len(references) if losses else 0 * render.depth.sum()


def _enough(inside: Bool[Tensor, "H W 1"]) -> bool:
    return int(inside.sum()) > 2


def _uncorrelated(known: Float[Tensor, "M"], z: Float[Tensor, "M"]) -> Float[Tensor, ""]:
    a, b = known - known.mean(), z - z.mean()
    flat = (a.norm() < 1e-4 * known.norm()) | (b.detach().norm() < 1e-6)
    return torch.where(
        flat, 0 * b.sum(), 1 - (a * b).sum() / (a.norm() * (b.square().sum() + 1e-12).sqrt()).clamp(1e-9)
    )


def _disordered(known: Float[Tensor, "M"], z: Float[Tensor, "M"], generator: Any) -> Float[Tensor, ""]:
    source = generator.device if generator is not None else known.device
    pairs = torch.randint(len(known), (2, PAIRS), generator=generator, device=source).to(known.device)
    gap = known[pairs[0]] - known[pairs[1]]  # > 0: the first is farther
    clear = gap.abs() > CLEAR * (known.amax() - known.amin())
    wrong = (RANK_MARGIN - torch.sign(gap) * (z[pairs[0]] - z[pairs[1]])).clamp(min=0)
    return (wrong * clear).sum() / clear.sum().clamp(min=1)


def _mean(values: Float[Tensor, "N H W 1"], weight: Float[Tensor, "N H W 1"]) -> Float[Tensor, ""]:
    """Weighted mean over all pixels; 0 where nothing counts."""
    return (values * weight).sum() / weight.sum().clamp(min=1e-6)
