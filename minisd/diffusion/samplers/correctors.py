"""Samplers that, once they have the estimate at the next level, go there again with it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from ..schedule import scaled_linear
from .parts import PLACES, WEIGHTS, integrals, weighted


def uni_pc(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 3) -> Steps:
    """UniPC on estimates of x_0 (Zhao et al. 2023, arXiv 2302.04867, alg. 5 and 6) with B_1(h) = h."""
    return unified(denoise, x, sigmas, order, lambda h: -h)


def uni_pc_bh2(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, order: int = 3) -> Steps:
    """The same with B_2(h) = e^h - 1."""
    return unified(denoise, x, sigmas, order, lambda h: (-h).expm1())


def unified(denoise: Denoise, x: Tensor, sigmas: Tensor, order: int, of_step: Callable[[Tensor], Tensor]) -> Steps:
    """A last level of 0 is taken as 0.001, and lambda is that of a float32 program, as ComfyUI has both (uni_pc.py)."""
    ends = torch.cat([sigmas[:-1], sigmas[-1:].clamp(min=1e-3)])
    (lambdas, ratios), steps, top = as_float32(ends), len(ends) - 1, max(1, min(order, len(ends) - 2))
    known = [denoise(x, ends[0])]
    for i in range(steps):
        h, used, denoised = lambdas[i + 1] - lambdas[i], min(i + 1, top, steps - i), known[0]
        base, b = ratios[i + 1] / ratios[i] * x - (-h).expm1() * denoised, of_step(h)
        past = [(lambdas[i - j] - lambdas[i]) / h for j in range(1, used)]
        changes = [(known[j] - denoised) / r for j, r in enumerate(past, start=1)]
        x = base - b * weighted(shares(past, h, b), changes) if changes else base
        if i < steps - 1:
            new = denoise(x, ends[i + 1])
            x = base - b * weighted(shares([*past, torch.ones_like(h)], h, b), [*changes, new - denoised])
            known = [new, *known][:top]
        yield x, denoised


def as_float32(sigmas: Tensor) -> tuple[Tensor, Tensor]:
    """lambda and sigma / alpha as a program in float32 has them by way of alpha: at 0.001 that makes a difference."""
    log_alpha = 0.5 * (1 / (sigmas.float() ** 2 + 1)).log()
    variance = 1 - (2 * log_alpha).exp()
    return (log_alpha - 0.5 * variance.log()).double(), (variance.sqrt() / log_alpha.exp()).double()


def shares(r: list[Tensor], h: Tensor, b: Tensor) -> Tensor:
    """The weights of the changes (eq. 10); of a single one a half, as in all its programs."""
    if len(r) == 1:
        return torch.full((1,), 0.5, dtype=torch.float64)
    phi, rows = (-h).expm1() / -h - 1, []
    for i in range(1, len(r) + 1):
        rows.append(phi * math.factorial(i) / b)
        phi = phi / -h - 1 / math.factorial(i + 1)
    return torch.linalg.solve(torch.stack([torch.stack(r) ** i for i in range(len(r))]), torch.stack(rows))


def sa_solver(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """Stochastic Adams: predict, evaluate, correct (SA-Solver: Xue et al. 2023, arXiv 2309.05019, alg. 1)."""
    return adams(denoise, x, sigmas, noise, eta, s_noise, again=False)


def sa_solver_pece(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = 1.0, s_noise: float = 1.0) -> Steps:
    """The same, and evaluate again."""
    return adams(denoise, x, sigmas, noise, eta, s_noise, again=True)


def adams(denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, eta: float, s_noise: float, again: bool) -> Steps:
    """Of order 3 and, correcting, 4; less towards a last level of 0.  Noise comes from a fifth to four fifths of SD's steps."""
    high, low = scaled_linear().sigma(torch.tensor([0.8 * 999, 0.2 * 999]))
    lambdas, left = -sigmas.double().log(), (len(sigmas) - 1) * (1 if sigmas[-1] == 0 else 2)
    known: list[Tensor] = []
    before, tau, fresh = x, 0.0, 0.0
    for i, (sigma, following) in enumerate(pairwise(sigmas)):
        known = [denoise(x, sigma), *known][:4]
        if i and (following > 0 or again):
            used = min(4, len(known), left - i)
            x = adams_step(before, known[:used], lambdas[i + 1 - used : i + 1], lambdas[i - 1], lambdas[i], tau) + fresh
            known[0] = denoise(x, sigma) if again else known[0]
        before, fresh, tau = x, 0.0, eta if high >= following >= low else 0.0
        if following > 0:
            used = min(3, len(known), left - 1 - i)
            up = s_noise * following * (1 - (following / sigma) ** (2 * tau**2)).sqrt()
            fresh = up * noise(float(sigma), float(following)) if up > 0 else 0.0
            x = adams_step(x, known[:used], lambdas[i + 1 - used : i + 1], lambdas[i], lambdas[i + 1], tau) + fresh
        else:
            x = known[0]
        yield x, known[0]


def adams_step(x: Tensor, known: list[Tensor], at: Tensor, start: Tensor, end: Tensor, tau: float) -> Tensor:
    """The polynomial through the estimates (the last first), known at these lambdas (rising), in the exponential integrator."""
    rate, way = 1 + tau**2, start + (end - start) * PLACES
    weights = integrals(at.flip(0), way, rate * (rate * (way - end)).exp() * (end - start) * WEIGHTS)
    return (-(tau**2) * (end - start)).exp() * (start - end).exp() * x + weighted(weights, known)
