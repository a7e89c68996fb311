"""Samplers that make use of the estimates of the steps before, in lambda = -ln sigma or in sigma."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from .parts import slope, split, step_in


def dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """On a straight line in lambda through the last two (DPM-Solver++(2M): Lu et al. 2022, arXiv 2211.01095, alg. 2)."""
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised = estimate = denoise(x, sigma)
        h = step_in(sigma, following)
        if previous is not None and last is not None and following > 0:
            estimate = denoised + h / (2 * last) * (denoised - previous)
        x = estimate + following / sigma * (x - estimate)
        previous, last = denoised, h
        yield x, denoised


def dpmpp_2m_v2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The same with the mean of the last two steps for the change (stable-diffusion.cpp, denoiser.hpp, DPM++2Mv2)."""
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised, h = denoise(x, sigma), step_in(sigma, following)
        if previous is None or last is None or following == 0:
            x = denoised + following / sigma * (x - denoised)
        else:
            r = torch.maximum(h, last) / torch.minimum(h, last)
            x = following / sigma * x - (-(h + last) / 2).expm1() * (denoised + (denoised - previous) / (2 * r))
        previous, last = denoised, h
        yield x, denoised


def dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Its stochastic form (Lu et al. 2022; k-diffusion sampling.py, sample_dpmpp_2m_sde with the midpoint's correction)."""
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised = estimate = denoise(x, sigma)
        h = step_in(sigma, following)
        if previous is not None and last is not None and following > 0:
            estimate = denoised + h / (2 * last) * (denoised - previous)
        x, previous, last = stochastic(x, estimate, sigma, following, eta, s_noise, noise), denoised, h
        yield x, denoised


def stochastic(x: Tensor, estimate: Tensor, sigma: Tensor, following: Tensor, eta: float, s_noise: float, noise: Noise) -> Tensor:
    """A step of the SDE over which the estimate holds."""
    left = (following / sigma) ** eta
    x = estimate + left * following / sigma * (x - estimate)
    up = s_noise * following * (1 - left**2).sqrt()
    return x + up * noise(float(sigma), float(following)) if up > 0 else x


def dpmpp_2m_sde_heun(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0
) -> Steps:
    """The same with Heun's correction, which dpmpp_3m_sde has in its second step."""
    return dpmpp_3m_sde(denoise, x, sigmas, noise, eta=eta, s_noise=s_noise, order=2)


def dpmpp_3m_sde(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0, order: int = 3
) -> Steps:
    """On a parabola through the last three (k-diffusion sampling.py, sample_dpmpp_3m_sde)."""
    known: list[Tensor] = []  # the estimates, and the steps between them in lambda, the last first
    ways: list[Tensor] = []
    for sigma, following in pairwise(sigmas):
        known, h = [denoise(x, sigma), *known][:order], step_in(sigma, following)
        x = stochastic(x, known[0], sigma, following, eta, s_noise, noise)
        if ways and following > 0:
            total = (1 + eta) * h
            phi_2 = 1 + (-total).expm1() / total
            first = (known[0] - known[1]) * h / ways[0]
            if len(known) > 2:
                second = (first - (known[1] - known[2]) * h / ways[1]) * h / (ways[0] + ways[1])
                first = first + second * ways[0] / h
                x = x - (phi_2 / total - 0.5) * second
            x = x + phi_2 * first
        ways = [h, *ways][:2]
        yield x, known[0]


def res_multistep(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0, s_noise: float = 1.0) -> Steps:
    """An exponential multistep method of order two (RES: Zhang et al. 2023, arXiv 2308.02157; ComfyUI sampling.py)."""
    previous = last = None
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        down, up = split(sigma, following, eta)
        x, last = res_step(x, denoised, previous, sigma, down, last), (sigma, down)
        if up > 0 and s_noise > 0:
            x = x + s_noise * up * noise(float(sigma), float(following))
        previous = denoised
        yield x, denoised


def res_step(
    x: Tensor, denoised: Tensor, previous: Tensor | None, sigma: Tensor, down: Tensor, last: tuple[Tensor, Tensor] | None
) -> Tensor:
    """last: where the last step began and ended, before noise was added."""
    if previous is None or last is None or down == 0:
        return denoised + down * slope(x, denoised, sigma)
    h = step_in(sigma, down)
    share = (1 + (-h).expm1() / h) / step_in(*last)  # -phi_2 / c_2
    return denoised + (-h).exp() * (x - denoised) + h * share * (denoised - previous)


def er_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, s_noise: float = 1.0, order: int = 3) -> Steps:
    """The extended reverse-time SDE (ER-SDE-Solver-3: Cui et al. 2023, arXiv 2309.06169), with the authors' sums of 200 points
    in place of two integrals."""
    previous = before = None  # the last estimate, and its slope by sigma
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised, step = denoise(x, sigma), following - sigma
        ratio, points = scale(following) / scale(sigma), following - torch.arange(200, dtype=torch.float64) * step / 200
        x = denoised + ratio * (x - denoised) if following > 0 else denoised
        if previous is not None and order > 1 and following > 0:
            first, density = (denoised - previous) / (sigma - sigmas[i - 1]), -step / 200 * scale(following) / scale(points)
            x = x + (step + density.sum()) * first
            if before is not None and order > 2:
                second = (first - before) / ((sigma - sigmas[i - 2]) / 2)
                x = x + (step**2 / 2 + (density * (points - sigma)).sum()) * second
            before = first
        up = s_noise * (following**2 - (sigma * ratio) ** 2).clamp(min=0).sqrt()
        if up > 0:
            x = x + up * noise(float(sigma), float(following))
        previous = denoised
        yield x, denoised


def scale(sigma: Tensor) -> Tensor:
    """The paper's fifth function of how much noise there is."""
    return sigma * ((sigma**0.3).exp() + 10)
