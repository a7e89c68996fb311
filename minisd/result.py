"""What comes out: steps on the way, pictures with their recipes in the end."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from torch import Tensor

from .errors import MinisdError
from .pictures.grids import grid
from .pictures.image import save_png

Outcome = TypeVar("Outcome")  # what a generator of steps returns


@dataclass(frozen=True, repr=False)
class Step:
    """One step of one or more pictures in the making: on a CPU of one, on a GPU of all that are drawn together.

    latents and denoised belong to the walk; `transform` is the way to change what it goes on with.
    """

    index: int  # counts the steps of all pictures of the call, from 0
    total: int | None  # None where nobody can know: the sampler decides on its way
    latents: Tensor  # (B, C, h, w), at the noise level that is left
    denoised: Tensor  # (B, C, h, w), the estimate of the finished latents
    before: Tensor  # (B, C, h, w), the latents that the step began from
    sigma: float  # the noise level that it began at, where the network was asked
    timestep: float  # the same as the network is told it
    picture: int  # the number of the first of its pictures in the call
    seeds: tuple[int | None, ...]  # of its B pictures
    way: str  # how it was computed: recorded, network or plain (fast/ways.py)

    @property
    def seed(self) -> int | None:
        """That of the first of its pictures."""
        return self.seeds[0]

    @property
    def eps(self) -> Tensor:
        """The estimate of the noise, (B, C, h, w): before = denoised + sigma * eps."""
        return (self.before - self.denoised) / self.sigma

    def __repr__(self) -> str:
        of = "" if self.total is None else f" of {self.total}"
        shape = "x".join(map(str, self.latents.shape))
        return (
            f"Step({self.index + 1}{of}, sigma {self.sigma:.4g}, timestep {self.timestep:.4g}, {shape} latents, seed {self.seed})"
        )


@dataclass(frozen=True, repr=False)
class Result:
    """Finished pictures; index i of every field belongs to picture i."""

    images: list[Image.Image]
    seeds: list[int | None]  # None where the caller gave the noise
    latents: Tensor  # (B, C, h, w), of unit variance, float32
    metadata: list[dict[str, Any]]  # enough to make the picture again

    def __repr__(self) -> str:
        size = "x".join(map(str, self.images[0].size))
        return f"Result({len(self.images)} of {size} pixels, seeds {', '.join(map(str, self.seeds))})"

    def _repr_png_(self) -> bytes:
        """What a notebook shows: the picture, or all of them side by side."""
        buffer = io.BytesIO()
        (self.images[0] if len(self.images) == 1 else grid(self.images)).save(buffer, "PNG")
        return buffer.getvalue()

    def save(self, path: str | os.PathLike[str], replace: bool = True) -> list[Path]:
        """Writes every picture with its recipe: out.png, out-2.png, out-3.png, …  Returns the paths; raises OutputError.

        replace: False takes the next names that are free.
        """
        return list(self.saved(path, replace))

    def saved(self, path: str | os.PathLike[str], replace: bool = True) -> Iterator[Path]:
        """`save`, picture by picture."""
        names = numbered_paths(path, len(self.images)) if replace else [Path(path)] * len(self.images)
        for parts in zip(self.images, names, self.metadata, strict=True):
            yield save_png(*parts, replace)


class Drawn:
    """What is finished of a call, picture by picture."""

    def __init__(self, seeds: list[int | None]) -> None:
        self.seeds = seeds
        self.latents: list[Tensor] = []
        self.images: list[Image.Image] = []
        self.recipes: list[dict[str, Any]] = []

    def add(self, latents: Tensor, images: list[Image.Image], recipes: list[dict[str, Any]]) -> None:
        self.latents.append(latents)
        self.images += images
        self.recipes += recipes  # last: what has a recipe is whole

    def result(self) -> Result | None:
        count = len(self.recipes)
        return Result(self.images[:count], self.seeds[:count], torch.cat(self.latents)[:count], self.recipes) if count else None

    def whole(self) -> Result:
        result = self.result()
        assert result is not None
        return result


def numbered_paths(path: str | os.PathLike[str], count: int) -> list[Path]:
    path = Path(path)
    return [path, *(path.with_stem(f"{path.stem}-{i}") for i in range(2, count + 1))]


def finish(steps: Generator[Step, None, Outcome]) -> Outcome:
    """Runs `Pipeline.stream` to its end, or another generator of steps."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]


def with_bar(
    steps: Generator[Step, None, Outcome], look: Callable[[Step], None] | None = None, hidden: bool | None = False
) -> Outcome:
    """`finish` with a bar on stderr that shows the time of each step, and `look` at every step.

    hidden: None shows the bar only where stderr is a terminal.
    """
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
    with tqdm(desc="drawing", unit="step", bar_format=form, disable=hidden) as bar:
        while True:
            try:
                step = next(steps)
                bar.total = step.total
                bar.update()
                if look:
                    look(step)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]
            except KeyboardInterrupt as stop:
                steps.throw(stop)  # if it came between two steps: the generator knows what is finished
                raise


class Interrupted(KeyboardInterrupt):
    """Ctrl-C with some pictures finished: `result` has them."""

    def __init__(self, result: Result) -> None:
        super().__init__()
        self.result = result


@contextmanager
def keeping_finished(drawn: Callable[[], Result | None]) -> Iterator[None]:
    """What ends the drawing early, an error of ours or Ctrl-C, carries what is finished by then."""
    try:
        yield
    except MinisdError as error:
        error.result = drawn()
        raise
    except KeyboardInterrupt:
        finished = drawn()
        if finished is None:
            raise
        raise Interrupted(finished) from None
