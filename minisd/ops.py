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
    out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(b, length, channels)


def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """GroupNorm over (B, C, H, W), followed by SiLU where the network has one there."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def geglu(x: Tensor) -> Tensor:
    """(..., 2*C) -> (..., C): the first half times GELU (exact, erf) of the second (CompVis attention.py, GEGLU)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
