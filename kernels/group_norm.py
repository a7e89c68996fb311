"""GroupNorm over channels-last feature maps, with the SiLU that follows it and the sums and concatenations before it.

    x'[b, p, c] = x[b, p, c] + shift[b, c]                p: one of the H*W pixels; the channels of `skip` come after those of x
    y[b, p, c]  = silu((x'[b, p, c] - mean[b, g]) / sqrt(var[b, g] + eps) * weight[c] + bias[c])

with mean and variance over the pixels and channels of group g (Wu and He 2018, arXiv 1803.08494).

Memory traffic.  A pixel's channels lie next to each other, so a sample is a matrix (H*W, C).  The statistics need all of x
before the first output: read x, read x again, write y; of a map that fits into the 50 MB of L2 the second read is nearly free.
Floor: 2 or 3 times the bytes of x over the bandwidth.  320 channels at 64x64, batch 2, half precision: 10.5 MB, 2.5 us at
4.2 TB/s; 128 channels at 1024x1024: 805 MB, 0.19 ms.

Work split.  One program per (sample, group) would occupy 64 of 132 SMs and read 20 bytes here and there.  Here one takes a
chunk of pixels times a run of whole groups, up to 128 channels (12 groups of 10, 6 of 20, 3 of 40, 4 of 30, 32 of 4), in pieces
of 16 bytes.  Both launches use the same grid of about three programs per SM:

 1. partial_kernel: mean and M2 = sum (x' - mean)^2 of each group over the chunk, in fp32.  What is summed is x' minus the
    channel's first pixel in the chunk, so a mean far above the deviation costs no digits; channels are merged by Chan's formula
    (Chan, Golub and LeVeque 1983).  No atomics: the same input gives the same bits.
 2. apply_kernel: merges the chunks of its groups (a few kB out of L2), then normalises its own chunk.

Maps of up to 16x16 pixels take one launch, whole_kernel: a program has all pixels of one to four groups, 64 programs for 1280
channels in a batch of 2, and reads them a second time out of its own L1.  There a launch, and the way of the statistics through
L2, would cost more than the SMs that stay idle.

A group may straddle x and skip: a tile is loaded from both under complementary masks, and a masked-off lane costs no traffic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil, gcd
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import MapShape, check, check_vector, expect, jit, launcher, pixels_of, tl


class Tile(NamedTuple):
    rows: int  # pixels loaded at once: of 128 channels, with 256 threads, two 16-byte loads a thread and two more on their way
    programs: int  # about so many; another GPU changes the speed, not the result
    warps: int


TILE = Tile(32, 3 * 132, 8)  # three programs for each SM of an H200
WHOLE = 256  # pixels of a map that goes in one launch


def reference(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None,
    skip: Tensor | None = None, known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    x = x if skip is None else torch.cat([x, skip], dim=1)
    y = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(y) if silu else y


def chunk_moments(x: Tensor, groups: int, shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Of x + shift: mean, and sum of the squared differences from it, of each group over each chunk: (B, chunks, groups)."""
    b, channels, height, width = x.shape
    _, chunk, _ = chunks_of(b, height * width, channels, groups)
    wide = x if x.dtype == torch.float64 else x.float()
    wide = wide if shift is None else wide + shift[:, None, None]
    pieces = [piece.reshape(b, groups, -1) for piece in wide.flatten(2).split(chunk, dim=2)]
    means = torch.stack([piece.mean(dim=2) for piece in pieces], dim=1)
    return means, torch.stack([piece.var(dim=2, correction=0) * piece.shape[2] for piece in pieces], dim=1)


@jit
def channels_of(block, span, channels, BLOCK_C: tl.constexpr):
    """The lanes of a block of `span` channels, the channels that they stand for, and which lanes have one."""
    lanes = tl.arange(0, BLOCK_C)
    own = block * span + lanes
    return lanes, own, (lanes < span) & (own < channels)


@jit
def load_tile(x, skip, rows, row_mask, channels, mask, c1, x_row, skip_row):
    """[x, skip] at these pixels and channels, as stored; zero where masked off."""
    from_x = row_mask[:, None] & (mask & (channels < c1))[None, :]
    tile = tl.load(x + rows[:, None] * x_row + channels[None, :], mask=from_x, other=0.0)
    if skip is not None:
        from_skip = row_mask[:, None] & (mask & (channels >= c1))[None, :]
        tile += tl.load(skip + rows[:, None] * skip_row + (channels - c1)[None, :], mask=from_skip, other=0.0)
    return tile


@jit
def of_groups(mean_c, m2_c, n, lanes, mask, width, BLOCK_G: tl.constexpr):
    """Mean and M2 of each group from those of its channels, n numbers of each."""
    member = (lanes[None, :] // width == tl.arange(0, BLOCK_G)[:, None]) & mask[None, :]  # [g, c]: channel c is in group g
    first_mean = tl.sum(tl.where(member & (lanes[None, :] % width == 0), mean_c[None, :], 0.0), axis=1)
    mean_g = first_mean + tl.sum(tl.where(member, mean_c[None, :] - first_mean[:, None], 0.0), axis=1) / width
    apart = tl.where(member, mean_c[None, :] - mean_g[:, None], 0.0)
    return mean_g, tl.sum(tl.where(member, m2_c[None, :], 0.0) + n * apart * apart, axis=1)


@jit
def store_chunk(means, m2s, mean_g, m2_g, block, batch, groups, width, span, BLOCK_G: tl.constexpr):
    """Of the chunk that is this program's."""
    slots = tl.arange(0, BLOCK_G)
    group = block * (span // width) + slots
    at = (batch * tl.num_programs(0) + tl.program_id(0)) * groups + group
    group_mask = (slots < span // width) & (group < groups)
    tl.store(means + at, mean_g, mask=group_mask)
    tl.store(m2s + at, m2_g, mask=group_mask)


@jit
def statistics(
    x, skip, shift, count, lanes, channels, mask, c1, width, span, x_row, skip_row,
    ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Mean and M2 of each group over `count` pixels, the first of which x, skip and shift point to: (BLOCK_G,) each."""
    # Every load is asked for one tile ahead of its use.
    one, rows = tl.arange(0, 1), tl.arange(0, ROWS)
    following = load_tile(x, skip, rows, rows < count, channels, mask, c1, x_row, skip_row)
    if x.dtype.element_ty == tl.float32:  # the mean of the first tile: takes longer, and leaves the last bits right
        near = tl.minimum(count, ROWS).to(tl.float32)
        pivot = tl.sum(following, axis=0)[None, :] / near  # (1, BLOCK_C)
    else:
        pivot = load_tile(x, skip, one, one < 1, channels, mask, c1, x_row, skip_row).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK_C], tl.float32)
    squares = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for start in range(0, count, ROWS):
        tile, now = following.to(tl.float32) - pivot, start + rows
        following = load_tile(x, skip, now + ROWS, now + ROWS < count, channels, mask, c1, x_row, skip_row)
        tile = tl.where((now < count)[:, None], tile, 0.0)
        sums += tile
        squares += tile * tile
    n = count.to(tl.float32)
    sum_c, pivot_c = tl.sum(sums, axis=0), tl.sum(pivot, axis=0)  # (BLOCK_C,)
    # The pivot is one of the pixels or their mean, so this difference loses at most log2(n) bits, however far off it is.
    m2_c = tl.maximum(tl.sum(squares, axis=0) - sum_c * sum_c / n, 0.0)
    if shift is not None:
        pivot_c += tl.load(shift + channels, mask=mask & (channels < c1), other=0.0).to(tl.float32)
    return of_groups(pivot_c + sum_c / n, m2_c, n, lanes, mask, width, BLOCK_G)


@jit
def normalise(
    following, x, skip, shift, weight, bias, y, mean_g, rstd_g, count, lanes, channels, mask, c1, c2, width, x_row, skip_row,
    SILU: tl.constexpr, ROWS: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    """Writes `count` pixels of y, by the mean and the reciprocal deviation of each group; following: their first tile."""
    offset = tl.load(bias + channels, mask=mask, other=0.0).to(tl.float32)[None, :]
    factor = tl.load(weight + channels, mask=mask, other=0.0).to(tl.float32)
    member = (lanes[None, :] // width == tl.arange(0, BLOCK_G)[:, None]) & mask[None, :]
    mean = tl.sum(tl.where(member, mean_g[:, None], 0.0), axis=0)[None, :]
    scale = (factor * tl.sum(tl.where(member, rstd_g[:, None], 0.0), axis=0))[None, :]
    if shift is not None:
        shift_c = tl.load(shift + channels, mask=mask & (channels < c1), other=0.0).to(tl.float32)
    rows = tl.arange(0, ROWS)
    for start in range(0, count, ROWS):
        tile, now = following.to(tl.float32), start + rows
        following = load_tile(x, skip, now + ROWS, now + ROWS < count, channels, mask, c1, x_row, skip_row)
        if shift is not None:
            tile += shift_c[None, :]
        tile = (tile - mean) * scale + offset  # mean first: scale * mean alone may be far above the result
        if SILU:
            tile = tile / (1.0 + tl.exp(-tile))
        out = y + now[:, None] * (c1 + c2) + channels[None, :]
        tl.store(out, tile.to(y.dtype.element_ty), mask=(now < count)[:, None] & mask[None, :])


@jit(do_not_specialize=["pixels", "chunk", "groups", "width", "span"])
def partial_kernel(
    x, skip, shift, means, m2s, pixels, chunk, groups, c1, c2, width, span,
    x_row, x_batch, skip_row, skip_batch, shift_batch,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    first, block, batch = tl.program_id(0) * chunk, tl.program_id(1), tl.program_id(2).to(tl.int64)
    span = span * UNIT  # as a product, so that the compiler sees that 16-byte loads are aligned
    lanes, channels, mask = channels_of(block, span, c1 + c2, BLOCK_C)
    x += batch * x_batch + first.to(tl.int64) * x_row
    if skip is not None:
        skip += batch * skip_batch + first.to(tl.int64) * skip_row
    if shift is not None:
        shift += batch * shift_batch
    count = tl.minimum(pixels - first, chunk)
    mean_g, m2_g = statistics(
        x, skip, shift, count, lanes, channels, mask, c1, width, span, x_row, skip_row, ROWS, BLOCK_C, BLOCK_G
    )
    store_chunk(means, m2s, mean_g, m2_g, block, batch, groups, width, span, BLOCK_G)


@jit(do_not_specialize=["pixels", "chunk", "groups", "width", "span", "eps"])
def apply_kernel(
    x, skip, shift, means, m2s, weight, bias, y, pixels, chunk, groups, c1, c2, width, span, eps,
    x_row, x_batch, skip_row, skip_batch, shift_batch,
    SILU: tl.constexpr, PARTS: tl.constexpr,
    UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    first, block, batch = tl.program_id(0) * chunk, tl.program_id(1), tl.program_id(2).to(tl.int64)
    chunks = tl.num_programs(0)
    span = span * UNIT
    lanes, channels, mask = channels_of(block, span, c1 + c2, BLOCK_C)
    x += batch * x_batch + first.to(tl.int64) * x_row
    if skip is not None:
        skip += batch * skip_batch + first.to(tl.int64) * skip_row
    if shift is not None:
        shift += batch * shift_batch
    y += (batch * pixels + first) * (c1 + c2)
    count = tl.minimum(pixels - first, chunk)
    rows = tl.arange(0, ROWS)
    following = load_tile(x, skip, rows, rows < count, channels, mask, c1, x_row, skip_row)  # on its way during the merge

    # Merge the chunks, shifted by the first one's mean (which costs at most log2(chunks) bits, as the pivot above).
    slots = tl.arange(0, BLOCK_G)
    group = block * (span // width) + slots
    group_mask = (slots < span // width) & (group < groups)
    means += batch * chunks * groups + group
    m2s += batch * chunks * groups + group
    first_mean = tl.load(means, mask=group_mask, other=0.0)
    sums = tl.zeros([PARTS, BLOCK_G], tl.float32)
    m2 = tl.zeros([PARTS, BLOCK_G], tl.float32)
    for start in range(0, chunks, PARTS):
        part = start + tl.arange(0, PARTS)
        part_mask = (part < chunks)[:, None] & group_mask[None, :]
        n = tl.minimum(pixels - part * chunk, chunk).to(tl.float32)[:, None]
        apart = tl.load(means[None, :] + part[:, None] * groups, mask=part_mask, other=0.0) - first_mean[None, :]
        apart = tl.where(part_mask, apart, 0.0)
        sums += n * apart
        m2 += tl.load(m2s[None, :] + part[:, None] * groups, mask=part_mask, other=0.0) / width + n * apart * apart
    offset_g = tl.sum(sums, axis=0) / pixels
    var_g = tl.maximum(tl.sum(m2, axis=0) / pixels - offset_g * offset_g, 0.0)
    normalise(
        following, x, skip, shift, weight, bias, y, first_mean + offset_g, 1.0 / tl.sqrt(var_g + eps), count,
        lanes, channels, mask, c1, c2, width, x_row, skip_row, SILU, ROWS, BLOCK_G,
    )  # fmt: skip


@jit(do_not_specialize=["pixels", "width", "span", "eps"])
def whole_kernel(
    x, skip, shift, weight, bias, y, pixels, c1, c2, width, span, eps,
    x_row, x_batch, skip_row, skip_batch, shift_batch,
    SILU: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_G: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    span = span * UNIT
    lanes, channels, mask = channels_of(block, span, c1 + c2, BLOCK_C)
    x += batch * x_batch
    if skip is not None:
        skip += batch * skip_batch
    if shift is not None:
        shift += batch * shift_batch
    y += batch * pixels * (c1 + c2)
    mean_g, m2_g = statistics(
        x, skip, shift, pixels, lanes, channels, mask, c1, width, span, x_row, skip_row, ROWS, BLOCK_C, BLOCK_G
    )
    rows = tl.arange(0, ROWS)
    following = load_tile(x, skip, rows, rows < pixels, channels, mask, c1, x_row, skip_row)
    normalise(
        following, x, skip, shift, weight, bias, y, mean_g, 1.0 / tl.sqrt(m2_g / width / pixels + eps), pixels,
        lanes, channels, mask, c1, c2, width, x_row, skip_row, SILU, ROWS, BLOCK_G,
    )  # fmt: skip


def channel_span(width: int, groups: int) -> int:
    """Channels of a program: whole groups, up to 128 channels, a multiple of 8 (16 bytes in half precision) if possible."""
    runs = range(1, min(groups, 32, max(1, 128 // width)) + 1)
    aligned = [n * width for n in runs if n * width % 8 == 0]
    return max(aligned or [n * width for n in runs])


@launcher
def group_norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False, shift: Tensor | None = None,
    skip: Tensor | None = None, tile: Tile | None = None, known: tuple[Tensor, Tensor] | None = None,
) -> Tensor:  # fmt: skip
    """GroupNorm of [x + shift, skip] over `groups` groups, then SiLU if asked for.

    x (B, C, H, W) and skip (B, C2, H, W) in channels-last memory (slices of the channels or of the batch too), weight and bias
    (C + C2,), shift (B, C) -> (B, C + C2, H, W), channels-last, in x's dtype.  Statistics are in float32.  tile: of the two
    launches, which are taken for small maps as well then.  known: `chunk_moments` of x, from the kernel that wrote x
    (add_bias.py, upsample_conv.py): then the second launch is all there is.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None, None, None, None))
    b, c1, height, width_px = x.shape
    c2 = 0 if skip is None else skip.shape[1]
    expect(groups > 0 and (c1 + c2) % groups == 0, "groups", f"a divisor of the {c1 + c2} channels", groups)
    check_vector("weight", weight, c1 + c2, like=x)
    check_vector("bias", bias, c1 + c2, like=x)
    x_row, x_batch = pixels_of("x", x)
    skip_row, skip_batch, shift_batch = 0, 0, 0
    if skip is not None:
        check("skip", skip, (b, None, height, width_px), like=x, dtypes=(x.dtype,))
        skip_row, skip_batch = pixels_of("skip", skip)
    if shift is not None:
        check("shift", shift, (b, c1), like=x)
        expect(shift.stride(1) == 1 or c1 == 1, "shift", "stride 1 over the channels", shift.stride())
        shift_batch = shift.stride(0)

    y = torch.empty(b, c1 + c2, height, width_px, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    given, strides = (weight, bias, y), (x_row, x_batch, skip_row, skip_batch, shift_batch)
    sizes = (height * width_px, c1, c2, (c1 + c2) // groups)
    if known is not None:
        expect(skip is None and tile is None, "known", "neither a skip nor a tile beside it", "one of them")
        chunks = chunks_of(b, height * width_px, c1, groups)[2][0]
        for moments in known:
            check("known", moments, (b, chunks, groups), like=x, dtypes=(torch.float32,))
    if tile is None and known is None and height * width_px <= WHOLE:
        launch_whole((x, skip, shift), given, groups, sizes, strides, (eps, silu))
    else:
        launch_two((x, skip, shift), given, groups, sizes, strides, (eps, silu, tile or TILE, known))
    return y


def launch_whole(
    inputs: tuple[Any, ...], given: tuple[Tensor, ...], groups: int, sizes: tuple[int, ...], strides: tuple[int, ...],
    how: tuple[float, bool],
) -> None:  # fmt: skip
    """A program for a few whole groups of a sample, as few as make 16-byte loads."""
    (pixels, c1, c2, width), (eps, silu) = sizes, how
    span = width * min(groups, 8 // gcd(width, 8))
    unit = 8 if span % 8 == 0 else 1
    block = max(64, 1 << (span - 1).bit_length())
    sized = {"UNIT": unit, "ROWS": max(1, 4096 // block), "BLOCK_C": block, "BLOCK_G": 8, "num_warps": 8}
    grid = (ceil((c1 + c2) / span), len(inputs[0]))
    whole_kernel[grid](*inputs, *given, pixels, c1, c2, width, span // unit, eps, *strides, SILU=silu, **sized)


def chunks_of(b: int, pixels: int, channels: int, groups: int, tile: Tile | None = None) -> tuple[int, int, tuple[int, int, int]]:
    """Channels of a program, pixels of one, and the grid, over chunks of pixels, runs of whole groups and samples."""
    tile = tile or TILE
    span = channel_span(channels // groups, groups)
    blocks = ceil(channels / span)
    chunk = tile.rows * ceil(pixels / ceil(tile.programs / (b * blocks)) / tile.rows)
    return span, chunk, (ceil(pixels / chunk), blocks, b)


def blocking(span: int, width: int, tile: Tile | None = None) -> dict[str, int]:
    tile = tile or TILE
    block = {"UNIT": 8 if span % 8 == 0 else 1, "ROWS": tile.rows, "BLOCK_C": max(128, 1 << (span - 1).bit_length())}
    return block | {"BLOCK_G": 16 if span // width <= 16 else 32, "num_warps": tile.warps}


def launch_two(
    inputs: tuple[Any, ...], given: tuple[Tensor, ...], groups: int, sizes: tuple[int, ...], strides: tuple[int, ...],
    how: tuple[float, bool, Tile, tuple[Tensor, Tensor] | None],
) -> None:  # fmt: skip
    """Statistics of chunks of pixels, where they are not known, then their use, over the same grid."""
    (pixels, c1, c2, width), (eps, silu, tile, known) = sizes, how
    span, chunk, grid = chunks_of(len(inputs[0]), pixels, c1 + c2, groups, tile)
    block = blocking(span, width, tile)
    numbers = (groups, c1, c2, width, span // block["UNIT"])
    if known is None:
        means, m2s = torch.empty(2, grid[2], grid[0], groups, device=inputs[0].device, dtype=torch.float32)
        partial_kernel[grid](*inputs, means, m2s, pixels, chunk, *numbers, *strides, **block)
    else:
        means, m2s = known
    apply_kernel[grid](*inputs, means, m2s, *given, pixels, chunk, *numbers, eps, *strides, SILU=silu, PARTS=64, **block)


@dataclass(frozen=True)
class Shape(MapShape):
    skip: int = 0
    shift: bool = False
    silu: bool = True


SHAPES = [
    Shape("SD 1.5 320@64x64", 2, 320, 64, shift=True),
    Shape("SD 1.5 320@64x64, before a transformer", 2, 320, 64, shift=True, silu=False),
    Shape("SD 1.5 640+320@64x64", 2, 640, 64, skip=320),
    Shape("SD 1.5 640@32x32", 2, 640, 32, shift=True),
    Shape("SD 1.5 1280+640@32x32", 2, 1280, 32, skip=640),
    Shape("SD 1.5 1280@16x16", 2, 1280, 16, shift=True),
    Shape("SD 1.5 1280@16x16, before a transformer", 2, 1280, 16, shift=True, silu=False),
    Shape("SD 1.5 1280@8x8", 2, 1280, 8),
    Shape("SD 1.5 1280+1280@8x8", 2, 1280, 8, skip=1280),
    Shape("SD 2.1 320@96x96", 2, 320, 96, shift=True),
    Shape("SDXL 320@128x128", 2, 320, 128, shift=True),
    Shape("SDXL 640+320@128x128", 2, 640, 128, skip=320),
    Shape("SDXL 640@64x64", 2, 640, 64, shift=True),
    Shape("SDXL 1280@32x32", 2, 1280, 32, shift=True),
    *Shape.of("VAE", 1, (512, 64), (256, 512), (128, 512), (128, 1024)),
    Shape("VAE 128@512x512, shift", 1, 128, 512, shift=True),
    Shape("VAE 512@64x64, before attention", 1, 512, 64, silu=False),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def image(channels: int) -> Tensor:
        x = torch.randn(shape.batch, channels, shape.size, shape.size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last)

    total = shape.channels + shape.skip
    return {
        "x": image(shape.channels),
        "groups": 32,
        "weight": 1 + torch.randn(total, device=device, dtype=dtype) / 4,
        "bias": torch.randn(total, device=device, dtype=dtype) / 4,
        "eps": 1e-5,
        "silu": shape.silu,
        "shift": torch.randn(shape.batch, shape.channels, device=device) if shape.shift else None,  # a sum, in float32
        "skip": image(shape.skip) if shape.skip else None,
    }


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing."""
    return [Tile(rows, each * 132, warps) for rows, warps in ((16, 4), (32, 4), (32, 8), (64, 8)) for each in (1, 2, 3, 6)]


def elements(shape: Shape) -> int:
    return shape.batch * (shape.channels + shape.skip) * shape.size**2


def traffic(shape: Shape, element_size: int) -> int:
    """x read once and y written once: what the L2 makes possible.  Maps larger than it are read twice."""
    return (2 if elements(shape) * element_size < 50e6 else 3) * elements(shape) * element_size


def flops(shape: Shape) -> int:
    return 12 * elements(shape)


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
