"""The operations that the models are written in.  The one place that chooses how each of them is computed."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d).  No padding mask: Stable Diffusion uses none.
    """
    b, length, channels = q.shape
    q, k, v = (x.view(b, -1, heads, channels // heads).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] >= 1024 and not causal:
        out = attention_by_rows(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(b, length, channels)


def attention_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula as it stands, for so many query rows at a time that the scores stay in the cache: (B, heads, L, d) -> same.

    For bfloat16 on a CPU, where PyTorch's fused attention runs at the speed of float32: 0.13 s against 0.26 s for 8 heads of
    40 channels, L = 4096, batch 2, on 2 cores.  Scores are rounded to bfloat16: error 5e-3 against 2e-3.
    """
    b, heads, length, d = q.shape
    keys = k.flatten(0, 1).transpose(1, 2)  # (B*heads, d, S)
    values = v.flatten(0, 1)  # (B*heads, S, d)
    rows = max(1, (1 << 22) // (b * heads * k.shape[2]))
    pieces = (q.flatten(0, 1) * d**-0.5).split(rows, dim=1)  # (B*heads, rows, d) each
    out = [torch.bmm(torch.bmm(piece, keys).softmax(dim=-1), values) for piece in pieces]
    return torch.cat(out, dim=1).view(b, heads, length, d)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """GroupNorm over (B, C, H, W), followed by SiLU where the network has one there."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def geglu(x: Tensor) -> Tensor:
    """(..., 2*C) -> (..., C): the first half times GELU (exact, erf) of the second (CompVis attention.py, GEGLU)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
