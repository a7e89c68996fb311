"""The operations of models/ops.py by kernels, and those that only the fused networks have: each with its plain form beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..models import ops
from .choice import kernels, takes

Operation = Callable[..., Tensor]


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Operation | None:
    """What computes this attention in the place of PyTorch's, if anything does: arguments as `ops.attention`."""
    if causal:
        return None
    apart = ops.split_heads(heads, q, k, v)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.shape[-1] // heads > 256 and takes("wide_attention", *apart):
        return by_heads(kernels().wide_attention)
    if takes("attention", *apart) and copyable(*apart):
        return by_heads(kernels().attention)
    by_rows = q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[1] >= 1024
    return by_heads(attention_by_rows) if by_rows else None


def by_heads(attend: Operation) -> Operation:
    """An attention over (B, heads, L, d) as one over (B, L, heads*d)."""

    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
        return ops.joined_heads(attend(*ops.split_heads(heads, q, k, v)))

    return attention


def copyable(*tensors: Tensor) -> bool:
    """Whether tensors (B, heads, L, d) are laid out so that the copy engine can fetch them."""
    unit = 16 // tensors[0].element_size()
    strides = [stride for x in tensors for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(x.shape[3] <= 512 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 for x in tensors)
    return aligned and all(stride > 0 and stride % unit == 0 for stride in strides)


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


def kernel_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *how: float) -> Operation | None:
    if takes("group_norm", x, weight, bias):
        return lambda x, *others: kernels().group_norm(channels_last(x), *others)
    sums_squares = x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 4 and not x.is_contiguous()
    return centred_group_norm if sums_squares else None


def centred_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool = False) -> Tensor:
    """ops.group_norm of x less about its mean, which changes nothing.

    For channels-last maps on a CPU, where PyTorch takes the variance for the mean square less the squared mean: where the mean
    is 100 times the deviation, as in pictures of one colour, 2.6e-3 off, and so 2e-7.  In bfloat16 rounding is more than that.
    """
    row = x[:, :, x.shape[2] // 2].reshape(len(x), groups, -1).mean(-1)  # the middle row of pixels
    x = F.group_norm(x - row.repeat_interleave(x.shape[1] // groups, 1)[:, :, None, None], groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def kernel_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Operation | None:
    fits = takes("layer_norm", x, weight, bias) and even_rows(x) and x.shape[-1] <= 16384
    return kernels().layer_norm if fits else None


def kernel_geglu(x: Tensor) -> Operation | None:
    return kernels().geglu if takes("geglu", x) and even_rows(x) else None


ops.REPLACEMENTS.update(
    attention=kernel_attention, group_norm=kernel_group_norm, layer_norm=kernel_layer_norm, geglu=kernel_geglu
)


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool = False,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
) -> Tensor:
    """GroupNorm over [x + shift, skip], then SiLU where there is one.

    x (B, C, H, W), shift (B, C), skip (B, C2, H, W) -> (B, C + C2, H, W); from the kernel always channels-last.
    """
    if takes("group_norm", x, weight, bias, shift, skip):
        skip = None if skip is None else channels_last(skip)
        return kernels().group_norm(channels_last(x), groups, weight, bias, eps, silu, shift, skip)
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    x = x if skip is None else torch.cat([x, skip], dim=1)
    return ops.group_norm(x, groups, weight, bias, eps, silu)


def channels_last(x: Tensor) -> Tensor:
    """x itself where the channels of a pixel are neighbours in memory, a slice of them too; else a copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and LayerNorm of it: (..., C) each."""
    rows = even_rows(x) and even_rows(residual) and x.shape[-1] <= 16384
    if takes("layer_norm", x, residual, weight, bias) and rows:
        return kernels().layer_norm(x, weight, bias, eps, residual=residual)
    total = x + residual
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


def even_rows(x: Tensor) -> bool:
    """Whether (..., C) is rows at an even distance, as of every tensor that is contiguous or a slice of the last dimension."""
    try:
        return x.view(-1, x.shape[-1]).stride(-1) == 1
    except RuntimeError:
        return False


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """geglu of a linear layer: x (..., K), weight (2*C, K), bias (2*C,) -> (..., C)."""
    if takes("linear_geglu", x, weight, bias) and even_rows(x):
        aligned = x.stride(-2) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and weight.is_contiguous()
        if aligned and weight.shape[1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0:
            return kernels().linear_geglu(x, weight, bias)
    return ops.geglu(F.linear(x, weight, bias))


def add_bias(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual: (B, C, H, W), (C,), (B, C, H, W) -> (B, C, H, W); x may be written over."""
    dense = all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, residual))
    if takes("add_bias", x, bias, residual) and dense:
        return kernels().add_bias(x, bias, residual)
    return x.add_(bias[:, None, None]).add_(residual)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, phases: Tensor | None) -> Tensor:
    """A 3x3 convolution of x at twice its size: (B, C, H, W), (C', C, 3, 3), (C',) -> (B, C', 2*H, 2*W).

    phases: kernels.phase_weights(weight), made once, for the kernel; None where it is not wanted.
    """
    if phases is not None and takes("upsample_conv", x, phases, bias):
        return kernels().upsample_conv(channels_last(x), phases, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def linear_step(
    history: Tensor, asked: Tensor, prediction: Tensor, weights: Tensor, table: Tensor, call: Tensor, model_input: Tensor,
    **known: Tensor,
) -> None:  # fmt: skip
    """Guidance and one call of the sampler, in place: see kernels/linear_step.py."""
    arguments = (history, asked, prediction, weights, table, call, model_input)
    if takes("linear_step", history, prediction, model_input):
        kernels().linear_step(*arguments, **known)
        return
    results = kernels().KERNELS["linear_step"].reference(*arguments, **known)
    for target, result in zip((history, asked, model_input), results, strict=True):
        target.copy_(result)
