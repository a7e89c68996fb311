"""`minisd score FOLDER …`: what batches have drawn, in numbers."""

from __future__ import annotations

import argparse
import json

from ..options import Parser, add_output_options


def parser() -> Parser:
    made = Parser(
        prog="minisd score",
        description="Judge the pictures of minisd batch by what they were asked for: a line for each model.",
        epilog="What the tiny checkpoints drew is judged by shape, colour and background.  For others: --clip and --fid, by "
        "torchmetrics (the extra 'score'), whose weights must be on this machine.",
    )
    made.add_argument("folders", nargs="+", metavar="FOLDER", help="an OUT of minisd batch")
    made.add_argument("--clip", metavar="NAME", help="also the CLIP score, by this model of transformers")
    made.add_argument("--fid", metavar="FOLDER", help="also the FID to the pictures of this folder")
    add_output_options(made)
    return made


def score(args: argparse.Namespace) -> int:
    from ...batch.scores.table import as_text, metrics_of, scored

    found = scored(args.folders, metrics_of(args.clip, args.fid))
    print(json.dumps({model: each.facts() for model, each in found.items()}) if args.json else as_text(found))
    return 0
