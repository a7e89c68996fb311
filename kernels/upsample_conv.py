"""Nearest-neighbour upsampling by 2, then a 3x3 convolution, as four 2x2 convolutions of the small image.

In a row of pixels doubled, u = x0 x0 x1 x1 x2 x2 ..., three neighbours hold only two different values.  An output at an even
place 2i sees x[i-1] x[i] x[i], one at an odd place x[i] x[i] x[i+1], so with the weights w0 w1 w2

    y[2i]   =  w0 x[i-1]  +  (w1 + w2) x[i]              y[2i+1]  =  (w0 + w1) x[i]  +  w2 x[i+1]

and the same down the columns: four phases (even or odd row, even or odd column), each a 2x2 convolution.  The zero beyond the
border of u is the zero beyond the border of x: exact at the edges too.  4 of 9 multiplications remain, and the upsampled image,
four times as large as x, is never made.

How.  All phases read x[i-1], x[i] or x[i], x[i+1], that is the outputs i or i+1 of a 2x2 convolution with one zero of padding
all around.  So one library convolution makes all four, with 4 C' outputs over (H+1) x (W+1) places, and a kernel puts each
where it belongs and adds the bias.
Memory traffic of that kernel: every output read and written once.  256 channels, 512x512 to 1024x1024, half precision: 1.07 GB,
0.26 ms at 4.2 TB/s, for the 687 of 1237 GFLOP that are saved, 0.93 ms at 740 TFLOP/s.
Statistics.  Where GroupNorm follows, a second kernel also writes mean and M2 of every group over chunks of the pixels: see
add_bias.py.
Work split.  A program takes 16 pixels of the output and up to 128 channels, which are neighbours in both images.

Rounding.  Sums of weights are made in float32 and rounded once: in half precision that adds an error as large as that of
rounding the result, so the error is up to 1.5 times that of the plain convolution.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import MapShape, check, check_vector, expect, jit, launcher, pixels_of, tl
from .group_norm import blocking, channels_of, chunk_moments, chunks_of, of_groups, store_chunk


def phase_weights(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (4*C', C, 2, 2), channels-last: the phases of even and odd rows, each of even and odd columns."""

    def halves(w: Tensor, dim: int) -> list[Tensor]:  # w0, w1, w2 -> even (w0, w1 + w2), odd (w0 + w1, w2)
        w0, w1, w2 = w.unbind(dim)
        return [torch.stack([w0, w1 + w2], dim), torch.stack([w0 + w1, w2], dim)]

    wide = weight if weight.dtype == torch.float64 else weight.float()
    phases = [columns for rows in halves(wide, 2) for columns in halves(rows, 3)]
    return torch.cat(phases).to(weight.dtype).contiguous(memory_format=torch.channels_last)


def whole_weights(phases: Tensor) -> Tensor:
    """The inverse of phase_weights, but for rounding: (4*C', C, 2, 2) -> (C', C, 3, 3)."""

    def whole(even: Tensor, odd: Tensor, dim: int) -> Tensor:
        (w0, w12), (_, w2) = even.unbind(dim), odd.unbind(dim)
        return torch.stack([w0, w12 - w2, w2], dim)

    a, b, c, d = phases.chunk(4)
    return whole(whole(a, b, 3), whole(c, d, 3), 2)


def plain(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """What it stands for, from the weights (C', C, 3, 3)."""
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def reference(
    x: Tensor, phases: Tensor, bias: Tensor | None = None, groups: int | None = None
) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
    b, _, height, width = x.shape
    y = x.new_empty(b, len(phases) // 4, 2 * height, 2 * width)
    for phase, weight in enumerate(phases.chunk(4)):
        row, column = divmod(phase, 2)
        z = F.conv2d(x, weight, bias, padding=1)  # (B, C', H + 1, W + 1)
        y[:, :, row::2, column::2] = z[:, :, row : row + height, column : column + width]
    return y if groups is None else (y, *chunk_moments(y, groups))


@jit(do_not_specialize=["height", "width"])
def interleave_kernel(z, bias, y, height, width, channels, z_row, z_batch, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    batch = tl.program_id(2).to(tl.int64)
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i, j = pixel // (2 * width), pixel % (2 * width)
    source = (i // 2 + i % 2) * (width + 1) + j // 2 + j % 2  # an odd place is one further on in z
    phase = 2 * (i % 2) + j % 2
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < 4 * height * width)[:, None] & (channel < channels)[None, :]
    z += batch * z_batch
    at = source.to(tl.int64)[:, None] * z_row + (phase * channels)[:, None] + channel[None, :]
    values = tl.load(z + at, mask=mask, other=0.0)
    if bias is not None:
        offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
        values = (values.to(tl.float32) + offset[None, :]).to(y.dtype.element_ty)
    y += batch * 4 * height * width * channels
    tl.store(y + pixel.to(tl.int64)[:, None] * channels + channel[None, :], values, mask=mask)


@jit(do_not_specialize=["height", "width", "chunk", "groups", "group_width", "span"])
def interleave_statistics_kernel(
    z, bias, y, means, m2s, height, width, chunk, groups, channels, group_width, span, z_row, z_batch,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    first, block, batch = tl.program_id(0) * chunk, tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = span * UNIT
    lanes, channel, mask = channels_of(block, span, channels, BLOCK_C)
    pixels = 4 * height * width
    count = tl.minimum(pixels - first, chunk)
    z += batch * z_batch
    y += (batch * pixels + first) * channels
    offset = tl.zeros([BLOCK_C], tl.float32)
    if bias is not None:
        offset = tl.load(bias + channel, mask=mask, other=0.0).to(tl.float32)
    pivot = tl.zeros([1, BLOCK_C], tl.float32)
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, count, ROWS):
        row = start + tl.arange(0, ROWS)
        i, j = (first + row) // (2 * width), (first + row) % (2 * width)
        source = (i // 2 + i % 2) * (width + 1) + j // 2 + j % 2
        at = source.to(tl.int64)[:, None] * z_row + ((2 * (i % 2) + j % 2) * channels)[:, None] + channel[None, :]
        valid = (row < count)[:, None] & mask[None, :]
        values = tl.load(z + at, mask=valid, other=0.0).to(tl.float32) + offset[None, :]
        rounded = values.to(y.dtype.element_ty)
        tl.store(y + row[:, None] * channels + channel[None, :], rounded, mask=valid)
        values = rounded.to(tl.float32)
        if start == 0:  # what is summed is y minus the mean of the first pixels
            near = tl.minimum(count, ROWS).to(tl.float32)
            pivot = (tl.sum(tl.where(valid, values, 0.0), axis=0) / near)[None, :]
        apart = tl.where(valid, values - pivot, 0.0)
        sums += apart
        squares += apart * apart
    n = count.to(tl.float32)
    sum_c = tl.sum(sums, axis=0)
    m2_c = tl.maximum(tl.sum(squares, axis=0) - sum_c * sum_c / n, 0.0)
    mean_g, m2_g = of_groups(tl.sum(pivot, axis=0) + sum_c / n, m2_c, n, lanes, mask, group_width, BLOCK_G)
    store_chunk(means, m2s, mean_g, m2_g, block, batch, groups, group_width, span, BLOCK_G)


@launcher
def upsample_conv(
    x: Tensor, phases: Tensor, bias: Tensor | None = None, groups: int | None = None
) -> Tensor | tuple[Tensor, ...]:
    """A 3x3 convolution with padding 1 of x at twice its size: x (B, C, H, W), phases (4*C', C, 2, 2) -> (B, C', 2*H, 2*W).

    x and phases in channels-last memory, phases from `phase_weights`, bias (C',).  The result is channels-last, in x's dtype.
    groups: those of a GroupNorm that follows: then (result, *group_norm.chunk_moments of it).
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None, None, None, None))
    b, c, height, width = x.shape
    pixels_of("x", x)
    check("phases", phases, (None, c, 2, 2), like=x, dtypes=(x.dtype,))
    expect(len(phases) % 4 == 0, "phases", "4*C' outputs, as phase_weights makes them", tuple(phases.shape))
    channels = len(phases) // 4
    if bias is not None:
        check_vector("bias", bias, channels, like=x)
    z = F.conv2d(x, phases, padding=1)  # (B, 4*C', H + 1, W + 1)
    z = z.contiguous(memory_format=torch.channels_last)  # as cuDNN makes it: no copy
    z_row, z_batch = pixels_of("convolution's result", z)
    y = torch.empty(b, channels, 2 * height, 2 * width, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    if groups is not None:
        expect(channels % groups == 0, "groups", f"a divisor of the {channels} channels", groups)
        span, chunk, grid = chunks_of(b, 4 * height * width, channels, groups)
        block = blocking(span, channels // groups) | {"ROWS": 16}  # half of a chunk's step: addresses take registers here
        known = torch.empty(2, b, grid[0], groups, device=x.device, dtype=torch.float32).unbind(0)
        numbers = (height, width, chunk, groups, channels, channels // groups, span // block["UNIT"], z_row, z_batch)
        interleave_statistics_kernel[grid](z, bias, y, *known, *numbers, **block)
        return y, *known
    grid = (-(-4 * height * width // 16), -(-channels // 128), b)
    interleave_kernel[grid](z, bias, y, height, width, channels, z_row, z_batch, ROWS=16, BLOCK_C=128, num_warps=4)
    return y


@dataclass(frozen=True)
class Shape(MapShape):
    statistics: bool = False


SHAPES = [
    *Shape.of("SD 1.5", 2, (1280, 8), (1280, 16), (640, 32)),
    *Shape.of("SDXL", 2, (1280, 32), (640, 64)),
    *(Shape(f"VAE {c}@{size}x{size}, statistics", 1, c, size, True)
      for c, size in ((512, 64), (512, 128), (256, 256), (512, 256), (256, 512))),
]  # fmt: skip


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    c = shape.channels
    x = torch.randn(shape.batch, c, shape.size, shape.size, device=device, dtype=dtype).to(memory_format=torch.channels_last)
    weight = torch.randn(c, c, 3, 3, device=device, dtype=dtype) * (9 * c) ** -0.5
    arguments = {"x": x, "phases": phase_weights(weight), "bias": torch.randn(c, device=device, dtype=dtype)}
    return arguments | ({"groups": 32} if shape.statistics else {})


def traffic(shape: Shape, element_size: int) -> int:
    return (5 * shape.batch * shape.size**2 + 16 * shape.channels) * shape.channels * element_size


def flops(shape: Shape) -> int:
    """What is left to do: 4 multiplications and additions for each output and input channel, not 9."""
    return 2 * 4 * shape.batch * 4 * shape.size**2 * shape.channels**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    x, phases, bias = arguments["x"], arguments["phases"], arguments["bias"]
    weight = whole_weights(phases).contiguous(memory_format=torch.channels_last)
    groups = arguments.get("groups")

    def whole() -> Tensor | tuple[Tensor, ...]:
        y = plain(x, weight, bias)
        return y if groups is None else (y, *chunk_moments(y, groups))

    return {"PyTorch": whole, "four convolutions": lambda: reference(x, phases, bias, groups)}
