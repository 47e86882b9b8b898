"""A plain DDIM sampler over a prior, to hold against what a diffusers pipeline draws; and a sphere seen by cameras, for hints."""

import torch

from nerf.provider import orbit


@torch.no_grad()
def ddim(prior, latents, count, guided):
    """`count` steps from noise to clean latents, the timesteps being those of a DDIMScheduler with offset 1; guided(latents, t) -> eps."""
    jump = prior.num_timesteps // count
    for step in reversed(range(count)):
        now = step * jump + 1
        then = max(now - jump, 0)
        eps = guided(latents, torch.full((len(latents),), now))
        clean = (latents - prior.sigma[now] * eps) / prior.signal[now]
        latents = prior.signal[then] * clean + prior.sigma[then] * eps
    return latents


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sphere_hints(azimuth, size=48, polar=80.0, radius=3.0, fovy=40.0):
    """c2w, normal, depth and alpha of the sphere of radius 0.8 around the origin, exactly, seen from each azimuth."""
    cameras = orbit(polar, torch.tensor(azimuth), radius, fovy, size, size)
    origin, ray = cameras.rays()
    along = -(origin * ray).sum(-1, keepdim=True)
    inside = 0.8**2 - (origin.square().sum(-1, keepdim=True) - along.square())
    alpha = (inside > 0).float()
    depth = (along - inside.clamp(min=0).sqrt()) * alpha
    return {"c2w": cameras.c2w, "normal": (origin + depth * ray) / 0.8 * alpha, "depth": depth, "alpha": alpha}
