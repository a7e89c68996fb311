"""What samplers are made of: the slope, a step's split into down and fresh noise, weights of steps before."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..denoiser import Denoise, Noise, Steps

Run = Callable[..., Steps]


def slope(x: Tensor, denoised: Tensor, sigma: Tensor) -> Tensor:
    """dx/dsigma = (x - x_0) / sigma, the noise that the network sees in x (Karras et al. 2022, arXiv 2206.00364, eq. 3)."""
    return (x - denoised) / sigma


def step_in(sigma: Tensor, following: Tensor) -> Tensor:
    """h: the way from one level to the next in lambda = -ln sigma, in which the DPM-Solvers step."""
    return (sigma / following).log()


def split(sigma: Tensor, following: Tensor, eta: float) -> tuple[Tensor, Tensor]:
    """(down, up): the level to step down to, and how much fresh noise then leads up to `following`, down^2 + up^2 = following^2.

    eta: 0 adds none, 1 as much as DDPM's posterior has (k-diffusion sampling.py, get_ancestral_step).
    """
    up = (eta * following * (1 - following**2 / sigma**2).clamp(min=0).sqrt()).clamp(max=following)
    return (following**2 - up**2).sqrt(), up


def ancestral(run: Run, default: float = 1.0) -> Run:
    """A sampler that keeps nothing from step to step, made stochastic: each step goes lower, and noise leads up again."""

    def stochastic(
        denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *, eta: float = default, s_noise: float = 1.0
    ) -> Steps:
        for sigma, following in pairwise(sigmas):
            down, up = split(sigma, following, eta)
            ((x, denoised),) = run(denoise, x, torch.stack([sigma, down]), noise)
            if up > 0 and s_noise > 0:
                x = x + s_noise * up * noise(float(sigma), float(following))
            yield x, denoised

    return stochastic


def churned(run: Run) -> Run:
    """Another way to make it stochastic: noise before the step, between two levels (Karras et al. 2022, alg. 2, lines 4 to 6)."""

    def stochastic(
        denoise: Denoise, x: Tensor, sigmas: Tensor, noise: Noise, *,
        s_churn: float = 0.0, s_tmin: float = 0.0, s_tmax: float = math.inf, s_noise: float = 1.0,
    ) -> Steps:  # fmt: skip
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1)
        for sigma, following in pairwise(sigmas):
            hat = sigma * (1 + gamma) if s_tmin <= sigma <= s_tmax else sigma
            if hat > sigma:
                x = x + s_noise * (hat**2 - sigma**2).sqrt() * noise(float(sigma), float(hat))
            ((x, denoised),) = run(denoise, x, torch.stack([hat, following]), noise)
            yield x, denoised

    return stochastic


def weighted(weights: Sequence[Tensor] | Tensor, tensors: Sequence[Tensor]) -> Tensor:
    """The sum of tensors, each with its weight."""
    first, *others = (weight * each for weight, each in zip(weights, tensors, strict=True))
    return sum(others, first)


def integrals(known: Tensor, at: Tensor, width: Tensor) -> Tensor:
    """Of each polynomial that is 1 at one of the known points and 0 at the others, by its values at `at`, times `width`."""
    basis = [torch.stack([at * 0 + 1, *((at - other) / (each - other) for other in known if other != each)]) for each in known]
    return torch.stack([(one.prod(0) * width).sum() for one in basis])


# Places and weights of Gauss-Legendre integration from 0 to 1.
PLACES, WEIGHTS = (torch.from_numpy(each) / 2 for each in np.polynomial.legendre.leggauss(32))
PLACES = PLACES + 0.5
