"""What the commands share: options, and ways to show progress."""

from __future__ import annotations

import argparse
import contextlib
import re
import signal
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import UsageError

if TYPE_CHECKING:
    from ..result import Step

Outcome = TypeVar("Outcome")  # what a generator of steps returns


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no shortened options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        self.exit(UsageError.exit_code, f"minisd: error: {message} (see {self.prog} --help)\n")


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


def check_output(given: Path | None, default: Path) -> Path:
    """Where a picture is to go; one that nobody named replaces none.  Raises UsageError, OutputError."""
    from ..pictures.image import check_writable
    from ..system.atomic import free_names

    check_writable(given or next(free_names(default)))
    return given or default


def check_distinct(outputs: Iterable[Path], inputs: Iterable[str | None]) -> None:
    """Raises UsageError if an output is named twice or is also read: what is written later would replace the other."""
    taken = {Path(path).resolve() for path in inputs if path}
    for path in outputs:
        if path.resolve() in taken:
            raise UsageError(f"output {path}: expected a name of its own, found one that is read or written before")
        taken.add(path.resolve())


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C waits until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets it
        yield
        return
    came: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: came.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if came:
        raise KeyboardInterrupt


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
            except KeyboardInterrupt as stop:
                steps.throw(stop)  # if it came between two steps: the generator knows what is finished
                raise


# What Python calls an argument, and what the command line does.
OPTIONS = {
    "width": "--size", "height": "--size", "guidance_scale": "--cfg", "negative_prompt": "--negative", "init_image": "--init",
    "num_images": "--num-images", "image_guidance_scale": "--image-cfg", "guidance_rescale": "--rescale",
    "clip_skip": "--clip-skip", "high_noise_frac": "--high-noise-frac", "original_size": "--original-size",
    "target_size": "--target-size", "zero_negative": "--zero-negative", "aesthetic_score": "--aesthetic", "steps": "--steps",
    "sampler": "--sampler", "seed": "--seed", "eta": "--eta", "spacing": "--spacing", "strength": "--strength",
    "mask": "--mask", "crop": "--crop", "device": "--device", "dtype": "--dtype", "prediction": "--prediction",
    "axis": "--x, --y", "method": "--method", "base": "--base", "blocks": "--blocks", "density": "--density", "ratio": "--ratio",
    "name": "--name",
}  # fmt: skip


def one_line(error: Any) -> str:
    """An error's text; that of a UsageError, which begins with the name of an argument, with the name of the option."""
    text = " ".join(str(error).split())
    if not isinstance(error, UsageError):
        return text
    text = re.sub(r"^\w+(?=:| )", lambda name: OPTIONS.get(name[0], name[0]), text)
    return text.replace("an init_image", "--init PICTURE")
