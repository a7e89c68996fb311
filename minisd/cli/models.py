"""The commands about several models, `minisd models` and `minisd compare`.  Each is a thin call of a Python function."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .options import Parser, add_device, add_options, add_output_options, check_output, one_line, request_of

if TYPE_CHECKING:
    from ..workbench.comparing import Cells


def numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 1,2,3, found {text!r}") from None


def compare_parser() -> Parser:
    parser = Parser(
        prog="minisd compare",
        description="Draw a prompt in every combination of two things that change: one labelled picture.",
        epilog="Without --x and --y, checkpoints are columns and seeds rows.  What changes: model, seed, sampler, steps or cfg.",
    )
    parser.add_argument("prompt", metavar="PROMPT")
    parser.add_argument(
        "-m", "--model", metavar="FILE", action="append", help="a checkpoint, or its name; -m A -m B compares two"
    )
    parser.add_argument("--seeds", type=numbers, default=[], metavar="N,N,…", help="(default: one, at random, for all)")
    parser.add_argument("--x", metavar="WHAT=A,B,…", help="what changes from column to column, such as sampler=ddim,euler")
    parser.add_argument("--y", metavar="WHAT=A,B,…", help="what changes from row to row, such as cfg=3,7")
    parser.add_argument("-o", "--output", type=Path, metavar="PNG", help="where to (default: compare.png, or the next free)")
    add_options(parser, ("negative_prompt", "steps", "guidance_scale", "sampler", "width"), also="of all")
    add_device(parser)
    return parser


def compare(args: argparse.Namespace) -> int:
    output = check_output(args.output, Path("compare.png"))
    from ..workbench.comparing import Axis, settle_cells

    seeds, args.seeds = args.seeds, "rising"
    x, y = (Axis.parse(text) if text else None for text in (args.x, args.y))
    for option, given, name in (("-m", args.model, "model"), ("--seeds", seeds, "seed")):
        if given and name in [axis.name for axis in (x, y) if axis]:
            raise UsageError(f"{option}: expected none beside an axis of {name}s, found {', '.join(map(str, given))}")
    return draw_cells(settle_cells(request_of(args.prompt, args), args.model or [None], seeds, x, y), output, args)


def compare_again(recipe: dict[str, Any], output: Path, args: argparse.Namespace) -> int:
    from ..workbench.comparing import cells_again

    given = [flag for flag, value in (("--vae", args.vae), ("--refiner", args.refiner), ("--init", args.init_image)) if value]
    if given or args.mask:
        raise UsageError(f"{(given or ['--mask'])[0]}: expected none, as the picture is a comparison")
    if args.model:
        raise UsageError("-m: expected none, as the picture is a comparison, which names its checkpoints itself")
    args.device, args.dtype = args.device or recipe.get("device"), args.dtype or recipe.get("dtype")
    return draw_cells(cells_again(recipe), output, args)


def draw_cells(cells: Cells, output: Path, args: argparse.Namespace) -> int:
    """Draws, writes and reports a comparison.  The exit code is that of the first cell that has no picture, if any."""
    from ..pipeline import Pipeline, load
    from ..result import with_bar
    from ..workbench.comparing import stream
    from ..workbench.teaching import teach

    def loaded(model: Path) -> Pipeline:
        pipe = load(model, device=args.device, dtype=args.dtype, offload=args.offload)
        teach([pipe], max(cells.requests, key=lambda request: request.steps))  # all have one prompt
        return pipe

    done = with_bar(stream(cells, loaded), hidden=None)
    path = str(done.save(output, replace=args.output is not None))
    failures = [failure for failure in done.failures if failure]
    facts = {"image": path, "recipe": done.recipe, "cells": done.metadata, "failures": list(map(str, failures))}
    print(json.dumps(facts) if args.json else path)
    for text in dict.fromkeys(map(one_line, failures)):
        print(f"minisd: error: {text}", file=sys.stderr)
    return failures[0].exit_code if failures else 0


def models_parser() -> Parser:
    parser = Parser(
        prog="minisd models",
        description="The models on this machine: name, kind, what it is, size, model hash where known, path.",
        epilog="minisd models add FILE [--name NAME] [--folder FOLDER] imports one: checked first, never executed.",
    )
    parser.add_argument("what", nargs="?", choices=["list", "add"], help=argparse.SUPPRESS)
    parser.add_argument("--hash", action="store_true", help="also the hashes that are not known yet (reads those files)")
    parser.add_argument("--all", action="store_true", help="also the files that minisd cannot use, and why")
    add_output_options(parser)
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    if argv[:1] == ["add"]:
        return add_parser().parse_args(argv[1:], argparse.Namespace(what="add"))
    parser = models_parser()
    if argv[:1] and not argv[0].startswith("-") and argv[0] != "list":
        parser.error(f"expected nothing, list, or add FILE, found {argv[0]!r}; to remove a model, delete its file")
    return parser.parse_args(argv)


def models(args: argparse.Namespace) -> int:
    if args.what == "add":
        return add_model(args)
    from ..library.names import as_text, list_models, places_shown
    from ..library.places import searched

    found = list_models(args.hash)
    listed = [model for model in found if args.all or model.kind != "other"]
    if args.json:
        entries = [vars(model) | {"path": str(model.path)} for model in listed]
        print(json.dumps({"searched": list(map(str, searched())), "models": entries}))
        return 0
    print(as_text(listed))
    hidden = f"; {len(found) - len(listed)} files of no use to it, see --all" if len(found) > len(listed) else ""
    print(f"minisd: searched {', '.join(places_shown())}{hidden}", file=sys.stderr)
    return 0


def add_parser() -> Parser:
    parser = Parser(prog="minisd models add", description="Copy a model file into the library, once it is checked.")
    parser.add_argument("file", metavar="FILE", help="a .safetensors or .ckpt file")
    parser.add_argument("--name", metavar="NAME", help="what to call it (default: as the file)")
    parser.add_argument("--folder", metavar="FOLDER", help="where to (default: the first of $MINISD_MODELS, else models)")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def add_model(args: argparse.Namespace) -> int:
    from ..library.importing import add

    print(add(args.file, args.name, args.folder))
    return 0
