"""`minisd bench`: its options, and what runs for them.  The measuring is in ..bench."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .options import Parser, size

if TYPE_CHECKING:
    import torch

EPILOG = """\
what:
  kernels [NAME]   every kernel over the real shapes: time, rate, share of the ceiling, error, PyTorch's alternatives
  compile [NAME]   what Triton makes of every kernel for GPUs that need not be there: registers, spills, instructions, occupancy
  unet             one step of the UNet, kernels on and off, against diffusers
  vae              one picture decoded, the same
  image            a picture from a command to the file on disk, a fresh process each; then prompt to pixels in one that runs
  start            the wait from a command to a picture on disk, entry by entry, with empty and with filled caches
  load             a checkpoint from the page cache to the device
  lora             a LoRA into the weights, another strength, off again, beside diffusers with peft
  serve            what minisd serve adds: start to first picture, to an answer, to the pictures in a second
  accuracy         what number formats, fp8 and shortcuts (--cfg-until, --cache) cost in pictures and layers, against float32
  samplers         what every sampler converges to, how fast, and how far it is at 10, 20 and 40 calls of the network
  taps             what a tap costs while there is none: the UNet never tapped, and tapped before, in turns
  roofline         where a step spends its time, and what is left to win; --device h200, …: predicted for a GPU that is not there
  all              every figure, the most wanted first, in at most --minutes, then those that matter most; needs --json

Ceilings (copy bandwidth, matrix product) and peers are measured in the same run.  On a CPU shapes are smaller (--full: not so)
and kernels, which run in Triton's interpreter there (TRITON_INTERPRET=1), are checked and not timed.  In the JSON file a key such
as time_us says the unit of its number.

A kernel of your own: copy one of minisd's (kernels/geglu.py, say), change it, and run
  minisd bench kernels geglu --against geglu.py --shapes-of CHECKPOINT
The file defines a function with the kernel's name and the same arguments, in Triton or not, and may import what the kernels
import (from .checks import ...).  It is checked and timed beside minisd's and PyTorch's, over the shapes that the networks of
the checkpoint hand to the kernel: the UNet with guidance, the VAE's decoder and the text encoders, at the size it draws at.
"""
PARTS = {
    "kernels": ("kernels", "bench"),
    "compile": ("machine.compiling", "bench"),
    "unet": ("steps", "bench_unet"),
    "vae": ("steps", "bench_vae"),
    "image": ("processes", "bench_image"),
    "start": ("machine.ledger", "bench"),
    "load": ("processes", "bench_load"),
    "roofline": ("machine.roofline", "bench"),
    "lora": ("lab.loras", "bench"),
    "serve": ("lab.serving", "bench"),
    "accuracy": ("lab.accuracy", "bench"),
    "samplers": ("lab.samplers", "bench"),
    "taps": ("lab.taps", "bench"),
    "all": ("everything", "bench"),
}
PEERS = ("eager", "graph", "compiled", "openvino", "onnxruntime", "sdcpp")

# Which parts take an option; those that are not named here all of them do.
MEASURED = tuple(part for part in PARTS if part not in ("compile", "accuracy", "samplers", "lora", "serve", "taps"))
TAKEN_BY = {
    "name": ("kernels", "compile"),
    "against": ("kernels",),
    "shapes_of": ("kernels", "compile"),
    "tiles": ("kernels",),
    "gpu": ("compile",),
    "model": ("unet", "image", "start", "load", "roofline"),
    "checkpoint": ("image", "start", "load", "accuracy", "samplers", "taps"),
    "peers": ("unet", "vae", "image", "load", "lora"),
    "size": ("image",),
    "steps": ("image",),
    "processes": ("image",),
    "ablate": ("unet", "vae"),
    "fp8": ("unet", "roofline"),
    "minutes": ("all",),
    "full": (*MEASURED, "accuracy"),
    "repeats": (*(part for part in MEASURED if part != "start"), "lora", "serve", "taps"),
    "device": (*MEASURED, "accuracy", "samplers", "lora", "serve", "taps"),
    "plot": (*MEASURED, "samplers", "lora"),
}
DEFAULTS: dict[str, Any] = {
    "name": None, "against": None, "shapes_of": None, "tiles": False, "gpu": "h100", "model": "sd15", "checkpoint": None,
    "peers": list(PEERS), "size": None, "steps": None, "processes": False, "ablate": False, "fp8": False,
    "minutes": 9.5, "full": False, "repeats": None, "device": None, "dtype": None,
    "json": None, "plot": None, "debug": False,
}  # fmt: skip


def parser() -> Parser:
    """What it parses holds only what was given: `parsed` adds the defaults."""
    made = Parser(
        prog="minisd bench",
        description="How fast this machine is at drawing, part by part.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
    )
    made.add_argument("what", choices=PARTS)
    made.add_argument("name", nargs="?", metavar="NAME", help=f"{users('name')}: only this one")
    add_kernels(made)
    add_networks(made)
    made.add_argument("--full", action="store_true", help="the real shapes on a CPU, too")
    made.add_argument("--repeats", type=positive, metavar="N", help="measurements of each (default: 20, on a CPU 5)")
    made.add_argument("--minutes", type=minutes, metavar="M", help=f"{users('minutes')}: when to stop (default: 9.5)")
    made.add_argument("--device", metavar="NAME", help="cpu, cuda, … (default: a GPU if there is one)")
    made.add_argument(
        "--dtype",
        metavar="NAME",
        help="float32, bfloat16 or float16 (default: what the device draws in; kernels on a CPU float32, compile float16)",
    )
    made.add_argument("--json", type=Path, metavar="FILE", help="also write the figures there, after every row")
    made.add_argument("--plot", type=Path, metavar="PNG", help="also draw them (needs the extra 'bench')")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def add_kernels(made: argparse.ArgumentParser) -> None:
    made.add_argument("--tiles", action="store_true", help=f"{users('tiles')}: also other tile sizes, to choose by")
    made.add_argument(
        "--against", type=Path, metavar="FILE.py", help=f"{users('against')} NAME: also this file's own form of the kernel"
    )
    made.add_argument(
        "--shapes-of", metavar="CHECKPOINT", help=f"{users('shapes_of')}: the shapes of this file's networks, from its header"
    )
    made.add_argument(
        "--gpu", metavar="NAME,…", help=f"{users('gpu')}: a100, h100, rtx4090, … or sm_NN, or several of them (default: h100)"
    )


def add_networks(made: argparse.ArgumentParser) -> None:
    made.add_argument("--model", choices=("sd15", "sd21", "sdxl"), help=f"{users('model')}: whose architecture (default: sd15)")
    made.add_argument("-m", "--checkpoint", metavar="FILE", help=f"{users('checkpoint')}: a file or its name, not random weights")
    made.add_argument("--peers", type=peer_kinds, metavar="KINDS", help=f"{users('peers')}: some of {','.join(PEERS)}, or ''")
    made.add_argument(
        "--size", type=size, metavar="WxH", help=f"{users('size')}: pixels (default: as trained; on a CPU a quarter)"
    )
    made.add_argument("--steps", type=positive, metavar="N", help=f"{users('steps')}: of a picture (default: 20, on a CPU 4)")
    made.add_argument("--processes", action="store_true", help=f"{users('processes')}: only whole processes")
    made.add_argument("--ablate", action="store_true", help=f"{users('ablate')}: also each kernel switched alone")
    made.add_argument("--fp8", action="store_true", help=f"{users('fp8')}: of a step as --fp8 draws (roofline: predicted alone)")


def users(option: str, word: str = "and") -> str:
    """The parts that take an option, as its help says it."""
    *parts, last = TAKEN_BY[option]
    return f"with {', '.join(parts)} {word} {last}" if parts else f"with {last}"


def parsed(argv: Sequence[str]) -> argparse.Namespace:
    """The options, with the defaults of those that are not given.  Ends where one is given that its part does not use."""
    made = parser()
    given = vars(made.parse_args(argv))
    what = given["what"]
    for option in given:
        if what not in TAKEN_BY.get(option, PARTS):
            flag = f"name {given['name']!r}" if option == "name" else f"--{option.replace('_', '-')}"
            made.error(f"{flag}: expected {users(option, 'or')}, found with {what}")
    if "against" in given and "name" not in given:
        made.error("--against: expected the NAME of the kernel that it is another form of, found none")
    return argparse.Namespace(**DEFAULTS | given)


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


def number_format(what: str, name: str | None, device: torch.device, absent: bool = False) -> torch.dtype:
    """Kernels are computed in Triton's interpreter on a CPU, which rounds float32 and float16 as a GPU does, and not bfloat16.

    absent: for a GPU that is not there.
    """
    import torch

    from ..system.device import to_dtype

    if absent:
        return to_dtype(name or "float16", torch.device("cuda"))
    if what == "kernels" and device.type == "cpu":
        return torch.float16 if name == "float16" else to_dtype(name or "float32", device)
    return to_dtype(name, device)


def bench(args: argparse.Namespace) -> int:
    from ..bench.machine.gpus import is_gpu
    from ..bench.report import Report, machine, pyplot
    from ..bench.timing import Clock
    from ..fast.choice import chosen, settle_cudnn
    from ..system.atomic import check_place
    from ..system.device import to_device

    if args.plot:
        pyplot()  # says at once that it is missing
    for path in (args.json, args.plot):
        if path:
            check_place(path)
    chosen()
    absent = args.what == "compile" or (args.what == "roofline" and is_gpu(args.device))
    device = to_device("cpu" if absent else args.device)
    dtype = number_format(args.what, args.dtype, device, absent)
    settle_cudnn()  # of ours and of the peers
    clock = Clock(device, dtype, args.repeats or (20 if device.type == "cuda" else 5))
    args.full, args.repeats = args.full or device.type == "cuda" or absent, clock.repeats
    report = Report(clock, args.json, args.debug)
    print("minisd bench on " + ", ".join(f"{name} {value}" for name, value in machine(clock).items()))
    if not args.full and args.what in MEASURED and not args.size:
        print("on a CPU: smaller shapes, and no times of kernels")
    module, function = PARTS[args.what]
    getattr(import_module(f"minisd.bench.{module}"), function)(report, args)
    report.write()
    if args.plot:
        report.plot(args.plot)
    return 0
