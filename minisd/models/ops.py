"""The operations that the networks are written in, each as its formula stands.

`REPLACEMENTS` is for those who compute the same numbers sooner (fast/choice.py fills it): under the name of an operation, a
function that is asked with the operation's arguments and answers with what takes its place for them, or None.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec

import torch
import torch.nn.functional as F
from torch import Tensor

Given = ParamSpec("Given")
REPLACEMENTS: dict[str, Callable[..., Callable[..., Tensor] | None]] = {}


def replaceable(plain: Callable[Given, Tensor]) -> Callable[Given, Tensor]:
    """An operation that REPLACEMENTS may compute in another way."""

    @wraps(plain)
    def operation(*arguments: Any, **options: Any) -> Tensor:
        ask = REPLACEMENTS.get(plain.__name__)
        return ((ask and ask(*arguments, **options)) or plain)(*arguments, **options)

    return operation


@replaceable
def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d).  No padding mask: Stable Diffusion uses none.
    """
    q, k, v = split_heads(heads, q, k, v)
    return joined_heads(F.scaled_dot_product_attention(q, k, v, is_causal=causal))


def split_heads(heads: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """(B, L, heads*d) -> (B, heads, L, d), each."""
    return tuple(x.view(len(x), -1, heads, x.shape[-1] // heads).transpose(1, 2) for x in tensors)


def joined_heads(x: Tensor) -> Tensor:  # (B, heads, L, d) -> (B, L, heads*d)
    return x.transpose(1, 2).flatten(2)


@replaceable
def group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """GroupNorm, followed by SiLU where the network has one there: (B, C, H, W) -> (B, C, H, W)."""
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


@replaceable
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: (..., C) -> (..., C)."""
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


@replaceable
def geglu(x: Tensor) -> Tensor:
    """(..., 2*C) -> (..., C): the first half times GELU (exact, erf) of the second (CompVis attention.py, GEGLU)."""
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
