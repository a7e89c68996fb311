"""What every kernel file shares: Triton, if it is there, the questions that a wrapper asks of its arguments, a common shape."""

from __future__ import annotations

import os
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps
from typing import Any, Self

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
    from triton.tools.tensor_descriptor import TensorDescriptor
except Exception:  # not installed, or broken (`minisd doctor` says how): the kernels can be imported, and refuse to run
    triton = tl = TensorDescriptor = None


def jit(*functions: Any, **options: Any) -> Any:
    """triton.jit, or nothing where there is no Triton: `check` then refuses before any launch."""
    return triton.jit(*functions, **options) if triton else functions[0] if functions else lambda function: function


def launcher(wrapper: Any) -> Any:
    """A wrapper whose tensors' device is the current one while it runs: Triton launches there, whatever the tensors say."""

    @wraps(wrapper)
    def launching(*given: Any, **named: Any) -> Any:
        tensor = next((x for x in (*given, *named.values()) if isinstance(x, Tensor)), None)
        with nullcontext() if tensor is None else torch.cuda.device_of(tensor):
            return wrapper(*given, **named)

    return launching


__all__ = [
    "FLOATS", "MapShape", "capability", "check", "check_vector", "descriptor", "expect", "jit", "launcher", "pixels_of",
    "rows_of", "tl", "view",
]  # fmt: skip

FLOATS = (torch.float32, torch.float16, torch.bfloat16)

# Products and sums fuse, as they always did; from 3.9 on Triton warns where this is not said, because its default will change.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

# Triton's interpreter runs kernels on the CPU, for tests.  The variable must be set before Triton is first imported.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")
DEVICES = ("cuda", "cpu") if INTERPRETED else ("cuda",)


def expect(holds: bool, name: str, expected: Any, found: Any) -> None:
    """ValueError that names the argument, what it should be and what it is."""
    if not holds:
        raise ValueError(f"{name}: expected {expected}, found {found}")


def check(
    name: str, x: Tensor, shape: tuple[int | None, ...], like: Tensor | None = None, dtypes: tuple[torch.dtype, ...] = FLOATS
) -> None:
    """x is a tensor of this shape (None: any size), of one of these dtypes, on a device that kernels run on (that of `like`).

    The kernels have no backward pass, so a tensor that wants a gradient is refused as well: it would silently get none.
    """
    if triton is None:
        raise ImportError("minisd.kernels needs Triton: `pip install triton` (Linux), or use each file's PyTorch reference")
    expect(isinstance(x, Tensor), name, "a tensor", type(x).__name__)
    fits = x.dim() == len(shape) and all(size in (None, found) for size, found in zip(shape, x.shape, strict=True))
    expect(fits, name, f"shape ({', '.join('any' if size is None else str(size) for size in shape)})", tuple(x.shape))
    expect(x.numel() > 0, name, "at least one element", tuple(x.shape))
    expect(x.dtype in dtypes, name, " or ".join(str(dtype) for dtype in dtypes), x.dtype)
    expect(not (x.requires_grad and torch.is_grad_enabled()), name, "no gradient wanted (torch.no_grad())", "requires_grad")
    if like is not None:
        expect(x.device == like.device, name, f"device {like.device}", x.device)
    else:
        expect(x.device.type in DEVICES, name, "a CUDA device (or TRITON_INTERPRET=1 before Triton is imported)", x.device)


def check_vector(name: str, x: Tensor, size: int, like: Tensor) -> None:
    """x is one number for each channel, (size,), next to each other."""
    check(name, x, (size,), like=like)
    expect(x.is_contiguous(), name, "contiguous", f"stride {x.stride()}")


def view(name: str, x: Tensor, shape: tuple[int, ...], wanted: str, dense: bool = True) -> Tensor:
    """x.view(shape), never a copy; dense: the last dimension has stride 1."""
    try:
        x_view = x.view(shape)
    except RuntimeError:
        x_view = None
    fits = x_view is not None and (not dense or x_view.stride(-1) == 1 or x_view.shape[-1] == 1)
    expect(fits, name, wanted, f"shape {tuple(x.shape)} with strides {x.stride()}")
    assert x_view is not None
    return x_view


def rows_of(name: str, x: Tensor) -> tuple[int, int]:
    """(..., C) -> the number of rows of C neighbours in memory, and the distance between two of them."""
    rows = view(name, x, (-1, x.shape[-1]), "rows evenly spaced in memory, their elements next to each other")
    return rows.shape[0], rows.stride(0)


def pixels_of(name: str, x: Tensor) -> tuple[int, int]:
    """(B, C, H, W) -> the distance between two pixels and between two samples, where x is channels-last."""
    b, c, height, width = x.shape
    pixels = view(name, x.permute(0, 2, 3, 1), (b, height * width, c), "channels-last memory (torch.channels_last)")
    return pixels.stride(1), pixels.stride(0)


ABSENT: int | None = None  # the compute capability that is compiled for, where no GPU of it is here


def capability(x: Tensor) -> int:
    """The compute capability of the GPU that x is on, major and minor as one number; elsewhere that of an H100."""
    if ABSENT is not None or not x.is_cuda:
        return ABSENT or 90
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def descriptor(x: Tensor, shape: tuple[int, ...], strides: tuple[int, ...], block: tuple[int, ...]) -> Any:
    """What the copy engine of a Hopper GPU needs to know: the layout of x, and the block to load at once."""
    return TensorDescriptor(x, list(shape), list(strides), list(block))


@dataclass(frozen=True)
class MapShape:
    """A real shape of square feature maps, (batch, channels, size, size)."""

    label: str
    batch: int
    channels: int
    size: int

    @classmethod
    def of(cls, model: str, batch: int, *maps: tuple[int, int]) -> list[Self]:
        """Those of a model, each by channels and size."""
        return [cls(f"{model} {channels}@{size}x{size}", batch, channels, size) for channels, size in maps]
