"""`minisd numerics -m FILE --a float32 --b bfloat16`."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from ...errors import UsageError
from ..options import Parser, add_options, add_output_options, request_of

if TYPE_CHECKING:
    from ...request import Request

PROMPT = "a red circle on a blue background"


def numerics_parser() -> Parser:
    made = Parser(
        prog="minisd numerics",
        description="Two ways to compute the same networks, layer by layer: where an error enters (each layer given what A's was "
        "given), where it accumulates, how near the numbers are to the end of float16.",
        epilog="Compared are the texts, the first, the middle and the last call of the UNet, and the VAE's decoder, in a drawing "
        "by A.  --nan draws once, and names the first module that makes NaN or infinity, with what to do.",
    )
    made.add_argument("prompt", metavar="PROMPT", nargs="?", default=PROMPT, help=f"what is drawn (default: {PROMPT})")
    made.add_argument("-m", "--model", metavar="FILE", help="a checkpoint, or its name in minisd models (default: tiny)")
    made.add_argument("--a", default="float32", metavar="FORMAT", help="float32, bfloat16 or float16 (default: float32)")
    made.add_argument(
        "--b", default="bfloat16", metavar="HOW",
        help="bfloat16, float16 (on a CPU emulated: computed in float32, weights and values rounded), float32; fp8 (as --fp8 "
        "draws); triton (A's format, by kernels); fast, cpu:fast (the fused networks of a GPU, of a CPU); or another file of the "
        "same networks (default: bfloat16)",
    )  # fmt: skip
    made.add_argument("--bound", type=float, metavar="R", help="name the first layer past it (default: by the number format)")
    made.add_argument("--layers", action="store_true", help="a row for every layer, and not for every block")
    made.add_argument("--plot", type=Path, metavar="SVG", help="a drawing of it, layer by layer")
    made.add_argument("--nan", action="store_true", help="name the first module that leaves the finite numbers, in A's format")
    made.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    add_options(made, ("steps", "width", "height", "seed"))
    made.set_defaults(steps=8)
    add_output_options(made)
    return made


def numerics(args: argparse.Namespace) -> int:
    from ...inside.layers import numerics as compared
    from ...inside.shown.files import check_svg, write_text
    from ...inside.shown.numerics import as_text, plot
    from ...inside.sides import side
    from ...inside.sketches import parts_of

    if args.plot:
        check_svg(args.plot)
    request = request_of(args.prompt, args)
    request = replace(request, seed=0 if request.seed is None else request.seed)
    if args.nan:
        return nan(args, request)
    a = side(args.a, args.model, args.device)
    facts = compared(a, side(args.b, args.model, args.device, a), request, args.bound)
    if args.plot:
        write_text(args.plot, plot(facts))
    names = [layer["name"] for layer in facts["layers"]] if args.layers else [name for name, _ in parts_of(a.pipe.model)]
    print(json.dumps(facts) if args.json else as_text(facts, names))
    return 0


def nan(args: argparse.Namespace, request: Request) -> int:
    from ...inside.shown.numerics import first_nonfinite
    from ...inside.sides import side

    if args.plot or args.bound is not None or args.layers:
        raise UsageError("--nan: expected without --plot, --bound and --layers")
    found = first_nonfinite(side(args.a, args.model, args.device).pipe, request)
    text = found["words"] if found else "all that every module makes is finite"
    print(json.dumps({"first": found}) if args.json else text)
    return 0
