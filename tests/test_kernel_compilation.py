"""Every kernel compiles for sm_90 over the real shapes, on a machine without a GPU, and into what its page promises.

This stands in for the compiler's part of a run on a GPU: layouts, shared memory, registers.  The numbers are the interpreter's
part (test_kernels.py); time is measured only on a GPU.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REGISTERS, SHARED_MEMORY = 65536, 232448  # of an SM of a Hopper GPU; CUDA C++ Programming Guide, compute capability 9.0
THREAD_LIMIT = 255


def compiled(dtype: str, cache: Path) -> list[dict[str, Any]]:
    script = Path(__file__).parent / "compile_kernels.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(cache)  # compile, whatever an earlier run has left
    run = subprocess.run([sys.executable, script, dtype], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def programs_per_sm(variant: dict[str, Any]) -> int:
    registers = -(-variant["registers"] // 8) * 8 * variant["warps"] * 32
    return min(REGISTERS // registers, SHARED_MEMORY // (variant["shared"] + 1024))


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision(dtype, tmp_path):
    variants = compiled(dtype, tmp_path)
    print(json.dumps(variants))  # pytest -rA shows it
    for variant in variants:
        assert variant["stack"] == 0, variant  # nothing spills
        assert variant["registers"] <= THREAD_LIMIT
        assert programs_per_sm(variant) >= 1
        if variant["kernel"] != "linear_step_kernel":
            assert variant["wide_loads"] > 0, variant  # 16 bytes a thread, or the copy engine
        if variant["kernel"] in ("attention_kernel", "linear_geglu_kernel"):
            assert variant["wgmma"] > 0, variant
        if variant["kernel"] in ("partial_kernel", "apply_kernel"):
            assert programs_per_sm(variant) >= 3, variant  # what PROGRAMS in group_norm.py counts on
    dims = {variant["for"] for variant in variants if variant["kernel"] == "attention_kernel"}
    assert len(dims) >= 5  # 40, 64, 80, 160, 512
    # Every variant is a wait on the first run of a machine: new ones need a reason.
    assert len(variants) <= 32


@pytest.mark.slow
def test_single_precision(tmp_path):
    for variant in compiled("float32", tmp_path):
        assert programs_per_sm(variant) >= 1, variant
