"""A weight in float8 dequantised: what a convolution reads that no library computes in float8.

    w[n, k] = s[n] q[n, k],     q in e4m3, s in float32, one for each output channel

Memory traffic.  q is read, w written: 3 bytes for each weight in half precision.  (1280, 1280, 3, 3), as most of SD 1.5's are: 44
MB, 11 us at 4.2 TB/s.  PyTorch converts in one kernel and multiplies in another, 7 bytes; by way of float32 it is 19.

The numbers are found by their bits, so any GPU can do it: e4m3 has sign, 4 bits of exponent and 3 of mantissa, float16 sign, 5
and 10.  Moved up by 7 places, with the sign where it was, they are a float16 whose exponent counts from 15 in place of 7: 2^-8
times the number, those below e4m3's smallest power of two included.  (e4m3's NaN is not kept; weights have none.)

Work split.  A program takes a piece of one row, whose scale it reads once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import FLOATS, check, expect, jit, launcher, tl
from .float8 import E4M3


class Tile(NamedTuple):
    numbers: int  # of a program
    warps: int


TILE = Tile(2048, 4)


def reference(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    wide = scale.view(-1, *[1] * (weight.dim() - 1)) * weight.to(scale.dtype)
    return wide if scale.dtype == torch.float64 else wide.to(dtype)


@jit
def dequantise_kernel(weight, scale, y, numbers, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    number = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = number < numbers
    bits = tl.load(weight + row * numbers + number, mask=mask, other=0).to(tl.int16)  # two signs: of 8 bits, and above them
    half = ((bits << 7) & ~0x4000).to(tl.float16, bitcast=True)
    values = half.to(tl.float32) * (256.0 * tl.load(scale + row))
    tl.store(y + row * numbers + number, values.to(y.dtype.element_ty), mask=mask)


@launcher
def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype, tile: Tile = TILE) -> Tensor:
    """weight (N, ...), e4m3, whose rows lie one behind the other, contiguous or channels-last, scale (N,) -> the same in `dtype`.

    ValueError for other shapes, dtypes, strides or devices.
    """
    check("weight", weight, (None,) * weight.dim(), dtypes=(E4M3,))
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    expect(dense, "weight", "contiguous or channels-last", f"strides {weight.stride()}")
    check("scale", scale, (len(weight),), like=weight, dtypes=(torch.float32,))
    expect(scale.is_contiguous(), "scale", "contiguous", f"stride {scale.stride()}")
    expect(dtype in FLOATS, "dtype", " or ".join(map(str, FLOATS)), dtype)
    y = torch.empty_like(weight, dtype=dtype)
    numbers = weight[0].numel()
    grid = (len(weight), -(-numbers // tile.numbers))  # of the second there may be 65,535 only
    dequantise_kernel[grid](weight.view(torch.int8), scale, y, numbers, BLOCK=tile.numbers, num_warps=tile.warps)
    return y


@dataclass(frozen=True)
class Shape:
    label: str
    outputs: int
    inputs: int
    kernel: int = 3


SHAPES = [
    Shape("SD 1.5 320 to 320", 320, 320),
    Shape("SD 1.5 1280 to 1280", 1280, 1280),
    Shape("SD 1.5 2560 to 1280", 1280, 2560),
    Shape("SD 1.5 2560 to 1280, 1x1", 1280, 2560, 1),
    Shape("SDXL 640 to 640", 640, 640),
    Shape("SDXL 1920 to 1280", 1280, 1920),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    weight = torch.randn(shape.outputs, shape.inputs, shape.kernel, shape.kernel, device=device) * 100
    weight = weight.clamp(-448, 448).to(E4M3).contiguous(memory_format=torch.channels_last)
    return {"weight": weight, "scale": torch.rand(shape.outputs, device=device) / 1e4, "dtype": dtype}


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(numbers, warps) for numbers, warps in ((1024, 4), (2048, 4), (2048, 8), (4096, 4), (4096, 8), (8192, 8))]


def traffic(shape: Shape, element_size: int) -> int:
    return shape.outputs * (shape.inputs * shape.kernel**2 * (1 + element_size) + 4)


def flops(shape: Shape) -> int:
    return shape.outputs * shape.inputs * shape.kernel**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
