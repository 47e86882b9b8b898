"""Train tiny-if: a T5 text encoder and a denoiser of pixels that also tells how sure it is of each."""

import torch
import torch.nn.functional as F
from torch import Tensor

from toybox.denoiser import Captions, parser, train
from toybox.models import T5_LENGTH, build_pixel_scheduler, build_pixel_unet, build_t5, save_pixel_pipeline

BOUND = 1e-3  # weight of the variational bound, which trains the variance alone (Nichol and Dhariwal 2021, section 3.1)


def variance_loss(
    mix: Tensor, guess: Tensor, clean: Tensor, noisy: Tensor, t: Tensor, abar: Tensor, betas: Tensor
) -> Tensor:
    """KL of the true backward step from the learned one, in nats per value.

    mix in [-1, 1] sets log variance between that of the posterior given the clean picture (-1) and beta_t (1): Nichol and Dhariwal 2021,
    equation 15; guess: the clean picture as predicted (no gradient). All [B, C, h, w]; t: [B]; abar, betas: [T].
    """
    at, beta = (table[t].view(-1, 1, 1, 1) for table in (abar, betas))
    before = torch.where(t > 0, abar[(t - 1).clamp(min=0)], 1.0).view(-1, 1, 1, 1)
    true = (beta * (1 - before) / (1 - at)).clamp(min=1e-6)  # nothing is left to know at t = 0
    low, high = true.log(), beta.log()
    log_variance = low + (mix + 1) / 2 * (high - low)
    gap = before.sqrt() * beta / (1 - at) * (clean - guess)  # between the means; what they have of z_t is the same
    return 0.5 * (log_variance - low - 1 + (low - log_variance).exp() + gap.square() * (-log_variance).exp()).mean()


def main() -> None:
    args = parser(__doc__).parse_args()

    torch.manual_seed(args.seed)
    encoder, tokenizer = build_t5()
    scheduler, unet = build_pixel_scheduler(), build_pixel_unet()
    size = unet.config.sample_size

    def encode(image: Tensor) -> Tensor:
        return F.interpolate(image, (size, size), mode="bilinear", antialias=True)

    def loss(output: Tensor, clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        guess, mix = output.chunk(2, 1)
        abar, betas = scheduler.alphas_cumprod.to(t.device), scheduler.betas.to(t.device)
        signal, spread = abar[t].sqrt().view(-1, 1, 1, 1), (1 - abar[t]).sqrt().view(-1, 1, 1, 1)
        noisy = signal * clean + spread * noise
        error = (guess - (signal * noise - spread * clean)).square().mean()
        picture = (signal * noisy - spread * guess).detach()
        return error + BOUND * variance_loss(mix, picture, clean, noisy, t, abar, betas)

    def save(unet_weights: dict[str, Tensor], text_weights: dict[str, Tensor]) -> None:
        parts = build_pixel_unet(), build_t5()[0]
        for part, values in zip(parts, (unet_weights, text_weights), strict=True):
            part.load_state_dict(values)
        save_pixel_pipeline(args.out, *parts)

    train(args, unet, Captions(encoder, tokenizer, T5_LENGTH), scheduler.alphas_cumprod, encode, loss, save, middle=0.7)


if __name__ == "__main__":
    main()
