"""What there is: `minisd doctor`, what a report of a fault should carry; `minisd samplers`, which there are to choose from."""

from __future__ import annotations

import argparse
import json

from .options import Parser, add_output_options


def doctor_parser() -> Parser:
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


def samplers_parser() -> Parser:
    made = Parser(
        prog="minisd samplers",
        description="The samplers for --sampler: order of convergence, calls of the network a step, whether they add noise, the "
        "schedule that they take by default, their own options, and what other programs call them.",
        epilog='A name may end in a schedule: "DPM++ 2M Karras".  Names of A1111, ComfyUI, diffusers, OctoAI and '
        "stable-diffusion.cpp are known, however they are written.",
    )
    add_output_options(made)
    return made


def samplers(args: argparse.Namespace) -> int:
    from ..diffusion.samplers.facts import all_facts, as_table

    rows = all_facts()
    print(json.dumps({"samplers": rows}) if args.json else as_table(rows))
    return 0
