"""How fast samplers converge: their order on scores that are known, and on a checkpoint their error by calls of the network.

Noise is turned off where a sampler lets it be (eta = 0): then all of them follow the probability flow (Song et al. 2021,
arXiv 2011.13456, eq. 13), whose end is known, or is found in a thousand steps.
"""

from __future__ import annotations

import argparse
import math
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...diffusion.denoiser import Denoise
from ...diffusion.samplers import SAMPLERS, Sampler, sample
from ..report import Report, pyplot
from .analytic import PROBLEMS, Problem

HIGH, LOW = (
    10.0,
    0.1,
)  # levels between which the order is measured: none of them is the last step to 0, which is the first order's
FINE = (63, 126)  # steps: how much smaller the error is with twice as many tells the order
BUDGETS = (10, 20, 40)  # calls of the network
PROMPT, SEED, GUIDANCE, REFERENCE = "a red circle on a blue background", 1, 3.0, 500

# Why some have no order, and why that of others is not the one that their source claims.
NO_ORDER = {
    "lcm": "goes to a picture and back at each step",
    "tcd": "goes by whole timesteps",
    "restart": "adds noise in the middle of the way",
    "er_sde": "follows another equation, of which noise is a part",
    "dpm_adaptive": "its tolerance decides on its steps",
    "dpmpp_2s_ancestral_cfg_pp": "as ComfyUI has it, it leaves the flow even without guidance",
}
FIRST, EQUAL = "its first steps are of lower orders", "its weights are for equal steps, and its first steps of lower orders"
WHY = {
    "lms": FIRST, "deis": FIRST, "dpmpp_3m_sde": FIRST, "plms": EQUAL, "ipndm": EQUAL,
    "ipndm_v": "its third weight lacks a bracket, and its first steps are of lower orders",
    "uni_pc": "its first and last steps are of lower orders", "uni_pc_bh2": "its first and last steps are of lower orders",
    "sa_solver": "its corrector is of order 4, its first steps of lower orders",
    "sa_solver_pece": "its corrector is of order 4, its first steps of lower orders",
    "dpm_fast": "its last steps are of lower orders",
    "heunpp2": "its weights are shares of the levels, not of the steps",
}  # fmt: skip


def quiet(sampler: Sampler) -> dict[str, Any]:
    """The options that turn its noise off."""
    return {"eta": 0.0} if "eta" in sampler.options else {}


class Counted:
    """A denoiser that counts its calls, and hands out pairs where a sampler wants them."""

    def __init__(self, denoise: Denoise, pair: bool) -> None:
        self.denoise, self.pair, self.calls = denoise, pair, 0

    def __call__(self, x: Tensor, sigma: Tensor) -> Any:
        self.calls += 1
        found = self.denoise(x, sigma)
        return (found, found) if self.pair else found


def start() -> Tensor:
    return HIGH * torch.randn(64, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@cache
def solution(problem: Problem) -> Tensor:
    high, low = torch.tensor([HIGH, LOW], dtype=torch.float64)
    return problem.solution(start(), high, low)


def error(name: str, problem: Problem, steps: int) -> tuple[float, int]:
    """How far from the solution a sampler ends, relative to it, and how many calls it took."""
    counted, exact = Counted(problem.denoise, SAMPLERS[name].pair), solution(problem)
    sigmas = torch.logspace(math.log10(HIGH), math.log10(LOW), steps + 1, dtype=torch.float64)
    *_, (x, _) = sample(name, counted, start(), sigmas, **quiet(SAMPLERS[name]))
    return float((x - exact).norm() / exact.norm()), counted.calls


def measured_order(name: str, problem: Problem) -> float:
    """log2 of how many times smaller the error is with twice as many calls."""
    (coarse, few), (fine, many) = (error(name, problem, steps) for steps in FINE)
    return math.log(coarse / fine) / math.log(many / few)


def at_budget(name: str, problem: Problem, calls: int) -> float | None:
    """The error with the most steps that so many calls are enough for."""
    for steps in range(calls, SAMPLERS[name].least - 1, -1):
        found, taken = error(name, problem, steps)
        if taken <= calls:
            return found
    return None


def bench(report: Report, args: argparse.Namespace) -> None:
    on_known_scores(report)
    lines = on_a_checkpoint(report, args)
    report.drawn = lambda path: plot(lines, path)


def on_known_scores(report: Report) -> None:
    names = [problem.title for problem in PROBLEMS]
    columns = ("claimed", *(f"order {name}" for name in names), *(f"error {name}" for name in names), "why")
    report.table(f"order of convergence from level {HIGH:g} to {LOW:g}, and relative error of {BUDGETS[1]} calls", columns)
    for name, sampler in SAMPLERS.items():
        with report.attempt(name):
            if name in NO_ORDER:
                report.add(name, claimed=None, why=NO_ORDER[name])
                continue
            found = {f"order_{each.title}": measured_order(name, each) for each in PROBLEMS}
            errors = {f"error_{each.title}": at_budget(name, each, BUDGETS[1]) for each in PROBLEMS}
            report.add(name, claimed=sampler.order, **found, **errors, why=WHY.get(name))


def on_a_checkpoint(report: Report, args: argparse.Namespace) -> dict[str, list[tuple[int, float]]]:
    """By sampler: calls of the network, and how far from the reference it ends; those that are deterministic."""
    from ...pipeline import load

    pipe = load(args.checkpoint, device=args.device, dtype="float32")
    common: dict[str, Any] = {"seed": SEED, "guidance_scale": GUIDANCE, "spacing": "karras"}
    reference = pipe(PROMPT, sampler="heun", steps=REFERENCE, **common).latents
    which = f"{2 * REFERENCE} calls of Heun's method, CFG {GUIDANCE:g}"
    title = f"{pipe.checkpoint.path.name}: relative error of the latents against {which}"
    report.table(title, tuple(f"{calls} calls" for calls in BUDGETS))
    lines: dict[str, list[tuple[int, float]]] = {}
    for name, sampler in SAMPLERS.items():
        if name in NO_ORDER or sampler.pair:
            continue
        with report.attempt(name):
            lines[name] = []
            for calls in BUDGETS:
                asked: list[object] = []
                steps = max(sampler.least, steps_for(name, calls))
                watch: dict[str, Any] = {"observe": lambda call, x, estimates, asked=asked: asked.append(call)}
                eta = quiet(sampler).get("eta")
                found = pipe(PROMPT, sampler=name, steps=steps, eta=eta, **common, **watch).latents
                lines[name].append((len(asked), float((found - reference).norm() / reference.norm())))
            report.add(name, **{f"{calls}_calls": far for calls, (_, far) in zip(BUDGETS, lines[name], strict=True)})
    return lines


def steps_for(name: str, calls: int) -> int:
    """The most steps that end at 0 and take so many calls."""
    for steps in range(calls, 1, -1):
        counted = Counted(PROBLEMS[0].denoise, False)
        sigmas = torch.cat([torch.logspace(1, -1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
        for _ in sample(name, counted, start(), sigmas, **quiet(SAMPLERS[name])):
            pass
        if counted.calls <= calls:
            return steps
    return 1


def plot(lines: dict[str, list[tuple[int, float]]], path: Path) -> None:
    """Error against calls, both in powers: a line for each sampler, or for those that are one without noise; the best first."""
    alike: dict[tuple[str, ...], list[str]] = {}
    for name, found in lines.items():
        alike.setdefault(tuple(f"{far:.2e}" for _, far in found), []).append(name)
    figure, axis = pyplot().subplots(figsize=(9.6, 5.4), constrained_layout=True)
    colours = pyplot().get_cmap("tab20").colors
    for i, names in enumerate(sorted(alike.values(), key=lambda names: lines[names[0]][-1][1])):
        calls, errors = zip(*lines[names[0]], strict=True)
        looks = {"marker": "osD^v"[i % 5], "markersize": 4, "linewidth": 1.2, "color": colours[i % 20]}
        axis.plot(calls, errors, label=", ".join(names), **looks)
    axis.set(xscale="log", yscale="log", xlabel="calls of the network", ylabel="relative error of the latents")
    axis.set_xticks(BUDGETS, [str(calls) for calls in BUDGETS])
    axis.minorticks_off()
    axis.grid(color="#e4e7eb", linewidth=0.7)
    for side in axis.spines.values():
        side.set_visible(False)
    axis.legend(frameon=False, fontsize=7.5, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=100, facecolor="white")
