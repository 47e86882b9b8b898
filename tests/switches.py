"""What the tests of the memory switches share: tiny priors, and a step with them."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_folder

from errors import UserError
from guidance.priors import load_prior
from guidance.weights import resolve

WIDTHS = {"xl-eps": 48, "sd3": 48, "if": 24}  # of an embedding's rows


def loader(root):
    """`load(kind, dtype)`: a fresh prior from a tiny folder, written when it is first asked for."""

    def fresh(kind="eps-kl", dtype=torch.float32, device="cpu"):
        folder = root / kind
        if kind == "if":
            prior = small_if()
        else:
            if not folder.exists():
                build_folder(folder, kind)
            prior = load_prior(resolve(SimpleNamespace(hf_key=str(folder), IF=False)), device, dtype)
        prior.kind = kind
        return prior

    return fresh


def small_if():
    """DeepFloyd's own kinds of blocks, which tiny-if does not have."""
    from diffusers import UNet2DConditionModel

    from benchmarks.architectures import deepfloyd, random_network
    from guidance.deepfloyd_if import DeepFloydIF

    few = {"layers_per_block": 1, "sample_size": 16, "block_out_channels": (32, 64), "attention_head_dim": 8}
    text = {"cross_attention_dim": 64, "encoder_hid_dim": 24, "addition_embed_type_num_heads": 4}
    large = deepfloyd(32)
    down, up = large["down_block_types"][:2], large["up_block_types"][-2:]
    config = large | few | text | {"down_block_types": down, "up_block_types": up}
    denoiser = random_network(UNet2DConditionModel, config, "cpu", torch.float32)
    sigma = torch.linspace(0.05, 0.99, 1000)
    return DeepFloydIF(denoiser, None, (1 - sigma**2).sqrt(), sigma, "epsilon", "cpu")


def noise(prior, seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(prior.device)


def predict(prior, count=4):
    size = prior.latent_size
    noisy = noise(prior, 1, count, prior.latent_channels, size, size)
    t = torch.tensor([3, 400, 700, 990], device=prior.device)[:count]
    return prior.predict(noisy, t, noise(prior, 2, count, 17, WIDTHS.get(prior.kind, 16)))


def step(prior):
    """What a step asks of a prior: latents of two pictures, the noise in four, and the pictures' gradient."""
    image = noise(prior, 3, 2, 3, prior.image_size, prior.image_size).sigmoid().requires_grad_()
    latents = prior.encode(image, torch.Generator(prior.device).manual_seed(4))
    eps = predict(prior)
    (gradient,) = torch.autograd.grad(latents, image, noise(prior, 5, *latents.shape))
    return latents.detach(), eps, gradient


def assert_same(prior, plain, tolerance=1e-5):
    for one, other in zip(step(prior), step(plain), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * other.abs().max().item())


def sizes_seen(network, *at):
    """A list to which every call of the network adds the size of its first argument, at these dimensions."""
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape[i] for i in at)))
    return seen


def refusal(act, *arguments):
    with pytest.raises(UserError) as caught:
        act(*arguments)
    text = str(caught.value)
    assert "\n" not in text and len(text) < 400
    return text
