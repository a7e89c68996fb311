"""The command line.  Every command is a thin call of a Python function, imported when it is needed: --help stays fast.

stdout carries data (the path of a picture, JSON), everything else goes to stderr.  Exit codes: 0 done, 1 other errors,
2 wrong usage, 3 bad checkpoint, 4 out of memory, 5 NaN, 6 output could not be written, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import __version__
from .errors import MinisdError

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result
    from .request import Request

EPILOG = """\
commands:
  minisd "PROMPT" [...]       draw (also: minisd draw "PROMPT")
  minisd again PICTURE.png    make a picture again from the recipe that it carries
  minisd inspect FILE         what a checkpoint is, from its header alone

examples:
  minisd "a red circle on a blue background"
  minisd "a photograph of an astronaut riding a horse" -m v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
"""


def draw_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minisd",
        description="Draw a picture with a Stable Diffusion checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument(
        "-m", "--model", metavar="FILE", help="a single-file SD 1.x checkpoint (default: the tiny one in the box)"
    )
    parser.add_argument("-n", "--negative", default="", metavar="TEXT", help="what it should not show")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PNG", help="where to (default: out.png, or the next free out-2.png, …)"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--cfg", type=float, default=7.5, metavar="W", help="guidance scale; 1 turns guidance off (default: 7.5)")
    parser.add_argument("--sampler", default="euler", metavar="NAME", help="euler or ddim (default: euler)")
    parser.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="0 to 1: noise that ddim adds back at each step (default: 0)"
    )
    parser.add_argument(
        "--spacing", metavar="NAME", help="noise levels: linspace, leading or trailing (default: the sampler's own)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the picture repeatable; picture i has seed N + i (default: random)"
    )
    parser.add_argument(
        "--size", type=size, default=(None, None), metavar="WxH", help="pixels, multiples of 8 (default: the checkpoint's)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures to draw (default: 1)")
    parser.add_argument("--ema", action="store_true", help="draw with the moving average of the weights, where the file has it")
    add_device(parser)
    parser.add_argument("--version", action="version", version=f"minisd {__version__}")
    return parser


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument(
        "--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: the fastest that the device computes well)"
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


def draw(argv: Sequence[str]) -> int:
    args = draw_parser().parse_args(argv)
    output = args.output or free_path(Path("out.png"))
    check_output(output)
    from .pipeline import load
    from .request import Request

    pipe = load(args.model, args.device, args.dtype, args.ema)
    request = Request(
        prompt=args.prompt,
        negative_prompt=args.negative,
        width=args.size[0],
        height=args.size[1],
        steps=args.steps,
        guidance_scale=args.cfg,
        sampler=args.sampler,
        seed=args.seed,
        num_images=args.num_images,
        eta=args.eta,
        spacing=args.spacing,
    )
    return report(with_progress(pipe, request), output, args.json)


def again(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisd again", description="Make a picture again from the recipe in its minisd chunk.")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    parser.add_argument("-m", "--model", metavar="FILE", help="the checkpoint, where it is no longer at the recorded path")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="where to (default: PICTURE-again.png)")
    add_device(parser)
    args = parser.parse_args(argv)
    from .recipe import read_recipe, repeat

    recipe = read_recipe(args.picture)
    output = args.output or free_path(args.picture.with_stem(f"{args.picture.stem}-again"))
    check_output(output)
    from .pipeline import load

    device, dtype = args.device or recipe.get("device"), args.dtype or recipe.get("dtype")
    pipe = load(args.model or recipe.get("model_path"), device, dtype, recipe.get("ema") is True)
    return report(with_progress(pipe, repeat(recipe, pipe.checkpoint.path)), output, args.json)


def inspect(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisd inspect", description="What a checkpoint is, from its header alone.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--hash", action="store_true", help="also the model hash (reads the whole file)")
    add_output_options(parser)
    args = parser.parse_args(argv)
    from .inspection import as_text, inspect

    facts = inspect(args.file, args.hash)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {"draw": draw, "again": again, "inspect": inspect}


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


def with_progress(pipe: Pipeline, request: Request) -> Result:
    """Runs a request with a bar on stderr that shows the time per step; no bar where stderr is no terminal."""
    from tqdm import tqdm

    steps = pipe.stream(request)
    look = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_inv_fmt}]"
    with tqdm(desc="drawing", unit="step", bar_format=look, disable=None) as bar:
        while True:
            try:
                bar.total = next(steps).total
                bar.update()
            except StopIteration as stop:
                return stop.value  # type: ignore[no-any-return]


def report(result: Result, output: Path, as_json: bool) -> int:
    paths = [str(path) for path in result.save(output)]
    if as_json:
        print(json.dumps({"images": paths, "seeds": result.seeds, "metadata": result.metadata}))
    else:
        print("\n".join(paths))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = lambda message, *_: print(f"minisd: warning: {message}", file=sys.stderr)
    try:
        command = COMMANDS.get(arguments[0]) if arguments else None
        return command(arguments[1:]) if command else draw(arguments)
    except MinisdError as error:
        if "--debug" in arguments:
            raise
        print(f"minisd: error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("minisd: interrupted; nothing was written", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it exits
        return 141


def one_line(error: Any) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
