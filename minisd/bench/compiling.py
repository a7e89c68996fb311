"""bench compile: what Triton makes of every kernel for a named GPU, which need not be there: registers, spills, shared memory.

The wrappers run on meta tensors of the real shapes, with Triton told to compile and not to launch.  That takes a process of its
own: Triton learns what to compile for when it starts, and here it may have started as an interpreter.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..fast.choice import kernels
from ..system.device import name_of
from .kernels import asked, takes
from .report import Report

COLUMNS = ("kernel", "registers", "spilled B", "shared B", "warps", "an SM holds", "compile s")
GPUS = {
    "a100": 80, "a40": 86, "rtx3090": 86, "l4": 89, "l40s": 89, "rtx4090": 89, "h100": 90, "h200": 90, "b200": 100,
    "rtx5090": 120,
}  # fmt: skip

# Of one SM: registers; shared memory in bytes, of which each program also takes RESERVED; threads, in warps of 32 (CUDA
# Programming Guide, technical specifications per compute capability).
REGISTERS, RESERVED = 65536, 1024
SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}


def bench(report: Report, args: Any) -> None:
    capability, names = capability_of(args.gpu), asked("compile", args.name)
    if kernels().checks.triton is None:
        raise UsageError("bench compile: expected Triton to be installed, found none: `pip install triton` (on Linux)")
    dtype = name_of(report.clock.dtype)
    for name in names:
        if not takes(name, report.clock.dtype):
            report.skip(name, f"does not take {dtype}")
    if not (names := [name for name in names if takes(name, report.clock.dtype)]):
        return
    title = f"compiled for {args.gpu} (sm_{capability}), {dtype}"
    report.table(f"{title}: registers and spills are a thread's, shared memory is a program's", COLUMNS)
    report.note("each variant stands at the first shape that asks for it; where an SM holds 0 programs, none can run")
    with report.attempt("the compiler"), tempfile.TemporaryDirectory() as cache:  # an empty one, or nothing is compiled
        for found in compiled(capability, dtype, names, Path(cache)):
            report.add(
                found["for"], **({"error_text": found["error_text"]} if "error_text" in found else cells(found, capability))
            )


def cells(found: dict[str, Any], capability: int) -> dict[str, Any]:
    return {
        "kernel": found["kernel"].removesuffix("_kernel"),
        "registers": found["registers"],
        "spilled_B": found["stack"],
        "shared_B": found["shared"],
        "warps": found["warps"],
        "an_SM_holds": programs_per_sm(found, capability),
        "compile": found["seconds"],
    }


def capability_of(gpu: str) -> int:
    """The compute capability of a GPU by its name or "sm_90", major and minor as one number.  Raises UsageError."""
    plain = re.sub(r"[ _-]", "", gpu.lower())
    found = GPUS.get(plain) or int((re.fullmatch(r"sm(\d+)", plain) or ["", "0"])[1])
    if found not in SHARED:
        raise UsageError(f"--gpu: expected one of {', '.join([*GPUS, *(f'sm_{each}' for each in SHARED)])}, found {gpu!r}")
    return found


def programs_per_sm(variant: dict[str, Any], capability: int) -> int:
    """How many programs an SM holds at once: 0 if not even one fits."""
    registers = -(-variant["registers"] // 8) * 8 * variant["warps"] * 32
    shared = variant["shared"] + RESERVED
    return min(REGISTERS // registers, SHARED[capability] // shared, WARPS[capability] // variant["warps"])


def compiled(capability: int, dtype: str, names: Iterable[str] = (), cache: Path | None = None) -> Iterator[dict[str, Any]]:
    """What the compiler makes of each variant of the kernels (default: all), as it comes; of a shape that fails, "error_text".

    cache: where compiled kernels are kept; by default where Triton always keeps them.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    command = [sys.executable, "-P", "-m", __name__, str(capability), dtype, *names]
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        assert process.stdout is not None
        try:
            for line in process.stdout:
                yield json.loads(line)
            if process.wait():
                errors.seek(0)
                raise RuntimeError((errors.read().strip().splitlines() or ["the process failed"])[-1])
        finally:
            process.kill()
            process.wait()


def main(capability: str, dtype: str, *names: str) -> None:
    """In the process of its own: a line of JSON for each variant."""
    checks, seen = kernels().checks, set()
    checks.DEVICES, checks.ABSENT = ("meta",), int(capability)

    def tell(kernel: Any, seconds: float) -> None:
        if kernel.hash not in seen:
            seen.add(kernel.hash)
            print(json.dumps({"kernel": kernel.name, "for": label} | resources(kernel) | {"seconds": seconds}), flush=True)

    compile_only(int(capability), tell)
    for name in names or kernels().KERNELS:
        module, given = kernels().KERNELS[name], getattr(torch, dtype)
        for shape in module.SHAPES if takes(name, given) else []:
            label = f"{name} {shape.label}"
            try:
                getattr(kernels(), name)(**module.make(shape, "meta", given))
            except Exception as error:
                line = (str(error).splitlines() or [""])[0]
                print(json.dumps({"for": label, "error_text": f"{type(error).__name__}: {line[:160]}"}), flush=True)


def compile_only(capability: int, tell: Callable[[Any, float], None]) -> None:
    """From now on Triton compiles every kernel for this capability, tells of it, and launches none."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    class AbsentGPU:
        """What Triton asks of a driver before it compiles."""

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", capability, 32)

        def get_current_device(self) -> int:
            return 0

        def get_current_stream(self, device: int) -> int:
            return 0

    run = JITFunction.run

    def compiling(self: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, **{**options, "warmup": True})
        tell(kernel, time.perf_counter() - start)
        return kernel

    driver.set_active(AbsentGPU())
    JITFunction.run = compiling


def resources(kernel: Any) -> dict[str, int]:
    """What bounds a program's speed: registers a thread, bytes of stack (spills), shared memory, and the wide instructions."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run([dump, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    ptx = kernel.asm["ptx"]
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.|cp\.async\.bulk\.tensor", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
