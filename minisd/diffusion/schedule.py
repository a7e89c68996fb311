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
LAST_ALPHA = 2.0**-24  # in place of zero, which has no sigma (diffusers scheduling_euler_discrete.py, rescale_betas_zero_snr)


@dataclass(frozen=True)
class Discrete:
    """The noise of every training timestep: alphas_cumprod (1000,), float64, falling."""

    alphas_cumprod: Tensor

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


def leading(steps: int) -> Tensor:
    """Multiples of 1000 // steps, plus 1, falling: 981, 961, …, 1 for 50 steps (CompVis util.py, make_ddim_timesteps)."""
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (TRAINING_STEPS // steps) + 1


def linspace(steps: int) -> Tensor:
    """Evenly from 999 to 0, fractional in between (k-diffusion external.py, get_sigmas)."""
    return torch.linspace(TRAINING_STEPS - 1, 0, steps, dtype=torch.float64)


def trailing(steps: int) -> Tensor:
    """Evenly from 999, not reaching 0: 999, 979, …, 19 for 50 steps (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    return (TRAINING_STEPS - torch.arange(steps, dtype=torch.float64) * (TRAINING_STEPS / steps)).round() - 1


def karras(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Evenly in the seventh root of sigma (Karras et al. 2022, eq. 5, rho = 7): denser where there is little noise."""
    ramp = torch.linspace(0, 1, steps, dtype=torch.float64)
    return (high ** (1 / 7) + ramp * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def exponential(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """Evenly in log sigma (k-diffusion sampling.py, get_sigmas_exponential)."""
    return torch.linspace(float(high.log()), float(low.log()), steps, dtype=torch.float64).exp()


BY_TIMESTEP = {"leading": leading, "linspace": linspace, "trailing": trailing}
BY_SIGMA = {"karras": karras, "exponential": exponential}
SPACINGS = (*BY_TIMESTEP, *BY_SIGMA)


def start_scale(schedule: Schedule, sigma: Tensor, spacing: str, unit_variance: bool) -> Tensor:
    """What unit noise is multiplied with to become the first latents.

    Strictly, latents at level sigma have the variance sigma^2 plus that of the picture.  The references leave the picture out
    (k-diffusion) or count it as 1: DDIM does so always, diffusers' Euler where the spacing is "leading" or the noise levels
    are continuous (scheduling_edm_euler.py).
    """
    counted = unit_variance or spacing == "leading" or isinstance(schedule, Continuous)
    return (sigma**2 + 1).sqrt() if counted else sigma


def noise_levels(schedule: Schedule, spacing: str, steps: int, unit_variance: bool) -> Tensor:
    """The sigmas that a sampler visits, falling, and where it ends: (steps + 1,), float64.

    The end is zero, or with unit_variance the level of training timestep 0, where there are timesteps.  Warns where a spacing
    starts far below the top.
    """
    end = torch.zeros(1, dtype=torch.float64)
    if spacing in BY_SIGMA:
        return torch.cat([BY_SIGMA[spacing](*schedule.range, steps), end])
    timesteps = BY_TIMESTEP[spacing](steps)
    if timesteps[0] < 800:
        warnings.warn(
            f"spacing {spacing!r} with {steps} steps starts at timestep {timesteps[0]:.0f} of {TRAINING_STEPS - 1}, "
            "as its reference does; the picture will lack contrast or form: use spacing 'trailing'",
            stacklevel=2,
        )
    if unit_variance and isinstance(schedule, Discrete):
        end = schedule.sigmas[:1]
    return torch.cat([schedule.sigma(timesteps), end])
