"""One picture followed through the machine, with all that a page about it shows: page.py makes the page."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ...addons.wanted import wanted
from ...diffusion.denoiser import Call
from ...errors import UsageError
from ...models.family import UNET, VAE
from ...pictures.image import to_pil
from ...pipeline import Pipeline
from ...plan import Plan, planned
from ...request import Request
from ...result import Result, Step, with_bar
from ...text.grammar import parse
from ...text.listing import listed
from ..maps import END, Attention, collecting, grouped
from ..sketches import parts_of
from ..taps import Value, check_pipeline, tap
from .unet_map import Blueprint, blueprint_of

DECODED = 256 * 256  # pixels up to which the VAE itself shows the steps; beyond, a linear map that is fitted to it


@dataclass
class Moment:
    """A step, as the page shows it."""

    step: Step
    x: Image.Image
    estimate: Image.Image
    calls: list[dict[str, float]]  # of the network: sigma, timestep, c_in, apart (the norm of eps_c - eps_u)


@dataclass
class Lecture:
    """What a page shows of one picture."""

    pipe: Pipeline
    plan: Plan
    result: Result
    tokens: dict[str, Any]
    moments: list[Moment]
    attention: Attention
    blueprint: Blueprint
    texts: list[Value]  # of the text encoders' layers
    blocks: list[Value]  # of the UNet's, at the step in the middle
    middle: int  # that step
    decoder: list[Value]
    calls: list[tuple[Call, Tensor, list[Tensor]]] = field(default_factory=list)


@torch.no_grad()
def lecture(pipe: Pipeline, request: Request) -> Lecture:
    """Draws one picture of a text, and keeps what a page shows of its way.  Raises UsageError, and what drawing raises."""
    check_pipeline(pipe)
    request, _ = wanted(request, pipe.stack.kept)
    if not isinstance(request.prompt, str) or request.num_images != 1 or request.refiner is not None:
        raise UsageError("explain: expected a text as prompt, for one picture, and no refiner")
    calls: list[tuple[Call, Tensor, list[Tensor]]] = []
    request = replace(request, observe=lambda call, x, estimates: calls.append((call, x.clone(), list(estimates))))
    plan = planned(request, pipe.capabilities())
    request = replace(request, seed=plan.seeds[0])
    words, groups = grouped(pipe, plan, None)
    shown = [name for name, _ in parts_of(pipe.model) if not name.startswith(f"{VAE}.encoder")]
    middle = request.steps // 2
    size, steps = (plan.shape[1], plan.shape[2]), list[Step]()
    with collecting(pipe, groups, size, kernel=False) as columns, tap(pipe, shown, steps=middle) as values:
        result = with_bar(pipe.stream(request), lambda step: steps.append(copied(step)), hidden=None)
    attention = Attention(result, words, columns.maps(), size)
    made = Lecture(
        pipe, plan, result, tokens_of(pipe, plan), [], attention, blueprint_of(pipe.checkpoint.path, (plan.width, plan.height)),
        [each for each in values if each.call is None and not each.name.startswith(VAE)],
        [each for each in values if each.name.startswith(UNET)], middle,
        [each for each in values if each.name.startswith(VAE)], calls,
    )  # fmt: skip
    made.moments = [moment(made, step) for step in steps]
    return made


def copied(step: Step) -> Step:
    return replace(step, latents=step.latents.clone(), denoised=step.denoised.clone(), before=step.before.clone())


def tokens_of(pipe: Pipeline, plan: Plan) -> dict[str, Any]:
    prompt = parse(plan.prompts[0], plan.request.steps, plan.reading)
    return listed(prompt, pipe.family.towers, plan.reading, pipe.conditioner.added)


def moment(made: Lecture, step: Step) -> Moment:
    schedule, deviation = made.pipe.network.schedule, made.pipe.network.sigma_data
    rows = []
    for call, _, estimates in made.calls:
        if call.step == step.index:
            sigma = torch.tensor(call.sigma, dtype=torch.float64)
            apart = float((estimates[-1] - estimates[0]).norm()) / call.sigma if len(estimates) > 1 else 0.0
            rows.append({
                "sigma": call.sigma, "t": float(schedule.timestep(sigma)), "c_in": float((sigma**2 + deviation**2).rsqrt()),
                "apart": apart,
            })  # fmt: skip
    unit = step.before / (step.sigma**2 + deviation**2) ** 0.5
    return Moment(step, seen(made, unit), seen(made, step.denoised), rows)


def seen(made: Lecture, latents: Tensor) -> Image.Image:
    """Latents of unit variance as a picture."""
    if made.plan.width * made.plan.height <= DECODED:
        return to_pil(made.pipe.codec.decode(latents)[0])
    return made.pipe.preview(latents)[0]


def heat_of(made: Lecture) -> dict[str, float]:
    """How large the numbers of each block are, beside the largest: root mean square, by block."""
    sizes = {value.name.removeprefix(f"{UNET}."): float(value.output.float().square().mean().sqrt()) for value in made.blocks}
    largest = max([size for name, size in sizes.items() if "_block" in name], default=1.0)
    return {name: size / largest for name, size in sizes.items() if "_block" in name}


def words_shown(made: Lecture) -> list[str]:
    """Those of the prompt, and what stands behind it, which gets much of the attention."""
    return [word for word in made.attention.words if not word.startswith("<")] + [END]
