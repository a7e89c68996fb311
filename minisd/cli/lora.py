"""`minisd lora extract|resize|merge|rename`: LoRAs as files."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from ..options import OPTIONS
from .options import Parser, add_output_options, byte_bar

if TYPE_CHECKING:
    from ..workbench.loras.extracting import Made

WAYS = {  # how many files each takes
    "extract": "two checkpoints, the first and what became of it",
    "resize": "one LoRA",
    "merge": "two LoRAs or more, each NAME[:STRENGTH]",
    "rename": "one LoRA",
}


def parser() -> Parser:
    made = Parser(
        prog="minisd lora",
        description="extract: what checkpoint B learned since A, as a LoRA.  resize: one of smaller rank.  merge: one that does "
        "what several do.  rename: with the names of other programs.",
        epilog="Into a checkpoint: minisd merge CHECKPOINT --lora NAME.  What one is: minisd inspect LORA -m CHECKPOINT.",
    )
    made.add_argument("way", choices=list(WAYS), metavar="WAY", help=", ".join(WAYS))
    made.add_argument("files", nargs="+", metavar="FILE", help="; ".join(f"{way}: {what}" for way, what in WAYS.items()))
    made.add_argument("-o", "--output", type=Path, required=True, metavar="OUT.safetensors", help="where to, over what is there")
    made.add_argument("--rank", type=int, metavar="R", help="of the result (extract: 32; merge: the sum of all ranks)")
    made.add_argument("--energy", type=float, metavar="E", help="0 to 1: as few ranks, up to R, as keep this share")
    made.add_argument("--names", default="kohya", metavar="NAME", help="extract, rename: kohya (default) or peft")
    made.add_argument("-m", "--model", metavar="FILE", help="merge, rename: the checkpoint they are for, where they do not tell")
    made.add_argument("--dtype", default="float16", metavar="NAME", help="float16 (default), bfloat16 or float32")
    add_output_options(made)
    return made


def lora(args: argparse.Namespace) -> int:
    from ..library.names import resolve
    from .files import stored_dtype, tell_replaced

    kind = "checkpoint" if args.way == "extract" else "lora"
    given = [named(file) if args.way == "merge" else (file,) for file in args.files]
    if two := next((file for file, each in zip(args.files, given, strict=True) if len(each) > 2), None):
        raise UsageError(f"lora merge: expected NAME[:STRENGTH], found {two[:80]!r}")
    paths, strengths = [resolve(each[0], kind) for each in given], [(*each, 1.0)[1] for each in given]
    if (len(paths) < 2) if args.way == "merge" else len(paths) != (2 if args.way == "extract" else 1):
        raise UsageError(f"lora {args.way}: expected {WAYS[args.way]}, found {len(paths)} files")
    tell_replaced(args.output, paths)
    dtype, model = stored_dtype(args.dtype), resolve(args.model) if args.model else None
    report(made(args, paths, strengths, dtype, model), args.json)
    return 0


def named(file: str) -> tuple[Any, ...]:
    try:
        return OPTIONS["loras"].kind.parse(file)  # type: ignore[no-any-return]
    except ValueError as error:
        raise UsageError(f"lora merge: expected NAME[:STRENGTH]: {error}") from None


def made(args: argparse.Namespace, paths: Sequence[Path], strengths: Sequence[float], dtype: Any, model: Path | None) -> Made:
    from ..workbench.loras import extracting, reshaping

    if args.way == "extract":
        with byte_bar("extracting") as tell:
            return extracting.extract(paths[0], paths[1], args.output, args.rank or 32, args.energy, dtype, args.names, tell)
    if args.way == "merge":
        return reshaping.merge(paths, strengths, args.output, args.rank, args.energy, dtype, model)
    if args.way == "rename":
        return reshaping.rename(paths[0], args.output, args.names, dtype, model)
    if args.rank is None:
        raise UsageError("lora resize: expected --rank R, found none")
    return reshaping.resize(paths[0], args.output, args.rank, args.energy, dtype)


def report(result: Made, as_json: bool) -> None:
    if as_json:
        facts = {"path": str(result.path), "modules": result.modules, "kept": result.kept, "left_out": result.left_out}
        print(json.dumps(facts))
        return
    print(f"{result.path}: {result.modules} modules, {result.kept:.2%} of the change")
    if result.left_out:
        print(f"differs, too, and is in no LoRA: {len(result.left_out)}: {', '.join(result.left_out[:5])}")
