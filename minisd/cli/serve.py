"""`minisd serve`: its options; the server is in ..serve."""

from __future__ import annotations

import argparse
import json

from ..errors import MinisdError, UsageError
from .options import Parser, add_fp8, add_output_options


def parser() -> Parser:
    made = Parser(
        prog="minisd serve",
        description="Draw for programs, over HTTP, in the APIs of OctoAI, A1111 and OpenAI, with the models of the library.",
        epilog="Prints its address once it takes requests.  Other machines may ask only with a key (--host, MINISD_API_KEY).",
    )
    made.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="(default: 127.0.0.1, this machine alone)")
    made.add_argument("--port", type=int, default=7860, metavar="N", help="(default: 7860; 0: any that is free)")
    made.add_argument(
        "--api-key", metavar="KEY", help="what clients must send, as a bearer token; others see it here: better MINISD_API_KEY"
    )
    made.add_argument("--allow-host", action="append", metavar="NAME", help="a name of this machine that clients use; repeatable")
    add_models(made)
    add_amounts(made)
    made.add_argument("--prompt-loras", action="store_true", help="<lora:NAME:1> in prompts names LoRAs of the library")
    made.add_argument("--no-uploads", action="store_true", help="no models are added or deleted over HTTP")
    made.add_argument("--log-prompts", action="store_true", help="prompts, too, are in the log on stderr")
    add_output_options(made)
    return made


def add_models(made: argparse.ArgumentParser) -> None:
    made.add_argument(
        "-m", "--model", action="append", metavar="NAME",
        help="of minisd models: only these may be drawn with, the first where nobody says; repeatable (default: all, tiny first)",
    )  # fmt: skip
    made.add_argument("--refiner", metavar="NAME", help="finishes what SDXL draws, where a request does not say no")
    made.add_argument(
        "--device",
        action="append",
        metavar="NAME",
        help="cpu, cuda:0, …; repeatable, each draws (default: a GPU if there is one)",
    )
    made.add_argument("--dtype", metavar="NAME", help="as of minisd draw")
    add_fp8(made)


def add_amounts(made: argparse.ArgumentParser) -> None:
    made.add_argument("--memory", type=float, metavar="GB", help="for models, on each device (default: 0.6 of what is free)")
    made.add_argument(
        "--queue", type=int, default=8, metavar="N", help="requests that may wait; others are told when (default: 8)"
    )
    made.add_argument("--max-steps", type=int, default=200, metavar="N", help="of a request (default: 200)")
    made.add_argument("--max-images", type=int, default=16, metavar="N", help="of a request (default: 16)")
    made.add_argument("--max-pixels", type=int, default=2048 * 2048, metavar="N", help="of a picture (default: 4194304)")
    made.add_argument(
        "--grace", type=float, default=30.0, metavar="S", help="seconds to finish pictures at the end (default: 30)"
    )


def serve(args: argparse.Namespace) -> int:
    check_numbers(args)
    try:
        from ..serve.app import run
        from ..serve.settings import Limits, Settings, key_of
    except ImportError as error:
        if error.name and error.name.startswith("minisd"):
            raise
        raise MinisdError(f"minisd serve takes {error.name}: pip install 'minisd[server]'") from None
    limits = Limits(steps=args.max_steps, images=args.max_images, pixels=args.max_pixels)
    settings = Settings(
        args.host, args.port, key_of(args.api_key), tuple(args.allow_host or ()), tuple(args.model or ()), args.refiner,
        tuple(args.device or (None,)), args.dtype, int(args.memory * 1e9) if args.memory else None, args.queue, args.grace,
        args.prompt_loras, not args.no_uploads, args.log_prompts, limits, args.fp8,
    )  # fmt: skip
    run(settings, lambda url: print(json.dumps({"url": url}) if args.json else url, flush=True))
    return 0


def check_numbers(args: argparse.Namespace) -> None:
    """Raises UsageError."""
    ranges = {
        "port": (0, 65_535), "queue": (0, 10_000), "max_steps": (1, 999), "max_images": (1, 1000), "max_pixels": (64, 1 << 28),
        "grace": (0, 86_400), "memory": (0.001, 1e6),
    }  # fmt: skip
    for name, (low, high) in ranges.items():
        value = getattr(args, name)
        if value is not None and not low <= value <= high:
            raise UsageError(f"{name}: expected a number from {low} to {high}, found {value}")
