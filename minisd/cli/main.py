"""The command line.  Every command is a thin call of a Python function, imported when it is needed: --help stays fast.

stdout carries data (the path of a picture, JSON), everything else goes to stderr.  Exit codes: 0 done, 1 other errors,
2 wrong usage, 3 bad checkpoint, 4 out of memory, 5 NaN, 6 output could not be written, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import MinisdError, OutputError, UsageError
from .bench import bench
from .files import convert, diff, inspect, merge, save
from .models import compare, compare_again, models
from .options import Parser, add_device, check_distinct, check_output, one_line, size, undisturbed, with_progress

if TYPE_CHECKING:
    from ..pipeline import Pipeline
    from ..request import Request
    from ..result import Result, Step

EPILOG = """\
commands:
  minisd "PROMPT" [...]       draw (also: minisd draw "PROMPT")
  minisd again PICTURE.png    make a picture again from the recipe that it carries
  minisd inspect FILE         what a checkpoint is, and why, from its header alone
  minisd diff A B             what is different between two checkpoints, and how much
  minisd merge A B -o OUT     mix checkpoints
  minisd convert FILE -o OUT  write it anew as .safetensors: another dtype, pruned, with another VAE
  minisd save -m FILE         put a checkpoint together from parts, under the next free number
  minisd compare "PROMPT" …   checkpoints against seeds, or over other settings: one picture
  minisd models               what models there are on this machine, and their short names
  minisd models add FILE      import one
  minisd bench WHAT           how fast this machine draws, beside its limits and diffusers

examples:
  minisd "a red circle on a blue background"
  minisd "a photograph of an astronaut riding a horse" -m v1-5-pruned-emaonly.safetensors --steps 30 --seed 7
  minisd "the same in winter" -m sd_xl_base_1.0.safetensors --refiner sd_xl_refiner_1.0.safetensors --init photo.jpg
"""


def draw_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="minisd",
        description="Draw a picture with a Stable Diffusion checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument("-n", "--negative", default="", metavar="TEXT", help="what it should not show")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="PNG",
        help="where to, over what is there (default: out.png, or the next free out-2.png, …)",
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--cfg", type=float, default=7.5, metavar="W", help="guidance scale; 1 turns guidance off (default: 7.5)")
    parser.add_argument("--sampler", default="euler", metavar="NAME", help="euler or ddim (default: euler)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the picture repeatable; picture i has seed N + i (default, and -1: random)"
    )
    parser.add_argument(
        "--size", type=size, default=(None, None), metavar="WxH", help="pixels, multiples of 8 (default: the checkpoint's)"
    )
    parser.add_argument("--num-images", type=int, default=1, metavar="N", help="pictures to draw (default: 1)")
    parser.add_argument("--grid", type=Path, metavar="PNG", help="also all of them in one picture")
    parser.add_argument("--preview", type=Path, metavar="PNG", help="show the picture in the making in this file, step by step")
    parser.add_argument("--version", action="version", version=f"minisd {__version__}")
    add_files(parser)
    add_init(parser)
    add_finer(parser)
    add_sizes(parser)
    add_device(parser)
    return parser


def add_files(parser: argparse.ArgumentParser) -> None:
    files = parser.add_argument_group("model files")
    files.add_argument("-m", "--model", metavar="FILE", help="a checkpoint, or its name in minisd models (default: tiny)")
    files.add_argument(
        "--vae", metavar="FILE", action="append", help="the VAE of another file; TAESD's two halves: --vae A --vae B"
    )
    files.add_argument("--refiner", metavar="FILE", help="a second checkpoint that finishes what the first began")
    files.add_argument(
        "--high-noise-frac", type=float, default=0.8, metavar="F", help="the part that the first draws (default: 0.8)"
    )
    files.add_argument("--ema", action="store_true", help="draw with the moving average of the weights, where the file has it")
    files.add_argument("--prediction", metavar="NAME", help="epsilon or v, where the file does not say which")


def add_init(parser: argparse.ArgumentParser) -> None:
    init = parser.add_argument_group("starting from a picture")
    init.add_argument("--init", metavar="PICTURE", help="draw over this picture, edit it, or paint into it")
    init.add_argument(
        "--strength", type=float, metavar="S", help="0 to 1: how much of it may change (default: 0.8; 1 under a mask)"
    )
    init.add_argument("--mask", metavar="PICTURE", help="white where to paint, black where to keep")
    init.add_argument(
        "--image-cfg", type=float, default=1.5, metavar="W", help="how closely an editing model keeps to it (default: 1.5)"
    )


def add_finer(parser: argparse.ArgumentParser) -> None:
    finer = parser.add_argument_group("finer control")
    finer.add_argument(
        "--eta", type=float, default=0.0, metavar="E", help="0 to 1: noise that ddim adds back at each step (default: 0)"
    )
    finer.add_argument(
        "--spacing",
        metavar="NAME",
        help="noise levels: linspace, leading, trailing, karras or exponential (default: the checkpoint's or sampler's own)",
    )
    finer.add_argument("--clip-skip", type=int, metavar="N", help="1: the text encoder's last layer, 2: the one before it, …")
    finer.add_argument(
        "--rescale", type=float, default=0.0, metavar="R", help="0 to 1: against the glare of strong guidance (default: 0)"
    )


def add_sizes(parser: argparse.ArgumentParser) -> None:
    sizes = parser.add_argument_group("what SDXL is told")
    sizes.add_argument("--original-size", type=size, metavar="WxH", help="size before cropping (default: the picture's)")
    sizes.add_argument("--crop", type=size, default=(0, 0), metavar="LxT", help="left and top of the crop (default: 0x0)")
    sizes.add_argument("--target-size", type=size, metavar="WxH", help="size after cropping (default: the picture's)")
    sizes.add_argument(
        "--zero-negative",
        action=argparse.BooleanOptionalAction,
        help="an empty negative prompt is all zeros, not the encoding of no words (default: as SDXL was trained, zeros)",
    )
    sizes.add_argument("--aesthetic", type=float, default=6.0, metavar="S", help="0 to 10, what the refiner aims at (default: 6)")


def draw(argv: Sequence[str]) -> int:
    parser = draw_parser()
    args, more = parser.parse_known_args(argv)
    if more:
        parser.error(unexpected(argv[0], more))
    if close := get_close_matches(args.prompt, COMMANDS, 1, cutoff=0.8):
        warnings.warn(f"drawing {args.prompt!r}; did you mean the command {close[0]}?", stacklevel=2)
    output = settled_output(args)
    from ..pictures.grids import grid
    from ..pictures.image import save_png
    from ..pipeline import load
    from ..result import Interrupted

    pipe = load(args.model, args.device, args.dtype, args.vae, args.prediction, args.offload, args.ema)
    refiner = load(args.refiner, args.device, args.dtype, offload=args.offload) if args.refiner else None
    look = Preview(pipe, args.preview) if args.preview else None
    try:
        result = with_progress(pipe.stream(request_of(args), refiner), look)
    except (Interrupted, MinisdError) as stop:
        if stop.result is not None:
            report(stop.result, output, args)
            print(f"minisd: of {args.num_images} pictures {len(stop.result.images)} are finished", file=sys.stderr)
        raise
    status = report(result, output, args)
    if args.grid:
        save_png(grid(result.images), args.grid, as_grid(result))
    return status


def settled_output(args: argparse.Namespace) -> Path:
    """Where the pictures go, once every name is found to be free for it.  Raises UsageError, OutputError."""
    output = check_output(args.output, Path("out.png"))
    from ..request import MAX_IMAGES
    from ..result import numbered_paths

    own = numbered_paths(args.output, min(args.num_images, MAX_IMAGES)) if args.output else []
    named = [*own, *(path for path in (args.grid, args.preview) if path)]
    for path in named:
        check_output(path, path)
    check_distinct(named, [args.init, args.mask])
    if args.grid and not args.output and re.fullmatch(r"out(-\d+)?\.png", args.grid.name):
        raise UsageError(f"--grid {args.grid}: is a name that pictures take when nobody names them; choose another, or give -o")
    return output


def request_of(args: argparse.Namespace) -> Request:
    from ..request import Request

    return Request(
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
        guidance_rescale=args.rescale,
        clip_skip=args.clip_skip,
        init_image=args.init,
        strength=args.strength,
        mask=args.mask,
        image_guidance_scale=args.image_cfg,
        high_noise_frac=args.high_noise_frac,
        zero_negative=args.zero_negative,
        original_size=args.original_size,
        crop=args.crop,
        target_size=args.target_size,
        aesthetic_score=args.aesthetic,
    )


def unexpected(first: str, more: Sequence[str]) -> str:
    """What to say of arguments that are left over: often words of a prompt without quotes, or a command that is misspelt."""
    if any(word.startswith("-") for word in more):
        return f"unrecognized arguments: {' '.join(more)}"
    close = get_close_matches(first, COMMANDS, 1)
    advice = f"did you mean the command {close[0]}?" if close else "put the prompt into quotes"
    return f"expected one text, found more words, {' '.join(more)!r}: {advice}"


def again(argv: Sequence[str]) -> int:
    parser = Parser(prog="minisd again", description="Make a picture again from the recipe in its minisd chunk.")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    parser.add_argument("-m", "--model", metavar="FILE", help="the checkpoint, where it is no longer at the recorded path")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="where to (default: PICTURE-again.png)")
    add_device(parser)
    args = parser.parse_args(argv)
    from ..pictures.metadata import read_recipe
    from ..request import repeat

    recipe = read_recipe(args.picture)
    if "compare" in recipe:
        return compare_again(recipe, args)
    output = check_output(args.output, args.picture.with_stem(f"{args.picture.stem}-again"))
    from ..pictures.grids import grid
    from ..pipeline import load

    common: dict[str, Any] = {"device": args.device or recipe.get("device"), "dtype": args.dtype or recipe.get("dtype")}
    common |= {"offload": args.offload}
    files: dict[str, Any] = {
        "vae": recipe.get("vae_path"),
        "prediction": recipe.get("prediction"),
        "ema": recipe.get("ema") is True,
    }
    pipe = load(args.model or recipe.get("model_path"), **common, **files)
    refiner = load(recipe["refiner_path"], **common) if recipe.get("refiner_path") else None
    result = with_progress(pipe.stream(repeat(recipe, pipe.checkpoint.path), refiner))
    if "grid" in recipe:
        sheet = grid(result.images)
        result = replace(result, images=[sheet], seeds=result.seeds[:1], metadata=[as_grid(result)])
    return report(result, output, args)


def as_grid(result: Result) -> dict[str, Any]:
    """The recipe of a grid: that of its first picture, and how many there are."""
    return result.metadata[0] | {"grid": len(result.images)}


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "draw": draw,
    "again": again,
    "inspect": inspect,
    "save": save,
    "convert": convert,
    "merge": merge,
    "diff": diff,
    "compare": compare,
    "models": models,
    "bench": bench,
}


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


def main(argv: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115  # closed by the caller: 2>&-
    warnings.showwarning = lambda message, *_: print(f"minisd: warning: {message}", file=sys.stderr)
    try:
        command = COMMANDS.get(arguments[0]) if arguments else None
        status = command(arguments[1:]) if command else draw(["--help"] if arguments == ["help"] else arguments)
        sys.stdout.flush()
        return status
    except MinisdError as error:
        if "--debug" in arguments:
            raise
        print(f"minisd: error: {one_line(error)}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("minisd: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains while it exits
        return 141
    except OSError as error:
        # Files that are read or written have errors of their own, and a name: what has none is standard output.
        if "--debug" in arguments or error.filename is not None:
            raise
        print(f"minisd: error: standard output could not be written: {error.strerror}", file=sys.stderr)
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OutputError.exit_code


if __name__ == "__main__":
    sys.exit(main())
