"""What a compiled kernel takes of an SM, and what it consists of: read out of its machine code."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# Of one SM: registers; shared memory in bytes, of which each program also takes RESERVED; threads, in warps of 32 (CUDA
# Programming Guide, technical specifications per compute capability).
REGISTERS, RESERVED = 65536, 1024
SHARED = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10, 120: 100 << 10}
WARPS = {80: 64, 86: 48, 89: 48, 90: 64, 100: 64, 120: 48}

# Instructions that multiply matrices, by how their names begin: mma.sync, Hopper's wgmma, Blackwell's tcgen05.
MATRIX = {"HMMA": "mma", "HGMMA": "wgmma", "UTCHMMA": "tcgen05"}
INSTRUCTION = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", re.MULTILINE)


def resources(kernel: Any) -> dict[str, Any]:
    """Of triton's CompiledKernel: registers a thread, bytes of stack (spills), shared memory, warps, and its instructions."""
    text = disassembled(kernel.asm["cubin"])
    found = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    codes = Counter(INSTRUCTION.findall(text.partition("code for")[2]))
    del codes["NOP"]  # fills the end
    ptx = kernel.asm["ptx"]
    return {
        "registers": found["REG"],
        "stack": found["STACK"] + found["LOCAL"],
        "shared": kernel.metadata.shared,
        "warps": kernel.metadata.num_warps,
        "instructions": codes.total(),
        "local": counted(codes, r"(LDL|STL)\b"),
        "loads": counted(codes, r"LDG\.|LDG$"),
        "wide": counted(codes, r"(LDG|LDGSTS)\..*\b128\b"),
        "tma": counted(codes, r"UTMALDG"),
        "matrix": matrix(codes),
        "wide_loads": len(re.findall(r"ld\.global\S*\.v4\.b32|cp\.async\.cg\.|cp\.async\.bulk\.tensor", ptx)),
        "wgmma": ptx.count("wgmma.mma_async"),
    }


def disassembled(cubin: bytes) -> str:
    """What NVIDIA's cuobjdump, which Triton brings, says of machine code."""
    import triton

    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(dump), "--dump-resource-usage", "--dump-sass", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counted(codes: Counter[str], pattern: str) -> int:
    return sum(count for code, count in codes.items() if re.match(pattern, code))


def matrix(codes: Counter[str]) -> str:
    """Such as "36 wgmma"; nothing where a kernel multiplies no matrices."""
    kinds = Counter[str]()
    for code, count in codes.items():
        if kind := MATRIX.get(code.split(".")[0]):
            kinds[kind] += count
    return ", ".join(f"{count} {kind}" for kind, count in kinds.items())


def programs_per_sm(variant: dict[str, Any], capability: int) -> int:
    """How many programs an SM holds at once: 0 if not even one fits."""
    registers = -(-variant["registers"] // 8) * 8 * variant["warps"] * 32
    shared = variant["shared"] + RESERVED
    return min(REGISTERS // registers, SHARED[capability] // shared, WARPS[capability] // variant["warps"])


def occupancy(variant: dict[str, Any], capability: int) -> float:
    """The share of an SM's warps that can be under way at once."""
    return programs_per_sm(variant, capability) * variant["warps"] / WARPS[capability]
