"""`minisd trace "PROMPT" -o t.safetensors` and `minisd verify t.safetensors`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..options import Parser, add_output_options
from .common import add_drawing, add_model, asked


def trace_parser() -> Parser:
    made = Parser(
        prog="minisd trace",
        description="Draw a picture and keep its whole way: conditionings, noise levels, x, eps and the estimate of every step, "
        "and a hash of every block: small enough for a report of a fault.",
    )
    made.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="where to, over what is there")
    add_drawing(made)
    return made


def trace(args: argparse.Namespace) -> int:
    from ...inside.traces import checked_name
    from ...inside.traces import trace as traced

    checked_name(args.output)
    pipe, request = asked(args)
    result = traced(pipe, args.output, request)
    print(json.dumps({"trace": str(args.output), "metadata": result.metadata[0]}) if args.json else args.output)
    return 0


def verify_parser() -> Parser:
    made = Parser(
        prog="minisd verify",
        description="Draw the picture of a trace again, and say where the first difference is, and how large: on another "
        "machine, in another number format or version, with other kernels or another file.",
        epilog="Exit code 0: nothing is past the bound; 1: something is.",
    )
    made.add_argument("trace", metavar="FILE", help="what minisd trace wrote")
    add_model(made)
    made.add_argument(
        "--bound",
        type=float,
        default=0.01,
        metavar="R",
        help="how far off is too far, as a part of a value's norm (default: 0.01)",
    )
    made.add_argument(
        "--from-step", type=int, metavar="K", help="take what is before step K, from 0, from the trace, the conditioning, too"
    )
    add_output_options(made)
    return made


def verify(args: argparse.Namespace) -> int:
    from ...inside.traces import read_trace
    from ...inside.verifying import as_text, asked_of, check_within, pipeline_of
    from ...inside.verifying import verify as verified

    recipe = read_trace(args.trace).recipe
    with asked_of(args.trace):
        pipe = pipeline_of(recipe, args.model, args.device, args.dtype)
    facts = verified(args.trace, pipe, args.bound, args.from_step)
    print(json.dumps(facts) if args.json else as_text(facts))
    check_within(facts)
    return 0
