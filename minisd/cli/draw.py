"""`minisd "PROMPT"`, or in full `minisd draw "PROMPT"`."""

from __future__ import annotations

import argparse
import json
import math
import re
import sys
import time
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import MinisdError, UsageError
from ..options import ADDONS
from .options import (
    Parser,
    add_device,
    add_fp8,
    add_options,
    add_training,
    check_distinct,
    check_output,
    one_line,
    request_of,
    undisturbed,
)

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..result import Result, Step


# What the checkpoints in the box were taught to draw (scripts/tiny_world.py).
KNOWN = {"circle", "square", "triangle", "star", "heart", "cross", "ring", "diamond"}


def parser() -> Parser:
    made = Parser(prog="minisd draw", description="Draw a picture with a Stable Diffusion checkpoint.")
    made.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    made.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="where to, over what is there (default: out.png, or the next free out-2.png, …)",
    )
    made.add_argument("--grid", type=Path, metavar="PNG", help="also all of them in one picture")
    made.add_argument("--preview", type=Path, metavar="PNG", help="show the picture in the making in this file, step by step")
    add_files(made)
    add_options(made)
    add_controls(made)
    add_device(made)
    return made


def add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("model files")
    files.add_argument("-m", "--model", metavar="FILE", help="a checkpoint, or its name in minisd models (default: tiny)")
    files.add_argument(
        "--vae", metavar="FILE", action="append", help="the VAE of another file; TAESD's two halves: --vae A --vae B"
    )
    files.add_argument("--refiner", metavar="FILE", help="a second checkpoint that finishes what the first began")
    files.add_argument("--ema", action="store_true", help="draw with the moving average of the weights, where the file has it")
    add_fp8(files)
    files.add_argument("--strict", action="store_true", help="refuse a checkpoint with tensors that nothing asks for")
    add_training(files)


# What is said of every control by an option of its own, once for all or once for each: by the field of Control.
OF_CONTROLS = {
    "preprocess": "what makes the hint of that picture: canny, invert, blur, tile or none (default: none)",
    "kind": "of a ControlNet Union, what that picture is: openpose, depth, hed, canny, … (default: what is preprocessed)",
    "where": "the side of guidance that is asked with it: both, positive or negative (default: both)",
    "range": "what its start and end count: steps, or noise levels as ComfyUI has it: noise (default: steps)",
}


def add_controls(parser: argparse.ArgumentParser) -> None:
    group = next(group for group in parser._action_groups if group.title == ADDONS)
    group.add_argument("--control-image", action="append", metavar="PICTURE", help="what it follows; one for each --control")
    for name, said in OF_CONTROLS.items():
        group.add_argument(f"--control-{name}", action="append", metavar="NAME", help=said)
    group.add_argument("--control-guess", action="store_true", help="guess mode: the picture counts more than the words")


def controls_of(args: argparse.Namespace) -> list[Any]:
    """The controls that the options name, each with its picture.  Raises UsageError, CheckpointError."""
    from ..addons.controls.control import Control
    from ..library.names import resolve

    named, images = args.controls or [], args.control_image or []
    if len(images) != len(named):
        found = f"{len(named)} --control and {len(images)} --control-image"
        raise UsageError(f"controls: expected a picture for each, found {found}")
    if args.control_guess and not named:
        raise UsageError("control_guess: expected a --control that it is about, found none")
    said: list[dict[str, Any]] = [{"guess": args.control_guess} for _ in named]
    for name in OF_CONTROLS:
        values = getattr(args, f"control_{name}") or []
        if len(values) not in {0, min(1, len(named)), len(named)}:
            raise UsageError(f"control_{name}: expected one for all {len(named)} --control, or one for each, found {len(values)}")
        for each, value in zip(said, values if len(values) == len(named) else values * len(named), strict=False):
            each |= {name: value} if value != "none" else {}
    return [
        Control(**{**each, "source": resolve(each["source"], "controlnet")}, image=image, **more)
        for each, image, more in zip(named, images, said, strict=True)
    ]


def parse(argv: Sequence[str]) -> argparse.Namespace:
    made = parser()
    args, more = made.parse_known_args(argv)
    if more:  # often words of a prompt without quotes
        options = [word for word in more if word.startswith("-")]
        close = [match for word in options for match in get_close_matches(word, made._option_string_actions, 1)]
        meant = f"; did you mean {close[0]}?" if close else ""
        found = f"expected one text, found more words, {' '.join(more)!r}: put the prompt into quotes"
        made.error(f"unrecognized arguments: {' '.join(more)}{meant}" if options else found)
    return args


def draw(args: argparse.Namespace) -> int:
    output = settled_output(args)
    from ..warmup.starting import begin_early

    if not args.offload:  # which draws by other kernels
        begin_early(args.model, args.device, args.dtype, args.size, args.fp8)  # torch, which is imported next, takes seconds
    from ..fast.operations import attentions_of
    from ..pictures.grids import grid
    from ..pictures.image import save_png
    from ..pipeline import load
    from ..result import Interrupted, with_bar
    from ..workbench.teaching import teach

    args.controls = controls_of(args)
    common: dict[str, Any] = {"device": args.device, "dtype": args.dtype, "offload": args.offload, "strict": args.strict}
    own: dict[str, Any] = {name: getattr(args, name) for name in ("vae", "prediction", "zero_snr", "ema", "fp8")}
    pipe = load(args.model, **own, **common)
    args.refiner = load(args.refiner, **common) if args.refiner else None
    request = request_of(args.prompt, args)
    teach([each for each in (pipe, args.refiner) if each], request)
    look = Preview(pipe, args.preview) if args.preview else None
    steps = pipe.stream(request)
    tell_what_it_knows(args.prompt, pipe.checkpoint.path)
    if args.debug:
        print(f"minisd: attention by {attentions_of(pipe.unet)}", file=sys.stderr)
    try:
        result = with_bar(steps, look, hidden=None)
    except (Interrupted, MinisdError) as stop:
        if stop.result is not None:
            report(stop.result, output, args)
            print(f"minisd: of {args.num_images} pictures {len(stop.result.images)} are finished", file=sys.stderr)
        raise
    status = report(result, output, args)
    if args.grid:
        save_png(grid(result.images), args.grid, as_grid(result))
    return status


def tell_what_it_knows(prompt: str, checkpoint: Path) -> None:
    """Says what the checkpoints in the box know, where a prompt names no shape that they do."""
    words = re.findall(r"\w+", prompt.lower())
    if in_box(checkpoint) and not KNOWN & {word.removesuffix(end) for word in words for end in ("", "s", "es")}:
        print(
            "minisd: the tiny checkpoint in the box knows eight shapes (a circle, a star, …) in ten colours and nothing else; "
            "-m FILE draws with a real model",
            file=sys.stderr,
        )


def in_box(checkpoint: Path) -> bool:
    from ..library.places import tiny_checkpoint

    tiny = tiny_checkpoint()
    return checkpoint.resolve() in (tiny.resolve(), tiny.with_name("tiny-lit.safetensors").resolve())


def settled_output(args: argparse.Namespace) -> Path:
    """Where the pictures go, once every name is found to be free for it.  Raises UsageError, OutputError."""
    output = check_output(args.output, Path("out.png"))
    from ..options import MAX_IMAGES
    from ..result import numbered_paths

    own = numbered_paths(args.output, min(args.num_images, MAX_IMAGES)) if args.output else []
    named = [*own, *(path for path in (args.grid, args.preview) if path)]
    for path in named:
        check_output(path, path)
    check_distinct(named, [args.init_image, args.mask, *(args.control_image or [])])
    if args.grid and not args.output and re.fullmatch(r"out(-\d+)?\.png", args.grid.name):
        raise UsageError(f"--grid {args.grid}: is a name that pictures take when nobody names them; choose another, or give -o")
    return output


def as_grid(result: Result) -> dict[str, Any]:
    """The recipe of a grid: that of its first picture, and how many there are."""
    return result.metadata[0] | {"grid": len(result.images)}


class Preview:
    """Shows the picture in the making in a file, no more often than the eye wants."""

    def __init__(self, pipe: Pipeline, path: Path) -> None:
        self.pipe, self.path, self.drawn = pipe, path, time.monotonic()

    def __call__(self, step: Step) -> None:
        from ..pictures.image import save_png

        if time.monotonic() - self.drawn >= 0.5:  # seconds
            try:
                save_png(self.pipe.preview(step.denoised)[0], self.path, None)
            except MinisdError as error:  # the picture itself may still come out
                warnings.warn(f"no previews: {one_line(error)}", stacklevel=2)
                self.drawn = math.inf
                return
            self.drawn = time.monotonic()


def report(result: Result, output: Path, args: argparse.Namespace) -> int:
    paths = []
    with undisturbed():  # what is drawn is written, and said, before Ctrl-C has its way
        for path in result.saved(output, replace=args.output is not None):
            paths.append(str(path))
            if not args.json:
                print(path)
        if args.json:
            print(json.dumps({"images": paths, "seeds": result.seeds, "metadata": result.metadata}))
    return 0
