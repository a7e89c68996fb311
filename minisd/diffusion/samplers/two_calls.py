"""Samplers that ask the network two or three times a step, at levels in between or ahead, to step with a better slope."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from ..spacings import karras_levels
from .parts import slope, split, step_in, weighted


def heun(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The mean of the slopes at both ends of a step (Karras et al. 2022, arXiv 2206.00364, alg. 2)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = slope(x, denoised, sigma)
        if following > 0:
            there = x + (following - sigma) * d
            d = (d + slope(there, denoise(there, following), following)) / 2
        x = x + (following - sigma) * d
        yield x, denoised


def heunpp2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """Slopes at this level and the two that follow, weighted by the levels (Heun++: Carzit/sd-webui-samplers-scheduler)."""
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        denoised = denoise(x, sigma)
        slopes, there, level = [slope(x, denoised, sigma)], x, sigma
        for ahead in (each for each in sigmas[i + 1 : i + 3] if each != sigmas[-1]):
            there, level = there + (ahead - level) * slopes[-1], ahead
            slopes.append(slope(there, denoise(there, level), level))
        shares = sigmas[i + 1 : i + len(slopes)] / (len(slopes) * sigmas[0])
        x = x + (following - sigma) * weighted([1 - shares.sum(), *shares], slopes)
        yield x, denoised


def dpm_2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The slope at the middle of the step in ln sigma (k-diffusion sampling.py; Lu et al. 2022, arXiv 2206.00927)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = slope(x, denoised, sigma)
        if following > 0:
            middle = (sigma * following).sqrt()
            there = x + (middle - sigma) * d
            d = slope(there, denoise(there, middle), middle)
        x = x + (following - sigma) * d
        yield x, denoised


def dpmpp_2s(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """The estimate at the middle of the step (DPM-Solver++(2S): Lu et al. 2022, arXiv 2211.01095, alg. 1)."""
    for sigma, following in pairwise(sigmas):
        denoised = estimate = denoise(x, sigma)
        if following > 0:
            middle = (sigma * following).sqrt()
            estimate = denoise(denoised + middle / sigma * (x - denoised), middle)
        x = estimate + following / sigma * (x - estimate)
        yield x, denoised


def dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Its stochastic form, in which the noises of both halves begin at this level (k-diffusion sampling.py, sample_dpmpp_sde)."""

    def towards(level: Tensor, estimate: Tensor) -> Tensor:
        down, up = split(sigma, level, eta)
        there = estimate + down / sigma * (x - estimate)
        return there + s_noise * up * noise(float(sigma), float(level)) if up > 0 and s_noise > 0 else there

    for sigma, following in pairwise(sigmas):
        denoised = estimate = denoise(x, sigma)
        if following > 0:
            middle = (sigma * following).sqrt()
            estimate = denoise(towards(middle, denoised), middle)
        x = towards(following, estimate)
        yield x, denoised


def seeds_2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """An exponential Runge-Kutta step for the SDE (SEEDS-2: Gonzalez et al. 2023, arXiv 2305.14267, alg. 2)."""
    for sigma, following in pairwise(sigmas):
        denoised = estimate = denoise(x, sigma)
        if following > 0:
            fresh, middle = growing(noise, sigma, eta, s_noise), (sigma * following).sqrt()
            estimate = denoise(kept(x, denoised, sigma, middle, eta) + fresh(middle), middle)
            x = kept(x, estimate, sigma, following, eta) + fresh(following)
        else:
            x = denoised
        yield x, denoised


def seeds_3(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """The same with two levels in between (SEEDS-3: Gonzalez et al. 2023, alg. 3)."""
    for sigma, following in pairwise(sigmas):
        first = denoise(x, sigma)
        if following > 0:
            h, fresh = (1 + eta) * step_in(sigma, following), growing(noise, sigma, eta, s_noise)
            one, two = (sigma ** (1 - r) * following**r for r in (1 / 3, 2 / 3))
            second = denoise(kept(x, first, sigma, one, eta) + fresh(one), one)
            there = kept(x, first, sigma, two, eta) - 2 * phi_2(-h * 2 / 3) * (second - first) + fresh(two)
            third = denoise(there, two)
            x = kept(x, first, sigma, following, eta) - 1.5 * phi_2(-h) * (third - first) + fresh(following)
        else:
            x = first
        yield x, first


def res_2s(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """An exponential Runge-Kutta step (RES: Zhang et al. 2023, arXiv 2308.02157, as stable-diffusion.cpp has it, c_2 = 1/2)."""
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        change, h = torch.zeros_like(x), step_in(sigma, following)
        if following > 0:
            middle = (sigma * following).sqrt()
            change = -2 * phi_2(-h) * (denoise(kept(x, denoised, sigma, middle, 0), middle) - denoised)
        x = kept(x, denoised, sigma, following, 0) + change
        yield x, denoised


def kept(x: Tensor, estimate: Tensor, sigma: Tensor, level: Tensor, eta: float) -> Tensor:
    """x at another level if the estimate holds, without the noise that takes the place of what is left of x."""
    return estimate + (level / sigma) ** (1 + eta) * (x - estimate)


def phi_2(h: Tensor) -> Tensor:
    return (h.expm1() - h) / h


def growing(noise: Noise, sigma: Tensor, eta: float, s_noise: float) -> Callable[[Tensor], Tensor | float]:
    """Noise that grows from level to level of one step, out of independent pieces."""
    total: Tensor | float = 0.0

    def to(level: Tensor) -> Tensor | float:
        nonlocal total, sigma
        if eta <= 0 or s_noise <= 0:
            return 0.0
        left = (level / sigma) ** eta
        total = left * total + (1 - left**2).sqrt() * noise(float(sigma), float(level))
        sigma = level
        return s_noise * level * total

    return to


def restart(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, s_noise: float = 1.0) -> Steps:
    """Heun's method that goes from level 0.1 back up to 2 (Xu et al. 2023, arXiv 2306.14878), as often as A1111's does."""
    for sigma, following in restarts(sigmas):
        if following > sigma:
            x = x + s_noise * (following**2 - sigma**2).sqrt() * noise(float(sigma), float(following))
        else:
            ((x, denoised),) = heun(denoise, x, torch.stack([sigma, following]), noise)
            yield x, denoised


def restarts(sigmas: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Its steps, pairs of levels: none begins again below 20, and from there they are Karras' (A1111 sd_samplers_extra.py)."""
    steps = len(sigmas) - 1
    times, length = (2, steps // 4) if steps >= 36 else (1, 9) if steps >= 20 else (0, 0)
    if not times:
        return list(pairwise(sigmas))
    way = torch.cat([karras_levels(sigmas[-2], sigmas[0], steps - times * length), sigmas[-1:]])
    low, high = (way[(way - level).abs().argmin()] for level in (0.1, 2.0))
    again = karras_levels(low, high, length + 1)[:-1] if high > low else way[:0]
    down = list(pairwise(way))
    turn = next(i for i, (_, following) in enumerate(down) if following == low) + 1
    return [*down[:turn], *([(low, high), *pairwise([*again, low])] * times if len(again) else []), *down[turn:]]
