"""The samplers by name, with what each asks of its noise levels, and what other programs call them."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...errors import UsageError
from ..denoiser import Denoise, DenoisePair, Noise, Steps
from ..levels import LevelWish
from ..spacings import ALIKE as ALIKE_SPACINGS
from ..spacings import LABELS
from ..spacings import key as spacing_key
from . import by_estimates, by_slopes, cfg_pp, correctors, distilled, free_steps, one_step, two_calls
from .parts import ancestral, churned

EVEN, KARRAS, EXPONENTIAL, DISTILLED = (LevelWish(name) for name in ("linspace", "karras", "exponential", "lcm"))
DISCARDED, KARRAS_DISCARDED = LevelWish("linspace", discard=True), LevelWish("karras", discard=True)
# CompVis ddim.py and util.py, alphas_prev; diffusers calls the end set_alpha_to_one=False.
VARIANCE_PRESERVING = LevelWish("leading", unit_start=True, ends_above_zero=True)


@dataclass(frozen=True)
class Sampler:
    """How a sampler is called and shown.  A user's own function becomes one by `Sampler(function, its name)`."""

    run: Callable[..., Steps]  # (denoise, x, sigmas, noise, *, options)
    label: str  # the name in A1111's parameters text, or as it would be there
    wish: LevelWish = EVEN  # its spacing is the one that A1111 gives it
    order: int = 1  # that its source claims, of a stochastic one without noise; `minisd bench samplers` measures
    names: tuple[str, ...] = ()  # that other programs have for it
    source: str = ""
    pair: bool = False  # denoise gives it the unconditional estimate as well (CFG++)
    least: int = 1  # steps
    orders: tuple[int, int] = (1, 4)  # that may be asked for, where `order` is an option

    @property
    def options(self) -> Mapping[str, Any]:
        """Its own options and their defaults: the keyword-only parameters of its function."""
        parameters = inspect.signature(self.run).parameters.values()
        return {each.name: each.default for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}

    def checked(self, options: Mapping[str, object]) -> dict[str, float]:
        """Options as plain numbers.  Raises UsageError, which names the option, what was expected and what was found."""
        found = {}
        for name, value in options.items():
            if name not in self.options:
                takes = ", ".join(self.options) or "none"
                raise UsageError(f"{name}: sampler {self.label!r} has no such option, found {value!r}; its options: {takes}")
            low, high = RANGES.get(name, (-math.inf, math.inf))
            if name == "order":
                low, high = self.orders
            number = value.item() if isinstance(value, Tensor) and value.dim() == 0 else value
            whole = isinstance(self.options[name], int)
            fits = isinstance(number, int | float) and not isinstance(number, bool) and low <= number <= high
            if not fits or (whole and number != int(number)):  # type: ignore[call-overload]
                kind = "a whole number" if whole else "a number"
                raise UsageError(f"{name}: expected {kind} from {low} to {high} for {self.label!r}, found {str(value)[:80]!r}")
            found[name] = int(number) if whole else float(number)  # type: ignore[arg-type, call-overload]
        return found


RANGES = {
    "eta": (0.0, 1.0), "s_noise": (0.0, 10.0), "s_churn": (0.0, 1000.0), "s_tmin": (0.0, 1e6), "s_tmax": (0.0, math.inf),
    "gamma": (0.0, 10.0), "rtol": (1e-6, 1.0), "atol": (1e-6, 1.0),
}  # fmt: skip
EDM, UNIPC, PNDM = (
    "Karras et al. 2022, arXiv 2206.00364",
    "Zhao et al. 2023, arXiv 2302.04867",
    "Liu et al. 2022, arXiv 2202.09778",
)
GRADIENT = "Permenter and Yuan 2023, arXiv 2306.04848"
KD, PLUS_PLUS = "k-diffusion sampling.py", "Lu et al. 2022, arXiv 2211.01095"
DPM, IPNDM = "Lu et al. 2022, arXiv 2206.00927", "Zhang and Chen 2022, arXiv 2204.13902"
SEEDS, RES, SA = (
    "Gonzalez et al. 2023, arXiv 2305.14267",
    "Zhang et al. 2023, arXiv 2308.02157",
    "Xue et al. 2023, arXiv 2309.05019",
)
SD_CPP = "stable-diffusion.cpp denoiser.hpp"
CFG_PP = "Chung et al. 2024, arXiv 2406.08070"

euler, heun, dpm_2 = churned(one_step.euler), churned(two_calls.heun), churned(two_calls.dpm_2)
SAMPLERS = {
    "euler": Sampler(euler, "Euler", names=("EulerDiscrete",), source=EDM),
    "euler_ancestral": Sampler(
        ancestral(one_step.euler), "Euler a", names=("EulerAncestralDiscrete", "euler a"), source=KD
    ),
    "ddim": Sampler(one_step.ddim, "DDIM", VARIANCE_PRESERVING, source="Song et al. 2020, arXiv 2010.02502"),
    "ddpm": Sampler(ancestral(one_step.euler), "DDPM", source="Ho et al. 2020, arXiv 2006.11239"),
    "heun": Sampler(heun, "Heun", order=2, names=("HeunDiscrete",), source=EDM),
    "heunpp2": Sampler(two_calls.heunpp2, "HeunPP2", order=2, source="Carzit/sd-webui-samplers-scheduler"),
    "dpm_2": Sampler(dpm_2, "DPM2", KARRAS_DISCARDED, 2, ("KDPM2Discrete",), f"{KD}; {DPM}"),
    "dpm_2_ancestral": Sampler(
        ancestral(two_calls.dpm_2), "DPM2 a", KARRAS_DISCARDED, 2, ("KDPM2AncestralDiscrete", "dpm_2_a"), KD
    ),
    "lms": Sampler(by_slopes.lms, "LMS", order=4, names=("LMSDiscrete", "KLMS"), source=KD),
    "plms": Sampler(by_slopes.plms, "PLMS", VARIANCE_PRESERVING, 4, ("PNDM",), PNDM),
    "ipndm": Sampler(by_slopes.ipndm, "IPNDM", order=4, source=IPNDM),
    "ipndm_v": Sampler(by_slopes.ipndm_v, "IPNDM_V", order=4, source=IPNDM),
    "deis": Sampler(by_slopes.deis, "DEIS", order=3, orders=(1, 3), names=("DEISMultistep",), source=IPNDM),
    "gradient_estimation": Sampler(
        by_slopes.gradient_estimation, "Gradient Estimation", names=("euler_ge",), source=GRADIENT
    ),
    "dpmpp_2s": Sampler(two_calls.dpmpp_2s, "DPM++ 2S", KARRAS, 2, ("DPMSolverSinglestep", "DPM_SINGLE"), PLUS_PLUS),
    "dpmpp_2s_ancestral": Sampler(ancestral(two_calls.dpmpp_2s), "DPM++ 2S a", KARRAS, 2, ("dpmpp_2s_a",), KD),
    "dpmpp_sde": Sampler(two_calls.dpmpp_sde, "DPM++ SDE", KARRAS, 2, ("DPMSolverSDE", "dpmpp_sde_gpu"), KD),
    "dpmpp_2m": Sampler(by_estimates.dpmpp_2m, "DPM++ 2M", KARRAS, 2, ("DPMSolverMultistep",), PLUS_PLUS),
    "dpmpp_2m_v2": Sampler(by_estimates.dpmpp_2m_v2, "DPM++ 2M v2", KARRAS, 2, ("dpm++2mv2",), SD_CPP),
    "dpmpp_2m_sde": Sampler(
        by_estimates.dpmpp_2m_sde, "DPM++ 2M SDE", EXPONENTIAL, 2, ("dpmpp_2m_sde_gpu", "dpm++2m_sde_bt"), PLUS_PLUS
    ),
    "dpmpp_2m_sde_heun": Sampler(
        by_estimates.dpmpp_2m_sde_heun, "DPM++ 2M SDE Heun", EXPONENTIAL, 2, ("dpmpp_2m_sde_heun_gpu",), KD
    ),
    "dpmpp_3m_sde": Sampler(by_estimates.dpmpp_3m_sde, "DPM++ 3M SDE", EXPONENTIAL, 3, ("dpmpp_3m_sde_gpu",), KD, orders=(1, 3)),
    "uni_pc": Sampler(correctors.uni_pc, "UniPC", DISCARDED, order=3, names=("UniPCMultistep",), source=UNIPC, orders=(1, 3)),
    "uni_pc_bh2": Sampler(correctors.uni_pc_bh2, "UniPC bh2", DISCARDED, order=3, source=UNIPC, orders=(1, 3)),
    "res_2s": Sampler(partial(ancestral(two_calls.res_2s), eta=0.0), "Res 2S", order=2, source=f"{RES}; {SD_CPP}"),
    "res_multistep": Sampler(by_estimates.res_multistep, "Res Multistep", order=2, source=RES),
    "res_multistep_ancestral": Sampler(
        partial(by_estimates.res_multistep, eta=1.0), "Res Multistep Ancestral", order=2, source=RES
    ),
    "er_sde": Sampler(by_estimates.er_sde, "ER SDE", order=3, source="Cui et al. 2023, arXiv 2309.06169", orders=(1, 3)),
    "seeds_2": Sampler(two_calls.seeds_2, "SEEDS 2", order=2, source=SEEDS),
    "seeds_3": Sampler(two_calls.seeds_3, "SEEDS 3", order=3, source=SEEDS),
    "sa_solver": Sampler(correctors.sa_solver, "SA Solver", order=3, source=SA),
    "sa_solver_pece": Sampler(correctors.sa_solver_pece, "SA Solver PECE", order=3, source=SA),
    "restart": Sampler(two_calls.restart, "Restart", KARRAS, 2, source="Xu et al. 2023, arXiv 2306.14878"),
    "dpm_fast": Sampler(free_steps.dpm_fast, "DPM fast", order=3, source=DPM, least=2),
    "dpm_adaptive": Sampler(
        free_steps.dpm_adaptive, "DPM adaptive", order=3, names=("dpm_ad",), source=DPM, least=2, orders=(2, 3)
    ),
    "lcm": Sampler(distilled.lcm, "LCM", DISTILLED, source="Luo et al. 2023, arXiv 2310.04378"),
    "tcd": Sampler(distilled.tcd, "TCD", DISTILLED, source="Zheng et al. 2024, arXiv 2402.19159"),
    "euler_cfg_pp": Sampler(cfg_pp.euler_cfg_pp, "Euler CFG++", names=("ddim_cfgpp",), source=CFG_PP, pair=True),
    "euler_ancestral_cfg_pp": Sampler(
        ancestral(cfg_pp.euler_cfg_pp), "Euler a CFG++", names=("euler_a_cfg_pp",), source=CFG_PP, pair=True
    ),
    "dpmpp_2s_ancestral_cfg_pp": Sampler(
        ancestral(cfg_pp.dpmpp_2s_cfg_pp), "DPM++ 2S a CFG++", KARRAS, 2, (), CFG_PP, pair=True
    ),
    "dpmpp_2m_cfg_pp": Sampler(cfg_pp.dpmpp_2m_cfg_pp, "DPM++ 2M CFG++", KARRAS, 2, (), CFG_PP, pair=True),
    "res_multistep_cfg_pp": Sampler(cfg_pp.res_multistep_cfg_pp, "Res Multistep CFG++", order=2, source=CFG_PP, pair=True),
    "res_multistep_ancestral_cfg_pp": Sampler(
        partial(cfg_pp.res_multistep_cfg_pp, eta=1.0), "Res Multistep Ancestral CFG++", order=2, source=CFG_PP, pair=True
    ),
    "gradient_estimation_cfg_pp": Sampler(
        cfg_pp.gradient_estimation_cfg_pp, "Gradient Estimation CFG++", source=CFG_PP, pair=True
    ),
}  # fmt: skip


# A name may end in that of a spacing, as A1111 has it: "DPM++ 2M Karras", "k_dpmpp_2m_ka", "DPM_2_KARRAS", "ddim_trailing".
ENDINGS = ALIKE_SPACINGS | {spacing_key(label): name for label, name in LABELS.items()}


def key(name: str) -> str:
    """A name as all write it: case, blanks and underscores apart, without k-diffusion's k and diffusers' Scheduler."""
    text = name.casefold().removesuffix("scheduler")
    text = text[2:] if re.match(r"k[ _]", text) else text
    text = text.replace("plus_plus", "++").replace("dpmpp", "dpm++").replace("dpm_++", "dpm++").replace("cfg_pp", "cfg++")
    return re.sub(r"[^a-z0-9+]", "", text.replace("cfgpp", "cfg++"))


NAMES = {key(name): own for own, each in SAMPLERS.items() for name in (*each.names, each.label, own)}


def named(name: str) -> tuple[str, str | None]:
    """What another program's name means here: a key of SAMPLERS, and a spacing where the name says one.  Raises UsageError."""
    found = key(name)
    if found in NAMES:
        return NAMES[found], None
    for ending in sorted(ENDINGS, key=len, reverse=True):
        if found.endswith(ending) and found.removesuffix(ending) in NAMES:
            return NAMES[found.removesuffix(ending)], ENDINGS[ending]
    close = get_close_matches(found, NAMES, 1, 0.5)
    meant = f"did you mean {NAMES[close[0]]}? " if close else ""
    raise UsageError(f"sampler: {name[:80]!r} is unknown; {meant}minisd samplers lists all")


def sample(
    name: str,
    denoise: Denoise | DenoisePair,
    x: Tensor,
    sigmas: Tensor,
    noise: Noise | None = None,
    **options: float,
) -> Steps:
    """Walks down noise levels by a sampler, with any denoiser: yields (latents, denoised), shaped like x, for every step.

    name: of `SAMPLERS`, or what another program calls it.  denoise(x, sigma) -> x_0; for the CFG++ forms the guided estimate and
    the unconditional one.  x: latents at the level sigmas[0], x_0 + sigmas[0] * eps.  sigmas: (N + 1,), falling.
    noise(sigma, following) -> unit noise shaped like x for the way between two levels; by default torch's own.
    options: the sampler's (`SAMPLERS[name].options`).  Raises UsageError.
    """
    sampler = SAMPLERS[named(name)[0]]
    levels = torch.as_tensor(sigmas, dtype=torch.float64).cpu()
    if levels.dim() != 1 or len(levels) <= sampler.least or not (levels.diff() < 0).all() or levels[-1] < 0:
        found = levels.tolist() if levels.dim() == 1 else tuple(levels.shape)
        raise UsageError(f"sigmas: expected {sampler.least + 1} or more falling numbers, not below 0, found {str(found)[:80]}")
    return sampler.run(denoise, x, levels, noise or (lambda *_: torch.randn_like(x)), **sampler.checked(options))
