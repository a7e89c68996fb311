"""Rows in float8 of a tensor that no kernel of ours wrote so: what attention makes, and what a map is to a linear layer.

    s[r] = max_c |x[r, c]| / 448,     p[r, c] = e4m3(x[r, c] / s[r])

with e4m3's largest number, 448, at the largest of every row (Micikevicius et al. 2022, arXiv 2209.05433): see float8.py.

Memory traffic.  x is read once, p written once: 3 bytes for each number in half precision, and the floor is that over the
bandwidth.  (8192, 640), as 30 times in a step of SDXL: 16 MB, 4 us at 4.2 TB/s.  PyTorch takes seven kernels, three of which go
through float32.

Work split.  A program holds whole rows in registers (about 2048 values, so one to four rows), as that of LayerNorm does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import check, expect, jit, launcher, rows_of, tl
from .float8 import empty_rows, row_scale, scaled
from .layer_norm import TILE, WIDE, Tile


def reference(x: Tensor) -> tuple[Tensor, Tensor]:
    return scaled(x)


@jit(do_not_specialize=["rows"])
def quantise_rows_kernel(x, y, scales, rows, channels, x_row, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)[None, :]
    mask = (row < rows)[:, None] & (channel < channels)
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + row * x_row + channel, mask=mask, other=0.0).to(tl.float32)
    unit = row_scale(values)[:, None]
    tl.store(scales + row, unit, mask=row < rows)
    tl.store(y + row * channels + channel, (values / unit).to(y.dtype.element_ty), mask=mask)


@launcher
def quantise_rows(x: Tensor, tile: Tile | None = None) -> tuple[Tensor, Tensor]:
    """x (..., C), C up to 16384 -> (values (..., C), scales (..., 1)), e4m3 and float32, contiguous.

    ValueError for other dtypes, strides or devices, and for a GPU that has no float8.
    """
    check("x", x, (None,) * x.dim())
    channels = x.shape[-1]
    expect(channels <= 16384, "x", "at most 16384 channels", channels)
    rows, x_row = rows_of("x", x)
    y, scales = empty_rows(x, channels)
    block = 1 << (channels - 1).bit_length()
    tile = tile or (TILE if block <= TILE.numbers else WIDE)
    rows_each = max(1, tile.numbers // block)
    quantise_rows_kernel[(-(-rows // rows_each),)](
        x, y, scales, rows, channels, x_row, ROWS=rows_each, BLOCK_C=block, num_warps=tile.warps
    )
    return y, scales


@dataclass(frozen=True)
class Shape:
    label: str
    rows: int
    channels: int
    float8: bool = True  # which not every GPU has


SHAPES = [
    Shape("SD 1.5 320@64x64", 2 * 64 * 64, 320),
    Shape("SD 1.5 640@32x32", 2 * 32 * 32, 640),
    Shape("SD 1.5 1280@16x16", 2 * 16 * 16, 1280),
    Shape("SD 2.1 320@96x96", 2 * 96 * 96, 320),
    Shape("SDXL 640@64x64", 2 * 64 * 64, 640),
    Shape("SDXL 1280@32x32", 2 * 32 * 32, 1280),
    Shape("SDXL, a prompt", 2 * 77, 2048),
    Shape("SD 1.5, a prompt", 2 * 77, 768),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    return {"x": torch.randn(shape.rows, shape.channels, device=device, dtype=dtype)}


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(numbers, warps) for numbers, warps in ((1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 8))]


def traffic(shape: Shape, element_size: int) -> int:
    return shape.rows * (shape.channels * (element_size + 1) + 4)


def flops(shape: Shape) -> int:
    return 3 * shape.rows * shape.channels


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
