"""What these commands share: the options of a drawing that is looked into, and what they make."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import TYPE_CHECKING

from ..options import Parser, add_options, add_output_options, request_of

if TYPE_CHECKING:
    from ...pipeline import Pipeline
    from ...request import Request

# Of one picture, by one model, without pictures of the user's.
DRAWING = (
    "negative_prompt", "width", "height", "steps", "sampler", "guidance_scale", "seed", "clip_skip", "eta", "sampler_options",
    "spacing", "guidance_rescale", "rng", "emphasis", "plain_prompt", "loras",
)  # fmt: skip


def add_drawing(parser: Parser, names: Iterable[str] = DRAWING) -> None:
    """PROMPT, whose model, and how it is drawn."""
    parser.add_argument("prompt", metavar="PROMPT", help="what the picture should show")
    add_model(parser)
    add_options(parser, names)
    add_output_options(parser)


def add_model(parser: Parser) -> None:
    parser.add_argument("-m", "--model", metavar="FILE", help="a checkpoint, or its name in minisd models (default: tiny)")
    parser.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    parser.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: as drawing takes it)")


def asked(args: argparse.Namespace) -> tuple[Pipeline, Request]:
    """The pipeline and the request that the options of `add_drawing` ask for.  Raises CheckpointError, UsageError."""
    from ...pipeline import load
    from ...workbench.teaching import teach

    pipe, request = load(args.model, args.device, args.dtype), request_of(args.prompt, args)
    teach([pipe], request)
    return pipe, request
