"""Attention on a CPU by code of our own (attention.c), built here by a C compiler where MINISD_CPU says so.

    torch       PyTorch's operations alone
    compiled    attention in bfloat16 by attention.c, on processors with AVX-512 BF16
    auto        compiled where the extra minisd[native] is installed and that can be, else torch, the default: a compiler that a
                machine has for other ends changes no picture

What is built lies in minisd's cache, under a name that says of which source, by which compiler and for which processor.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.util
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...errors import UsageError, shown
from ...system.atomic import drafting
from ...system.cache import folder
from ...system.device import cpu_bfloat16, name_of

SOURCE = Path(__file__).with_name("attention.c")
OPTIONS = ("-O3", "-march=native", "-std=gnu11", "-shared", "-fPIC")
WIDEST = 512  # channels of a head
LINES = 5  # of a compiler's last words


class Job(ctypes.Structure):
    """As in attention.c."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out")),
        *((name, ctypes.c_int64) for name in ("q_batch", "q_row", "k_batch", "k_row", "v_batch", "v_row")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "length", "keys", "d", "parts", "next")),
    )


class Built(NamedTuple):
    attend: Any
    parallel: Any  # GOMP_parallel, or None


def asked() -> str:
    """What MINISD_CPU says.  Raises UsageError for another value than auto, torch, compiled or none."""
    said = os.environ.get("MINISD_CPU") or "auto"
    if said not in ("auto", "torch", "compiled"):
        raise UsageError(f"MINISD_CPU: expected auto, torch or compiled, found {said!r}")
    return said


def wanted() -> bool:
    """Whether attention in bfloat16 is to be compiled.  Raises UsageError for a wrong MINISD_CPU."""
    return expected() and (asked() == "compiled" or extra_builds())


def expected() -> bool:
    """Whether it will be built here, if all goes well.  Raises UsageError."""
    said = asked()
    return said == "compiled" or (said == "auto" and has_zig() and has_instructions())


@cache
def extra_builds() -> bool:
    """Whether it can be built; where it cannot, a warning says why."""
    try:
        built()
    except UsageError as error:
        warnings.warn(f"minisd[native] is of no use here, so attention is by PyTorch's operations: {error}", stacklevel=2)
        return False
    return True


def prepare(dtype: torch.dtype) -> None:
    """Builds it, if it is wanted, for networks of this number format.  Raises UsageError where it is asked for and cannot be."""
    if asked() == "compiled" and dtype != torch.bfloat16:
        raise UsageError(
            f"MINISD_CPU=compiled: expected bfloat16, found {name_of(dtype)}: use --dtype bfloat16, or MINISD_CPU=torch"
        )
    if dtype == torch.bfloat16 and wanted():
        built()


def takes(q: Tensor, k: Tensor, v: Tensor, heads: int) -> bool:
    """Whether it is wanted, and for such tensors: q (B, L, heads*d), k and v (B, S, heads*d)."""
    if q.device.type != "cpu" or q.dtype != torch.bfloat16 or not wanted():
        return False
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    fits = all(x.dtype == torch.bfloat16 and x.stride(-1) == 1 and x.numel() > 0 for x in (q, k, v))
    return fits and not learns and q.shape[-1] <= WIDEST * heads


def compiled_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """q (B, L, heads*d), k and v (B, S, heads*d), as `takes` says, not causal -> (B, L, heads*d).  Raises UsageError."""
    attend, parallel = built()
    batch, length, width = q.shape
    out = torch.empty(q.shape, dtype=q.dtype)
    places = (x.data_ptr() for x in (q, k, v, out))
    strides = (x.stride(i) for x in (q, k, v) for i in (0, 1))
    job = Job(*places, *strides, batch, heads, length, k.shape[1], width // heads)
    attend(ctypes.byref(job), torch.get_num_threads(), parallel)
    return out


@cache
def built() -> Built:
    """Raises UsageError where the processor lacks the instructions, or no compiler builds it."""
    if not has_instructions():
        raise UsageError(
            "MINISD_CPU=compiled: expected a processor with avx512_bf16 (on Linux), found none: use MINISD_CPU=torch"
        )
    failures = []
    for compiler in compilers():
        try:
            attend = loaded(compiler).attention
        except (OSError, RuntimeError) as error:
            failures.append(f"{shlex.join(compiler)}: {error}")
            continue
        attend.argtypes = (ctypes.c_void_p, ctypes.c_uint, ctypes.c_void_p)
        attend.restype = None
        return Built(attend, parallel())
    if failures:
        raise UsageError(f"MINISD_CPU=compiled: cannot be built here; use MINISD_CPU=torch, or another CC. {'; '.join(failures)}")
    raise UsageError(
        "MINISD_CPU=compiled: expected a C compiler (CC, cc, gcc, clang, or `pip install ziglang`), found none: "
        "install one, or use MINISD_CPU=torch"
    )


def compilers() -> list[list[str]]:
    """The commands to try, in this order; where CC names one, that alone."""
    if os.environ.get("CC"):
        return [shlex.split(os.environ["CC"])]
    found = [[name] for name in ("cc", "gcc", "clang") if shutil.which(name)]
    return [*found, *([[sys.executable, "-m", "ziglang", "cc"]] if has_zig() else [])]


@cache
def has_zig() -> bool:
    """Whether the extra minisd[native] is installed."""
    return importlib.util.find_spec("ziglang") is not None


def has_instructions() -> bool:
    return "avx512_bf16" in cpu_bfloat16()


def loaded(compiler: list[str]) -> ctypes.CDLL:
    """The library, built for this process alone where there is no cache that it can be kept in.  Raises OSError, RuntimeError."""
    try:
        return kept(compiler)
    except OSError:
        with tempfile.TemporaryDirectory() as here:
            return ctypes.CDLL(str(build(compiler, Path(here, "attention.so"))))


def kept(compiler: list[str]) -> ctypes.CDLL:
    """The library from the cache, built where it is not there yet, or not whole.  Raises OSError, RuntimeError."""
    target = folder() / f"attention-{fingerprint(compiler)}.so"
    with contextlib.suppress(OSError):
        return ctypes.CDLL(str(target))
    target.parent.mkdir(parents=True, exist_ok=True)
    with drafting(target, 0o700) as draft:
        build(compiler, draft).replace(target)
    return ctypes.CDLL(str(target))


def fingerprint(compiler: list[str]) -> str:
    """Of all that decides what is built: the source, the compiler, and the processor, as -march=native sees it."""
    about = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    processor = [line for line in about if line.startswith(("vendor_id", "cpu family", "model", "stepping", "flags"))]
    facts = [SOURCE.read_text(encoding="utf-8"), *OPTIONS, *compiler, said([*compiler, "--version"]), *processor]
    return hashlib.sha256("\0".join(facts).encode()).hexdigest()[:32]


def build(compiler: list[str], target: Path) -> Path:
    """Raises RuntimeError with the compiler's last lines."""
    said([*compiler, *OPTIONS, "-o", str(target), str(SOURCE)])
    return target


def said(command: list[str]) -> str:
    """What a command prints.  Raises RuntimeError where it fails, with its last lines; OSError where it is not there."""
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = [shown(line, 200) for line in done.stderr.splitlines() if line.strip()]
        raise RuntimeError("\n".join(lines[-LINES:]) or f"ended with {done.returncode}")
    return done.stdout


def parallel() -> Any:
    """GOMP_parallel of the OpenMP that PyTorch itself runs on: threads of a second one would wait for work beside the first's.

    None where PyTorch has no such, and then one thread computes.  GNU's OpenMP has it, and LLVM's and Intel's for its sake.
    """
    try:
        return ctypes.cast(ctypes.CDLL(torch._C.__file__).GOMP_parallel, ctypes.c_void_p)
    except (AttributeError, OSError):
        return None
