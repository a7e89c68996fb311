"""Samplers: each a short generator that walks down the noise levels and hands back every step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..denoiser import Denoise, Noise, Steps
from .one_step import ddim, euler


@dataclass(frozen=True)
class Sampler:
    """How a sampler is called and shown, and how its reference begins and ends."""

    run: Callable[[Denoise, Tensor, Tensor, Noise, float], Steps]
    label: str  # the name in A1111's parameters text
    spacing: str  # the noise levels where nothing else is asked for; see schedule.py
    unit_variance: bool  # starts from unit variance instead of sigma, and ends at the level of training timestep 0, not at zero


SAMPLERS = {
    "euler": Sampler(euler, "Euler", "linspace", unit_variance=False),  # k-diffusion sampling.py, sample_euler
    # CompVis ddim.py and util.py, alphas_prev; diffusers calls the end set_alpha_to_one=False.
    "ddim": Sampler(ddim, "DDIM", "leading", unit_variance=True),
}
