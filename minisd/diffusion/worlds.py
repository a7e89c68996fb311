"""The rules of other programs, where they differ from minisd's: for pictures of theirs that are wanted again (`--like`).

minisd's own rules are diffusers' where there is a choice (levels.py); `diffusers` names them.  What a program does is said here
once, in the order in which it happens: which levels, how the first noise is scaled, which timestep the network is told.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..errors import UsageError
from .levels import Levels, LevelWish, levels, unit, without_penultimate
from .schedule import TRAINING_STEPS, Continuous, Discrete, Schedule
from .spacings import visited

LAST_ALPHA = 4.8973451890853435e-08  # of zero terminal SNR in ComfyUI's and A1111's code (4518.76 as a sigma)
WORLDS = ("comfyui", "a1111", "diffusers")
BY_TIMESTEPS = ("ddim", "plms")  # which A1111 walks by timesteps, of the variance-preserving process


@dataclass(frozen=True, repr=False)
class WholeTimesteps(Discrete):
    """The network is told the nearest of the thousand timesteps, in log sigma (ComfyUI model_sampling.py, timestep)."""

    def timestep(self, sigma: Tensor) -> Tensor:
        logs = self.sigmas.log()
        return (sigma.double().clamp(min=1e-10).log()[..., None] - logs).abs().argmin(-1).double()


def schedule_of(world: str | None, schedule: Schedule) -> Schedule:
    """The noise schedule as a program has it."""
    if isinstance(schedule, Continuous) or world not in ("comfyui", "a1111"):
        return schedule
    alphas = schedule.alphas_cumprod
    if alphas[-1] < 1e-6:  # zero terminal SNR
        alphas = torch.cat([alphas[:-1], alphas.new_tensor([LAST_ALPHA])])
    return WholeTimesteps(alphas) if world == "comfyui" else Discrete(alphas)


@dataclass(frozen=True)
class Wanted:
    """What levels are asked for."""

    sampler: str
    spacing: str
    steps: int
    wish: LevelWish
    xl: bool = False
    strength: float | None = None  # over a picture


def walked(schedule: Schedule, wanted: Wanted, steps: int, discard: bool) -> Tensor:
    sigmas = visited(wanted.spacing, schedule, steps + discard, wanted.xl)
    return without_penultimate(sigmas) if discard else sigmas


def comfyui(schedule: Schedule, wanted: Wanted) -> Levels:
    """All N steps are done: of more levels, so many that the last N + 1 begin at the strength (samplers.py, KSampler)."""
    strength = wanted.strength if wanted.strength is not None and wanted.strength <= 0.9999 else 1.0
    sigmas = walked(schedule, wanted, int(wanted.steps / strength), wanted.wish.discard)[-(wanted.steps + 1) :]
    top = float(schedule.range[1])
    at_top = float(sigmas[0]) > top or abs(float(sigmas[0]) - top) <= 1e-5 * top
    return Levels(sigmas, unit(sigmas[0]) if at_top else float(sigmas[0]), 1.0)


def a1111(schedule: Schedule, wanted: Wanted) -> Levels:
    """k-diffusion's rules; DDIM and PLMS end one step early, at timestep 1 (sd_samplers_timesteps.py)."""
    if wanted.sampler in BY_TIMESTEPS and isinstance(schedule, Discrete):
        if wanted.steps < 2:
            raise UsageError(f"steps: expected at least 2 for {wanted.sampler} like a1111, which leaves one out, found 1")
        timesteps = torch.arange(0, TRAINING_STEPS, TRAINING_STEPS // wanted.steps, dtype=torch.float64).flip(0) + 1
        sigmas = schedule.sigma(timesteps.clamp(max=TRAINING_STEPS - 1))
        found = Levels(sigmas, unit(sigmas[0]), unit(sigmas[-1]))
    else:
        discard = wanted.sampler in ("dpm_2", "dpm_2_ancestral", "dpmpp_3m_sde")
        sigmas = walked(schedule, wanted, wanted.steps, discard)
        found = Levels(sigmas, float(sigmas[0]), 1.0)
    if wanted.strength is None:
        return found
    return found.tail(int(min(wanted.strength, 0.999) * wanted.steps) + 1)


def diffusers(schedule: Schedule, wanted: Wanted) -> Levels:
    """minisd's own, which are those of diffusers' classes."""
    found = levels(schedule, wanted.spacing, wanted.steps, wanted.wish, wanted.xl)
    return found if wanted.strength is None else found.tail(int(found.steps * wanted.strength))


RULES = {"comfyui": comfyui, "a1111": a1111, "diffusers": diffusers, None: diffusers}
# What else a program does otherwise, by the options that say it; options that are given say more.
OWN_DEFAULTS: dict[str, object] = {"rng": "cpu", "emphasis": "original", "plain_prompt": False}
DEFAULTS: dict[str, dict[str, object]] = {
    "comfyui": {"zero_negative": False, "emphasis": "comfy", "rng": "comfy"},
    "a1111": {"rng": "nv"},
    "diffusers": {"plain_prompt": True},
}
BROWNIAN = ("dpmpp_sde", "dpmpp_2m_sde", "dpmpp_2m_sde_heun", "dpmpp_3m_sde")  # whose noise is that of one path in both


def sde_noise_of(world: str | None, sampler: object) -> Literal["independent", "brownian"]:
    return "brownian" if world in ("comfyui", "a1111") and sampler in BROWNIAN else "independent"
