"""GEGLU, the gated activation of the feed-forward layers (Shazeer 2020, arXiv 2002.05202; CompVis attention.py, GEGLU).

    y[r, c] = x[r, c] * gelu(x[r, C + c]),     gelu(g) = g/2 (1 + erf(g / sqrt 2)),     x (R, 2C) -> y (R, C)

Memory traffic.  x is read once, y written once: 3 R C elements, and the floor is that over the bandwidth.  (2048, 2 * 5120) in
half precision, as 60 times in a step of SDXL: 63 MB, 15 us at 4.2 TB/s.  PyTorch's two kernels (GELU, product) move 5 R C, with
strided reads.  Only a GEMM that applies it to its own result does better: see linear_geglu.py.

Work split.  Every output is independent: a program takes 8 rows of 256 columns, two 16-byte loads a thread from each half.  For
rows in float8 (see float8.py) it takes one row, whose scale depends on all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check, expect, jit, launcher, rows_of, tl
from .float8 import empty_rows, row_scale, scaled


class Tile(NamedTuple):
    rows: int
    columns: int
    warps: int


TILE = Tile(8, 256, 4)


def gated(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def reference(x: Tensor, float8: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    return scaled(gated(x)) if float8 else gated(x)


@jit
def gelu(x):
    return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))  # 1 / sqrt(2)


@jit(do_not_specialize=["rows"])
def geglu_kernel(x, y, rows, columns, x_row, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    mask = (row < rows)[:, None] & (column < columns)
    row = row.to(tl.int64)[:, None]
    value = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_row + columns + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + row * columns + column, (value * gelu(gate)).to(y.dtype.element_ty), mask=mask)


@jit
def geglu_float8_kernel(x, y, scales, columns, x_row, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    mask = column < columns
    value = tl.load(x + row * x_row + column, mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(x + row * x_row + columns + column, mask=mask, other=0.0).to(tl.float32)
    values = value * gelu(gate)
    unit = row_scale(values)
    tl.store(scales + row + tl.arange(0, 1), unit)
    tl.store(y + row * columns + column, (values / unit[:, None]).to(y.dtype.element_ty), mask=mask)


@launcher
def geglu(x: Tensor, tile: Tile = TILE, float8: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """(..., 2*C) -> (..., C), contiguous: the first half times the exact (erf) GELU of the second, made in float32.

    float8: instead (values (..., C), scales (..., 1)), e4m3 and float32, as `float8.scaled` makes them; C up to 16384.
    ValueError for an odd last dimension and for other dtypes, strides or devices.
    """
    check("x", x, (None,) * x.dim())
    expect(x.shape[-1] % 2 == 0, "x", "an even last dimension", tuple(x.shape))
    rows, x_row = rows_of("x", x)
    columns = x.shape[-1] // 2
    if float8:
        expect(columns <= 16384, "x", "at most 2 * 16384 columns", 2 * columns)
        y, scales = empty_rows(x, columns)
        block = 1 << (columns - 1).bit_length()
        geglu_float8_kernel[(rows,)](x, y, scales, columns, x_row, BLOCK=block, num_warps=min(16, max(4, block // 512)))
        return y, scales
    y = torch.empty(*x.shape[:-1], columns, device=x.device, dtype=x.dtype)
    grid = (-(-rows // tile.rows), -(-columns // tile.columns))  # of the second there may be 65,535 only
    geglu_kernel[grid](x, y, rows, columns, x_row, ROWS=tile.rows, BLOCK=tile.columns, num_warps=tile.warps)
    return y


@dataclass(frozen=True)
class Shape:
    label: str
    rows: int
    columns: int
    float8: bool = False


SHAPES = [
    Shape("SD 1.5 1280@64x64", 2 * 64 * 64, 1280),
    Shape("SD 1.5 2560@32x32", 2 * 32 * 32, 2560),
    Shape("SD 1.5 5120@16x16", 2 * 16 * 16, 5120),
    Shape("SD 2.1 1280@96x96", 2 * 96 * 96, 1280),
    Shape("SDXL 2560@64x64", 2 * 64 * 64, 2560),
    Shape("SDXL 5120@32x32", 2 * 32 * 32, 5120),
    Shape("to float8, SD 1.5 1280@64x64", 2 * 64 * 64, 1280, float8=True),
    Shape("to float8, SDXL 2560@64x64", 2 * 64 * 64, 2560, float8=True),
    Shape("to float8, SDXL 5120@32x32", 2 * 32 * 32, 5120, float8=True),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    x = torch.randn(shape.rows, 2 * shape.columns, device=device, dtype=dtype)
    return {"x": x} | ({"float8": True} if shape.float8 else {})


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(*each) for each in ((4, 256, 4), (8, 256, 4), (8, 256, 8), (16, 256, 8), (4, 512, 4), (8, 512, 8), (2, 1024, 4))]


def traffic(shape: Shape, element_size: int) -> int:
    return shape.rows * shape.columns * (2 * element_size + (1 if shape.float8 else element_size))


def flops(shape: Shape) -> int:
    return 30 * shape.rows * shape.columns  # erf is a polynomial of about 20 operations


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
