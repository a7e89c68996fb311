"""The command line.  Every command is a thin call of a Python function, imported when it is needed: --help stays fast.

stdout carries data (the path of a picture, JSON), everything else goes to stderr.  Exit codes: 0 done, 1 other errors,
2 wrong usage, 3 bad checkpoint, 4 out of memory, 5 NaN, 6 output could not be written, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from . import __version__
from .errors import MinisdError

if TYPE_CHECKING:
    from .pipeline import Pipeline, Result, Step

Outcome = TypeVar("Outcome")  # what a generator of steps returns

EPILOG = """\
commands:
  minisd "PROMPT" [...]       draw (also: minisd draw "PROMPT")
  minisd again PICTURE.png    make a picture again from the recipe that it carries
  minisd inspect FILE         what a checkpoint is, and why, from its header alone
  minisd merge A B -o OUT     mix two checkpoints
  minisd convert FILE -o OUT  write it anew as .safetensors: another dtype, pruned, with another VAE
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
    parser = argparse.ArgumentParser(
        prog="minisd",
        description="Draw a picture with a Stable Diffusion checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    parser.add_argument("-n", "--negative", default="", metavar="TEXT", help="what it should not show")
    parser.add_argument(
        "-o", "--output", type=Path, metavar="PNG", help="where to (default: out.png, or the next free out-2.png, …)"
    )
    parser.add_argument("--steps", type=int, default=20, metavar="N", help="denoising steps (default: 20)")
    parser.add_argument("--cfg", type=float, default=7.5, metavar="W", help="guidance scale; 1 turns guidance off (default: 7.5)")
    parser.add_argument("--sampler", default="euler", metavar="NAME", help="euler or ddim (default: euler)")
    parser.add_argument(
        "--seed", type=int, metavar="N", help="makes the picture repeatable; picture i has seed N + i (default: random)"
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


def draw(argv: Sequence[str]) -> int:
    args = draw_parser().parse_args(argv)
    output = args.output or free_path(Path("out.png"))
    for path in (output, args.grid, args.preview):
        if path:
            check_output(path)
    from .image import grid, save_png
    from .pipeline import load
    from .request import Request

    pipe = load(args.model, args.device, args.dtype, args.vae, args.prediction, args.offload, args.ema)
    refiner = load(args.refiner, args.device, args.dtype, offload=args.offload) if args.refiner else None
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
    look = Preview(pipe, args.preview) if args.preview else None
    result = with_progress(pipe.stream(request, refiner), look)
    status = report(result, output, args.json)
    if args.grid:
        save_png(grid(result.images), args.grid, result.metadata[0])
    return status


def again(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisd again", description="Make a picture again from the recipe in its minisd chunk.")
    parser.add_argument("picture", type=Path, metavar="PICTURE.png")
    parser.add_argument("-m", "--model", metavar="FILE", help="the checkpoint, where it is no longer at the recorded path")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="where to (default: PICTURE-again.png)")
    add_device(parser)
    args = parser.parse_args(argv)
    from .recipe import read_recipe, repeat

    recipe = read_recipe(args.picture)
    if "compare" in recipe:
        from .cli_models import compare_again

        return compare_again(recipe, args)
    output = args.output or free_path(args.picture.with_stem(f"{args.picture.stem}-again"))
    check_output(output)
    from .pipeline import load

    common: dict[str, Any] = {"device": args.device or recipe.get("device"), "dtype": args.dtype or recipe.get("dtype")}
    common |= {"offload": args.offload}
    files: dict[str, Any] = {
        "vae": recipe.get("vae_path"),
        "prediction": recipe.get("prediction"),
        "ema": recipe.get("ema") is True,
    }
    pipe = load(args.model or recipe.get("model_path"), **common, **files)
    refiner = load(recipe["refiner_path"], **common) if recipe.get("refiner_path") else None
    return report(with_progress(pipe.stream(repeat(recipe, pipe.checkpoint.path), refiner)), output, args.json)


def inspect(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="minisd inspect", description="What a checkpoint is, from its header alone.")
    parser.add_argument("file", metavar="FILE")
    parser.add_argument("--check", action="store_true", help="also look for NaN and infinity (reads the whole file)")
    parser.add_argument("--hash", action="store_true", help="also the model hash (reads the whole file)")
    add_output_options(parser)
    args = parser.parse_args(argv)
    from .inspection import as_text, inspect
    from .library import resolve

    facts = inspect(resolve(args.file), args.hash, args.check)
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0


def convert(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="minisd convert", description="Write a checkpoint anew as .safetensors: another dtype, pruned, with another VAE."
    )
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt checkpoint")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: what the file has)")
    parser.add_argument("--prune", action="store_true", help="leave out what nobody needs to draw")
    parser.add_argument("--vae", metavar="FILE", help="with the VAE of this file")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from .device import DTYPES
    from .errors import UsageError
    from .library import resolve
    from .saving import convert

    if args.dtype and args.dtype not in DTYPES:
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {args.dtype!r}")
    vae = resolve(args.vae, "vae") if args.vae else None
    print(convert(resolve(args.file), args.output, DTYPES.get(args.dtype), args.prune, vae))
    return 0


def merge(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="minisd merge",
        description="Mix two checkpoints: (1 - R) A + R B, or with --base C what B learned since C on top: A + R (B - C).",
    )
    parser.add_argument("a", metavar="A", help="decides keys, dtype and metadata")
    parser.add_argument("b", metavar="B")
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors")
    parser.add_argument("--ratio", type=float, default=0.5, metavar="R", help="how much of B (default: 0.5)")
    parser.add_argument("--base", metavar="C", help="add the difference of B to this one")
    for part, what in (("unet", "UNet"), ("text", "text encoders"), ("vae", "VAE")):
        parser.add_argument(f"--{part}-ratio", type=float, metavar="R", help=f"another ratio for the {what}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    from .library import resolve
    from .merging import PARTS, merge

    by_part = {part: value for part in PARTS if (value := getattr(args, f"{part}_ratio")) is not None}
    base = resolve(args.base) if args.base else None
    print(merge(resolve(args.a), resolve(args.b), args.output, args.ratio, base, by_part))
    return 0


def compare(argv: Sequence[str]) -> int:
    from .cli_models import compare

    return compare(argv)


def models(argv: Sequence[str]) -> int:
    from .cli_models import models

    return models(argv)


def bench(argv: Sequence[str]) -> int:
    from .bench import main

    return main(argv)


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "draw": draw,
    "again": again,
    "inspect": inspect,
    "convert": convert,
    "merge": merge,
    "compare": compare,
    "models": models,
    "bench": bench,
}


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


class Preview:
    """Shows the picture in the making in a file, no more often than the eye wants."""

    def __init__(self, pipe: Pipeline, path: Path) -> None:
        self.pipe, self.path, self.drawn = pipe, path, time.monotonic()

    def __call__(self, step: Step) -> None:
        from .image import save_png

        if time.monotonic() - self.drawn >= 0.5:  # seconds
            save_png(self.pipe.preview(step.denoised)[0], self.path, None)
            self.drawn = time.monotonic()


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
