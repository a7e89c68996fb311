"""Noise levels: how much noise a training timestep stands for, and which levels a sampler visits.

Two notations for the same thing.  With noise eps, x_t = sqrt(alpha_cumprod) x_0 + sqrt(1 - alpha_cumprod) eps (Ho et al. 2020,
arXiv 2006.11239, eq. 4).  Divided by sqrt(alpha_cumprod) it is x = x_0 + sigma eps, with
sigma = sqrt((1 - alpha_cumprod) / alpha_cumprod) (Karras et al. 2022, arXiv 2206.00364).  minisd's samplers use the second.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

TRAINING_STEPS = 1000
BETA_START, BETA_END = 0.00085, 0.0120  # CompVis v1-inference.yaml, linear_start and linear_end


@dataclass(frozen=True)
class Schedule:
    """The noise of every training timestep: alphas_cumprod (1000,) and sigmas (1000,), float64, sigmas rising."""

    alphas_cumprod: Tensor

    @property
    def sigmas(self) -> Tensor:
        return ((1 - self.alphas_cumprod) / self.alphas_cumprod).sqrt()

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


def scaled_linear() -> Schedule:
    """That of SD 1.x, 2.x and SDXL: beta rises linearly in its square root (CompVis util.py, make_beta_schedule)."""
    betas = torch.linspace(BETA_START**0.5, BETA_END**0.5, TRAINING_STEPS, dtype=torch.float64) ** 2
    return Schedule(torch.cumprod(1 - betas, dim=0))


def leading(steps: int) -> Tensor:
    """Multiples of 1000 // steps, plus 1, falling: 981, 961, …, 1 for 50 steps (CompVis util.py, make_ddim_timesteps)."""
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (TRAINING_STEPS // steps) + 1


def linspace(steps: int) -> Tensor:
    """Evenly from 999 to 0, fractional in between (k-diffusion external.py, get_sigmas)."""
    return torch.linspace(TRAINING_STEPS - 1, 0, steps, dtype=torch.float64)


def trailing(steps: int) -> Tensor:
    """Evenly from 999, not reaching 0: 999, 979, …, 19 for 50 steps (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    return (TRAINING_STEPS - torch.arange(steps, dtype=torch.float64) * (TRAINING_STEPS / steps)).round() - 1


SPACINGS = {"leading": leading, "linspace": linspace, "trailing": trailing}


def start_scale(sigma: Tensor, spacing: str, unit_variance: bool) -> Tensor:
    """What unit noise is multiplied with to become the first latents.

    Strictly, latents at level sigma have the variance sigma^2 plus that of the picture.  The references leave the picture out
    (k-diffusion) or count it as 1: DDIM does so always, diffusers' Euler where the spacing is "leading".
    """
    return (sigma**2 + 1).sqrt() if unit_variance or spacing == "leading" else sigma


def noise_levels(schedule: Schedule, spacing: str, steps: int, unit_variance: bool) -> Tensor:
    """The sigmas that a sampler visits, falling, and where it ends: (steps + 1,), float64.

    The end is zero, or with unit_variance the level of training timestep 0.  Warns where a spacing starts far below the top.
    """
    timesteps = SPACINGS[spacing](steps)
    if timesteps[0] < 800:
        warnings.warn(
            f"spacing {spacing!r} with {steps} steps starts at timestep {timesteps[0]:.0f} of {TRAINING_STEPS - 1}, "
            "as its reference does; the picture will lack contrast or form: use spacing 'trailing'",
            stacklevel=2,
        )
    end = schedule.sigmas[:1] if unit_variance else torch.zeros(1, dtype=torch.float64)
    return torch.cat([schedule.sigma(timesteps), end])
