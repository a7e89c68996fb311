"""LayerNorm over rows, with the residual sum that comes before it in a transformer block.

    sum[r, c] = x[r, c] + residual[r, c] + residual_bias[c]              (without a residual: x)
    y[r, c]   = (sum[r, c] - mean[r]) / sqrt(var[r] + eps) * weight[c] + bias[c]

with mean and variance over the C channels of a row (Ba et al. 2016, arXiv 1607.06450).

Memory traffic.  x and the residual are read once, the sum and y written once: 4 N bytes with a residual, 2 N without; the floor
is that over the bandwidth.  (2048, 1280) in half precision, as 60 times in a step of SDXL: 21 MB, 5 us at 4.2 TB/s.  As three
kernels (bias, add, norm) it would be 8 N bytes.

Work split.  A program holds whole rows in registers (about 2048 values, so one to four rows), and so makes the mean first and
the variance about it: no cancellation.  Statistics are made from the fp32 sum, not from the rounded one that is written.
`residual_bias` is for the bias of the layer that made x: left out of its GEMM, it costs nothing here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check, check_vector, expect, jit, launcher, rows_of, tl


class Tile(NamedTuple):
    numbers: int  # of a program: as many whole rows, at least one
    warps: int


TILE, WIDE = Tile(2048, 4), Tile(2048, 16)  # WIDE: of rows longer than that


def reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, residual_bias: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    if residual is None:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    total = x + residual if residual_bias is None else x + residual_bias + residual
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


@jit(do_not_specialize=["rows", "eps"])
def layer_norm_kernel(
    x, residual, residual_bias, weight, bias, total, y, rows, channels, x_row, residual_row, eps,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, BLOCK_C)
    valid = channel < channels
    mask = (row < rows)[:, None] & valid[None, :]
    row = row.to(tl.int64)[:, None]
    values = tl.load(x + row * x_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        values += tl.load(residual + row * residual_row + channel[None, :], mask=mask, other=0.0).to(tl.float32)
        if residual_bias is not None:
            values += tl.load(residual_bias + channel, mask=valid, other=0.0).to(tl.float32)[None, :]
        tl.store(total + row * channels + channel[None, :], values.to(total.dtype.element_ty), mask=mask)
    mean = tl.sum(values, axis=1) / channels
    values = tl.where(mask, values - mean[:, None], 0.0)
    if x.dtype.element_ty == tl.float32:  # what rounding left of the mean, which matters only here
        values = tl.where(mask, values - tl.sum(values, axis=1)[:, None] / channels, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(values * values, axis=1) / channels + eps)
    scale = tl.load(weight + channel, mask=valid, other=0.0).to(tl.float32)
    offset = tl.load(bias + channel, mask=valid, other=0.0).to(tl.float32)
    values = values * rstd[:, None] * scale[None, :] + offset[None, :]
    tl.store(y + row * channels + channel[None, :], values.to(y.dtype.element_ty), mask=mask)


@launcher
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, residual: Tensor | None = None, residual_bias: Tensor | None = None,
    tile: Tile | None = None,
) -> Tensor | tuple[Tensor, Tensor]:  # fmt: skip
    """LayerNorm over the last dimension: y, or (sum, y) with a residual, where sum = x + residual + residual_bias.

    x and residual (..., C), C up to 16384, weight, bias and residual_bias (C,) -> (..., C), contiguous, in x's dtype.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None,) * x.dim())
    channels = x.shape[-1]
    expect(channels <= 16384, "x", "at most 16384 channels", channels)
    rows, x_row = rows_of("x", x)
    for name, vector in (("weight", weight), ("bias", bias), ("residual_bias", residual_bias)):
        if vector is not None:
            check_vector(name, vector, channels, like=x)
    expect(residual is not None or residual_bias is None, "residual_bias", "a residual beside it", "none")
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    total, residual_row = None, 0
    if residual is not None:
        check("residual", residual, tuple(x.shape), like=x, dtypes=(x.dtype,))
        _, residual_row = rows_of("residual", residual)
        total = torch.empty(x.shape, device=x.device, dtype=x.dtype)
    block = 1 << (channels - 1).bit_length()
    tile = tile or (TILE if block <= TILE.numbers else WIDE)
    rows_each = max(1, tile.numbers // block)
    sizes = (rows, channels, x_row, residual_row)
    layer_norm_kernel[(-(-rows // rows_each),)](
        x, residual, residual_bias, weight, bias, total, y, *sizes, eps, ROWS=rows_each, BLOCK_C=block, num_warps=tile.warps
    )
    return y if total is None else (total, y)


@dataclass(frozen=True)
class Shape:
    label: str
    rows: int
    channels: int
    residual: bool = True


SHAPES = [
    Shape("SD 1.5 320@64x64", 2 * 64 * 64, 320),
    Shape("SD 1.5 640@32x32", 2 * 32 * 32, 640),
    Shape("SD 1.5 1280@16x16", 2 * 16 * 16, 1280),
    Shape("SD 2.1 320@96x96", 2 * 96 * 96, 320),
    Shape("SDXL 640@64x64", 2 * 64 * 64, 640),
    Shape("SDXL 1280@32x32", 2 * 32 * 32, 1280),
    Shape("SDXL 1280@32x32, no residual", 2 * 32 * 32, 1280, residual=False),
    Shape("SDXL refiner 1536@32x32", 2 * 32 * 32, 1536),
    Shape("CLIP 768@77", 2 * 77, 768),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def randn(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype)

    c = shape.channels
    arguments = {"x": randn(shape.rows, c), "weight": 1 + randn(c) / 4, "bias": randn(c) / 4, "eps": 1e-5}
    if shape.residual:
        arguments |= {"residual": randn(shape.rows, c), "residual_bias": randn(c)}
    return arguments


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(numbers, warps) for numbers, warps in ((1024, 2), (1024, 4), (2048, 2), (2048, 4), (2048, 8), (4096, 8))]


def traffic(shape: Shape, element_size: int) -> int:
    return (4 if shape.residual else 2) * shape.rows * shape.channels * element_size


def flops(shape: Shape) -> int:
    return (10 if shape.residual else 8) * shape.rows * shape.channels


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
