"""What the commands share: options, and ways to show progress."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Callable, Iterator


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
