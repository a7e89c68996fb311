"""The operations that the models are written in.  The one place that chooses how each of them is computed.

On a GPU that is minisd's own Triton kernels (kernels/), except where a library's is expected to be faster; elsewhere PyTorch.
MINISD_KERNELS=triton, torch or auto (the default) decides for a whole process, `kernels("torch")` for a part of one: the same
picture can be made both ways and compared.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor

from .errors import UsageError

CHOICES = ("auto", "triton", "torch")
SDPA_LIMIT = 256  # channels a head; beyond, of PyTorch's attentions only the slowest works (137 TFLOP/s on an H200, at 512)

_choice: ContextVar[str | None] = ContextVar("kernels", default=None)


@contextmanager
def kernels(choice: str) -> Iterator[None]:
    """Computes with these kernels inside a `with`: "triton", "torch" or "auto".  Raises UsageError."""
    token = _choice.set(checked(choice))
    try:
        yield
    finally:
        _choice.reset(token)


def checked(choice: str) -> str:
    if choice not in CHOICES:
        raise UsageError(f"MINISD_KERNELS: expected one of {', '.join(CHOICES)}, found {choice!r}")
    return choice


def by_triton(x: Tensor) -> bool:
    """Whether kernels of our own compute with this tensor.  They have no backward pass, so training never does."""
    choice = _choice.get() or checked(os.environ.get("MINISD_KERNELS") or "auto")
    if choice == "torch" or torch.is_grad_enabled():
        return False
    if choice == "auto":
        return x.is_cuda and find_spec("triton") is not None
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise UsageError(f"MINISD_KERNELS: triton needs a GPU (or TRITON_INTERPRET=1, for tests); found a tensor on {x.device}")
    return True


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d).  No padding mask: Stable Diffusion uses none.
    """
    b, length, channels = q.shape
    q, k, v = (x.view(b, -1, heads, channels // heads).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
    if not causal and flash_wins(q) and by_triton(q):
        from .kernels import attention as flash

        out = flash(q, k, v)
    elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] >= 1024 and not causal:
        out = attention_by_rows(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(b, length, channels)


def flash_wins(q: Tensor) -> bool:
    """Whether our attention is the one to use, where there is a choice: for the VAE's one head of 512 channels, for which cuDNN
    has none; for the others cuDNN's, until ours is measured faster.  Its tiles want heads that are multiples of 16 bytes."""
    d = q.shape[-1]
    if d * q.element_size() % 16 or d > 512:
        return False
    return d > SDPA_LIMIT or _choice.get() == "triton" or os.environ.get("MINISD_KERNELS") == "triton"


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
    if by_triton(x):
        from .kernels import group_norm as fused

        return fused(x.contiguous(memory_format=torch.channels_last), groups, weight, bias, eps, silu)
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension, (..., C) -> (..., C)."""
    if by_triton(x):
        from .kernels import layer_norm as fused

        return fused(x, weight, bias, eps)  # type: ignore[return-value]
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def geglu(x: Tensor) -> Tensor:
    """(..., 2*C) -> (..., C): the first half times GELU (exact, erf) of the second (CompVis attention.py, GEGLU)."""
    if by_triton(x):
        from .kernels import geglu as fused

        return fused(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)
