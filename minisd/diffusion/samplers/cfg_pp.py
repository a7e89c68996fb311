"""CFG++ (Chung et al. 2024, arXiv 2406.08070): the unconditional estimate's noise leads on, not that of the guided one.

Here `denoise(x, sigma)` gives a pair, the guided estimate and the unconditional one; the forms are ComfyUI's (sampling.py).
"""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor

from ..denoiser import DenoisePair, Noise, Steps
from .by_estimates import res_step
from .parts import slope, split, step_in


def euler_cfg_pp(denoise: DenoisePair, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    for sigma, following in pairwise(sigmas):
        denoised, unconditional = denoise(x, sigma)
        x = denoised + following * slope(x, unconditional, sigma)
        yield x, denoised


def dpmpp_2s_cfg_pp(denoise: DenoisePair, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    for sigma, following in pairwise(sigmas):
        denoised, unconditional = denoise(x, sigma)
        estimate = denoised
        if following > 0:
            middle = (sigma * following).sqrt()
            estimate, unconditional = denoise(denoised + middle / sigma * (x - unconditional), middle)
            x = x + denoised - unconditional
        x = estimate + following / sigma * (x - estimate)
        yield x, denoised


def dpmpp_2m_cfg_pp(denoise: DenoisePair, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised, unconditional = denoise(x, sigma)
        h, left = step_in(sigma, following), following / sigma
        x = denoised + left * (x - unconditional)
        if previous is not None and last is not None and following > 0:
            x = x + (1 - left) * h / (2 * last) * (denoised - previous)
        previous, last = unconditional, h
        yield x, denoised


def res_multistep_cfg_pp(
    denoise: DenoisePair, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0, s_noise: float = 1.0
) -> Steps:
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised, unconditional = denoise(x, sigma)
        down, up = split(sigma, following, eta)
        if previous is None or down == 0:
            x = denoised + down * slope(x, unconditional, sigma)
        else:
            x = res_step(x + denoised - unconditional, unconditional, previous, sigma, down, last)
        if up > 0 and s_noise > 0:
            x = x + s_noise * up * noise(float(sigma), float(following))
        previous, last = unconditional, (sigma, down)
        yield x, denoised


def gradient_estimation_cfg_pp(denoise: DenoisePair, x: Tensor, sigmas: Tensor, noise: Noise, *, gamma: float = 2.0) -> Steps:
    previous = None
    for sigma, following in pairwise(sigmas):
        denoised, unconditional = denoise(x, sigma)
        d = slope(x, unconditional, sigma)
        x = denoised + following * d
        if previous is not None and following > 0:
            x = x + (gamma - 1) * (following - sigma) * (d - previous)
        previous = d
        yield x, denoised
