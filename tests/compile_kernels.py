"""Compile every kernel for an H100 or H200 (sm_90) without having one: python compile_kernels.py [NAME ...]

The wrappers run on meta tensors of the real shapes, with Triton told to compile and not to launch.  Prints one JSON list: for each
compiled variant its kernel, dtype, first shape, and what the assembler says: registers, stack bytes (spills), shared memory.
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


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", text))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"]) + int(found["LOCAL"])}


def main(names: list[str]) -> None:
    driver.set_active(AbsentGPU())
    checks.DEVICES = ("meta",)
    compiled: dict[str, tuple[Any, str, float]] = {}
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        kernel = run(self, *args, **{**options, "warmup": True})
        compiled.setdefault(kernel.hash, (kernel, where, time.perf_counter() - start))
        return kernel

    JITFunction.run = compile_only
    for name in names or kernels.KERNELS:
        module = kernels.KERNELS[name]
        for dtype in (torch.float16, torch.bfloat16):
            for shape in module.SHAPES:
                where = f"{name}, {str(dtype).removeprefix('torch.')}, {shape.label}"
                getattr(module, name)(**module.make(shape, "meta", dtype))
    rows = [
        {"kernel": kernel.name, "for": where, **resources(kernel.asm["cubin"]), "shared": kernel.metadata.shared,
         "warps": kernel.metadata.num_warps, "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg|cp\.async\.bulk", kernel.asm["ptx"])),
         "wgmma": kernel.asm["ptx"].count("wgmma.mma_async"), "seconds": round(seconds, 2)}
        for kernel, where, seconds in compiled.values()
    ]  # fmt: skip
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main(sys.argv[1:])
