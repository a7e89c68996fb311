"""Attention with heads of 512 channels, as the VAE's one head has: two matrix products and, between them, one kernel.

    s = q k^T                       float32, from the library's matrix product
    p = 2^(factor (s - max s)),     between 0 and 1, kept in half precision;     l = its sum,     factor = scale log2(e)
    out = (p v) / l                 p v in float32 again

Why not attention.py.  That kernel keeps a block's weighted sums in registers, 64 queries x 512 channels = half of an SM's.  So
few queries at a time mean that keys and values cross from L2 to the SMs 256 times for 16,384 queries, 8.6 GB, 1.6 ms at
5.5 TB/s, and q k^T, in pieces as narrow as 64 x 16 for each group of warps, keeps the matrix units busy for about a third of
the time.  Library products of these sizes run at 600 to 700 TFLOP/s, and that is worth writing the scores to memory.

Memory traffic.  Scores are written and read once in float32, p in half precision: 12 L^2 bytes.  At L = 16,384 (1024x1024
pixels): 3.2 GB, 0.77 ms at 4.2 TB/s, partly behind the 550 GFLOP of the products, 0.74 ms at 740 TFLOP/s.  PyTorch's only fused
kernel for 512 channels was measured at 4.0 ms on an H200; this one is not measured yet.

Work split.  Queries come in pieces whose scores take at most 256 MB: 4096 of them at L = 16,384, which still makes 128 tiles of
128 x 128 in p v, one for nearly each SM.  In the kernel a program has one row of scores: in registers if it has up to 16,384
keys, so that it is read once; a longer one is read twice.

Rounding.  p is divided by its sum at the end and not before: a sixteen-thousandth would be too small a number for float16.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import attention as narrow
from .checks import check, expect, jit, launcher, tl

DTYPES = (torch.float16, torch.bfloat16)
SCORES = 1 << 26  # numbers at once
WHOLE = 1 << 14  # keys that a program holds in registers

reference = narrow.reference


@jit(do_not_specialize=["factor"])
def exponentials_kernel(scores, p, sums, keys, factor, BLOCK: tl.constexpr, ONCE: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    scores += row * keys
    p += row * keys
    if ONCE:
        s = tl.load(scores + lanes, mask=lanes < keys, other=float("-inf"))
        values = tl.exp2((s - tl.max(s, axis=0)) * factor)
        tl.store(p + lanes, values.to(p.dtype.element_ty), mask=lanes < keys)
        tl.store(sums + row, tl.sum(values, axis=0))
    else:
        largest = tl.full([BLOCK], float("-inf"), tl.float32)
        for start in range(0, keys, BLOCK):
            largest = tl.maximum(largest, tl.load(scores + start + lanes, mask=start + lanes < keys, other=float("-inf")))
        top = tl.max(largest, axis=0)
        total = tl.zeros([BLOCK], tl.float32)
        for start in range(0, keys, BLOCK):
            s = tl.load(scores + start + lanes, mask=start + lanes < keys, other=float("-inf"))
            values = tl.exp2((s - top) * factor)
            tl.store(p + start + lanes, values.to(p.dtype.element_ty), mask=start + lanes < keys)
            total += values
        tl.store(sums + row, tl.sum(total, axis=0))


def product(a: Tensor, b: Tensor) -> Tensor:
    """(B, M, K) times (B, K, N), summed and returned in float32."""
    if a.device.type == "cpu":  # which knows no such product
        return a.float() @ b.float()
    return torch.bmm(a, b, out_dtype=torch.float32)


@launcher
def wide_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """softmax(q k^T scale) v for each head; scale is D**-0.5 unless given.

    q (B, H, L, D), k and v (B, H, S, D), float16 or bfloat16, of any strides and any D -> (B, H, L, D), the view of a contiguous
    (B, L, H, D), in q's dtype.  ValueError for other shapes, dtypes or devices.
    """
    check("q", q, (None, None, None, None), dtypes=DTYPES)
    b, heads, length, d = q.shape
    check("k", k, (b, heads, None, d), like=q, dtypes=(q.dtype,))
    check("v", v, tuple(k.shape), like=q, dtypes=(q.dtype,))
    scale = d**-0.5 if scale is None else scale
    expect(scale > 0, "scale", "a positive number", scale)

    keys = k.shape[2]
    block = min(WHOLE, max(16, 1 << (keys - 1).bit_length()))
    warps = max(4, block // 1024)
    rows = max(1, SCORES // (b * keys))
    out = torch.empty(b, length, heads, d, device=q.device, dtype=q.dtype)
    for head in range(heads):
        for first in range(0, length, rows):
            scores = product(q[:, head, first : first + rows], k[:, head].transpose(1, 2))  # (B, rows, S)
            p, sums = torch.empty_like(scores, dtype=q.dtype), scores.new_empty(*scores.shape[:2], 1)
            grid = (scores.shape[0] * scores.shape[1],)
            exponentials_kernel[grid](
                scores, p, sums, keys, scale * 1.4426950408889634, BLOCK=block, ONCE=keys <= WHOLE, num_warps=warps
            )
            out[:, first : first + rows, head] = product(p, v[:, head]) / sums
    return out.transpose(1, 2)


SHAPES = [shape for shape in narrow.SHAPES if shape.dim == 512]
make, flops = narrow.make, narrow.flops


def traffic(shape: narrow.Shape, element_size: int) -> int:
    scores = shape.batch * shape.heads * shape.queries * shape.keys
    return scores * 2 * (4 + element_size) + narrow.traffic(shape, element_size)


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    q, k, v = arguments["q"], arguments["k"], arguments["v"]
    return {
        "PyTorch": lambda: F.scaled_dot_product_attention(q, k, v),
        "attention.py": partial(narrow.attention, q, k, v),
        "GEMM, softmax, GEMM": lambda: reference(q, k, v),
    }
