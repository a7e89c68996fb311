"""What comes out: steps on the way, pictures with their recipes in the end."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from PIL import Image
from torch import Tensor

from .errors import MinisdError
from .pictures.image import save_png

Outcome = TypeVar("Outcome")  # what a generator of steps returns


@dataclass(frozen=True)
class Step:
    """One step of one or more pictures in the making."""

    index: int  # counts the steps of all pictures of the call, from 0
    total: int
    latents: Tensor  # (B, C, h, w), at the noise level that is left
    denoised: Tensor  # (B, C, h, w), the estimate of the finished latents


@dataclass(frozen=True)
class Result:
    """Finished pictures; index i of every field belongs to picture i."""

    images: list[Image.Image]
    seeds: list[int | None]  # None where the caller gave the noise
    latents: Tensor = field(repr=False)  # (B, C, h, w), of unit variance, float32
    metadata: list[dict[str, Any]]  # enough to make the picture again

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
