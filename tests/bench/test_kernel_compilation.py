"""Every kernel compiles for sm_90 over the real shapes, on a machine without a GPU, and into what its page promises.

This stands in for the compiler's part of a run on a GPU: layouts, shared memory, registers.  The numbers are the interpreter's
part (test_kernels.py); time is measured only on a GPU.
"""

from __future__ import annotations

import json

import pytest

from minisd.bench.machine.compiling import compiled
from minisd.bench.machine.resources import programs_per_sm
from minisd.fast.choice import kernels
from minisd.warmup.absent import capability_of

HOPPER = capability_of("h100")
THREAD_LIMIT = 255


@pytest.mark.parametrize("dtype", ["float16", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_half_precision(dtype, tmp_path):
    variants = list(compiled(HOPPER, dtype, cache=tmp_path))  # compile, whatever an earlier run has left
    print(json.dumps(variants))  # pytest -rA shows it
    assert not [variant for variant in variants if "error_text" in variant]
    for variant in variants:
        assert variant["stack"] == 0, variant  # nothing spills
        assert variant["registers"] <= THREAD_LIMIT
        assert programs_per_sm(variant, HOPPER) >= 1
        if variant["kernel"] != "linear_step_kernel":
            assert variant["wide_loads"] > 0, variant  # 16 bytes a thread, or the copy engine
        if variant["kernel"] in ("attention_kernel", "linear_geglu_kernel"):
            assert variant["wgmma"] > 0, variant
        if variant["kernel"] in ("partial_kernel", "apply_kernel"):
            assert programs_per_sm(variant, HOPPER) >= 3, variant  # what PROGRAMS in group_norm.py counts on
    dims = {variant["for"] for variant in variants if variant["kernel"] == "attention_kernel"}
    assert len(dims) >= 5  # 40, 64, 80, 160, 512
    # Every variant is a wait on the first run of a machine: new ones need a reason.  Ten are of `attention` and `linear_geglu`,
    # which `auto` does not take; two are norms in one launch, four writers that make statistics, and thirteen are of float8, for
    # `--fp8` alone.
    assert len(variants) <= 58


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["a100", "b200", "rtx5090"])
def test_other_gpus(gpu, tmp_path):
    """Every kernel that is taken there fits without spilling, those too that `auto` leaves out."""
    capability = capability_of(gpu)
    names = [name for name in kernels().KERNELS if capability >= 90 or name not in ("attention", "linear_geglu")]
    for variant in compiled(capability, "float16", names, cache=tmp_path):
        assert "error_text" not in variant, variant
        assert variant["stack"] == 0, variant
        assert programs_per_sm(variant, capability) >= 1, variant


@pytest.mark.slow
@pytest.mark.parametrize("gpu", ["h100", "b200", "rtx5090"])
def test_attention_that_says_where_it_looks(gpu, tmp_path):
    """Which is not among those that draw; it is taken where there is a copy engine (inside/maps.py)."""
    capability = capability_of(gpu)
    variants = list(compiled(capability, "float16", ["attention_columns"], cache=tmp_path))
    assert len(variants) >= 3
    for variant in variants:
        assert "error_text" not in variant, variant
        assert variant["stack"] == 0, variant
        assert programs_per_sm(variant, capability) >= 1, variant


@pytest.mark.slow
def test_single_precision(tmp_path):
    for variant in compiled(HOPPER, "float32", cache=tmp_path):
        assert programs_per_sm(variant, HOPPER) >= 1, variant
