"""The bias of a convolution and the residual sum after it, in one kernel.

    y[b, p, c] = x[b, p, c] + bias[c] + residual[b, p, c]                p: one of the H*W pixels, channels-last

Memory traffic.  x and residual are read once, y written once: 3 N elements, and the floor is that over the bandwidth.  128
channels at 1024x1024 in half precision: 805 MB, 0.19 ms at 4.2 TB/s.  PyTorch's convolution adds its bias in a kernel of its own
(2 N), the sum is another (3 N).

Statistics.  Where GroupNorm follows, it would read y once more, to find its means and variances: another N.  So a second kernel
writes y and, of each chunk of its pixels, mean and M2 of every group, as group_norm.py's partial_kernel does, over its grid.

Work split.  Every output is independent: a program takes 16 pixels of up to 128 channels, one 16-byte load a thread from each.
The sum is made in float32 and rounded once, so it is no less precise than PyTorch's two roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import MapShape, check, check_vector, expect, jit, launcher, tl
from .group_norm import blocking, channels_of, chunk_moments, chunks_of, of_groups, store_chunk


def reference(
    x: Tensor, bias: Tensor, residual: Tensor, groups: int | None = None, shift: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    y = x + bias[:, None, None].to(x.dtype) + residual
    return y if groups is None else (y, *chunk_moments(y, groups, shift))


@jit(do_not_specialize=["pixels"])
def add_bias_kernel(x, bias, residual, y, pixels, channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + offset[None, :]
    values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@jit(do_not_specialize=["pixels", "chunk", "groups", "width", "span"])
def add_bias_statistics_kernel(
    x, bias, residual, shift, y, means, m2s, pixels, chunk, groups, channels, width, span,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    first, block, batch = tl.program_id(0) * chunk, tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = span * UNIT
    lanes, channel, mask = channels_of(block, span, channels, BLOCK_C)
    start_at = (batch * pixels + first) * channels
    x, residual, y = x + start_at, residual + start_at, y + start_at
    count = tl.minimum(pixels - first, chunk)
    offset = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
    # What is summed is y minus the channel's first pixel, as in partial_kernel.
    pivot = tl.load(x + channel, mask=mask, other=0.0).to(tl.float32)[None, :] + offset
    pivot += tl.load(residual + channel, mask=mask, other=0.0).to(tl.float32)[None, :]
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        valid = (row < count)[:, None] & mask[None, :]
        at = row[:, None] * channels + channel[None, :]
        values = tl.load(x + at, mask=valid, other=0.0).to(tl.float32) + offset
        values += tl.load(residual + at, mask=valid, other=0.0).to(tl.float32)
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + at, rounded, mask=valid)
        apart = tl.where(valid, rounded.to(tl.float32) - pivot, 0.0)
        sums += apart
        squares += apart * apart
    n = count.to(tl.float32)
    sum_c = tl.sum(sums, axis=0)
    m2_c = tl.maximum(tl.sum(squares, axis=0) - sum_c * sum_c / n, 0.0)
    mean_c = tl.sum(pivot, axis=0) + sum_c / n
    if shift is not None:
        mean_c += tl.load(shift + channel, mask=mask, other=0.0).to(tl.float32)
    mean_g, m2_g = of_groups(mean_c, m2_c, n, lanes, mask, width, BLOCK_G)
    store_chunk(means, m2s, mean_g, m2_g, block, batch, groups, width, span, BLOCK_G)


@launcher
def add_bias(
    x: Tensor, bias: Tensor, residual: Tensor, groups: int | None = None, shift: Tensor | None = None
) -> Tensor | tuple[Tensor, ...]:
    """x + bias + residual: (B, C, H, W), (C,), (B, C, H, W), the maps dense and channels-last, as the result is, in x's dtype.

    groups: those of a GroupNorm that follows, of the result + shift, (C,): then (result, *group_norm.chunk_moments of it).
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None, None, None, None))
    b, channels, height, width = x.shape
    check_vector("bias", bias, channels, like=x)
    check("residual", residual, tuple(x.shape), like=x, dtypes=(x.dtype,))
    for name, tensor in (("x", x), ("residual", residual)):
        dense = tensor.is_contiguous(memory_format=torch.channels_last)
        expect(dense, name, "dense channels-last memory (torch.channels_last)", f"strides {tensor.stride()}")
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    if groups is not None:
        expect(channels % groups == 0, "groups", f"a divisor of the {channels} channels", groups)
        if shift is not None:
            check_vector("shift", shift, channels, like=x)
        span, chunk, grid3 = chunks_of(b, height * width, channels, groups)
        block = blocking(span, channels // groups)
        known = torch.empty(2, b, grid3[0], groups, device=x.device, dtype=torch.float32).unbind(0)
        numbers = (height * width, chunk, groups, channels, channels // groups, span // block["UNIT"])
        add_bias_statistics_kernel[grid3](x, bias, residual, shift, y, *known, *numbers, **block)
        return y, *known
    grid = (-(-b * height * width // 16), -(-channels // 128))
    add_bias_kernel[grid](x, bias, residual, y, b * height * width, channels, ROWS=16, BLOCK_C=128, num_warps=8)
    return y


@dataclass(frozen=True)
class Shape(MapShape):
    statistics: bool = False
    shift: bool = False


SHAPES = [
    Shape("SD 1.5 320@64x64, statistics", 2, 320, 64, True, True),
    *Shape.of("SD 1.5", 2, (1280, 8)),
    *Shape.of("SDXL", 2, (320, 128)),
    Shape("SDXL 1280@32x32, statistics", 2, 1280, 32, True, True),
    Shape("VAE 512@64x64, statistics", 1, 512, 64, True),
    *Shape.of("VAE", 1, (256, 512)),
    Shape("VAE 128@512x512, statistics", 1, 128, 512, True),
    Shape("VAE 128@1024x1024, statistics", 1, 128, 1024, True),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def image() -> Tensor:
        x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last)

    bias, shift = (torch.randn(shape.channels, device=device) for _ in range(2))  # sums, in float32
    arguments = {"x": image(), "bias": bias, "residual": image()} | ({"groups": 32} if shape.statistics else {})
    return arguments | ({"shift": shift} if shape.shift else {})


def traffic(shape: Shape, element_size: int) -> int:
    return 3 * shape.batch * shape.channels * shape.size**2 * element_size


def flops(shape: Shape) -> int:
    return (6 if shape.statistics else 2) * shape.batch * shape.channels * shape.size**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
