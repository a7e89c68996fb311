"""`minisd attend "PROMPT" --words "circle,background" -o maps.png`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from ..options import Parser
from .common import add_drawing, asked


def attend_parser() -> Parser:
    made = Parser(
        prog="minisd attend",
        description="Draw a picture, and show where its pixels look in the prompt: cross-attention, word by word.",
        epilog="The finest layers behind the middle show shapes best: minisd attend … --by layer shows which.",
    )
    made.add_argument("-o", "--output", type=Path, required=True, metavar="PNG", help="where to, over what is there")
    made.add_argument("--words", metavar="W,W,…", help="of the prompt, or some in a row (default: all, and start and end)")
    made.add_argument("--by", default="word", metavar="WHAT", help="a row for each layer or step; word: one row (default)")
    made.add_argument("--layer", metavar="NAME", help="of this layer alone, such as output_blocks.2.1")
    add_drawing(made)
    return made


def attend(args: argparse.Namespace) -> int:
    from ...errors import UsageError
    from ...inside.maps import attention
    from ...inside.shown.heat import sheet, short
    from ...pictures.image import check_writable, save_png

    check_writable(args.output)
    if args.by not in ("word", "layer", "step"):
        raise UsageError(f"--by: expected word, layer or step, found {args.by[:80]!r}")
    pipe, request = asked(args)
    words = [word.strip() for word in args.words.split(",") if word.strip()] if args.words is not None else None
    if words == []:
        raise UsageError("words: expected words of the prompt with commas between, found none")
    found = attention(pipe, request, words=words)
    layer = args.layer and next((name for name in found.maps if args.layer in (name, short(name))), args.layer)
    save_png(sheet(found, args.by, layer), args.output, None)
    if args.json:
        shares = {name: maps.mean((0, 2, 3)).tolist() for name, maps in found.maps.items()}
        print(json.dumps({"image": str(args.output), "words": found.words, "shares": shares}))
    else:
        print(args.output)
    return 0
