"""What the commands share: options, and ways to show progress."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from .pipeline import Step

Outcome = TypeVar("Outcome")  # what a generator of steps returns


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the fastest that the device computes well)"
    )
    parser.add_argument(
        "--offload", action="store_true", help="keep the parts in main memory until they work: slower, for a small GPU"
    )
    add_output_options(parser)


def add_output_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")


def size(text: str) -> tuple[int, int]:
    width, mark, height = text.lower().partition("x")
    if not (mark and width.isdecimal() and height.isdecimal()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(width), int(height)


@contextlib.contextmanager
def byte_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A bar on stderr for (bytes done, bytes in all); none where stderr is no terminal."""
    from tqdm import tqdm

    with tqdm(desc=what, unit="B", unit_scale=True, disable=None) as bar:

        def tell(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield tell


def check_output(path: Path) -> None:
    from .image import check_writable

    check_writable(path)


def free_path(path: Path) -> Path:
    """The path itself, or the first of path-2, path-3, … that does not exist: a picture nobody named replaces none."""
    number, free = 1, path
    while free.exists():
        number += 1
        free = path.with_stem(f"{path.stem}-{number}")
    return free


def with_progress(steps: Generator[Step, None, Outcome], look: Callable[[Step], None] | None = None) -> Outcome:
    """Runs a generator of steps with a bar on stderr that shows the time of each; no bar where stderr is no terminal."""
    from tqdm import tqdm

    form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
    with tqdm(desc="drawing", unit="step", bar_format=form, disable=None) as bar:
        while True:
            try:
                step = next(steps)
                bar.total = step.total
                bar.update()
                if look:
                    look(step)
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]


def one_line(error: Any) -> str:
    return " ".join(str(error).split())
