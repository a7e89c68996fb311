"""Samplers, each a short generator in the file of its kind; here they are named, with what each asks of its noise levels."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ..denoiser import Steps
from ..levels import AS_THEY_COME, LevelWish
from .one_step import ddim, euler


@dataclass(frozen=True)
class Sampler:
    """How a sampler is called and shown.  A user's own function becomes one by `Sampler(function, its name)`."""

    run: Callable[..., Steps]  # (denoise, x, sigmas, noise, *, options)
    label: str  # the name in A1111's parameters text
    wish: LevelWish = AS_THEY_COME

    @property
    def options(self) -> Mapping[str, object]:
        """Its own options and their defaults: the keyword-only parameters of its function."""
        parameters = inspect.signature(self.run).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}


SAMPLERS = {
    "euler": Sampler(euler, "Euler"),  # k-diffusion sampling.py, sample_euler
    # CompVis ddim.py and util.py, alphas_prev; diffusers calls the end set_alpha_to_one=False.
    "ddim": Sampler(ddim, "DDIM", LevelWish("leading", unit_start=True, ends_above_zero=True)),
}
