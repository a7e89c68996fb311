"""What the commands share: options, and ways to show progress."""

from __future__ import annotations

import argparse
import contextlib
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from ..errors import UsageError
from ..options import FLAG, OPTIONS, PAIR, Option, pair
from .streams import undisturbed as undisturbed

if TYPE_CHECKING:
    from ..request import Request

Outcome = TypeVar("Outcome")  # what a generator of steps returns


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and takes no shortened options."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **(options | {"allow_abbrev": False}))

    def error(self, message: str) -> NoReturn:
        message = " ".join(message.split())
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


def add_training(parser: Any, file: str = "the file") -> None:
    """The options that say how a checkpoint was trained, where its file does not."""
    parser.add_argument("--prediction", metavar="NAME", help=f"epsilon or v, where {file} does not say which")
    parser.add_argument(
        "--zero-snr", action=argparse.BooleanOptionalAction, help="trained with zero terminal SNR or not, likewise; with v"
    )


def add_fp8(parser: Any) -> None:
    parser.add_argument("--fp8", action="store_true", help="the UNet's weights in float8: half the memory, less exact, no LoRAs")


def size(text: str) -> tuple[int, int]:
    try:
        return pair(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_options(parser: argparse.ArgumentParser, names: Iterable[str] = OPTIONS, also: str = "") -> None:
    """The options of a drawing of these names, in groups; also: what their help says instead of what they are for."""
    groups: dict[str, Any] = {"": parser} | {group.title or "": group for group in parser._action_groups}
    for option in (OPTIONS[name] for name in names):
        if option.flag is None or option.name == "height":  # which comes with the width, as --size
            continue
        if option.group not in groups:
            groups[option.group] = parser.add_argument_group(option.group)
        add_option(groups[option.group], option, also)


SECOND = {"negative_prompt": ("-n",), "spacing": ("--schedule",)}  # other flags for the same


def add_option(group: Any, option: Option, also: str) -> None:
    assert option.flag is not None
    flags = sorted((option.flag, *SECOND.get(option.name, ())), key=len)
    if option.name == "width":
        said = also or "pixels, multiples of 8"
        group.add_argument("--size", type=size, default=(None, None), metavar="WxH", help=f"{said} (default: the checkpoint's)")
        return
    if option.name in ("loras", "controls"):
        group.add_argument(
            *flags, dest=option.name, type=option.kind.parse, action="append", metavar=option.metavar, help=option.help
        )
        return
    shown = f" (default: {option.default})" if option.default not in (None, "", (0, 0)) else ""
    if option.kind is FLAG:
        group.add_argument(
            *flags, dest=option.name, default=option.default, action=argparse.BooleanOptionalAction, help=option.help
        )
        return
    group.add_argument(
        *flags, dest=option.name, type=size if option.kind is PAIR else option.kind.parse, default=option.default,
        metavar=option.metavar, help=(also or option.help) + shown,
    )  # fmt: skip


def request_of(prompt: str, args: argparse.Namespace) -> Request:
    """What the options of `add_options` ask for."""
    from ..request import Request

    width, height = args.size
    given = {name: getattr(args, name) for name in OPTIONS if hasattr(args, name)}
    return Request(prompt, width=width, height=height, **given)


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
    taken = {os.path.realpath(path) for path in inputs if path}  # Path.resolve raises where links lead in a circle
    for path in outputs:
        if (target := os.path.realpath(path)) in taken:
            raise UsageError(f"output {path}: expected a name of its own, found one that is read or written before")
        taken.add(target)


# What Python calls an argument, and what the command line does.
FLAGS = {option.name: option.flag for option in OPTIONS.values() if option.flag}
LOADING, MERGING = ("device", "dtype", "prediction", "fp8"), ("method", "base", "blocks", "density", "ratio", "name")
ELSEWHERE = ("ray", "shard", "workers", "bound", "words", "layer", "target", "jobs", "size")
FLAGS |= {name: f"--{name}" for name in (*LOADING, *MERGING, *ELSEWHERE)}
FLAGS |= {"from_step": "--from-step", "zero_snr": "--zero-snr", "axis": "--x, --y"}
FLAGS |= {f"control_{name}": f"--control-{name}" for name in ("preprocess", "kind", "where", "range", "guess")}


def one_line(error: Any) -> str:
    """An error's text; that of a UsageError, which begins with the name of an argument, with the name of the option."""
    text = " ".join(str(error).split())
    return with_flags(text) if isinstance(error, UsageError) else text


def with_flags(text: str) -> str:
    """A text that begins with the name of an argument, with that of the option."""
    text = re.sub(r"^\w+(?=:| )", lambda name: FLAGS.get(name[0], name[0]), text)
    return text.replace("an init_image", "--init PICTURE")
