"""`minisd batch MANIFEST -o OUT`: from a file of prompts to many pictures."""

from __future__ import annotations

import argparse
import json
import sys
from typing import TYPE_CHECKING, Any

from ...errors import MinisdError, UsageError, shown
from ...options import MAX_SEED, OPTIONS, whole
from ..options import Parser, add_device, add_fp8, add_options, add_training

if TYPE_CHECKING:
    from ...batch.job import Job
    from ...batch.rows import RowError

FORMATS = ("png", "jpeg", "webp", "latents", "wds")
# What a row says alone: the job's seed is another thing, and a picture is drawn over by one row, not by all.
BY_ROW = ("seed", "num_images", "init_image", "mask", "controls", "batch_place")


def parser() -> Parser:
    made = Parser(
        prog="minisd batch",
        description="Draw a picture of every row of a manifest, as OUT/SHARD/ID.png with its recipe as ID.json.  Started again, "
        "it draws what is missing, and nothing else.",
        epilog="A row has id and prompt, and any option of a drawing by its name, also model, vae and refiner; the options here "
        "are for rows that do not say.  Those that cannot be drawn are told in OUT/errors.jsonl, and do not stop the "
        "others; the exit code is 1 then.",
    )
    made.add_argument(
        "manifest", metavar="MANIFEST", help="JSON lines, CSV or Parquet, by its suffix; - reads JSON lines from stdin"
    )
    made.add_argument("-o", "--output", required=True, metavar="FOLDER", help="where to: a folder, or a URL that fsspec opens")
    made.add_argument("-m", "--model", metavar="FILE", help="a checkpoint, or its name in minisd models (default: tiny)")
    made.add_argument("--vae", metavar="FILE", action="append", help="the VAE of another file")
    made.add_argument("--refiner", metavar="FILE", help="a second checkpoint that finishes what the first began")
    made.add_argument("--ema", action="store_true", help="draw with the moving average of the weights, where the file has it")
    add_fp8(made)
    add_training(made)
    add_work(made)
    add_options(made, [name for name in OPTIONS if name not in BY_ROW])
    add_device(made)
    return made


def add_work(made: Parser) -> None:
    made.add_argument("--format", choices=FORMATS, default="png", metavar="NAME", help=f"{', '.join(FORMATS)} (default: png)")
    made.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the job: rows without a seed have one of it and their id"
    )
    made.add_argument(
        "--workers", type=int, metavar="N", help="processes (default: one for each GPU, or as many as there is room for)"
    )
    made.add_argument("--threads", type=int, default=1, metavar="N", help="of each, on a CPU (default: 1)")
    made.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="draw on a Ray cluster (default: one that is begun here)",
    )
    made.add_argument("--shard", metavar="I/N", help="of N machines this is the I-th, from 1: draws every N-th shard")
    made.add_argument(
        "--shard-rows", type=int, default=256, metavar="N", help="lines of the manifest that are a shard (default: 256)"
    )
    made.add_argument("--together", type=int, default=0, metavar="N", help="pictures of a call on a GPU (default: measured)")
    made.add_argument("--dry-run", action="store_true", help="check every row and model, say how long it takes, and draw nothing")


def batch(args: argparse.Namespace) -> int:
    from ...batch.progress import summary
    from ...batch.running import forecast, run

    job, mine = job_of(args), shard_of(args.shard)
    if args.workers is not None:
        whole(1, 1024).check("workers", args.workers)
    if args.dry_run:
        found = forecast(job, args.manifest, mine, args.workers, tell)
        print(json.dumps(vars(found)) if args.json else found)
        return failed(found.failed, "above")
    if args.ray is not None and args.manifest == "-":
        raise UsageError("ray: expected a manifest in a file, found -")
    tally = run(job, args.manifest, mine, args.workers, args.ray)
    print(f"minisd: {summary(job, tally)}", file=sys.stderr)
    print(json.dumps({"output": job.out, **tally.facts()}) if args.json else job.out)
    return failed(tally.failed, f"{job.out}/errors.jsonl")


def failed(count: int, where: str) -> int:
    """The exit code; of rows that failed there is a word more."""
    if not count:
        return 0
    print(f"minisd: error: {count:,} rows cannot be drawn: see {shown(where, 500)}", file=sys.stderr)
    return MinisdError.exit_code


def tell(bad: RowError) -> None:
    print(f"minisd: line {bad.line}: {shown(str(bad), 500)}", file=sys.stderr)


def job_of(args: argparse.Namespace) -> Job:
    """Raises UsageError."""
    from ...batch.job import Job
    from ...options import checked

    width, height = args.size
    asked = {name: getattr(args, name) for name in OPTIONS if name not in BY_ROW and hasattr(args, name)}
    asked |= {"width": width, "height": height, "refiner": args.refiner}
    defaults: dict[str, Any] = {name: value for name, value in asked.items() if value not in (OPTIONS[name].default, None)}
    for name, value in defaults.items():
        checked(name, value)
    named = ("device", "dtype", "vae", "prediction", "zero_snr", "offload", "ema", "fp8")
    loading = {name: getattr(args, name) for name in named}
    numbers = {
        "threads": whole(1, 1024),
        "shard_rows": whole(1, 1_000_000),
        "together": whole(0, 1000),
        "seed": whole(0, MAX_SEED),
    }
    found = {name: kind.check(name, getattr(args, name)) for name, kind in numbers.items()}
    given = {name: value for name, value in loading.items() if value not in (None, False)}
    return Job(args.output, format=args.format, model=model_of(args.model), defaults=defaults, loading=given, **found)


def model_of(name: str | None) -> str | None:
    """The name that was given, or the path that it stands for: workers elsewhere have other libraries."""
    from ...library.names import resolve

    return None if name is None else str(resolve(name).absolute())


def shard_of(text: str | None) -> tuple[int, int]:
    if text is None:
        return 0, 1
    first, slash, last = text.partition("/")
    if not (slash and first.isascii() and last.isascii() and first.isdecimal() and last.isdecimal() and len(text) < 20):
        raise UsageError(f"shard: expected I/N such as 1/3, found {shown(text, 60)!r}")
    number, count = int(first), int(last)
    if not 1 <= number <= count:
        raise UsageError(f"shard: expected I/N with I from 1 to N, found {shown(text, 60)!r}")
    return number - 1, count
