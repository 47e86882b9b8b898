"""What a scene should look like whatever the prompt: one function per regulariser, and which of them are active.

Weights follow the step (`opt.lambda_x(step)`); 0 means that nothing is computed.
"""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from gridencoder import VARIATION_REFERENCE, VARIATION_SAMPLES
from mesh.losses import eikonal, laplacian, normal_consistency
from nerf.probes import probes
from nerf.renderer import Render
from nerf.sampling import ray_of_sample

SHIFT = 0.01  # standard deviation of the step to the neighbour whose normal should agree, world units


def entropy(render: Render) -> Float[Tensor, ""]:
    """Samples are either all or nothing: mean_i of the binary entropy, in bits, of the compositing weight w_i.

    Per sample, like stable-dreamfusion, not per pixel; w is kept within 1e-5 of 0 and 1. Samples behind opaque ones are
    not in the mean: the marcher has dropped them.
    """
    w = render.weights.clamp(1e-5, 1 - 1e-5)
    return _mean(-w * torch.log2(w) - (1 - w) * torch.log2(1 - w))


def opacity(render: Render) -> Float[Tensor, ""]:
    """Little of the picture is covered: mean over the pixels of alpha^2."""
    return (render.alpha**2).mean()


def sparsity(render: Render) -> Float[Tensor, ""]:
    """The same with a gradient where nothing is yet: mean over the pixels of sqrt(alpha^2 + 0.01) (threestudio)."""
    return (render.alpha**2 + 0.01).sqrt().mean()


def opaque(render: Render) -> Float[Tensor, ""]:
    """Pixels are either covered or not: mean binary entropy of alpha, in nats, alpha kept within 1e-3 of 0 and 1."""
    p = render.alpha.clamp(1e-3, 1 - 1e-3)
    return (-p * p.log() - (1 - p) * (1 - p).log()).mean()


def emptiness(render: Render) -> Float[Tensor, ""]:
    """Most samples are empty: mean_i log(1 + 10 w_i) (Score Jacobian Chaining, Wang et al. 2023, section 5)."""
    return _mean(torch.log1p(10 * render.weights))


def convexity(render: Render, cells: int = 8) -> Float[Tensor, ""]:
    """The picture of the normals bulges towards the viewer: minus the mean of what left x right has upward and what above x below has to
    the right, over neighbouring cells.

    The picture is averaged to `cells` x `cells` in the camera's frame, where a sphere's normals turn from left to right (SDI, Lukoianov et al. 2024,
    as threestudio has it, who crosses them in the world's frame).
    """
    turn = render.cameras.c2w[:, :3, :3].to(render.normal)
    local = torch.einsum("bhwi,bij->bjhw", render.normal, turn)
    n = F.interpolate(local, (cells, cells), mode="bilinear", antialias=True).permute(0, 2, 3, 1)
    across = torch.linalg.cross(n[:, :, :-1], n[:, :, 1:])[..., 1]
    down = torch.linalg.cross(n[:, :-1], n[:, 1:])[..., 0]
    return -(across.mean() + down.mean())


def orientation(render: Render) -> Float[Tensor, ""]:
    """Visible surfaces face the camera: mean_i of w_i max(0, n_i . d_i)^2, w without gradient, d the ray's direction."""
    away = (render.normals * render.directions).sum(-1).clamp(min=0)
    return _mean(render.weights.detach() * away**2)


def normal_smooth_2d(render: Render) -> Float[Tensor, ""]:
    """The picture of the normals is smooth: mean squared difference of neighbouring pixels of sum_i w_i (n_i + 1) / 2.

    The weights carry no gradient, so that the outline is not asked to vanish. Down plus across.
    """
    picture = _pixels(render, render.weights.detach()[:, None] * (render.normals + 1) / 2)
    return (picture[:, 1:] - picture[:, :-1]).square().mean() + (picture[:, :, 1:] - picture[:, :, :-1]).square().mean()


def normal_smooth_3d(render: Render, scene: nn.Module) -> Float[Tensor, ""]:
    """Normals of neighbouring points agree: mean |n(x) - n(x + e)| over samples and axes, e Gaussian, 0.01 world units."""
    x, generator = render.positions, render.generator
    source = generator.device if generator is not None else x.device
    shift = SHIFT * torch.randn(x.shape, generator=generator, device=source).to(x.device)
    there = scene.normal((x + shift).clamp(-scene.bound, scene.bound))
    return _mean((render.normals - there).abs().mean(-1))


def center_of_mass(render: Render) -> Float[Tensor, ""]:
    """The object does not drift away: squared distance of the visible mass's centre from the line camera - origin.

    centre = sum_i w_i x_i / sum_i w_i per view; mean over the views. Across the view only: along it, the centre of what is
    seen lies in front of the object's, and pulling on it would hollow the object. All views together fix all directions.
    """
    moments = torch.cat([render.positions, torch.ones_like(render.positions[:, :1])], -1)
    moments = _pixels(render, render.weights[:, None] * moments).sum((1, 2))
    centre = moments[:, :3] / moments[:, 3:].clamp(min=1e-3)
    axis = F.normalize(render.cameras.position, dim=-1)
    across = centre - (centre * axis).sum(-1, keepdim=True) * axis
    return (across**2).sum(-1).mean()


def z_variance(render: Render) -> Float[Tensor, ""]:
    """Along a ray the surface is thin: sum_i v_i (z_i - mean z)^2 with v_i = w_i / sum w, mean over the rays that are more than half
    covered (HiFA, Zhu et al. 2024, equation 8; with normalised weights, else emptying the ray would do)."""
    ray = ray_of_sample(render.rays, len(render.weights))
    total = render.alpha.reshape(-1)
    share = render.weights / total.clamp(min=1e-5)[ray]
    z = (render.positions * render.directions).sum(
        -1
    )  # from the camera up to a constant of the ray, which no variance sees
    mean = torch.zeros_like(total).index_add(0, ray, share * z)
    variance = torch.zeros_like(total).index_add(0, ray, share * (z - mean[ray]) ** 2)
    covered = (total.detach() > 0.5).float()
    return (variance * covered).sum() / covered.sum().clamp(min=1)


def regularisers(opt: Any, step: int, scene: nn.Module, render: Render) -> dict[str, Float[Tensor, ""]]:
    """The weighted losses that are active at this step, by name; add them to the guidance's.

    Losses on normals are left out where the render has none (it computes them whenever one of these losses is active), losses on the samples of
    rays where it is a mesh's, losses on triangles where it is not.
    """
    seen, rays, drawn = render.normals is not None, render.weights is not None, render.surface is not None
    guide = getattr(scene, "guide_shape", None)
    table = {
        "entropy": (opt.lambda_entropy, rays, entropy),
        "opacity": (opt.lambda_opacity, True, opacity),
        "sparsity": (opt.lambda_sparsity, True, sparsity),
        "opaque": (opt.lambda_opaque, True, opaque),
        "emptiness": (opt.lambda_emptiness, rays, emptiness),
        "convex": (opt.lambda_convex, render.normal is not None, convexity),
        "orient": (opt.lambda_orient, seen, orientation),
        "2d_normal_smooth": (opt.lambda_2d_normal_smooth, seen, normal_smooth_2d),
        "3d_normal_smooth": (opt.lambda_3d_normal_smooth, seen, lambda r: normal_smooth_3d(r, scene)),
        "zvar": (opt.lambda_zvar, rays, z_variance),
        "center": (opt.lambda_center, rays, center_of_mass),
        "eikonal": (
            opt.lambda_eikonal,
            rays and hasattr(scene, "sdf_gradient"),
            lambda r: eikonal(scene.sdf_gradient(probes(r, scene.bound))),
        ),
        "shape": (opt.lambda_shape, rays and guide is not None, lambda r: guide.loss(r, scene)),
        "mesh_normal": (
            opt.lambda_mesh_normal,
            drawn,
            lambda r: normal_consistency(r.surface.vertices, r.surface.faces),
        ),
        "mesh_laplacian": (opt.lambda_mesh_laplacian, drawn, lambda r: laplacian(r.surface.vertices, r.surface.faces)),
    }
    active = {name: (weight(step), loss) for name, (weight, possible, loss) in table.items() if possible}
    return {name: weight * loss(render) for name, (weight, loss) in active.items() if weight > 0}


def regularise_gradients(opt: Any, step: int, scene: nn.Module) -> None:
    """Total variation and weight decay of the hash grid, added to its gradient: call it after backward (and unscaling).

    The variation is taken at random points, one for eight rows of the table, that stand for as many as always: the weight
    keeps its meaning and a small grid its speed. They follow from the step alone, so that a resumed run sees the same.
    """
    encoder = getattr(scene, "encoder", None)
    if not hasattr(encoder, "grad_total_variation"):
        return  # no grid; said when the scene was built
    variation, decay = opt.lambda_tv(step), opt.lambda_wd(step)
    if variation > 0:
        device = encoder.embeddings.device
        count = min(VARIATION_SAMPLES, len(encoder.embeddings) // 8 + 1)
        draw = torch.rand(count, 3, generator=torch.Generator(device).manual_seed(step), device=device)
        weight = variation * VARIATION_REFERENCE / count
        encoder.grad_total_variation(weight, (2 * draw - 1) * scene.bound, scene.bound)
    if decay > 0:
        encoder.grad_weight_decay(decay)


def _mean(values: Float[Tensor, "M"]) -> Float[Tensor, ""]:
    """The mean, and 0 (with its graph) of nothing."""
    return values.sum() / max(len(values), 1)


def _pixels(render: Render, values: Float[Tensor, "M K"]) -> Float[Tensor, "B H W K"]:
    """The samples' values, summed over each ray."""
    ray = ray_of_sample(render.rays, len(values))
    total = values.new_zeros(len(render.rays), values.shape[1]).index_add(0, ray, values)
    return total.reshape(*render.alpha.shape[:3], -1)
