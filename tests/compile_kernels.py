"""Compile every kernel for an H100 or H200 (sm_90) without having one: python compile_kernels.py DTYPE [NAME ...]

The wrappers run on meta tensors of the real shapes, with Triton told to compile and not to launch.  Prints a JSON list, one
entry for each compiled variant: its kernel, the first shape that asked for it, and what the compiler made of it.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from minisd import kernels
from minisd.kernels import checks

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class AbsentGPU:
    """What Triton asks of a driver before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def resources(kernel: Any) -> dict[str, int]:
    """What bounds a program's speed: registers a thread, bytes of stack (spills), shared memory, and the wide instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
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


def main(dtype: torch.dtype, names: list[str]) -> None:
    driver.set_active(AbsentGPU())
    checks.DEVICES = ("meta",)
    variants: dict[str, dict[str, Any]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, **{**options, "warmup": True})
        seconds = round(time.perf_counter() - start, 2)
        if kernel.hash not in variants:
            variants[kernel.hash] = {"kernel": kernel.name, "for": label, **resources(kernel), "seconds": seconds}
        return kernel

    JITFunction.run = compile_only
    for name in names or kernels.KERNELS:
        module = kernels.KERNELS[name]
        if dtype not in getattr(module, "DTYPES", checks.FLOATS):
            continue
        for shape in module.SHAPES:
            label = f"{name} {shape.label}"
            getattr(kernels, name)(**module.make(shape, "meta", dtype))
    print(json.dumps(list(variants.values()), indent=1))


if __name__ == "__main__":
    main(getattr(torch, sys.argv[1]), sys.argv[2:])
