"""Attention on a CPU.  Where a head has many scores, its exponentials are made within the product that makes the scores.

oneDNN applies a sigmoid to a product while it is in the cache, and no exponential.  But sigmoid(x) is exp(x) / (1 + exp(x)):
where x is far below zero, the two are the same number.  Softmax does not change when all scores of a row are moved by as much,
and a bound (Cauchy and Schwarz: no score is larger than the query is long times the longest key) moves them below zero:

    softmax(s)_j = exp(s_j - bound - c) / sum_j,   exp(x) = sigmoid(x) * (1 + exp(x)), and here exp(x) <= exp(-c)

The bound of the longest query is the bias of the product; a column of ones in the values, where a product has room for one more,
makes the sums.  So a block of rows is two products and a division.  The keys' mean is taken off first, which moves the scores
of a row, too: they are zero in the mean then, so the mean of exp(s) is at least 1 (Jensen), and the sum of what is computed at
least exp(-bound - c) times the number of keys.  Where the bound is too large for that to be a number, PyTorch's attention is
taken.

Processor time of one core (AVX-512 bf16, batch 2, 8 heads of 40 channels, 4096 queries and keys): bfloat16 0.20 s, PyTorch's
own 0.60 s; float32 0.31 s, PyTorch's own 0.53 s.  With 1024 of 80 channels 26 ms of 61, and 45 ms of 59.  compiled.py, where it
is asked for, takes its place in bfloat16.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import ops
from . import compiled
from .operations import onednn, packed

MANY = 1 << 16  # scores of a head from which on it pays
FEW, TOGETHER = 1 << 18, 1 << 22  # scores of a head up to which heads are multiplied with their values together; and of these
BLOCK = 1 << 21  # scores at a time: 4 MB in bfloat16; half as many take a tenth longer, as values are put in order for each
BELOW = {torch.bfloat16: 8.0, torch.float32: 20.0}  # c: exp(-c) is a sixth of bfloat16's rounding, a thirtieth of float32's
COLUMNS = 48  # of a product at a time, in oneDNN's kernels
FARTHEST = 66.0  # of bound + c: what is less than float32 can hold is 1e-9 of a row's sum then


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """ops.attention without gradients: q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d)."""
    if compiled.takes(q, k, v, heads):
        return compiled.compiled_attention(q, k, v, heads)
    q, k, v = ops.split_heads(heads, q, k, v)
    if pays(q, k):
        return ops.joined_heads(attention_by_sigmoids(q, k, v))
    return ops.joined_heads(attention_at_once(q, k, v) if possible(q) else F.scaled_dot_product_attention(q, k, v))


def pays(q: Tensor, k: Tensor) -> bool:
    """Whether `attention_by_sigmoids` is for queries (B, heads, L, d) and keys (B, heads, S, d) on a CPU."""
    return possible(q) and q.shape[2] * k.shape[2] >= MANY


def possible(q: Tensor) -> bool:
    """Whether anything here is: products are oneDNN's, and nobody wants gradients."""
    return onednn(q.dtype) and not (torch.is_grad_enabled() and q.requires_grad)


def attention_at_once(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """All heads in one product, for few scores: q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d).

    In float32 up to the weights: rounded to bfloat16, a score would be so before it is an exponent.  Milliseconds of two cores
    (AMD EPYC, Zen 5) in bfloat16, batch 2, 256 queries for 77 keys: 20 heads of 64 channels 1.0, head by head 1.7, PyTorch's own
    1.9; 8 heads of 160 channels 0.7, 1.1 and 1.6.
    """
    queries, keys, values = (x.contiguous().flatten(0, 1) for x in (q, k, v))
    weights = wide_products(queries, keys).mul_(q.shape[-1] ** -0.5).softmax(-1).to(v.dtype)
    return (weights @ values).view(q.shape)


def wide_products(x: Tensor, y: Tensor) -> Tensor:
    """x (N, L, K), y (N, S, K) -> (N, L, S), float32: in bfloat16 a second product finds what rounding took from the first, which
    is still sooner than one in float32."""
    made = x @ y.mT
    return made if x.dtype == torch.float32 else made.float().add_(torch.baddbmm(made, x, y.mT, beta=-1))


def attention_by_sigmoids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d)."""
    b, heads, length, d = q.shape
    queries, (keys, below, near) = q.contiguous(), centred(q, k)
    if q.dtype == torch.bfloat16 and length * k.shape[2] <= FEW and all(map(all, near)):
        return heads_by_sigmoids(queries, keys, v, below)
    out = q.new_empty(b, length, heads, d).transpose(1, 2)
    each = zip(*(x.flatten(0, 1).unbind() for x in (queries, keys, with_ones(v), below)), strict=True)
    for (i, head), (q1, k1, v1, below1) in zip(product(range(b), range(heads)), each, strict=True):
        if near[i][head]:
            head_by_sigmoids(q1, k1, v1, below1, out[i, head])
        else:
            one = slice(i, i + 1), slice(head, head + 1)  # as four dimensions, or PyTorch would make all scores at once
            out[one] = F.scaled_dot_product_attention(q[one], k[one], v[one])
    return out


def heads_by_sigmoids(q: Tensor, k: Tensor, v: Tensor, below: Tensor) -> Tensor:
    """The same in bfloat16 with few scores a head, where calls cost as much as what they do: the second product is one for many.

    q (B, heads, L, d), k and v (B, heads, S, d), below (B, heads, S) -> (B, heads, L, d).  Milliseconds of two cores (AMD EPYC,
    Zen 5), batch 2: 20 heads of 64 channels, 256 queries and keys 2.6, head by head 3.6; 10 with 1024 queries for 77 keys 2.2
    and 2.7.
    """
    count = max(1, TOGETHER // (q.shape[2] * k.shape[2]))
    parts = (x.flatten(0, 1).split(count) for x in (q, k, v.contiguous(), below))
    out = []
    for queries, keys, values, bias in zip(*parts, strict=True):
        weights = torch.stack([products(*each, "sigmoid") for each in zip(queries, keys, bias, strict=True)])
        out.append((weights @ values).div_(weights.sum(-1, keepdim=True)))
    return (out[0] if len(out) == 1 else torch.cat(out)).view(q.shape)


def head_by_sigmoids(queries: Tensor, keys: Tensor, values: Tensor, below: Tensor, out: Tensor) -> None:
    """queries (L, d), keys (S, d), values (S, d or more), below (S,) -> out (L, d)."""
    rows, d, values = max(64, BLOCK // len(keys)), out.shape[1], values.T
    if rows < len(queries):
        keys = packed(keys, len(queries))
    for block, place in zip(queries.split(rows), out.split(rows), strict=True):
        weights = products(block, keys, below, "sigmoid")  # (rows, S)
        sums = products(weights, values)  # (rows, d or more)
        total = sums[:, d : d + 1] if len(values) > d else weights.sum(-1, keepdim=True)
        torch.div(sums[:, :d], total, out=place)


def centred(queries: Tensor, k: Tensor) -> tuple[Tensor, Tensor, list[list[bool]]]:
    """Keys less their mean and scaled, what is added to all scores of a head to bring them below zero, and of which heads it is
    near enough.

    queries (B, heads, L, d), k (B, heads, S, d) -> (B, heads, S, d), (B, heads, S), [B][heads].
    """
    scale = k.shape[-1] ** -0.5
    keys = k.clone(memory_format=torch.contiguous_format)
    mean = keys.mean(2, keepdim=True, dtype=torch.float32)
    torch.add((-scale * mean).to(k.dtype), keys, alpha=scale, out=keys)  # rounded once
    longest_query, longest_key = (
        torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).amax(-1, keepdim=True) for x in (queries, keys)
    )
    bound = longest_query * longest_key + BELOW[k.dtype]  # (B, heads, 1)
    return keys, -bound.to(k.dtype).expand(keys.shape[:3]).contiguous(), (bound <= FARTHEST).squeeze(-1).tolist()  # NaN is not


def with_ones(v: Tensor) -> Tensor:
    """Values with a column of ones, if what makes a product 48 columns at a time has room for it: not those of 64, 160 or 512.

    v (B, heads, S, d) -> (B, heads, S, d or more).
    """
    d = v.shape[-1]
    if d % 32 == 0:
        return v.contiguous()
    values = F.pad(v, (0, COLUMNS - d % COLUMNS))
    values[..., d] = 1
    return values


def products(x: Tensor, weight: Tensor, bias: Tensor | None = None, then: str = "none") -> Tensor:
    """x (rows, K), weight (N, K), bias (N,) -> (rows, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, then, [], "")  # type: ignore[no-any-return]
