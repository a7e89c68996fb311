"""Samplers of distilled models, which go all the way to a picture at each step, and back up with noise."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from ..schedule import scaled_linear
from .parts import slope


def lcm(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Latent consistency (Luo et al. 2023, arXiv 2310.04378, alg. 3)."""
    for sigma, following in pairwise(sigmas):
        x = denoised = denoise(x, sigma)
        if following > 0:
            x = x + following * noise(float(sigma), float(following))
        yield x, denoised


def tcd(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.3) -> Steps:
    """Trajectory consistency: first to timestep (1 - eta) t of the next (Zheng et al. 2024, arXiv 2402.19159, alg. 4, whose
    gamma is eta): 0 is deterministic, 1 as LCM.  Timesteps are those of SD's schedule."""
    schedule = scaled_linear()
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        down = following
        if following > 0:
            down = schedule.sigma(((1 - eta) * schedule.timestep(following)).floor()).clamp(max=following)
        x = denoised + down * slope(x, denoised, sigma)
        if following > down:
            x = x + (following**2 - down**2).sqrt() * noise(float(sigma), float(following))
        yield x, denoised
