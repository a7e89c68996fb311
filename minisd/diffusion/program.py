"""A sampler as a table of coefficients, found by running it.

Most samplers are linear: where they ask the network, and what they hand back, are sums of the starting latents, the noise that
they drew and the estimates that they were given, with coefficients that depend on the noise levels alone.  So the sampler's own
generator is run once with unit vectors in the place of those three: what it asks at and what it yields are then the
coefficients themselves.  Run again with random vectors, small and large, it must keep to them, or it is not linear; and it must
not ask what the numbers are that it was given, or its course could be another next time.

    asked_i = questions_i . history        history: x, then noise and estimates in the order in which they come, a row each
    x_s     = latents_s . history

The whole history is kept, so that no kind of sampler (multistep, several calls a step, corrections of the state before) is
a case of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .denoiser import Steps, level

MAX_ROWS = 4096  # of history: four calls a step at the most steps that may be asked for
SHAPE = (2, 3, 4, 5)  # of the latents that it is tried on
MAX_NUMBERS = 1 << 23  # of a history in the shape that it is used for: beyond, it is not tried on that as well
SCALES = (1e-3, 1.0, 1e4)  # of the random vectors: what is cut off somewhere in between is found out
TOLERANCE = 1e-9  # in float64, relative to the largest of the vectors
# What tells a program the numbers of a tensor, so that it can depend on them other than by arithmetic.
TELLING = {"item", "tolist", "numpy", "equal", "allclose", "is_nonzero"}
TELLING |= {"__bool__", "__float__", "__int__", "__index__", "__array__"}
FRESH = {"new_ones", "new_zeros", "new_full", "new_tensor", "ones_like", "zeros_like", "full_like"}  # of its shape alone


class Blind(Tensor):
    """A tensor that is added to and scaled, and does not say what its numbers are; nor does what is made of it."""

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in TELLING:
            raise ValueError("the steps depend on what the network answers")
        result = super().__torch_function__(function, types, args, kwargs or {})
        return result.as_subclass(Tensor) if name in FRESH else result


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
    estimates: tuple[int, ...]  # for each call the row that its answer fills, or the two
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


def program(
    sampler: Callable[..., Steps], sigmas: Tensor, shape: tuple[int, ...] | None = None, pair: bool = False, **options: object
) -> Program | None:
    """The sampler's program for these noise levels (N + 1,), or None where it has none.

    shape: of the latents (B, C, h, w) that it will be used for.  pair: it is given two estimates a call, the guided one and the
    unconditional one, a row of history each.

    None where coefficients depend on what the network says, where numbers of a picture mix with each other, where noise comes
    from elsewhere, or where the run fails.
    """
    levels = sigmas.detach().double().cpu()
    # Several pictures, channels and pixels, all of them different: what looks at norms, neighbours or channels is found out.
    numbers = torch.randn(MAX_ROWS, *SHAPE, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    try:
        with torch.random.fork_rng([]):  # the sampler's own, if it has one, is not moved
            by_chance = [(numbers * scale, run(sampler, levels, numbers * scale, pair, options)) for scale in SCALES]
            rows = len(by_chance[0][1].rows) + 1
            by_unit = run(sampler, levels, torch.eye(rows, dtype=torch.float64).view(rows, 1, 1, 1, rows), pair, options)
            if shape and rows * math.prod(shape) <= MAX_NUMBERS:
                real = torch.randn(rows, 1, 1, 1, 1, dtype=torch.float64) * torch.randn(shape, dtype=torch.float64)
                by_chance.append((real, run(sampler, levels, real, pair, options)))
        if not by_unit.latents or not all(follows(course, by_unit, vectors) for vectors, course in by_chance):
            return None
    except Exception:  # whatever it is: the plain way meets it again, and says so
        return None
    draws = tuple((row, each) for row, each in enumerate(by_unit.rows, start=1) if isinstance(each, Draw))
    estimates = tuple(row for row, each in enumerate(by_unit.rows, start=1) if not isinstance(each, Draw))
    levels_asked = torch.tensor(by_unit.sigmas, dtype=torch.float64)
    return Program(levels_asked, *tables(by_unit), tuple(by_unit.done), estimates, draws)


def follows(course: Course, by_unit: Course, vectors: Tensor) -> bool:
    """Whether a run over these vectors (R, B, C, h, w) did what the coefficients say."""
    if not course.same(by_unit):
        return False
    flat = vectors.flatten(1)
    for coefficients, values in zip(tables(by_unit), tables(course), strict=True):
        expected = coefficients @ flat[: coefficients.shape[1]]
        if not (expected - values).abs().max() <= TOLERANCE * flat.abs().max() * coefficients.abs().max().clamp(min=1.0):
            return False
    return True


def run(sampler: Callable[..., Steps], sigmas: Tensor, vectors: Tensor, pair: bool, options: dict[str, object]) -> Course:
    """One run over vectors (R, B, C, h, w), taken one after the other as latents."""
    course = Course()

    def blind(row: int) -> Tensor:
        return vectors[row].clone().as_subclass(Blind)

    def following(what: Draw | int) -> Tensor:
        course.rows.append(what)
        return blind(len(course.rows))

    def denoise(x: Tensor, sigma: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        course.sigmas.append(float(level(sigma)))
        course.questions.append(seen(x))
        call = len(course.sigmas) - 1
        return (following(call), following(call)) if pair else following(call)

    def noise(sigma: float, next_sigma: float) -> Tensor:
        return following(Draw(float(sigma), float(next_sigma)))

    for x, denoised in sampler(denoise, blind(0), sigmas, noise, **options):
        course.latents.append(seen(x))
        course.denoised.append(seen(denoised))
        course.done.append(len(course.sigmas))
    return course


def seen(x: Tensor) -> Tensor:
    return x.detach().as_subclass(Tensor).clone()


def tables(course: Course) -> tuple[Tensor, Tensor, Tensor]:
    """Questions, latents and denoised, a row each: (calls, n), (steps, n), (steps, n)."""

    def rows(vectors: Sequence[Tensor]) -> Tensor:
        return torch.stack([vector.flatten() for vector in vectors])

    return rows(course.questions), rows(course.latents), rows(course.denoised)
