"""Where the network runs, in which number format, and what it says when there is no room."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from ..errors import UsageError
from .memory import first_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def to_device(device: str | None) -> torch.device:
    """A GPU gets its index, and becomes the current one, on which kernels and graphs are launched.  Raises UsageError."""
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.empty(0, device=device).device
    except Exception as error:  # PyTorch looks for modules and hooks of devices that it only has a name for
        raise UsageError(f"device: expected one that this machine has, found {device!r}: {first_line(error)}") from None
    if found.type == "meta":
        raise UsageError("device: expected one that computes, found 'meta'")
    make_current(found)
    return found


def make_current(device: torch.device) -> None:
    """Kernels and graphs are launched on the current GPU, whatever the tensors say."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def to_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.bfloat16 if cpu_computes_bfloat16() else torch.float32
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise UsageError(f"dtype: expected one of {', '.join(DTYPES)}, found {dtype!r}")
    if found == torch.float16 and device.type == "cpu":
        raise UsageError("dtype: expected bfloat16 or float32 on a CPU, found float16, which is hundreds of times slower there")
    assert found is not None
    return found


def gpu_computes_bfloat16(device: torch.device) -> bool:
    """Whether this GPU has instructions for it, whichever is the current one."""
    with torch.cuda.device(device):
        return torch.cuda.is_bf16_supported(including_emulation=False)


def cpu_computes_bfloat16() -> bool:
    """Whether the CPU has instructions for bfloat16 products; without them it is slower than float32."""
    return bool(cpu_bfloat16())


def cpu_bfloat16() -> list[str]:
    """Those instructions, by Linux's names: Intel's and AMD's, and Arm's."""
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return []
    return [flag for flag in ("amx_bf16", "avx512_bf16", "bf16") if flag in flags]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@contextmanager
def on_device(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Has a module on `device` while it works; one whose home is elsewhere goes back there, to make room for the next."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)
