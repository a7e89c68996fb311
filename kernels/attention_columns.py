"""Attention that also says where it looked: of the weights softmax(q k^T scale) it keeps sums over groups of keys, and no others.

    out = p v,    columns = mean over heads of p g,    p = softmax(q k^T scale) for each head,    g (S, W): 1 for a key in a group

Groups are the words of a prompt.  p g is attention with other values, so the weighted sums of v and of g go through the keys
together, with one running maximum and one sum of exponentials (attention.py), and the weights themselves, B H L S numbers, are
never written: for SD 1.5's 4096 queries, 8 heads, 77 keys and batch 2 they would be 20 MB in float32; columns of 8 words are 0.3.

Work split.  A program holds BLOCK_M queries and goes through all heads, one after the other, since their mean is what is wanted:
no sum over programs, whose order would be another each time.  That is H times fewer programs than attention.py has, each H times
as long: 64 for SD 1.5's 4096 queries at batch 1.  W is padded to 16 or a power of two above it, which costs W / D more products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .attention import Tile, largest_tile, split, strides_of
from .checks import check, descriptor, expect, jit, launcher, tl

MOST = 128  # groups
WIDE = 128  # channels, beyond which the sums do not fit into the registers of four warps beside those by group
SINGLE = Tile(32, 16, 4, 1)  # float32 has no matrix units that are exact: right, not fast


def reference(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    weights = (q @ k.transpose(-1, -2) * scale).softmax(dim=-1)  # (B, H, L, S)
    return weights @ v, (weights @ groups.to(weights.dtype)).mean(1).transpose(1, 2)


@jit(do_not_specialize=["queries", "keys", "heads", "count", "scale"])
def attention_columns_kernel(
    q1, q2, k1, k2, v1, v2, groups, out, columns, queries, keys, heads, count, scale,
    D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, W: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first, batch = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    query, word = first + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, W)[None, :]
    column1, column2 = tl.arange(0, D1)[None, :], D1 + tl.arange(0, D2)[None, :]
    total = tl.zeros([BLOCK_M, W], tl.float32)
    for head in range(0, heads):
        tile1 = q1.load([batch, head, first, 0]).reshape(BLOCK_M, D1)
        tile2 = q2.load([batch, head, first, D1]).reshape(BLOCK_M, D2) if D > D1 else tile1
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)  # noqa: E741
        acc1 = tl.zeros([BLOCK_M, D1], tl.float32)
        acc2 = tl.zeros([BLOCK_M, D2], tl.float32)
        found = tl.zeros([BLOCK_M, W], tl.float32)
        for start in range(0, keys, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            s = tl.dot(tile1, k1.load([batch, head, start, 0]).reshape(BLOCK_N, D1).T, input_precision=PRECISION)
            if D > D1:
                s = tl.dot(tile2, k2.load([batch, head, start, D1]).reshape(BLOCK_N, D2).T, s, input_precision=PRECISION)
            s = tl.where((key < keys)[None, :], s, float("-inf"))
            larger = tl.maximum(m, tl.max(s, axis=1) * scale)
            p = tl.exp2(s * scale - larger[:, None])
            shrink = tl.exp2(m - larger)
            l = l * shrink + tl.sum(p, axis=1)  # noqa: E741
            p = p.to(tile1.dtype)
            acc1 = tl.dot(
                p, v1.load([batch, head, start, 0]).reshape(BLOCK_N, D1), acc1 * shrink[:, None], input_precision=PRECISION
            )
            if D > D1:
                v = v2.load([batch, head, start, D1]).reshape(BLOCK_N, D2)
                acc2 = tl.dot(p, v, acc2 * shrink[:, None], input_precision=PRECISION)
            member = tl.load(groups + key[:, None] * count + word, mask=(key < keys)[:, None] & (word < count), other=0.0)
            found = tl.dot(p, member.to(tile1.dtype), found * shrink[:, None], input_precision=PRECISION)
            m = larger
        total += found / l[:, None]
        row = out + ((batch.to(tl.int64) * queries + query) * heads + head) * D
        tl.store(row + column1, (acc1 / l[:, None]).to(out.dtype.element_ty), mask=(query < queries) & (column1 < D))
        if D > D1:
            tl.store(row + column2, (acc2 / l[:, None]).to(out.dtype.element_ty), mask=(query < queries) & (column2 < D))
    place = columns + (batch.to(tl.int64) * count + word) * queries + query
    tl.store(place, total / heads, mask=(query < queries) & (word < count))


@launcher
def attention_columns(q: Tensor, k: Tensor, v: Tensor, groups: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """softmax(q k^T scale) v for each head, and of the weights the sums over groups of keys, in the mean over the heads.

    q, k, v: as `attention` takes them, (B, H, L, D), (B, H, S, D) twice.  groups (S, W), float32, W at most 128: how much of a
    key counts for a group, 0 or 1.  -> (B, H, L, D), the view of a contiguous (B, L, H, D), in q's dtype, and (B, W, L), float32.
    ValueError for other shapes, dtypes, strides or devices.
    """
    check("q", q, (None, None, None, None))
    b, heads, length, d = q.shape
    check("k", k, (b, heads, None, d), like=q, dtypes=(q.dtype,))
    check("v", v, tuple(k.shape), like=q, dtypes=(q.dtype,))
    check("groups", groups, (k.shape[2], None), like=q, dtypes=(torch.float32,))
    expect(groups.is_contiguous(), "groups", "contiguous", f"stride {groups.stride()}")
    expect(groups.shape[1] <= MOST, "groups", f"at most {MOST} groups", groups.shape[1])
    expect(d <= 256, "q", "a head dimension of at most 256", d)
    scale = d**-0.5 if scale is None else scale
    expect(scale > 0, "scale", "a positive number", scale)

    keys, count, (d1, d2) = k.shape[2], groups.shape[1], split(d)
    tile = SINGLE if q.dtype == torch.float32 else largest_tile(q)
    rows, block_n = min(tile.queries, 64), min(tile.keys, 64 if d <= WIDE else 16, max(16, 1 << (keys - 1).bit_length()))
    tensors = [
        descriptor(x, tuple(x.shape), strides_of(name, x), (1, 1, size, columns))
        for name, x, size in (("q", q, rows), ("k", k, block_n), ("v", v, block_n))
        for columns in (d1, d2)
    ]
    out = torch.empty(b, length, heads, d, device=q.device, dtype=q.dtype)
    columns = torch.empty(b, count, length, device=q.device, dtype=torch.float32)
    attention_columns_kernel[(-(-length // rows), b)](
        *tensors, groups, out, columns, length, keys, heads, count, scale * 1.4426950408889634,  # log2(e)
        D=d, D1=d1, D2=d2, W=max(16, 1 << (count - 1).bit_length()), BLOCK_M=rows, BLOCK_N=block_n,
        PRECISION="ieee" if q.dtype == torch.float32 else "tf32", num_stages=tile.stages,
        num_warps=tile.warps if d <= WIDE else 8,
    )  # fmt: skip
    return out.transpose(1, 2), columns


@dataclass(frozen=True)
class Shape:
    label: str
    batch: int
    heads: int
    queries: int
    keys: int
    dim: int
    groups: int


SHAPES = [
    Shape("SD 1.5 d=40 64x64", 2, 8, 4096, 77, 40, 8),
    Shape("SD 1.5 d=80 32x32", 2, 8, 1024, 77, 80, 8),
    Shape("SD 1.5 d=160 16x16, two chunks", 2, 8, 256, 154, 160, 20),
    Shape("SDXL d=64 64x64", 2, 10, 4096, 77, 64, 8),
]


def make(shape: Shape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def heads(length: int) -> Tensor:
        return torch.randn(shape.batch, length, shape.heads, shape.dim, device=device, dtype=dtype).transpose(1, 2)

    group = torch.randint(0, shape.groups, (shape.keys,), device=device)
    groups = torch.nn.functional.one_hot(group, shape.groups).float()  # every key in one group: the columns sum to 1
    return {"q": heads(shape.queries), "k": heads(shape.keys), "v": heads(shape.keys), "groups": groups}
