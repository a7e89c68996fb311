"""Attention, softmax(q k^T scale) v, without ever writing the scores (Dao et al. 2022, arXiv 2205.14135).

Keys come in blocks.  For each query row the kernel keeps the running maximum m, the sum l of exponentials and the weighted sum
acc of values, and rescales the two sums when the maximum grows (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):

    s = q k^T;   m' = max(m, scale s);   p = 2^(scale s - m');   l = l 2^(m - m') + sum p;   acc = acc 2^(m - m') + p v

and out = acc / l at the end,
with log2(e) folded into scale, because the hardware's exponential is base 2.

What bounds it.  4 B H L S D operations on the matrix units and B H L S exponentials, of which an SM makes 16 a clock.  For 8
heads of 40 channels, L = S = 4096, batch 2: 54 us of matrix work at 790 TFLOP/s, 64 us of exponentials, overlapping at best.
For 64 channels and 10 heads: 109 and 80 us.  Memory is no bound: q, k, v and out once is 21 MB, 5 us.

Work split.  A program holds BLOCK_M queries of one head and walks over the keys.  The wider BLOCK_M, the less often k and v
cross from L2 to the SMs: 335 MB at 128 rows of 40 channels.  Neighbouring programs share a head, hence its keys in L2.

Few keys.  A prompt's 77 tokens are one tile: then (ONCE) there is no loop and nothing to rescale, the maximum and the sum are
those of the row.  For 10 heads of 64 channels and 4096 queries, batch 2, q and out are 21 MB, 5 us at 4.2 TB/s, and that is the
bound.

Exact-fit head dimensions.  Tiles have sizes that are powers of two, and padding 40 to 64 or 160 to 256 wastes 37 % of the
matrix work.  A head is split instead, D = D1 + D2, into two products: 40 = 32 + 16 (8 are zero), 80 = 64 + 16, 160 = 128 + 32.
Hopper's copy engine fetches the tiles by a description of the whole tensor (B, H, L, D) and its strides, and reads zeros beyond
an end: no masks and no address registers, no copy of q, k and v out of a fused projection, and the ninth of 16 channels is a
zero and not the next head.  Only the last block of keys needs a mask, for its scores must be -inf and not 0.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checks import capability, check, descriptor, expect, jit, launcher, tl


class Tile(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int  # blocks of keys and values on their way at once


# By head dimension, half precision, for an H100 or H200.  64 and 128 follow PyTorch's FlexAttention there, 40 is alike.
# The others are the largest that the assembler fits into registers without spills (compiled, not yet timed): a program holds
# BLOCK_M x (D1 + D2) sums and BLOCK_M x BLOCK_N scores, in fp32.  At 512 the sums alone are half of an SM's registers: by
# computation wide_attention.py is faster there.
TILES = {
    40: Tile(128, 128, 4, 3),
    64: Tile(128, 128, 4, 3),
    80: Tile(64, 64, 4, 3),  # 256 programs for SD 1.5's 1024 queries; 128 rows would make 128, one short of each SM
    128: Tile(128, 64, 8, 3),
    160: Tile(64, 64, 4, 2),
    256: Tile(64, 32, 8, 2),
    512: Tile(64, 32, 8, 2),
}
# On later GPUs: what neither spills nor needs more shared memory than they have (compiled, not timed).
SMALLER = {
    40: Tile(128, 64, 4, 2),
    64: Tile(128, 64, 4, 2),
    80: Tile(64, 64, 4, 2),
    128: Tile(64, 32, 8, 2),
    160: Tile(64, 32, 4, 2),
    256: Tile(32, 16, 8, 1),
    512: Tile(16, 16, 8, 1),
}
ONE, FEW = 128, Tile(64, 128, 4, 1)  # so many keys are one tile
SINGLE = Tile(32, 16, 4, 1)  # float32 has no matrix units that are exact: right, not fast


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.transpose(-1, -2) * scale).softmax(dim=-1) @ v


@jit
def attend(
    q1, q2, k1, k2, v1, v2, batch, head, start, keys, scale, m, l, acc1, acc2,  # noqa: E741
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys, from `start` on: the running maximum, sum and weighted sums after it."""
    s = tl.dot(q1, k1.load([batch, head, start, 0]).reshape(BLOCK_N, D1).T, input_precision=PRECISION)
    if D > D1:
        s = tl.dot(q2, k2.load([batch, head, start, D1]).reshape(BLOCK_N, D2).T, s, input_precision=PRECISION)
    if LAST:
        s = tl.where((start + tl.arange(0, BLOCK_N) < keys)[None, :], s, float("-inf"))
    larger = tl.maximum(m, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - larger[:, None])
    shrink = tl.exp2(m - larger)
    l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
    p = p.to(q1.dtype)
    v = v1.load([batch, head, start, 0]).reshape(BLOCK_N, D1)
    acc1 = tl.dot(p, v, acc1 * shrink[:, None], input_precision=PRECISION)
    if D > D1:
        v = v2.load([batch, head, start, D1]).reshape(BLOCK_N, D2)
        acc2 = tl.dot(p, v, acc2 * shrink[:, None], input_precision=PRECISION)
    return larger, l, acc1, acc2


@jit
def attend_once(
    q1, q2, k1, k2, v1, v2, batch, head, keys, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All keys at once: the sum and the weighted sums."""
    s = tl.dot(q1, k1.load([batch, head, 0, 0]).reshape(BLOCK_N, D1).T, input_precision=PRECISION)
    if D > D1:
        s = tl.dot(q2, k2.load([batch, head, 0, D1]).reshape(BLOCK_N, D2).T, s, input_precision=PRECISION)
    s = tl.where((tl.arange(0, BLOCK_N) < keys)[None, :], s, float("-inf"))
    p = tl.exp2((s - tl.max(s, axis=1)[:, None]) * scale)
    l = tl.sum(p, axis=1)  # noqa: E741
    p = p.to(q1.dtype)
    acc1 = tl.dot(p, v1.load([batch, head, 0, 0]).reshape(BLOCK_N, D1), input_precision=PRECISION)
    acc2 = acc1
    if D > D1:
        acc2 = tl.dot(p, v2.load([batch, head, 0, D1]).reshape(BLOCK_N, D2), input_precision=PRECISION)
    return l, acc1, acc2


@jit
def attend_all(
    q1, q2, k1, k2, v1, v2, batch, head, keys, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The same, block by block."""
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        m, l, acc1, acc2 = attend(  # noqa: E741
            q1, q2, k1, k2, v1, v2, batch, head, start, keys, scale, m, l, acc1, acc2,
            D, D1, D2, BLOCK_N, False, PRECISION,
        )  # fmt: skip
    if full < keys:
        m, l, acc1, acc2 = attend(  # noqa: E741
            q1, q2, k1, k2, v1, v2, batch, head, full, keys, scale, m, l, acc1, acc2,
            D, D1, D2, BLOCK_N, True, PRECISION,
        )  # fmt: skip
    return l, acc1, acc2


@jit(do_not_specialize=["queries", "keys", "heads", "scale"])
def attention_kernel(
    q1, q2, k1, k2, v1, v2, out, queries, keys, heads, scale, ONCE: tl.constexpr,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, head, batch = tl.program_id(0) * BLOCK_M, tl.program_id(1), tl.program_id(2)
    tile1 = q1.load([batch, head, first, 0]).reshape(BLOCK_M, D1)
    tile2 = q2.load([batch, head, first, D1]).reshape(BLOCK_M, D2) if D > D1 else tile1
    if ONCE:
        l, acc1, acc2 = attend_once(  # noqa: E741
            tile1, tile2, k1, k2, v1, v2, batch, head, keys, scale, D, D1, D2, BLOCK_N, PRECISION
        )
    else:
        l, acc1, acc2 = attend_all(  # noqa: E741
            tile1, tile2, k1, k2, v1, v2, batch, head, keys, scale, D, D1, D2, BLOCK_M, BLOCK_N, PRECISION
        )

    query = first + tl.arange(0, BLOCK_M)[:, None]
    column1, column2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2)[None, :]
    out += ((batch.to(tl.int64) * queries + query) * heads + head) * D
    tl.store(out + column1, (acc1 / l[:, None]).to(out.dtype.element_ty), mask=(query < queries) & (column1 < D))
    if D > D1:
        tl.store(out + column2, (acc2 / l[:, None]).to(out.dtype.element_ty), mask=(query < queries) & (column2 < D))


def split(d: int) -> tuple[int, int]:
    """The head dimension as two tile widths, powers of two from 16 on; where one is enough, the second is 16 and not used."""
    first = max(16, 1 << (d.bit_length() - 1))
    return first, max(16, 1 << (d - first - 1).bit_length()) if d > first else 16


def strides_of(name: str, x: Tensor) -> tuple[int, ...]:
    """The strides of x (B, H, L, D), as the copy engine takes them: all but the last multiples of 16 bytes, and none 0.

    Its documentation (cuTensorMapEncodeTiled) also wants each to be a multiple of the next, which H and L of a fused projection
    are not; FlashAttention-3 describes its tensors so all the same.  In the order B, L, H, D they would be, but then the compiler
    takes the way through registers and spills at D = 512.
    """
    unit = 16 // x.element_size()
    strides = [stride if size > 1 else unit for size, stride in zip(x.shape, x.stride(), strict=True)]  # of one element: any
    fits = x.stride(3) == 1 and all(stride > 0 and stride % unit == 0 for stride in strides[:3]) and x.data_ptr() % 16 == 0
    expect(fits, name, f"strides that are multiples of {unit}, then 1, and 16-byte alignment", x.stride())
    return (*strides[:3], 1)


def largest_tile(q: Tensor) -> Tile:
    """For many keys in half precision, on the GPU that q is on."""
    tiles = TILES if capability(q) == 90 else SMALLER
    return tiles[min(size for size in tiles if size >= q.shape[-1])]


def tile_of(q: Tensor, keys: int) -> Tile:
    """What a head dimension takes on the GPU that q is on; float32 and few keys aside, that of TILES."""
    if q.dtype == torch.float32:
        return SINGLE
    tile = largest_tile(q)
    return (
        tile._replace(queries=min(tile.queries, 64), keys=ONE, warps=4, stages=1) if keys <= ONE and q.shape[-1] <= 160 else tile
    )


@launcher
def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, tile: Tile | None = None) -> Tensor:
    """softmax(q k^T scale) v for each head; scale is D**-0.5 unless given.

    q (B, H, L, D), k and v (B, H, S, D), D at most 512; the last dimension has stride 1, the others multiples of 16 bytes, so
    they may be views of one fused projection (B, L, 3*H*D).  -> (B, H, L, D), the view of a contiguous (B, L, H, D), in q's
    dtype.  Scores and sums are in float32.  tile: by default that of TILES.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("q", q, (None, None, None, None))
    b, heads, length, d = q.shape
    check("k", k, (b, heads, None, d), like=q, dtypes=(q.dtype,))
    check("v", v, tuple(k.shape), like=q, dtypes=(q.dtype,))
    expect(d <= 512, "q", "a head dimension of at most 512", d)
    scale = d**-0.5 if scale is None else scale
    expect(scale > 0, "scale", "a positive number", scale)

    keys, (d1, d2) = k.shape[2], split(d)
    if tile is None:
        tile = tile_of(q, keys)
    block_n = min(tile.keys, max(16, 1 << (keys - 1).bit_length()))
    tensors = [
        descriptor(x, tuple(x.shape), strides_of(name, x), (1, 1, rows, columns))
        for name, x, rows in (("q", q, tile.queries), ("k", k, block_n), ("v", v, block_n))
        for columns in (d1, d2)
    ]
    out = torch.empty(b, length, heads, d, device=q.device, dtype=q.dtype)
    grid = (-(-length // tile.queries), heads, b)
    attention_kernel[grid](
        *tensors, out, length, keys, heads, scale * 1.4426950408889634, ONCE=keys <= block_n,  # log2(e)
        D=d, D1=d1, D2=d2, BLOCK_M=tile.queries, BLOCK_N=block_n, PRECISION="ieee" if q.dtype == torch.float32 else "tf32",
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out.transpose(1, 2)


@dataclass(frozen=True)
class Shape:
    label: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int


SHAPES = [
    Shape("SD 1.5 self d=40 64x64", 2, 8, 4096, 4096, 40),
    Shape("SD 1.5 self d=80 32x32", 2, 8, 1024, 1024, 80),
    Shape("SD 1.5 self d=160 16x16", 2, 8, 256, 256, 160),
    Shape("SD 1.5 cross d=40 64x64", 2, 8, 4096, 77, 40),
    Shape("SD 1.5 cross d=80 32x32", 2, 8, 1024, 77, 80),
    Shape("SD 1.5 cross d=160 16x16", 2, 8, 256, 77, 160),
    Shape("SD 1.5 cross d=40 64x64, two chunks", 2, 8, 4096, 154, 40),
    Shape("SD 2.1 self d=64 96x96", 2, 5, 9216, 9216, 64),
    Shape("SDXL self d=64 64x64", 2, 10, 4096, 4096, 64),
    Shape("SDXL self d=64 32x32", 2, 20, 1024, 1024, 64),
    Shape("SDXL cross d=64 64x64", 2, 10, 4096, 77, 64),
    Shape("SDXL cross d=64 32x32", 2, 20, 1024, 77, 64),
    Shape("VAE d=512 64x64", 1, 1, 4096, 4096, 512),
    Shape("VAE d=512 128x128", 1, 1, 16384, 16384, 512),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    """Self-attention gets three views of one fused projection, as the runtime makes them."""

    def heads(length: int, parts: int) -> tuple[Tensor, ...]:
        x = torch.randn(shape.batch, length, parts * shape.heads * shape.dim, device=device, dtype=dtype)
        return x.view(shape.batch, length, parts, shape.heads, shape.dim).permute(2, 0, 3, 1, 4).unbind(0)

    if shape.queries == shape.keys:
        q, k, v = heads(shape.queries, 3)
    else:
        (q,), (k, v) = heads(shape.queries, 1), heads(shape.keys, 2)
    return {"q": q, "k": k, "v": v}


def tiles(shape: Shape) -> list[Tile]:
    """What is worth timing in half precision."""
    if shape.dim > 256:
        return [Tile(64, keys, 8, stages) for keys in (16, 32) for stages in (1, 2, 3)]
    sizes = [(64, 64, 4), (64, 128, 4), (128, 64, 4), (128, 64, 8), (128, 128, 4), (128, 128, 8)]
    return [Tile(*size, stages) for size in sizes for stages in (2, 3)]


def traffic(shape: Shape, element_size: int) -> int:
    return 2 * shape.batch * shape.heads * (shape.queries + shape.keys) * shape.dim * element_size


def flops(shape: Shape) -> int:
    return 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.dim


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    """PyTorch's own choice and three separate kernels; on a GPU also its fused attentions, each forced (RuntimeError where one
    does not take the shape)."""

    def forced(backend: SDPBackend) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v)

    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    plain = {
        "PyTorch": lambda: F.scaled_dot_product_attention(q, k, v),
        "GEMM, softmax, GEMM": lambda: reference(q, k, v),
    }
    fused = {
        "cuDNN": lambda: forced(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2": lambda: forced(SDPBackend.FLASH_ATTENTION),
        "memory-efficient": lambda: forced(SDPBackend.EFFICIENT_ATTENTION),
    }
    return plain | fused if q.is_cuda else plain
