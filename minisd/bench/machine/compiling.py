"""bench compile: what Triton makes of every kernel for named GPUs, which need not be there: registers, spills, instructions.

The wrappers run on meta tensors of the real shapes, or the networks of a checkpoint on the meta device, with Triton told to
compile and not to launch.  That takes a process of its own: Triton learns what to compile for when it starts, and here it may
have started as an interpreter.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from ...errors import UsageError
from ...fast.choice import FLOAT8, kernels
from ...files.checkpoint import open_checkpoint
from ...library.names import resolve
from ...system.device import name_of
from ...warmup.absent import capability_of, instead_of_launching, pretend
from ...warmup.starting import job_of, of_checkpoint, said, started
from ..kernels import asked, takes
from ..report import Report
from .resources import occupancy, programs_per_sm, resources

COLUMNS = (
    "kernel", "registers", "spilled B", "shared B", "warps", "an SM holds", "occupancy", "instructions", "loads", "of 16 B",
    "matrix", "compile s",
)  # fmt: skip


def bench(report: Report, args: Any) -> None:
    gpus = {name: capability_of(name) for name in args.gpu.split(",")}
    names = asked("compile", args.name)
    if kernels().checks.triton is None:
        raise UsageError("bench compile: expected Triton to be installed, found none: `pip install triton` (on Linux)")
    dtype = name_of(report.clock.dtype)
    file = open_checkpoint(resolve(args.shapes_of)) if args.shapes_of else None
    job: dict[str, Any] = {"dtype": dtype, "names": names}
    if file:
        fp8 = args.name in FLOAT8  # which nothing else launches
        job |= {"models": [of_checkpoint(file, dtype=dtype, fp8=fp8)], "names": names if args.name else list(kernels().KERNELS)}
    else:
        for name in names:
            if not takes(kernels().KERNELS[name], report.clock.dtype):
                report.skip(name, f"does not take {dtype}")
        if not (names := [name for name in names if takes(kernels().KERNELS[name], report.clock.dtype)]):
            return
        job["names"] = names
    for gpu, capability in gpus.items():
        title = f"compiled for {gpu} (sm_{capability}), {dtype}" + (f", as {file.path.name} launches them" if file else "")
        report.table(f"{title}: registers and spills are a thread's, shared memory is a program's", COLUMNS)
        report.note("each variant stands at the first shape that asks for it; where an SM holds 0 programs, none can run")
        for name in out_of_reach(job["names"], capability):
            report.skip(name, f"{gpu} has no float8, as GPUs from compute capability 8.9 on have")
        with report.attempt("the compiler"), tempfile.TemporaryDirectory() as cache:  # an empty one, or nothing is compiled
            for found in of_job(job | {"capability": capability}, Path(cache)):
                report.add(
                    found["for"], **({"error_text": found["error_text"]} if "error_text" in found else cells(found, capability))
                )


def out_of_reach(names: Iterable[str], capability: int) -> list[str]:
    """Kernels of which no shape is for GPUs of this compute capability."""
    modules = {name: import_module(f"minisd.kernels.{name}") for name in names}
    return [name for name, module in modules.items() if not any(in_reach(shape, capability) for shape in module.SHAPES)]


def cells(found: dict[str, Any], capability: int) -> dict[str, Any]:
    return {
        "kernel": found["kernel"].removesuffix("_kernel"),
        "registers": found["registers"],
        "spilled_B": found["stack"],
        "shared_B": found["shared"],
        "warps": found["warps"],
        "an_SM_holds": programs_per_sm(found, capability),
        "occupancy": occupancy(found, capability),
        "instructions": found["instructions"],
        "loads": found["loads"] + found["tma"],
        "of_16_B": found["wide"] + found["tma"],
        "matrix": found["matrix"],
        "compile": found["seconds"],
    }


def compiled(capability: int, dtype: str, names: Iterable[str] = (), cache: Path | None = None) -> Iterator[dict[str, Any]]:
    """What the compiler makes of each variant of the kernels (default: all), as it comes; of a shape that fails, "error_text".

    cache: where compiled kernels are kept; by default where Triton always keeps them.
    """
    return of_job({"capability": capability, "dtype": dtype, "names": list(names) or list(kernels().KERNELS)}, cache)


def of_job(job: dict[str, Any], cache: Path | None) -> Iterator[dict[str, Any]]:
    return said(started(__name__, job, {"TRITON_CACHE_DIR": cache} if cache else {}))


def main() -> None:
    """In the process of its own: a line of JSON for each variant."""
    job = json.load(sys.stdin)
    if "models" in job:
        launched(job)
    else:
        alone(job)


def tell(kernel: Any, label: str, seconds: float) -> None:
    print(json.dumps({"kernel": kernel.name, "for": label} | resources(kernel) | {"seconds": seconds}), flush=True)


def fault(label: str, error: Exception) -> None:
    line = (str(error).splitlines() or [""])[0]
    print(json.dumps({"for": label, "error_text": f"{type(error).__name__}: {line[:160]}"}), flush=True)


def in_reach(shape: Any, capability: int) -> bool:
    return capability >= kernels().float8.SINCE or not getattr(shape, "float8", False)


def alone(job: dict[str, Any]) -> None:
    """The kernels over the shapes of their own files."""
    pretend(job["capability"])
    seen, label = set[str](), ""

    def compiling(kernel: Any, run: Any) -> Any:
        start = time.perf_counter()
        made = run()
        if made.hash not in seen:
            seen.add(made.hash)
            tell(made, label, time.perf_counter() - start)
        return made

    instead_of_launching(compiling)
    given = getattr(torch, job["dtype"])
    for name in job["names"]:
        module = import_module(f"minisd.kernels.{name}")  # also one that draws nothing, which is not among KERNELS
        shapes = [shape for shape in module.SHAPES if in_reach(shape, job["capability"])]
        for shape in shapes if takes(module, given) else []:
            label = f"{name} {shape.label}"
            try:
                getattr(kernels(), name)(**module.make(shape, "meta", given))
            except Exception as error:
                fault(label, error)


def launched(job: dict[str, Any]) -> None:
    """The variants that a checkpoint's networks launch."""
    from ...warmup.worker import variants

    for variant in variants(job_of(job["models"], job["capability"], 1)).found.values():
        label, start = f"{variant.part}: {variant.kernel}", time.perf_counter()
        if variant.module not in job["names"]:
            continue
        try:
            kernel = variant.compiled()
        except Exception as error:
            fault(label, error)
        else:
            tell(kernel, label, time.perf_counter() - start)


if __name__ == "__main__":
    main()
