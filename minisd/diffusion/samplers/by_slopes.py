"""Samplers that go along a mixture of the slopes of this step and those before; they differ in the weights."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from .parts import PLACES, WEIGHTS, Run, integrals, slope, weighted

EQUAL = [[1.0], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12], [55 / 24, -59 / 24, 37 / 24, -9 / 24]]  # Adams-Bashforth's


def by_slopes(weights: Callable[[Tensor], Tensor], default: int) -> Run:
    """weights: of the slopes, the last first, for the levels where they were taken, (n,), and the next, all falling, (n + 1,)."""

    def run(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = default) -> Steps:
        slopes: list[Tensor] = []
        for i, (sigma, following) in enumerate(pairwise(sigmas)):
            denoised = denoise(x, sigma)
            slopes = [slope(x, denoised, sigma), *slopes][:order]
            x = x + weighted(weights(sigmas[i + 1 - len(slopes) : i + 2].double()), slopes) if following > 0 else denoised
            yield x, denoised

    return run


def of_polynomial(sigmas: Tensor) -> Tensor:
    """The polynomial through the slopes, integrated (linear multistep: k-diffusion sampling.py, sample_lms)."""
    step = sigmas[-1] - sigmas[-2]
    return integrals(sigmas[:-1].flip(0), sigmas[-2] + step * PLACES, step * WEIGHTS)


def of_equal_steps(sigmas: Tensor) -> Tensor:
    """As if the steps were equal (iPNDM: Zhang and Chen 2022, arXiv 2204.13902, eq. 13)."""
    return (sigmas[-1] - sigmas[-2]) * torch.tensor(EQUAL[len(sigmas) - 2], dtype=torch.float64)


def of_unequal_steps(sigmas: Tensor) -> Tensor:
    """For the steps as they are, as the authors' program has it (zju-pi/diff-sampler, solvers.py): what it adds for the third
    slope is not what the polynomial asks for, since it lacks a bracket."""
    steps = sigmas.diff().flip(0)
    a, b, c, e = torch.cat([steps, steps.new_ones(4)])[:4]
    third, w = (1 - a**2 / (3 * b * (b + c))) / 2, b * (b + c) / (c * (c + e))
    fourth = (1 - a / (3 * (a + b))) / 2 + (1 - a / (2 * (a + b))) * a / (6 * (a + b + c))
    fourth = fourth * a * (a + b) * (a + b + c) / (b * (b + c) * (b + c + e))
    rows = [(1, 0, 0, 0), (a / (2 * b), -a / (2 * b), 0, 0), (third, -(1 + b / c) * third, b / c * third, 0)]
    rows.append((fourth, -(1 + b / c + w) * fourth, (b / c + w * (1 + c / e)) * fourth, -w * b / c * fourth))
    return a * torch.tensor(rows[: len(steps)], dtype=torch.float64).sum(0)[: len(steps)]


# EDM's levels 0.002 and 80 at the times 0.001 and 1 of a process with ln(sigma^2 + 1) = RISE t^2 / 2 + START t.
LOW, HIGH = (torch.tensor(sigma**2 + 1.0, dtype=torch.float64).log() for sigma in (0.002, 80.0))
RISE = 2 * (LOW / 1e-3 - HIGH) / (1e-3 - 1)
START = HIGH - RISE / 2


def of_process_time(sigmas: Tensor) -> Tensor:
    """The polynomial in the time of a variance-preserving process (tAB-DEIS: Zhang and Chen 2022, eq. 14 and 15), with its
    integral as a sum of 10,000 points, as in its programs."""
    if len(sigmas) == 2:
        return sigmas.diff()
    times = ((START**2 + 2 * RISE * (sigmas**2 + 1).log()).sqrt() - START) / RISE
    at = torch.linspace(float(times[-2]), float(times[-1]), 10_000, dtype=torch.float64)
    log = RISE * at**2 / 2 + START * at
    rate = (RISE * at + START) * log.exp() / (2 * log.expm1().sqrt())  # dsigma/dt
    return integrals(times[:-1].flip(0), at, rate * (times[-1] - times[-2]) / 10_000)


lms, ipndm = by_slopes(of_polynomial, 4), by_slopes(of_equal_steps, 4)
ipndm_v, deis = by_slopes(of_unequal_steps, 4), by_slopes(of_process_time, 3)


def plms(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise) -> Steps:
    """iPNDM with a first step by Heun's method, down to the last level (PLMS: Liu et al. 2022, arXiv 2202.09778, alg. 2)."""
    slopes: list[Tensor] = []
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        slopes = [slope(x, denoised, sigma), *slopes][:4]
        d = weighted(torch.tensor(EQUAL[len(slopes) - 1]), slopes)
        if len(slopes) == 1 and following > 0:
            there = x + (following - sigma) * d
            d = (d + slope(there, denoise(there, following), following)) / 2
        x = x + (following - sigma) * d
        yield x, denoised


def gradient_estimation(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, gamma: float = 2.0) -> Steps:
    """The slope, and what changed in it since the last (Permenter and Yuan 2023, arXiv 2306.04848, alg. 2)."""
    previous = None
    for sigma, following in pairwise(sigmas):
        denoised = denoise(x, sigma)
        d = slope(x, denoised, sigma)
        better = d if previous is None else d + (gamma - 1) * (d - previous)
        x, previous = x + (following - sigma) * better if following > 0 else denoised, d
        yield x, denoised
