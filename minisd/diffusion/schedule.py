"""Noise levels: how much noise a training timestep stands for.

Two notations for the same thing.  With noise eps, x_t = sqrt(alpha_cumprod) x_0 + sqrt(1 - alpha_cumprod) eps (Ho et al. 2020,
arXiv 2006.11239, eq. 4).  Divided by sqrt(alpha_cumprod) it is x = x_0 + sigma eps, with
sigma = sqrt((1 - alpha_cumprod) / alpha_cumprod) (Karras et al. 2022, arXiv 2206.00364).  minisd's samplers use the second.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TRAINING_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120  # CompVis v1-inference.yaml, linear_start and linear_end
LAST_ALPHA = 2.0**-24  # in place of zero, which has no sigma (diffusers scheduling_euler_discrete.py, rescale_betas_zero_snr)


@dataclass(frozen=True, repr=False)
class Discrete:
    """The noise of every training timestep: alphas_cumprod (1000,), float64, falling."""

    alphas_cumprod: Tensor

    def __repr__(self) -> str:
        low, high = self.range
        return f"Discrete({len(self.alphas_cumprod)} timesteps, sigma {low:.4g} to {high:.4g})"

    @property
    def sigmas(self) -> Tensor:
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        """The least and the greatest noise level."""
        return self.sigmas[0], self.sigmas[-1]

    def sigma(self, t: Tensor) -> Tensor:
        """Noise level at timesteps (…), also between the trained ones: linear in log sigma (k-diffusion external.py)."""
        logs = self.sigmas.log()
        low = t.double().floor().long().clamp(0, len(logs) - 2)
        weight = t.double() - low
        return ((1 - weight) * logs[low] + weight * logs[low + 1]).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        """The timestep (…), fractional, of noise levels (…): the inverse of `sigma`, clamped to the trained range."""
        logs = self.sigmas.log()
        log = sigma.double().clamp(min=1e-10).log()
        low = (torch.searchsorted(logs, log.contiguous(), right=True) - 1).clamp(0, len(logs) - 2)
        weight = ((log - logs[low]) / (logs[low + 1] - logs[low])).clamp(0, 1)
        return low + weight


@dataclass(frozen=True)
class Continuous:
    """Any noise level in a range; what the network is told is a quarter of its logarithm (Karras et al. 2022, table 1)."""

    low: float
    high: float

    @property
    def range(self) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.low, dtype=torch.float64), torch.tensor(self.high, dtype=torch.float64)

    def sigma(self, t: Tensor) -> Tensor:
        return (4 * t.double()).exp()

    def timestep(self, sigma: Tensor) -> Tensor:
        return sigma.double().log() / 4


Schedule = Discrete | Continuous


def scaled_linear() -> Discrete:
    """That of SD 1.x, 2.x and SDXL: beta rises linearly in its square root (CompVis util.py, make_beta_schedule)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAINING_STEPS, dtype=torch.float64) ** 2
    return Discrete(torch.cumprod(1 - betas, dim=0))


def zero_terminal(schedule: Discrete) -> Discrete:
    """The same, stretched until the last timestep is pure noise (Lin et al. 2023, arXiv 2305.08891, algorithm 1)."""
    roots = schedule.alphas_cumprod.sqrt()
    roots = (roots - roots[-1]) * roots[0] / (roots[0] - roots[-1])
    return Discrete(torch.cat([roots[:-1] ** 2, torch.tensor([LAST_ALPHA], dtype=torch.float64)]))
