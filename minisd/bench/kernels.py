"""bench kernels: every kernel over the shapes of the real models, or of a checkpoint, against what PyTorch and others offer."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..fast.choice import kernels
from ..system.device import name_of
from .report import Report
from .shapes import shapes_of
from .timing import Run

COLUMNS = ("variant", "time us", "TB/s", "TFLOP/s", "of ceiling", "error", "to ours")
SMALL = {"size": 16, "rows": 256, "queries": 256, "keys": 256, "m": 256}  # on a CPU, where a kernel runs in the interpreter
AGAINST = "minisd.kernels.against"  # what a loaded file is imported as, so that a copy of a kernel's finds its neighbours


def bench(report: Report, args: Any) -> None:
    names = asked("kernels", args.name)
    if args.against and not args.against.is_file():
        raise UsageError(f"--against: expected a Python file, found none at {args.against}")
    for name in names:
        dtype = report.clock.dtype
        if not takes(kernels().KERNELS[name], dtype):
            report.skip(name, f"does not take {name_of(dtype)}")
            continue
        shapes = shapes_of(name, args.shapes_of, dtype) if args.shapes_of else kernels().KERNELS[name].SHAPES
        if not shapes:
            report.skip(name, f"the networks of {args.shapes_of} never call it")
            continue
        shapes = shapes if args.full else list(dict.fromkeys(smaller(shape) for shape in shapes))
        bench_kernel(report, name, shapes, args)


def asked(part: str, name: str | None) -> list[str]:
    known = kernels().KERNELS
    if name is not None and name not in known:
        raise UsageError(f"bench {part}: expected one of {', '.join(known)}, found {name!r}")
    return [name] if name else list(known)


def takes(module: ModuleType, dtype: torch.dtype) -> bool:
    """Whether the kernel of a module of minisd.kernels takes tensors of this dtype."""
    return dtype in getattr(module, "DTYPES", kernels().checks.FLOATS)


@torch.no_grad()
def bench_kernel(report: Report, name: str, shapes: list[Any], args: Any) -> None:
    module, clock = kernels().KERNELS[name], report.clock
    title = f"{name}, {name_of(clock.dtype)}" + (f", shapes of {Path(args.shapes_of).name}" if args.shapes_of else "")
    report.table(f"{title}: error is relative to float64, to ours is time over that of the kernel", COLUMNS)
    report.note(f"ceilings in this run: copy {clock.bandwidth / 1e12:.3g} TB/s, matmul {clock.matmul_rate / 1e12:.3g} TFLOP/s")
    if not clock.is_cuda or kernels().checks.triton is None:
        report.note(what_is_shown(clock.dtype))
    theirs = None
    if args.against:
        with report.attempt(args.against.name):
            theirs = loaded(args.against, name)
    for shape in shapes:
        with report.attempt(shape.label):
            torch.manual_seed(0)
            arguments = module.make(shape, clock.device, clock.dtype)
            wanted = outputs(module.reference(**double(arguments)))
            runs = variants(name, shape, arguments, clock.device, args.tiles)
            if theirs:
                runs |= {args.against.name: partial(theirs, **copied(arguments))}
            measure(report, name, shape, runs, wanted)


def what_is_shown(dtype: torch.dtype) -> str:
    if kernels().checks.triton is None:
        return "minisd's own kernels are left out: they need Triton, which is not installed: `pip install triton` (on Linux)"
    if not runs_here(torch.device("cpu")):
        return "minisd's own kernels are left out: they run on a GPU, or for their errors with TRITON_INTERPRET=1"
    if dtype == torch.bfloat16:
        return "no error of Triton kernels: the interpreter cuts bfloat16 off where a GPU rounds; float16 and float32 have one"
    return (
        "Triton kernels run in the interpreter: their errors count, as it rounds like a GPU, but for float8, of which none is "
        "told, and their times would not"
    )


def measure(report: Report, name: str, shape: Any, runs: dict[str, Run], wanted: tuple[Tensor, ...]) -> None:
    """A row for each way to compute the same."""
    module, clock = kernels().KERNELS[name], report.clock
    flops, traffic = module.flops(shape), module.traffic(shape, clock.dtype.itemsize)
    ours = None
    for variant, run in runs.items():
        with report.attempt(f"{shape.label}: {variant}"):
            interpreted = not clock.is_cuda and in_triton(run)
            # Before the clock starts: what changes its arguments does so at each call again.
            error: float | None = relative_error(outputs(run()), wanted)
            if interpreted and (clock.dtype == torch.bfloat16 or getattr(shape, "float8", False)):
                error = None
            seconds = None if interpreted else clock.seconds(run)
            ours = seconds if variant == "minisd" else ours
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
    others = module.tiles(shape) if tiles and hasattr(module, "tiles") else []
    runs: dict[str, Run] = {"minisd": partial(kernel, **copied(arguments))}
    runs |= {"x".join(map(str, tile)): partial(kernel, **copied(arguments), tile=tile) for tile in others}
    runs |= module.library(**arguments)
    return {variant: run for variant, run in runs.items() if runs_here(device) or not isinstance(run, partial)}


def runs_here(device: torch.device) -> bool:
    return device.type in kernels().checks.DEVICES and kernels().checks.triton is not None


def in_triton(run: Run) -> bool:
    """Whether it runs Triton kernels: ours do, and what was loaded if there are any in its file."""
    if not isinstance(run, partial) or run.func.__module__ != AGAINST:
        return isinstance(run, partial)
    return any(type(each).__module__.startswith("triton.") for each in vars(sys.modules[AGAINST]).values())


def loaded(path: Path, name: str) -> Callable[..., Any]:
    """The function `name` of a Python file.  Raises UsageError if there is none, and whatever the file itself does."""
    module = ModuleType(AGAINST)
    module.__file__, module.__package__ = str(path), AGAINST.rpartition(".")[0]
    sys.modules[AGAINST] = module  # where dataclasses look
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
    except SystemExit as stop:
        raise UsageError(f"expected a file that can be imported, found one that ends with status {stop.code}") from None
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if getattr(value, "__module__", None) == AGAINST]
        raise UsageError(f"expected a function {name} in it, found {', '.join(own) or 'none'}")
    return function  # type: ignore[no-any-return]


def smaller(shape: Any) -> Any:
    """The shape with its long dimensions cut; the widths, which decide the code, stay."""
    small = {field.name: min(getattr(shape, field.name), SMALL[field.name]) for field in fields(shape) if field.name in SMALL}
    return replace(shape, **small, label=f"{shape.label} (cut)")


def copied(arguments: dict[str, Any]) -> dict[str, Any]:
    """For a kernel of its own: some change what they are given."""
    return {key: x.clone() if isinstance(x, Tensor) else x for key, x in arguments.items()}


def outputs(result: Any) -> tuple[Tensor, ...]:
    found = result if isinstance(result, tuple) else (result,)
    if wrong := [type(x).__name__ for x in found if not isinstance(x, Tensor)]:
        raise UsageError(f"expected tensors as result, found {', '.join(wrong)}")
    return found


def double(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for key, x in arguments.items()}


def relative_error(found: tuple[Tensor, ...], wanted: tuple[Tensor, ...]) -> float:
    """The largest of ||found - wanted|| / ||wanted|| over the outputs."""
    if [x.shape for x in found] != [x.shape for x in wanted]:
        shapes = [", ".join(str(tuple(x.shape)) for x in tensors) for tensors in (wanted, found)]
        raise UsageError(f"expected a result of shape {shapes[0]}, found {shapes[1]}")
    pairs = zip(found, wanted, strict=True)
    return max(float((a.double() - b.double()).norm() / b.double().norm()) for a, b in pairs)
