"""Which noise levels a sampler visits: one function for each rule, and what other programs call it.

All take the noise schedule that the model was trained on and the number of steps N, and give the levels (N + 1,), float64,
falling, of which the last is where the sampler ends.  Two give more or fewer levels for some N, as their sources do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches

import torch
from torch import Tensor

from ..errors import UsageError
from . import tuned
from .schedule import TRAINING_STEPS, Continuous, Schedule

LAST = TRAINING_STEPS - 1


def to_zero(sigmas: Tensor) -> Tensor:
    return torch.cat([sigmas, sigmas.new_zeros(1)])


def even(start: float, end: float, count: int) -> Tensor:
    return torch.linspace(start, end, count, dtype=torch.float64)


# By timestep: a model that was trained on any noise level has none.


def at_timesteps(timesteps: Callable[[int], Tensor]) -> Callable[[Schedule, int], Tensor]:
    def levels(schedule: Schedule, steps: int) -> Tensor:
        return to_zero(schedule.sigma(timesteps(steps)))

    return levels


def leading(steps: int) -> Tensor:
    """Multiples of 1000 // steps, plus 1, falling: 981, 961, …, 1 for 50 steps (CompVis util.py, make_ddim_timesteps)."""
    return torch.arange(steps - 1, -1, -1, dtype=torch.float64) * (TRAINING_STEPS // steps) + 1


def linspace(steps: int) -> Tensor:
    """Evenly from 999 to 0, fractional in between (k-diffusion external.py, get_sigmas)."""
    return even(LAST, 0, steps)


def trailing(steps: int) -> Tensor:
    """Evenly from 999, not reaching 0: 999, 979, …, 19 for 50 steps (Lin et al. 2023, arXiv 2305.08891, table 2)."""
    return (TRAINING_STEPS - torch.arange(steps, dtype=torch.float64) * (TRAINING_STEPS / steps)).round() - 1


def sgm_uniform(steps: int) -> Tensor:
    """Evenly from 999 to 0 without the last, fractional in between (generative-models, discretizer.py)."""
    return even(LAST, 0, steps + 1)[:-1]


def simple(steps: int) -> Tensor:
    """Every (1000 / steps)th from 999 down, rounded up (ComfyUI samplers.py, simple_scheduler)."""
    return LAST - torch.tensor([int(i * (TRAINING_STEPS / steps)) for i in range(steps)], dtype=torch.float64)


def ddim_uniform(steps: int) -> Tensor:
    """1 and every (1000 // steps)th after it, so more than N where N does not divide 1000 (ComfyUI samplers.py)."""
    return torch.arange(1, TRAINING_STEPS, max(TRAINING_STEPS // steps, 1), dtype=torch.float64).flip(0)


def turbo(steps: int) -> Tensor:
    """Evenly from 999, not reaching 0, as Forge has it (sd_schedulers.py)."""
    return (torch.arange(steps, 0, -1, dtype=torch.float64) * (TRAINING_STEPS / steps) - 1).round().clamp(0, LAST)


def sd_turbo(steps: int) -> Tensor:
    """999, 899, …: the first N of the ten that SD Turbo was distilled at (ComfyUI's node SDTurboScheduler)."""
    if steps > 10:
        raise UsageError(f"steps: expected at most 10 with spacing 'sd_turbo', found {steps}")
    return LAST - 100 * torch.arange(steps, dtype=torch.float64)


def lcm(steps: int) -> Tensor:
    """Of the fifty that LCMs were distilled at, 19, 39, …, 999 (diffusers scheduling_lcm.py, set_timesteps)."""
    return torch.tensor([20.0 * (50 - 50 * i // steps) - 1 for i in range(steps)], dtype=torch.float64)


def smoothstep(steps: int) -> Tensor:
    """Denser at both ends: 3 u^2 - 2 u^3 (stable-diffusion.cpp denoiser.hpp)."""
    u = 1 - torch.arange(steps, dtype=torch.float64) / steps
    return (LAST * u**2 * (3 - 2 * u)).round()


def beta(steps: int) -> Tensor:
    """By the quantiles of the beta distribution; those that round to the same timestep come once (Lee et al. 2024,
    arXiv 2407.12173; ComfyUI samplers.py, beta_scheduler)."""
    rounded = (LAST * quantiles(1 - torch.arange(steps, dtype=torch.float64) / steps)).round()
    return torch.unique_consecutive(rounded)


A = 0.6  # both parameters of the beta distribution


def quantiles(shares: Tensor) -> Tensor:
    """The inverse of the distribution function of Beta(0.6, 0.6), by halving, from shares in [0, 1]."""
    low, high = torch.zeros_like(shares), torch.full_like(shares, 0.5)
    lower = torch.minimum(shares, 1 - shares)  # symmetric around 1/2
    for _ in range(60):
        middle = (low + high) / 2
        below = mass(middle) / (2 * mass(torch.tensor(0.5, dtype=torch.float64))) < lower
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(shares > 0.5, 1 - low, low)


def mass(x: Tensor) -> Tensor:
    """The integral of t^(a - 1) (1 - t)^(a - 1) from 0 to x <= 1/2, as a power series (DLMF 8.17.7)."""
    total, factor = torch.zeros_like(x), x**A
    for k in range(64):
        total = total + factor / (A + k)
        factor = factor * x * (k + 1 - A) / (k + 1)
    return total


# By the noise level itself.


def karras_levels(low: Tensor, high: Tensor, steps: int) -> Tensor:
    """From high to low, evenly in the seventh root of sigma (Karras et al. 2022, eq. 5, rho = 7)."""
    return (high ** (1 / 7) + even(0, 1, steps) * (low ** (1 / 7) - high ** (1 / 7))) ** 7


def karras(schedule: Schedule, steps: int) -> Tensor:
    """The same over the range of the model: denser where there is little noise."""
    return to_zero(karras_levels(*schedule.range, steps))


def exponential(schedule: Schedule, steps: int) -> Tensor:
    """Evenly in log sigma (k-diffusion sampling.py, get_sigmas_exponential; polyexponential with rho = 1 is the same)."""
    low, high = schedule.range
    return to_zero(even(float(high.log()), float(low.log()), steps).exp())


def kl_optimal(schedule: Schedule, steps: int) -> Tensor:
    """Evenly in the arcus tangent of sigma (Sabour et al. 2024, arXiv 2404.14507, eq. 15), then 0 (ComfyUI samplers.py)."""
    low, high = (float(each.atan()) for each in schedule.range)
    return to_zero(even(high, low, steps).tan())


def kl_optimal_a1111(schedule: Schedule, steps: int) -> Tensor:
    """The same over N steps to the lowest level, where it ends (A1111 sd_schedulers.py)."""
    low, high = (float(each.atan()) for each in schedule.range)
    return even(high, low, steps + 1).tan()


def linear_quadratic(schedule: Schedule, steps: int) -> Tensor:
    """Half of the steps over the first fortieth, evenly, the rest in growing steps (Genmo's Mochi; ComfyUI samplers.py)."""
    linear, first, high = steps // 2, 0.025, float(schedule.range[1])
    if steps == 1:
        return torch.tensor([high, 0.0], dtype=torch.float64)
    rest, ahead = steps - linear, linear - first * steps
    square = ahead / (linear * rest**2)
    slope = first / linear - 2 * ahead / rest**2
    done = [i * first / linear for i in range(linear)] + [square * (i**2 + linear**2) + slope * i for i in range(linear, steps)]
    return high * (1 - torch.tensor([*done, 1.0], dtype=torch.float64))


def beta_a1111(schedule: Schedule, steps: int) -> Tensor:
    """The beta distribution's quantiles between the lowest and the highest sigma (A1111 sd_schedulers.py; diffusers)."""
    low, high = schedule.range
    return to_zero(low + quantiles(1 - even(0, 1, steps)) * (high - low))


# Found by search, for SD 1.x and for SDXL.


def between(levels: Sequence[float], count: int) -> Tensor:
    """As many levels, log-linear between those that are given."""
    logs = torch.tensor(levels, dtype=torch.float64).log()
    at = even(0, len(levels) - 1, count)
    low = at.floor().long().clamp(max=len(levels) - 2)
    return (logs[low] + (at - low) * (logs[low + 1] - logs[low])).exp()


def then_zero(sigmas: Tensor) -> Tensor:
    """Zero in the place of the last."""
    return to_zero(sigmas[:-1])


@dataclass(frozen=True)
class Spacing:
    levels: Callable[[Schedule, int], Tensor]
    label: str | None = None  # A1111's or Forge's
    names: tuple[str, ...] = ()  # that other programs have for it
    xl: Callable[[Schedule, int], Tensor] | None = None  # for SDXL, where that is another
    timesteps: bool = False  # needs them


def searched(table: dict[bool, list[float]], own_end: bool) -> tuple[Callable[[Schedule, int], Tensor], ...]:
    """For SD 1.x and SDXL; own_end: the lowest level is a step's, too (A1111), or gives way to zero (ComfyUI)."""

    def for_(xl: bool) -> Callable[[Schedule, int], Tensor]:
        if own_end:
            return lambda _, steps: to_zero(between(table[xl], steps))
        return lambda _, steps: then_zero(between(table[xl], steps + 1))

    return for_(False), for_(True)


def gits(schedule: Schedule, steps: int) -> Tensor:
    """By the table for up to 20 steps, and beyond log-linear between those of 20 (ComfyUI's node GITSScheduler)."""
    return then_zero(between(tuned.gits(min(max(steps, 2), 20)), steps + 1))


def by_timesteps(rule: Callable[[int], Tensor], label: str | None = None, *names: str) -> Spacing:
    return Spacing(at_timesteps(rule), label, names, timesteps=True)


def found(table: dict[bool, list[float]], own_end: bool, label: str | None = None, *names: str) -> Spacing:
    usual, xl = searched(table, own_end)
    return Spacing(usual, label, names, xl)


SPACINGS = {
    "linspace": by_timesteps(linspace, "Uniform", "normal", "Normal", "discrete"),
    "leading": by_timesteps(leading),
    "trailing": by_timesteps(trailing),
    "karras": Spacing(karras, "Karras", ("use_karras_sigmas", "ka")),
    "exponential": Spacing(exponential, "Exponential", ("polyexponential", "Polyexponential", "use_exponential_sigmas", "exp")),
    "sgm_uniform": by_timesteps(sgm_uniform, "SGM Uniform", "SGMUniform"),
    "simple": by_timesteps(simple, "Simple"),
    "ddim_uniform": by_timesteps(ddim_uniform, "DDIM"),
    "beta": by_timesteps(beta),
    "beta_a1111": Spacing(beta_a1111, "Beta", ("use_beta_sigmas",)),
    "linear_quadratic": Spacing(linear_quadratic),
    "kl_optimal": Spacing(kl_optimal),
    "kl_optimal_a1111": Spacing(kl_optimal_a1111, "KL Optimal"),
    "align_your_steps": found(tuned.AYS, False, None, "ays", "AlignYourStepsScheduler"),
    "align_your_steps_a1111": found(tuned.AYS_A1111, True, "Align Your Steps", "align_your_steps_11", "Align Your Steps 11"),
    "gits": Spacing(gits, names=("GITSScheduler",)),
    "gits_forge": found(tuned.GITS_FORGE, True, "Align Your Steps GITS"),
    "turbo": by_timesteps(turbo, "Turbo"),
    "sd_turbo": by_timesteps(sd_turbo, None, "SDTurboScheduler"),
    "lcm": by_timesteps(lcm),
    "smoothstep": by_timesteps(smoothstep),
}
LABELS = {each.label: name for name, each in SPACINGS.items() if each.label}
NAMES = {name: own for own, each in SPACINGS.items() for name in each.names} | LABELS | {name: name for name in SPACINGS}


def key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.casefold())


ALIKE = {key(name): own for name, own in NAMES.items()} | {key(name): name for name in SPACINGS}


def spacing_named(name: str) -> str:
    """A key of SPACINGS, from what A1111, ComfyUI, diffusers or stable-diffusion.cpp call it.  Raises UsageError.

    A name as it stands in a program means what that program does ("KL Optimal" A1111's, "kl_optimal" ComfyUI's).
    """
    own = NAMES.get(name) or ALIKE.get(key(name))
    if own is None:
        close = get_close_matches(key(name), ALIKE, 1, 0.5)
        meant = f"did you mean {ALIKE[close[0]]}? " if close else ""
        raise UsageError(f"spacing: {name[:80]!r} is unknown; {meant}expected one of {', '.join(SPACINGS)}")
    return own


def visited(name: str, schedule: Schedule, steps: int, xl: bool = False) -> Tensor:
    """The levels of a spacing, float64, falling.  Raises UsageError where the model has no timesteps and the rule needs them."""
    spacing = SPACINGS[name]
    if spacing.timesteps and isinstance(schedule, Continuous):
        known = ", ".join(name for name, each in SPACINGS.items() if not each.timesteps)
        raise UsageError(f"spacing: expected one of {known} for a model without timesteps, found {name}")
    return (spacing.xl or spacing.levels if xl else spacing.levels)(schedule, steps)
