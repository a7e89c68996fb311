"""LayerNorm over rows, of a residual stream that some biases are still to be added to.

    x[r, c] <- x[r, c] + addend[r, c]                                    (where there is one)
    z[r, c] = x[r, c] + shift[c]                                         (without a shift: x)
    y[r, c] = (z[r, c] - mean[r]) / sqrt(var[r] + eps) * weight[c] + bias[c]

with mean and variance of z over the C channels of a row (Ba et al. 2016, arXiv 1607.06450).

Memory traffic.  x is read once, y written once: 2 N bytes, and the floor is that over the bandwidth.  (2048, 1280) in half
precision, as 210 times in a step of SDXL: 10.5 MB, 2.5 us at 4.2 TB/s.

Why a shift.  In a transformer block every layer before a norm adds to the stream, x += h W^T + b.  A matrix product that adds to
what is there (beta = 1) does the sum for one more read, but not the bias as well; b is the same for all rows, so it is left out
of the stream and given to every norm that follows, summed with those before it.  As kernels of its own the sum would be 3 N.

Why an addend.  A matrix product in float8 cannot add to what is there, so what it made is added here, and the stream written
back: 3 N beside what the norm writes, where a sum of its own and the norm after it would move 4 N in two launches.

Work split.  A program holds whole rows in registers (about 2048 values, so one to four rows), and so makes the mean first and
the variance about it: no cancellation.  For a matrix product in float8 it can write those rows so: see float8.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check, check_vector, expect, jit, launcher, rows_of, tl
from .float8 import empty_rows, row_scale, scaled


class Tile(NamedTuple):
    numbers: int  # of a program: as many whole rows, at least one
    warps: int


ADDEND = torch.bfloat16  # what a product in float8 makes
TILE, WIDE = Tile(2048, 4), Tile(2048, 16)  # WIDE: of rows longer than that


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None, float8: bool = False,
    addend: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """Without writing to x."""
    x = x if addend is None else x + addend.to(x.dtype)
    y = F.layer_norm(x if shift is None else x + shift.to(x.dtype), x.shape[-1:], weight, bias, eps)
    return scaled(y) if float8 else y


@jit(do_not_specialize=["rows", "eps"])
def layer_norm_kernel(
    x, addend, shift, weight, bias, y, scales, rows, channels, x_row, addend_row, eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    valid = channel < channels
    mask = (row < rows)[:, None] & valid[None, :]
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + row * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if addend is not None:
        values += tl.load(addend + row * addend_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        total = values.to(x.dtype.element_ty)
        tl.store(x + row * x_row + channel[None, :], total, mask=mask)
        values = total.to(tl.float32)
    if shift is not None:
        values += tl.load(shift + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
    mean = tl.sum(values, axis=1) / channels
    values = tl.where(mask, values - mean[:, None], 0.0)
    if x.dtype.element_ty == tl.float32:  # what rounding left of the mean, which matters only here
        values = tl.where(mask, values - tl.sum(values, axis=1)[:, None] / channels, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / channels + eps)
    scale = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    values = values * rstd[:, None] * scale[None, :] + offset[None, :]
    if scales is not None:
        unit = row_scale(values)[:, None]
        tl.store(scales + row, unit, mask=row < rows)
        values = values / unit
    tl.store(y + row * channels + channel[None, :], values.to(y.dtype.element_ty), mask=mask)


@launcher
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, shift: Tensor | None = None, tile: Tile | None = None,
    float8: bool = False, addend: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """LayerNorm of x + shift over the last dimension.

    x (..., C), C up to 16384, weight, bias and shift (C,) -> (..., C), contiguous, in x's dtype.
    float8: instead (values (..., C), scales (..., 1)), e4m3 and float32, as `float8.scaled` makes them.
    addend (..., C): is added to x first, in place; the memory of one must not overlap with that of the other.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None,) * x.dim())
    channels = x.shape[-1]
    expect(channels <= 16384, "x", "at most 16384 channels", channels)
    rows, x_row = rows_of("x", x)
    for name, vector in (("weight", weight), ("bias", bias), ("shift", shift)):
        if vector is not None:
            check_vector(name, vector, channels, like=x)
    addend_row = 0
    if addend is not None:
        check("addend", addend, tuple(x.shape), like=x)
        expect(rows == 1 or x_row >= channels, "x", "rows that do not overlap, where there is an addend", f"stride {x_row}")
        addend_row = rows_of("addend", addend)[1]
    y, scales = empty_rows(x, channels) if float8 else (torch.empty(x.shape, device=x.device, dtype=x.dtype), None)
    block = 1 << (channels - 1).bit_length()
    tile = tile or (TILE if block <= TILE.numbers else WIDE)
    rows_each = max(1, tile.numbers // block)
    layer_norm_kernel[(-(-rows // rows_each),)](
        x, addend, shift, weight, bias, y, scales, rows, channels, x_row, addend_row, eps,
        ROWS=rows_each, BLOCK_C=block, num_warps=tile.warps,
    )  # fmt: skip
    return y if scales is None else (y, scales)


@dataclass(frozen=True)
class Shape:
    label: str
    rows: int
    channels: int
    shift: bool = True
    float8: bool = False
    addend: bool = False


SHAPES = [
    Shape("SD 1.5 320@64x64", 2 * 64 * 64, 320),
    Shape("SD 1.5 320@64x64, first of a transformer", 2 * 64 * 64, 320, shift=False),
    Shape("SD 1.5 640@32x32", 2 * 32 * 32, 640),
    Shape("SD 1.5 1280@16x16", 2 * 16 * 16, 1280),
    Shape("SD 2.1 320@96x96", 2 * 96 * 96, 320),
    Shape("SDXL 640@64x64", 2 * 64 * 64, 640),
    Shape("SDXL 1280@32x32", 2 * 32 * 32, 1280),
    Shape("SDXL 1280@32x32, first of a transformer", 2 * 32 * 32, 1280, shift=False),
    Shape("SDXL refiner 1536@32x32", 2 * 32 * 32, 1536),
    Shape("CLIP 768@77", 2 * 77, 768, shift=False),
    Shape("to float8, SD 1.5 320@64x64", 2 * 64 * 64, 320, float8=True, addend=True),
    Shape("to float8, SDXL 640@64x64", 2 * 64 * 64, 640, float8=True, addend=True),
    Shape("to float8, SDXL 1280@32x32", 2 * 32 * 32, 1280, float8=True, addend=True),
    Shape("to float8, SD 1.5 320@64x64, first of a transformer", 2 * 64 * 64, 320, shift=False, float8=True),
    Shape("to float8, SDXL 640@64x64, first of a transformer", 2 * 64 * 64, 640, shift=False, float8=True),
    Shape("to float8, SDXL 1280@32x32, first of a transformer", 2 * 32 * 32, 1280, shift=False, float8=True),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    c = shape.channels
    arguments = {"x": randn(shape.rows, c), "weight": 1 + randn(c) / 4, "bias": randn(c) / 4, "eps": 1e-5}
    arguments |= {"shift": torch.randn(c, device=device)} if shape.shift else {}  # a sum of biases, in float32
    arguments |= {"addend": randn(shape.rows, c).to(ADDEND)} if shape.addend else {}
    return arguments | ({"float8": True} if shape.float8 else {})


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(numbers, warps) for numbers, warps in ((1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 8))]


def traffic(shape: Shape, element_size: int) -> int:
    moved = element_size + (1 if shape.float8 else element_size) + (element_size + ADDEND.itemsize if shape.addend else 0)
    return shape.rows * shape.channels * moved


def flops(shape: Shape) -> int:
    return (8 + shape.shift + shape.addend) * shape.rows * shape.channels


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
