"""A sampler as a table of coefficients, found by running it.

Most samplers are linear: where they ask the network, and what they hand back, are sums of the starting latents, the noise that
they drew and the estimates that they were given, with coefficients that depend on the noise levels alone.  So the sampler's own
generator is run once with unit vectors in the place of those three: what it asks at and what it yields are then the
coefficients themselves.  Run once more with random vectors it must keep to them, or it is not linear.

    asked_i = questions_i . history        history: x, then noise and estimates in the order in which they come, a row each
    x_s     = latents_s . history

The whole history is kept, so that no kind of sampler (multistep, several calls a step, corrections of the state before) is
a case of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .denoiser import Steps

MAX_ROWS = 4096  # of history: four calls a step at the most steps that may be asked for
TOLERANCE = 1e-9  # in float64, relative to the largest of the vectors


@dataclass(frozen=True)
class Draw:
    """A row of history that is fresh noise for the way between two levels."""

    sigma: float
    following: float


@dataclass(frozen=True)
class Program:
    """R rows of history, which begins with x; C calls of the network; S steps."""

    sigmas: Tensor  # (C,), float64: the level of every call
    questions: Tensor  # (C, R), float64
    latents: Tensor  # (S, R): what is yielded after each step, and with it
    denoised: Tensor  # (S, R): the estimate of the finished latents
    done: tuple[int, ...]  # for each step how many calls come before its end
    estimates: tuple[int, ...]  # for each call the row that its answer fills
    draws: tuple[tuple[int, Draw], ...]  # the rows that noise fills, in the order in which it is drawn


@dataclass
class Course:
    """What a sampler did in one run."""

    sigmas: list[float] = field(default_factory=list)
    questions: list[Tensor] = field(default_factory=list)
    latents: list[Tensor] = field(default_factory=list)
    denoised: list[Tensor] = field(default_factory=list)
    done: list[int] = field(default_factory=list)
    rows: list[Draw | int] = field(default_factory=list)  # after the first: what was drawn, or the number of the call

    def same(self, other: Course) -> bool:
        return (self.sigmas, self.done, self.rows) == (other.sigmas, other.done, other.rows)


def program(sampler: Callable[..., Steps], sigmas: Tensor, **options: object) -> Program | None:
    """The sampler's program for these noise levels (N + 1,), or None where it has none.

    None where coefficients depend on what the network says, where noise comes from elsewhere, or where the run fails.
    """
    levels = sigmas.detach().double().cpu()
    generator = torch.Generator().manual_seed(0)
    # Four numbers a vector, and not one, so that what looks at norms or quantiles of x is found out.
    numbers = torch.randn(MAX_ROWS, 4, generator=generator, dtype=torch.float64)
    try:
        by_chance = run(sampler, levels, numbers, options)
        by_unit = run(sampler, levels, torch.eye(len(by_chance.rows) + 1, dtype=torch.float64), options)
    except Exception:  # whatever it is: the plain way meets it again, and says so
        return None
    if not by_chance.same(by_unit) or not by_unit.latents:
        return None
    for coefficients, values in zip(tables(by_unit), tables(by_chance), strict=True):
        told = coefficients @ numbers[: coefficients.shape[1]]
        if not (told - values).abs().max() <= TOLERANCE * values.abs().max().clamp(min=1.0):
            return None
    draws = tuple((row, each) for row, each in enumerate(by_unit.rows, start=1) if isinstance(each, Draw))
    estimates = tuple(row for row, each in enumerate(by_unit.rows, start=1) if not isinstance(each, Draw))
    levels_asked = torch.tensor(by_unit.sigmas, dtype=torch.float64)
    return Program(levels_asked, *tables(by_unit), tuple(by_unit.done), estimates, draws)


def run(sampler: Callable[..., Steps], sigmas: Tensor, vectors: Tensor, options: dict[str, object]) -> Course:
    """One run over vectors (R, n), taken one after the other as latents (1, 1, 1, n)."""
    course = Course()

    def following(what: Draw | int) -> Tensor:
        course.rows.append(what)
        return vectors[len(course.rows)].view(1, 1, 1, -1).clone()

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        course.sigmas.append(float(sigma))
        course.questions.append(x.detach().clone())
        return following(len(course.sigmas) - 1)

    def noise(sigma: float, next_sigma: float) -> Tensor:
        return following(Draw(float(sigma), float(next_sigma)))

    for x, denoised in sampler(denoise, vectors[0].view(1, 1, 1, -1).clone(), sigmas, noise, **options):
        course.latents.append(x.detach().clone())
        course.denoised.append(denoised.detach().clone())
        course.done.append(len(course.sigmas))
    return course


def tables(course: Course) -> tuple[Tensor, Tensor, Tensor]:
    """Questions, latents and denoised, a row each: (calls, n), (steps, n), (steps, n)."""

    def rows(vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack([vector.flatten() for vector in vectors])

    return rows(course.questions), rows(course.latents), rows(course.denoised)
