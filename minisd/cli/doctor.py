"""`minisd doctor`: what a report of a fault should carry."""

from __future__ import annotations

import argparse
import json

from .options import Parser, add_output_options


def parser() -> Parser:
    made = Parser(
        prog="minisd doctor",
        description="This machine, what is installed, where minisd looks for models and what it keeps: for a report of a fault.",
        epilog="Opens no model and does not fail: what cannot be told says why.  The home folder is shown as ~.",
    )
    add_output_options(made)
    return made


def doctor(args: argparse.Namespace) -> int:
    from ..workbench.doctor import as_text, examined

    facts = examined()
    print(json.dumps(facts) if args.json else as_text(facts))
    return 0
