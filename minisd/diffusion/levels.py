"""Which noise levels a sampler visits, and how its first and last latents are scaled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import TRAINING_STEPS, Continuous, Discrete, Schedule


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


@dataclass(frozen=True)
class LevelWish:
    """What a sampler asks of its noise levels, as its reference has them."""

    spacing: str = "linspace"  # where nobody asks for another
    unit_start: bool = False  # the first latents have unit variance at the scale of training, picture included
    ends_above_zero: bool = False  # at the level of training timestep 0, where there are timesteps, and not at zero


AS_THEY_COME = LevelWish()


@dataclass(frozen=True)
class Levels:
    """A way down."""

    sigmas: Tensor  # (N + 1,), float64, falling
    start_scale: float  # unit noise times this is the first latents
    end_scale: float  # the last latents divided by this have unit variance

    def tail(self, steps: int) -> Levels:
        """The last steps alone."""
        return replace(self, sigmas=self.sigmas[-1 - steps :])

    def split(self, steps: int) -> tuple[Levels, Levels]:
        """The first steps, and the rest, which may be none of them."""
        return replace(self, sigmas=self.sigmas[: steps + 1]), replace(self, sigmas=self.sigmas[steps:])

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def levels(schedule: Schedule, spacing: str, steps: int, wish: LevelWish) -> Levels:
    """The sigmas that a sampler visits, falling, and where it ends.  Warns where a spacing starts far below the top."""
    end = torch.zeros(1, dtype=torch.float64)
    if spacing in BY_SIGMA:
        sigmas = BY_SIGMA[spacing](*schedule.range, steps)
    else:
        timesteps = BY_TIMESTEP[spacing](steps)
        if timesteps[0] < 800:
            warnings.warn(
                f"spacing {spacing!r} with {steps} steps starts at timestep {timesteps[0]:.0f} of {TRAINING_STEPS - 1}, "
                "as its reference does; the picture will lack contrast or form: use spacing 'trailing'",
                stacklevel=2,
            )
        sigmas = schedule.sigma(timesteps)
        if wish.ends_above_zero and isinstance(schedule, Discrete):
            end = schedule.sigmas[:1]
    return Levels(torch.cat([sigmas, end]), start_scale(schedule, sigmas[0], spacing, wish), unit(end[0]))


def start_scale(schedule: Schedule, sigma: Tensor, spacing: str, wish: LevelWish) -> float:
    """What unit noise is multiplied with to become the first latents.

    Strictly, latents at level sigma have the variance sigma^2 plus that of the picture.  The references leave the picture out
    (k-diffusion) or count it as 1: DDIM does so always, diffusers' Euler where the spacing is "leading" or the noise levels
    are continuous (scheduling_edm_euler.py).
    """
    counted = wish.unit_start or spacing == "leading" or isinstance(schedule, Continuous)
    return unit(sigma) if counted else float(sigma)


def unit(sigma: Tensor) -> float:
    """The deviation of latents at this level, that of the picture counted as 1."""
    return float((sigma**2 + 1).sqrt())


def own_levels(sigmas: Tensor | Sequence[float], wish: LevelWish) -> Levels:
    """A user's own noise levels; the first latents are noise of the first of them."""
    given = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    return Levels(given, unit(given[0]) if wish.unit_start else float(given[0]), unit(given[-1]))
