"""Which noise levels a sampler visits, and how its first and last latents are scaled."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .schedule import TRAINING_STEPS, Continuous, Discrete, Schedule
from .spacings import SPACINGS, visited


@dataclass(frozen=True)
class LevelWish:
    """What a sampler asks of its noise levels, as its reference has them."""

    spacing: str = "linspace"  # where nobody asks for another
    unit_start: bool = False  # the first latents have unit variance at the scale of training, picture included
    ends_above_zero: bool = False  # at the level of training timestep 0, where there are timesteps, and not at zero
    discard: bool = False  # without the last level before the end, of one step more (k-diffusion's DPM2 in A1111 and ComfyUI)


AS_THEY_COME = LevelWish()


@dataclass(frozen=True)
class Levels:
    """A way down."""

    sigmas: Tensor  # (N + 1,), float64, falling
    start_scale: float  # unit noise times this is the first latents
    end_scale: float  # the last latents divided by this have unit variance
    whole: tuple[float, float] | None = None  # the ends of the way that these are a part of

    def tail(self, steps: int) -> Levels:
        """The last steps alone."""
        return replace(self, sigmas=self.sigmas[-1 - steps :], whole=self.ends)

    def split(self, steps: int) -> tuple[Levels, Levels]:
        """The first steps, and the rest, which may be none of them."""
        first, rest = self.sigmas[: steps + 1], self.sigmas[steps:]
        return replace(self, sigmas=first, whole=self.ends), replace(self, sigmas=rest, whole=self.ends)

    @property
    def ends(self) -> tuple[float, float]:
        """The least level above 0 and the greatest of the whole way, between which Brownian noise moves (A1111
        sd_samplers_common.py, create_noise_sampler, takes all of them over a picture, too)."""
        return self.whole or (float(self.sigmas[self.sigmas > 0][-1]), float(self.sigmas[0]))

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1


def levels(schedule: Schedule, spacing: str, steps: int, wish: LevelWish, xl: bool = False) -> Levels:
    """The sigmas that a sampler visits, falling, and where it ends.  xl: the model is SDXL, for which some spacings are others.

    Warns where a spacing starts far below the top.
    """
    sigmas = visited(spacing, schedule, steps + wish.discard, xl)
    sigmas = without_penultimate(sigmas) if wish.discard else sigmas
    if SPACINGS[spacing].timesteps:
        first = float(schedule.timestep(sigmas[0]))
        if first < 800:
            warnings.warn(
                f"spacing {spacing!r} with {steps} steps starts at timestep {first:.0f} of {TRAINING_STEPS - 1}, "
                "as its reference does; the picture will lack contrast or form: use spacing 'trailing'",
                stacklevel=2,
            )
        if wish.ends_above_zero and isinstance(schedule, Discrete):
            sigmas = torch.cat([sigmas[:-1], schedule.sigmas[:1]])
    return Levels(sigmas, start_scale(schedule, sigmas[0], spacing, wish), unit(sigmas[-1]))


def without_penultimate(sigmas: Tensor) -> Tensor:
    """Without the last level before the end."""
    return torch.cat([sigmas[:-2], sigmas[-1:]])


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
