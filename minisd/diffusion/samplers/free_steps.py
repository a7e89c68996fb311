"""Samplers that choose their own levels between the first and the lowest that they are given; they end there, not at 0.

DPM-Solver (Lu et al. 2022, arXiv 2206.00927), on the noise eps = (x - x_0) / sigma and lambda = -ln sigma.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from .parts import slope, split


def solved(denoise: Denoise, x: Tensor, eps: Tensor, start: Tensor, end: Tensor, order: int) -> Iterator[Tensor]:
    """x at lambda = end by the solvers up to an order, one after the other, each with the calls of those before (alg. 1, 2)."""
    h, at = end - start, 1 / 3 if order == 3 else 1 / 2

    def linear(part: float) -> Tensor:
        return x - (-(start + part * h)).exp() * (part * h).expm1() * eps

    yield linear(1.0)
    if order > 1:
        middle = (-(start + at * h)).exp()
        there = linear(at)
        change = slope(there, denoise(there, middle), middle) - eps
        yield linear(1.0) - (-end).exp() / (2 * at) * h.expm1() * change
    if order > 2:
        later, h_2 = (-(start + 2 / 3 * h)).exp(), 2 / 3 * h
        there = linear(2 / 3) - 2 * later * (h_2.expm1() / h_2 - 1) * change
        change = slope(there, denoise(there, later), later) - eps
        yield linear(1.0) - (-end).exp() * 1.5 * (h.expm1() / h - 1) * change


def dpm_fast(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 0.0, s_noise: float = 1.0) -> Steps:
    """N calls in N // 3 + 1 equal steps, of order 3 and at the end less (DPM-Solver-fast, section 3.4)."""
    calls = len(sigmas) - 1
    orders = [3] * (calls // 3 - 1) + [2, 1] if calls % 3 == 0 else [3] * (calls // 3) + [calls % 3]
    first, last = (-each.log().double() for each in (sigmas[0], sigmas[sigmas > 0][-1]))
    lambdas = torch.linspace(float(first), float(last), len(orders) + 1, dtype=torch.float64)
    for order, (start, end) in zip(orders, pairwise(lambdas), strict=True):
        denoised, (target, up) = denoise(x, (-start).exp()), lower(start, end, lambdas[-1], eta)
        *_, x = solved(denoise, x, slope(x, denoised, (-start).exp()), start, target, order)
        x = x + s_noise * up * noise(math.exp(-start), math.exp(-end)) if up > 0 else x
        yield x, denoised


def lower(start: Tensor, end: Tensor, last: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """Where to step to, and how much noise then leads back up to `end`."""
    target = torch.minimum(last, -split((-start).exp(), (-end).exp(), eta)[0].log()) if eta > 0 else end
    return target, ((-2 * end).exp() - (-2 * target).exp()).clamp(min=0).sqrt()


def dpm_adaptive(
    denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *,
    eta: float = 0.0, s_noise: float = 1.0, order: int = 3, rtol: float = 0.05, atol: float = 0.0078,
) -> Steps:  # fmt: skip
    """Steps as long as two orders agree, in all pictures together (DPM-Solver-12 and -23, appendix C; k-diffusion's control)."""
    s, last = (-each.log().double() for each in (sigmas[0], sigmas[sigmas > 0][-1]))
    h, before = 0.05, x
    while s < last - 1e-5:
        end = torch.minimum(last, s + h)
        denoised, (target, up) = denoise(x, (-s).exp()), lower(s, end, last, eta)
        *_, low, high = solved(denoise, x, slope(x, denoised, (-s).exp()), s, target, order)
        tolerance = (rtol * torch.maximum(low.abs(), before.abs())).clamp(min=atol)
        error = float(((low - high) / tolerance).square().mean().sqrt())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / (1.5 if eta else order)) - 1)
        h = h * factor
        if factor >= 0.81:
            before, x = low, high + s_noise * up * noise(math.exp(-s), math.exp(-end)) if up > 0 else high
            s = end
            yield x, denoised
