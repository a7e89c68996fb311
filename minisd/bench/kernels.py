"""bench kernels: every kernel over the shapes of the real models, against what PyTorch offers."""

from __future__ import annotations

from dataclasses import fields, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..models.ops import kernels
from ..system.device import name_of
from .report import Report
from .timing import Run

COLUMNS = ("variant", "time us", "TB/s", "TFLOP/s", "of ceiling", "error", "to ours")
SMALL = {"size": 16, "rows": 256, "queries": 256, "keys": 256, "m": 256}  # on a CPU, where a kernel runs in the interpreter


def bench(report: Report, args: Any) -> None:
    known = kernels().KERNELS
    if args.name is not None and args.name not in known:
        raise UsageError(f"bench kernels: expected one of {', '.join(known)}, found {args.name!r}")
    for name in [args.name] if args.name else known:
        if report.clock.dtype not in getattr(known[name], "DTYPES", kernels().checks.FLOATS):
            report.skip(name, f"does not take {name_of(report.clock.dtype)}")
            continue
        bench_kernel(report, name, args.full, args.tiles)


@torch.no_grad()
def bench_kernel(report: Report, name: str, full: bool, tiles: bool) -> None:
    module, clock = kernels().KERNELS[name], report.clock
    title = f"{name}, {name_of(clock.dtype)}: error is relative to float64, to ours is time over that of the kernel"
    report.table(title, COLUMNS)
    report.note(f"ceilings in this run: copy {clock.bandwidth / 1e12:.3g} TB/s, matmul {clock.matmul_rate / 1e12:.3g} TFLOP/s")
    for shape in module.SHAPES if full else dict.fromkeys(smaller(shape) for shape in module.SHAPES):
        with report.attempt(shape.label):
            torch.manual_seed(0)
            arguments = module.make(shape, clock.device, clock.dtype)
            wanted = outputs(module.reference(**double(arguments)))
            ours = None
            for variant, run in variants(name, shape, arguments, clock.device, tiles).items():
                with report.attempt(f"{shape.label}: {variant}"):
                    # Before the clock starts: the sampler's step changes its arguments, each call again.
                    error = relative_error(outputs(run()), wanted)
                    seconds = clock.seconds(run) if clock.is_cuda or not isinstance(run, partial) else None
                    ours = seconds if variant == "minisd" else ours
                    flops, traffic = module.flops(shape), module.traffic(shape, clock.dtype.itemsize)
                    rates: dict[str, Any] = {}
                    if seconds:
                        rates = {"TB/s": traffic / seconds / 1e12, "TFLOP/s": flops / seconds / 1e12}
                        rates["of_ceiling"] = clock.floor(flops, traffic) / seconds
                    ratio = seconds / ours if ours and seconds else None
                    report.add(shape.label, variant=variant, time=seconds, error=error, to_ours=ratio, **rates)


def variants(name: str, shape: Any, arguments: dict[str, Any], device: torch.device, tiles: bool) -> dict[str, Run]:
    """The kernel, with other tiles too if asked for (under their numbers), then the library.

    What is a partial runs a kernel of ours: on a CPU in the interpreter, where time means nothing, or not at all.
    """
    module, kernel = kernels().KERNELS[name], getattr(kernels(), name)
    own = copied(arguments) if name == "guided_step" else arguments  # that one changes what it is given
    others = module.tiles(shape) if tiles and hasattr(module, "tiles") else []
    runs = {"minisd": partial(kernel, **own)} | {"x".join(map(str, tile)): partial(kernel, **own, tile=tile) for tile in others}
    runs |= module.library(**arguments)
    here = device.type in kernels().checks.DEVICES and kernels().checks.triton is not None
    return {variant: run for variant, run in runs.items() if here or not isinstance(run, partial)}


def smaller(shape: Any) -> Any:
    """The shape with its long dimensions cut; the widths, which decide the code, stay."""
    small = {field.name: min(getattr(shape, field.name), SMALL[field.name]) for field in fields(shape) if field.name in SMALL}
    return replace(shape, **small, label=f"{shape.label} (cut)")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in arguments.items()}


def outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in arguments.items()}


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest of ||found - wanted|| / ||wanted|| over the outputs."""
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
