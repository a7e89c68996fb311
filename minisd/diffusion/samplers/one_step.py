"""Samplers that ask the network once a step: each a short generator that walks down the noise levels and hands back every step.

All take `denoise(x, sigma) -> x_0`, noisy latents x = x_0 + sigma * eps of shape (B, C, H, W), the levels `sigmas` (N + 1,),
falling, and `noise(sigma, following)`, which draws fresh unit noise shaped like x; options are keywords.  They yield
(x, denoised) N times: the latents at the next level and the network's estimate of the finished ones, which a preview shows.
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..denoiser import Denoise, Noise, Steps


def euler(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Euler's method on dx/dsigma = (x - x_0) / sigma (Karras et al. 2022, arXiv 2206.00364, alg. 2 without churn)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        x = x + (following - sigma) * (x - denoised) / sigma
        yield x, denoised


def ddim(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0) -> Steps:
    """DDIM (Song et al. 2020, arXiv 2010.02502, eq. 12 and 16), divided by sqrt(alpha_cumprod).

    eta: 0 is deterministic, 1 adds as much noise back as DDPM does.  Of the variance sigma'^2 that x needs at the next level,
    fresh noise brings added^2 = eta^2 sigma'^2 (sigma^2 - sigma'^2) / sigma^2 (DDPM's posterior variance), and eps the rest.
    """
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        eps = (x - denoised) / sigma
        added = eta * following * (sigma**2 - following**2).sqrt() / sigma
        x = denoised + (following**2 - added**2).sqrt() * eps
        if added > 0:
            x = x + added * noise(float(sigma), float(following))
        yield x, denoised
