"""`minisd warm`: the kernels that models will launch, compiled before anybody draws."""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from ...errors import MinisdError, UsageError, shown
from ...options import pair, whole
from ..options import Parser, add_output_options

# Without a MODEL: the architectures of the published files, at the sizes that they draw at.
PUBLISHED = ("sd15", "sd21", "sdxl")


def parser() -> Parser:
    made = Parser(
        prog="minisd warm",
        description="Compile the kernels that drawing launches, from the headers of checkpoints, with or without a GPU, into the "
        "cache of Triton that drawing uses: then nobody waits for the compiler.",
        epilog="The cache (TRITON_CACHE_DIR, else ~/.triton/cache) is of use to the Triton that filled it, and to no other "
        "version.  ControlNets and the library's own plans (cuDNN, cuBLAS) are not in it.  Without a GPU, and with "
        "minisd[native] or MINISD_CPU=compiled, attention for the processor is built instead.",
    )
    made.add_argument(
        "models", nargs="*", metavar="MODEL", help="checkpoints, or their names (default: the published SD 1.5, 2.1 and SDXL)"
    )
    made.add_argument("--target", metavar="NAME", help="h100, a100, rtx4090, … or sm_NN (default: the GPU of this machine)")
    made.add_argument("--dtype", default="float16", metavar="NAME", help="of the UNet on that GPU (default: float16)")
    made.add_argument("--size", metavar="WxH", help="pixels, multiples of 8 (default: what each was trained at)")
    made.add_argument("--fp8", action="store_true", help="what drawing with --fp8 launches")
    made.add_argument(
        "--jobs", type=int, metavar="N", help="compile so many at a time (default: one less than processors, at most 8)"
    )
    add_output_options(made)
    return made


def warm(args: argparse.Namespace) -> int:
    from ...fast.cpu.compiled import built
    from ...warmup.starting import job_of
    from ...warmup.starting import warm as warmed

    if args.jobs is not None:
        whole(1, 256).check("jobs", args.jobs)
    if args.dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"dtype: expected float32, bfloat16 or float16, found {args.dtype!r}")
    start = time.perf_counter()
    if for_cpu(args.target):
        built()
        seconds = time.perf_counter() - start
        found = {"target": "cpu", "seconds": seconds, "variants": []}
        print(json.dumps(found) if args.json else f"attention for the processor of this machine, in {seconds:.1f} s")
        return 0
    job = job_of(models_of(args), target_of(args.target), args.jobs)
    count, *variants = counted(warmed(job))
    found = {"target": f"sm_{job['capability']}", "seconds": time.perf_counter() - start, "variants": variants}
    failed = [each for each in variants if "error_text" in each]
    for each in failed:
        print(f"minisd: {each['kernel']} ({each['part']}): {shown(each['error_text'], 300)}", file=sys.stderr)
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{count - len(failed)} variants of kernels for {found['target']}, in {found['seconds']:.1f} s")
    return MinisdError.exit_code if failed else 0


def for_cpu(target: str | None) -> bool:
    """Whether attention on the CPU is to be compiled, no GPU is here, and none is named.  Raises UsageError."""
    from ...fast.cpu.compiled import wanted
    from ...warmup.starting import capability_here

    return wanted() and target is None and capability_here() is None


def counted(lines: Any) -> Any:
    """How many variants there are, then each of them, with a bar on a terminal."""
    from tqdm import tqdm

    try:
        first = next(lines)["variants"]
        return [first, *tqdm(lines, total=first, desc="compiling", disable=None, leave=False)]
    except RuntimeError as error:
        raise MinisdError(f"warm: the compiler's process failed: {shown(str(error), 300)}") from None


def models_of(args: argparse.Namespace) -> list[Any]:
    """What to compile for.  Raises CheckpointError, UsageError."""
    from ...bench.networks import MODELS
    from ...files.checkpoint import open_checkpoint
    from ...library.names import resolve
    from ...warmup.starting import of_checkpoint, of_shapes

    size, how = size_of(args.size), (args.dtype, args.fp8)
    if args.models:
        return [of_checkpoint(open_checkpoint(resolve(name)), size or (None, None), *how) for name in args.models]
    published = [MODELS[name] for name in PUBLISHED]
    own = [(8 * model.latents, 8 * model.latents) for model in published]
    return [of_shapes(model.shapes(), model.family.name, size or each, *how) for model, each in zip(published, own, strict=True)]


def size_of(text: str | None) -> tuple[int, int] | None:
    """Raises UsageError."""
    try:
        found = None if text is None else pair(text)
    except ValueError as error:
        raise UsageError(f"size: {error}") from None
    if found is not None and any(side % 8 or not 8 <= side <= 4096 for side in found):
        raise UsageError(f"size: expected multiples of 8 from 8 to 4096, found {text!r}")
    return found


def target_of(name: str | None) -> int:
    """The compute capability of a target.  Raises UsageError, also where Triton is missing."""
    from ...fast.choice import has_triton
    from ...warmup.absent import capability_of
    from ...warmup.starting import capability_here

    if not has_triton():
        raise UsageError("warm: expected Triton to be installed, found none: `pip install triton` (on Linux)")
    if name is not None:
        return capability_of(name, "target")
    here = capability_here()
    if here is None:
        raise UsageError("target: expected the name of a GPU, such as h100 or sm_90, where this machine has none")
    return here
