"""`minisd explain "PROMPT" -o lecture.html`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..options import Parser
from .common import add_drawing, asked


def explain_parser() -> Parser:
    made = Parser(
        prog="minisd explain",
        description="Draw a picture, and write a page that follows it through the machine with its real numbers: tokens, text "
        "layers, noise levels, every step, latents, the UNet, cross-attention, the VAE.  One file, which asks for no other.",
    )
    made.add_argument("-o", "--output", type=Path, required=True, metavar="HTML", help="where to, over what is there")
    add_drawing(made)
    return made


def explain(args: argparse.Namespace) -> int:
    from ...inside.shown.files import check_named, write_text
    from ...inside.shown.lecture import lecture
    from ...inside.shown.page import page

    check_named(args.output, ".html")
    pipe, request = asked(args)
    made = lecture(pipe, request)
    write_text(args.output, page(made))
    print(json.dumps({"page": str(args.output), "metadata": made.result.metadata[0]}) if args.json else args.output)
    return 0
