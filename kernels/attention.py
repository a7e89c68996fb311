"""Attention, softmax(q k^T scale) v, without ever writing the scores (Dao et al. 2022, arXiv 2205.14135).

Keys come in blocks.  For each query row the kernel keeps the running maximum m, the sum l of exponentials and the weighted sum
acc of values, and rescales the two sums when the maximum grows (online softmax, Milakov and Gimelshein 2018, arXiv 1805.02867):

    s = q k^T;  m' = max(m, scale s);  p = 2^(scale s - m');  l = l 2^(m - m') + sum p;  acc = acc 2^(m - m') + p v;  out = acc / l

with log2(e) folded into scale, because the hardware's exponential is base 2.

What bounds it.  4 B H L S D operations on the matrix units and B H L S exponentials, of which an SM makes 16 a clock.  For 8 heads
of 40 channels, L = S = 4096, batch 2: 54 us of matrix work at 790 TFLOP/s and 64 us of exponentials, which overlap at best: 64 us.
For 64 channels and 10 heads: 109 and 80 us.  Memory is no bound: q, k, v and out once is 21 MB, 5 us.

Work split.  A program holds BLOCK_M queries of one head and walks over the keys.  The wider BLOCK_M, the less often k and v cross
from L2 to the SMs: 128 rows of 40 channels are 335 MB of it.  Neighbouring programs share a head, hence its keys in L2.

Exact-fit head dimensions.  Tiles have sizes that are powers of two, and padding 40 to 64 or 160 to 256 wastes 37 % of the matrix
work.  A head is split instead, D = D1 + D2, into two products: 40 = 32 + 16 (8 masked), 80 = 64 + 16, 160 = 128 + 32.
The last block of keys is as wide as what is left needs: 77 keys are 64 and a masked 16, and full blocks carry no mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .checks import check, expect, jit, tl


class Block(NamedTuple):
    queries: int
    keys: int
    warps: int
    stages: int  # blocks of keys and values on their way at once


# By head dimension, half precision, for an H100 or H200.  64 and 128 follow what PyTorch's FlexAttention found best there; the others
# are the nearest that compile without spills.  Queries as many as the registers hold: BLOCK_M x (D1 + D2) sums and
# BLOCK_M x BLOCK_N scores, in fp32.  At 512 the sums alone take half of an SM's registers, so 64 queries and one program per SM.
BLOCKS = {
    32: Block(128, 128, 4, 3),
    40: Block(128, 128, 4, 3),
    64: Block(128, 128, 4, 3),
    80: Block(128, 64, 8, 3),
    128: Block(128, 64, 8, 3),
    160: Block(128, 64, 8, 2),
    256: Block(64, 32, 4, 3),
    512: Block(64, 32, 8, 2),
}
SINGLE = Block(32, 16, 4, 1)  # float32 has no matrix units that are exact: right, not fast


def reference(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return (q @ k.transpose(-1, -2) * scale).softmax(dim=-1) @ v


@jit
def attend(
    q1, q2, k, v, start, keys, k_row, v_row, scale, m, l, acc1, acc2,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One block of keys from `start` on: the running maximum, sum and weighted sums after it."""
    key = start + tl.arange(0, BLOCK)[:, None]
    at1, at2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2)[None, :]
    inside = key < keys
    # Masks that hold everywhere are left out by the compiler.
    mask1 = ((D1 <= D) | (at1 < D)) & ((not MASKED) | inside)
    mask2 = ((D1 + D2 <= D) | (at2 < D)) & ((not MASKED) | inside)
    s = tl.dot(q1, tl.load(k + key * k_row + at1, mask=mask1, other=0.0).T, input_precision=PRECISION)
    if D > D1:
        s = tl.dot(q2, tl.load(k + key * k_row + at2, mask=mask2, other=0.0).T, s, input_precision=PRECISION)
    if MASKED:
        s = tl.where(inside.T, s, float("-inf"))
    larger = tl.maximum(m, tl.max(s, axis=1) * scale)
    p = tl.exp2(s * scale - larger[:, None])
    shrink = tl.exp2(m - larger)
    l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
    p = p.to(q1.dtype)
    v1 = tl.load(v + key * v_row + at1, mask=mask1, other=0.0)
    acc1 = tl.dot(p, v1, acc1 * shrink[:, None], input_precision=PRECISION)
    if D > D1:
        v2 = tl.load(v + key * v_row + at2, mask=mask2, other=0.0)
        acc2 = tl.dot(p, v2, acc2 * shrink[:, None], input_precision=PRECISION)
    return larger, l, acc1, acc2


@jit(do_not_specialize=["queries", "keys", "scale"])
def attention_kernel(
    q, k, v, out, queries, keys, heads, scale,
    q_batch, q_head, q_row, k_batch, k_head, k_row, v_batch, v_head, v_row,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TAIL: tl.constexpr,
    UNIT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    head, batch = tl.program_id(1), tl.program_id(2).to(tl.int64)
    q += batch * q_batch + head * (q_head * UNIT)  # as a product, so that the compiler sees that 16-byte loads are aligned
    k += batch * k_batch + head * (k_head * UNIT)
    v += batch * v_batch + head * (v_head * UNIT)
    query = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    at1, at2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2)[None, :]
    mask1, mask2 = (query < queries) & (at1 < D), (query < queries) & (at2 < D)
    q1 = tl.load(q + query * q_row + at1, mask=mask1, other=0.0)
    q2 = tl.load(q + query * q_row + at2, mask=mask2, other=0.0) if D > D1 else q1

    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
    acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
    full = keys // BLOCK_N * BLOCK_N
    for start in range(0, full, BLOCK_N):
        m, l, acc1, acc2 = attend(  # noqa: E741
            q1, q2, k, v, start, keys, k_row, v_row, scale, m, l, acc1, acc2, D, D1, D2, BLOCK_N, False, PRECISION
        )
    if TAIL > 0:
        m, l, acc1, acc2 = attend(  # noqa: E741
            q1, q2, k, v, full, keys, k_row, v_row, scale, m, l, acc1, acc2, D, D1, D2, TAIL, True, PRECISION
        )

    out += ((batch * queries + query) * heads + head) * D
    tl.store(out + at1, (acc1 / l[:, None]).to(out.dtype.element_ty), mask=mask1)
    if D > D1:
        tl.store(out + at2, (acc2 / l[:, None]).to(out.dtype.element_ty), mask=mask2)


def split(d: int) -> tuple[int, int]:
    """Two tile widths, powers of two from 16 on, that hold a head dimension; the second is 16 and unused where one fits."""
    if d & (d - 1) == 0 and d >= 16:
        return d, 16
    first = max(16, 1 << (d.bit_length() - 1))
    return first, max(16, 1 << (d - first - 1).bit_length()) if d > first else 16


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v for each head; scale is D**-0.5 unless given.

    q (B, H, L, D), k and v (B, H, S, D), D at most 512, with stride 1 in the last dimension and any strides in the
    others, so that they may be views of one fused projection (B, L, 3*H*D).  -> (B, H, L, D), the view of a contiguous
    (B, L, H, D), in q's dtype; scores and sums are in float32.  ValueError for other shapes, dtypes, strides or devices.
    """
    check("q", q, (None, None, None, None))
    b, heads, length, d = q.shape
    check("k", k, (b, heads, None, d), like=q, dtypes=(q.dtype,))
    check("v", v, tuple(k.shape), like=q, dtypes=(q.dtype,))
    expect(d <= 512, "q", "a head dimension of at most 512", d)
    for name, x in (("q", q), ("k", k), ("v", v)):
        expect(x.stride(-1) == 1, name, "stride 1 in the last dimension", x.stride())
    scale = d**-0.5 if scale is None else scale
    expect(scale > 0, "scale", "a positive number", scale)

    keys = k.shape[2]
    block = SINGLE if q.dtype == torch.float32 else BLOCKS[min(size for size in BLOCKS if size >= d)]
    if keys < 2 * block.keys:  # the prompt's 77 keys: 64 and 16 are nearer than 128
        block = block._replace(keys=min(block.keys, 64))
    left = keys % block.keys
    tail = max(16, 1 << (left - 1).bit_length()) if left else 0
    unit = 8 if all(x.stride(1) % 8 == 0 for x in (q, k, v)) else 1
    strides = [stride // unit if i == 1 else stride for x in (q, k, v) for i, stride in enumerate(x.stride()[:3])]
    d1, d2 = split(d)
    out = torch.empty(b, length, heads, d, device=q.device, dtype=q.dtype)
    grid = (-(-length // block.queries), heads, b)
    attention_kernel[grid](
        q, k, v, out, length, keys, heads, scale * 1.4426950408889634, *strides,
        D=d, D1=d1, D2=d2, BLOCK_M=block.queries, BLOCK_N=block.keys, TAIL=tail,
        UNIT=unit, PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_warps=block.warps, num_stages=block.stages,
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


def traffic(shape: Shape, element_size: int) -> int:
    return 2 * shape.batch * shape.heads * (shape.queries + shape.keys) * shape.dim * element_size


def flops(shape: Shape) -> int:
    return 4 * shape.batch * shape.heads * shape.queries * shape.keys * shape.dim


def library() -> dict[str, Any]:
    """PyTorch's fused attentions, each forced (RuntimeError where it does not take the shape), and three separate kernels."""

    def backend(which: SDPBackend) -> Any:
        def run(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
            with sdpa_kernel(which):
                return F.scaled_dot_product_attention(q, k, v, scale=scale)

        return run

    return {
        "PyTorch": F.scaled_dot_product_attention,
        "cuDNN": backend(SDPBackend.CUDNN_ATTENTION),
        "FlashAttention-2": backend(SDPBackend.FLASH_ATTENTION),
        "memory-efficient": backend(SDPBackend.EFFICIENT_ATTENTION),
        "GEMM, softmax, GEMM": reference,
    }
