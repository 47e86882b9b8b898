"""A prior whose noise estimate is known exactly: clean data of a prompt is a mixture of Gaussians, read off the prompt's embedding."""

import torch

from guidance.prior import Prior
from guidance.prompt import Condition


class MixturePrior:
    """An embedding [K, C + 2] lists the Gaussians of a prompt: mean (C numbers), variance, log weight. Latents are [B, C, h, w], every
    pixel a sample of its own, so that eps(z_t) = -sigma grad log p(z_t) is a formula."""

    num_timesteps, view_group, wants, latent_size, image_size = 1000, 1, (), 1, 1
    ask = Prior.ask

    def __init__(self, flow=False, channels=2):
        self.latent_channels, self.calls = channels, 0
        if flow:
            self.sigma = (torch.arange(1000) + 1) / 1000
            self.signal = 1 - self.sigma
        else:
            abar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
            self.signal, self.sigma = abar.sqrt(), (1 - abar).sqrt()

    def predict(self, noisy, t, embedding, hints=None):
        self.calls += 1
        return self.exact(noisy, t, embedding)

    def exact(self, noisy, t, embedding):
        """One mixture per sample, written with loops over its Gaussians."""
        a, s = (table[t].double().view(-1, 1, 1, 1) for table in (self.signal, self.sigma))
        z, parts = noisy.double(), embedding.double()
        logs, pulls = [], []
        for k in range(parts.shape[1]):
            mean, variance = parts[:, k, :-2, None, None], parts[:, k, -2].view(-1, 1, 1, 1)
            spread = a**2 * variance + s**2
            away = z - a * mean
            dims = z.shape[1]
            log = parts[:, k, -1].view(-1, 1, 1, 1) - (away**2).sum(1, keepdim=True) / (2 * spread)
            logs.append(log - 0.5 * dims * spread.log())
            pulls.append(away / spread)
        share = torch.stack(logs).softmax(0)
        return (s * (share * torch.stack(pulls)).sum(0)).float()


def gaussian(*mean, variance=0.3):
    """The embedding of a prompt with a single Gaussian; the second row weighs nothing, so that all prompts have two."""
    return torch.tensor([[*mean, variance, 0.0], [*mean, variance, -1e4]])


def mixture(first, second):
    """The embedding of two, equally likely."""
    return torch.stack([first[0], second[0]])


def condition(batch, text, negative, null=None, source=None, plain=None, **more):
    """The same prompts for every sample."""

    def rows(embedding):
        return None if embedding is None else embedding.expand(batch, *embedding.shape)

    return Condition(rows(text), rows(negative), rows(null), rows(source), rows(plain), **more)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)
