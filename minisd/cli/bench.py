"""`minisd bench`: its options, and what runs for them.  The measuring is in ..bench."""

from __future__ import annotations

import argparse
from importlib import import_module
from pathlib import Path

from .options import Parser

EPILOG = """\
what:
  kernels [NAME]   every kernel over the real shapes: time, rate, share of the ceiling, error, PyTorch's alternatives
  unet             one step of the UNet, kernels on and off, against diffusers
  vae              one picture decoded, the same
  image            prompt to pixels, and a cold process to the file on disk
  load             a checkpoint from the page cache to the device
  roofline         where a step spends its time, and what is left to win
  all              every figure, the most wanted first, in at most --minutes, then those that matter most; needs --json

Ceilings (copy bandwidth, matrix product) and peers are measured in the same run.  On a CPU shapes are smaller (--full: not so)
and kernels, which run in Triton's interpreter there, are not timed.
"""
PARTS = {
    "kernels": ("kernels", "bench"),
    "unet": ("steps", "bench_unet"),
    "vae": ("steps", "bench_vae"),
    "image": ("processes", "bench_image"),
    "load": ("processes", "bench_load"),
    "roofline": ("roofline", "bench"),
    "all": ("everything", "bench"),
}
PEERS = ("eager", "graph", "compiled")


def parser() -> Parser:
    made = Parser(
        prog="minisd bench",
        description="How fast this machine is at drawing, part by part.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("what", choices=PARTS)
    made.add_argument("name", nargs="?", metavar="NAME", help="with kernels: only this one")
    made.add_argument("--model", choices=("sd15", "sd21", "sdxl"), default="sd15", help="whose architecture (default: sd15)")
    made.add_argument("--checkpoint", metavar="FILE", help="with image and load: a file or its name, not random weights")
    made.add_argument(
        "--peers", type=peer_kinds, default=list(PEERS), metavar="KINDS", help="some of eager,graph,compiled, or ''"
    )
    made.add_argument("--ablate", action="store_true", help="with unet and vae: also each kernel switched alone")
    made.add_argument("--tiles", action="store_true", help="with kernels: also other tile sizes, to choose by")
    made.add_argument("--full", action="store_true", help="the real shapes on a CPU, too")
    made.add_argument("--repeats", type=positive, metavar="N", help="measurements of each (default: 20, on a CPU 5)")
    made.add_argument("--minutes", type=minutes, default=9.5, metavar="M", help="with all: when to stop (default: 9.5)")
    made.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    made.add_argument("--dtype", metavar="NAME", help="float32, bfloat16 or float16 (default: what the device draws in)")
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, after every row")
    made.add_argument("--plot", type=Path, metavar="PNG", help="also draw them (needs the extra 'bench')")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def peer_kinds(text: str) -> list[str]:
    kinds = [kind for kind in text.split(",") if kind]
    if not set(kinds) <= set(PEERS):
        raise argparse.ArgumentTypeError(f"expected some of {','.join(PEERS)}, found {text!r}")
    return kinds


def minutes(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < 1e6:
        raise argparse.ArgumentTypeError(f"expected a number of minutes above 0, found {text!r}")
    return value


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1 on, found {text!r}")
    return int(text)


def bench(args: argparse.Namespace) -> int:
    if args.name and args.what != "kernels":
        parser().error(f"{args.name!r}: only `bench kernels` takes a name")
    from ..bench.report import Report, machine, pyplot
    from ..bench.timing import Clock
    from ..fast.choice import chosen
    from ..system.atomic import check_place
    from ..system.device import to_device, to_dtype

    if args.plot:
        pyplot()  # says at once that it is missing
    for path in (args.json, args.plot):
        if path:
            check_place(path)
    chosen()
    device = to_device(args.device)
    clock = Clock(device, to_dtype(args.dtype, device), args.repeats or (20 if device.type == "cuda" else 5))
    args.full, args.repeats = args.full or device.type == "cuda", clock.repeats
    report = Report(clock, args.json, args.debug)
    print("minisd bench on " + ", ".join(f"{name} {value}" for name, value in machine(clock).items()))
    if not args.full:
        print("on a CPU: smaller shapes, and no times of kernels")
    module, function = PARTS[args.what]
    getattr(import_module(f"minisd.bench.{module}"), function)(report, args)
    report.write()
    if args.plot:
        report.plot(args.plot)
    return 0
