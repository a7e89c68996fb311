"""Denoisers that are known exactly, and where the probability flow takes latents with them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ...diffusion.denoiser import Denoise

SPREAD = torch.tensor([0.3, 0.6, 1.0, 2.0], dtype=torch.float64)  # of the Gaussian, by coordinate
REFINED = 4000  # steps of the reference where there is no formula


@dataclass(frozen=True)
class Problem:
    """Pictures of four numbers, (B, 4), whose distribution is known."""

    title: str
    denoise: Denoise
    solution: Callable[[Tensor, Tensor, Tensor], Tensor]  # x at one level, that level, another -> x there


def gaussian(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x] for pictures from N(0, SPREAD^2)."""
    return x * SPREAD**2 / (SPREAD**2 + sigma**2)


def along_gaussian(x: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """dx/dsigma = (x - E[x_0 | x]) / sigma, solved: x stays as many deviations away from the mean as it was."""
    return x * ((SPREAD**2 + end**2) / (SPREAD**2 + sigma**2)).sqrt()


def points() -> Tensor:
    """The centres of the mixture, (6, 4)."""
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def mixture(x: Tensor, sigma: Tensor) -> Tensor:
    """E[x_0 | x] for pictures from Gaussians of deviation 0.5 around the points."""
    centres, variance = points(), 0.25
    near = (-((x[:, None] - centres) ** 2).sum(-1) / (2 * (variance + sigma**2))).softmax(-1)  # (B, 6)
    return (x * variance + (near @ centres) * sigma**2) / (variance + sigma**2)


def refined(x: Tensor, sigma: Tensor, end: Tensor) -> Tensor:
    """The same flow through the mixture by the classical Runge-Kutta method in ln sigma."""
    h = (end / sigma).log() / REFINED

    def rate(x: Tensor, log: Tensor) -> Tensor:
        return x - mixture(x, log.exp())

    log = sigma.log()
    for _ in range(REFINED):
        a = rate(x, log)
        b = rate(x + h / 2 * a, log + h / 2)
        c = rate(x + h / 2 * b, log + h / 2)
        d = rate(x + h * c, log + h)
        x, log = x + h / 6 * (a + 2 * b + 2 * c + d), log + h
    return x


PROBLEMS = (Problem("Gaussian", gaussian, along_gaussian), Problem("mixture", mixture, refined))
