"""Attention on a CPU.  Where a head has many scores, its exponentials are made within the product that makes the scores.

oneDNN applies a sigmoid to a product while it is in the cache, and no exponential.  But sigmoid(x) is exp(x) / (1 + exp(x)):
where x is far below zero, the two are the same number.  Softmax does not change when all scores of a row are moved by as much,
and a bound (Cauchy and Schwarz: no score is larger than the query is long times the longest key) moves them below zero:

    softmax(s)_j = exp(s_j - bound - c) / sum_j,   exp(x) = sigmoid(x) * (1 + exp(x)), and here exp(x) <= exp(-c)

The bound is one more column of the queries, beside a column of ones in the keys; a column of ones in the values, where a product
has room for one more, makes the sums.  So a block of rows is two products and a division.  The keys' mean is taken off
first, which moves the scores of a row, too: they are zero in the mean then, so the mean of exp(s) is at least 1 (Jensen), and the
sum of what is computed at least exp(-bound - c) times the number of keys.  Where the bound is too large for that to be a number,
PyTorch's attention is taken.

Processor time of one core (AVX-512 bf16, batch 2, 8 heads of 40 channels, 4096 queries and keys): bfloat16 0.20 s, PyTorch's
own 0.60 s; float32 0.31 s, PyTorch's own 0.53 s.  With 1024 of 80 channels 26 ms of 61, and 45 ms of 59.
"""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from ...models import ops
from .operations import onednn, packed

MANY = 1 << 16  # scores of a head from which on it pays
BLOCK = 1 << 21  # scores at a time: 4 MB in bfloat16; half as many take a tenth longer, as values are put in order for each
BELOW = {torch.bfloat16: 8.0, torch.float32: 20.0}  # c: exp(-c) is a sixth of bfloat16's rounding, a thirtieth of float32's
COLUMNS = 48  # of a product at a time, in oneDNN's kernels
FARTHEST = 66.0  # of bound + c: what is less than float32 can hold is 1e-9 of a row's sum then


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    """ops.attention without gradients: q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d)."""
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

    Milliseconds of two cores (AMD EPYC, Zen 5) in bfloat16 and float32, batch 2, of 256 queries for 77 keys: 20 heads of 64
    channels 1.4 and 1.6, head by head 2.9 and 3.0, PyTorch's own 1.9 and 1.9.
    """
    scores = q.float() @ (k.float() * q.shape[-1] ** -0.5).mT  # in bfloat16 it would be rounded before it is an exponent
    return scores.softmax(-1).to(v.dtype) @ v


def attention_by_sigmoids(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d)."""
    b, heads, length, d = q.shape
    queries, keys, values, near = widened(q, k, v)
    rows = max(64, BLOCK // k.shape[2])
    out = q.new_empty(b, length, heads, d).transpose(1, 2)
    for i, head in product(range(b), range(heads)):
        if near[i][head]:
            of_head = packed(keys[i, head], length) if length > rows else keys[i, head]
            for block, place in zip(queries[i, head].split(rows), out[i, head].split(rows), strict=True):
                sums, total = weighted(block, of_head, values[i, head], d)
                torch.div(sums, total, out=place)
        else:
            one = slice(i, i + 1), slice(head, head + 1)  # as four dimensions, or PyTorch would make all scores at once
            out[one] = F.scaled_dot_product_attention(q[one], k[one], v[one])
    return out


def weighted(queries: Tensor, keys: Tensor, values: Tensor, d: int) -> tuple[Tensor, Tensor]:
    """queries (rows, d + 2), keys (S, d + 2), values (S, d or more) -> weighted sums (rows, d), and of the weights (rows, 1)."""
    weights = products(queries, keys, "sigmoid")  # (rows, S)
    sums = products(weights, values.T)
    return sums[:, :d], sums[:, d : d + 1] if sums.shape[1] > d else weights.sum(-1, keepdim=True)


def widened(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor, list[list[bool]]]:
    """Queries and keys with two more columns, a row's bound and ones; of zeros the second, as bfloat16 is multiplied in pairs.
    Values with a column of ones, if what makes a product 48 columns at a time has room for it: not those of 64, 160 or 512.

    q (B, heads, L, d), k and v (B, heads, S, d) -> (B, heads, L, d + 2), (B, heads, S, d + 2), (B, heads, S, d or more), and of
    which heads all bounds are near enough.
    """
    d, scale = q.shape[-1], q.shape[-1] ** -0.5
    queries, keys = F.pad(q, (0, 2)), k.new_zeros(*k.shape[:3], d + 2)
    mean = k.mean(2, keepdim=True, dtype=torch.float32)
    torch.add((-scale * mean).to(k.dtype), k, alpha=scale, out=keys[..., :d])  # rounded once
    longest = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32).amax(-1)[:, :, None]  # (B, heads, 1)
    bound = torch.linalg.vector_norm(queries, dim=-1, dtype=torch.float32) * longest + BELOW[q.dtype]  # (B, heads, L)
    queries[..., d] = -bound
    keys[..., d] = 1
    values = v.contiguous() if d % 32 == 0 else F.pad(v, (0, COLUMNS - d % COLUMNS))
    if values.shape[-1] > d:
        values[..., d] = 1
    return queries, keys, values, (bound.amax(-1) <= FARTHEST).tolist()  # not near where there is NaN


def products(x: Tensor, weight: Tensor, then: str = "none") -> Tensor:
    """x (rows, K), weight (N, K) -> (rows, N)."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, then, [], "")  # type: ignore[no-any-return]
