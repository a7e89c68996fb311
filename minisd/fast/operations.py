"""The operations of models/ops.py by kernels, and those that only the fused networks have: each with its plain form beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend

from ..models import ops
from ..models.unet import BasicTransformerBlock
from .choice import kernels, takes, wants
from .cpu import attention as on_cpu
from .cpu import compiled

Operation = Callable[..., Tensor]
FEW = 128  # keys that `cross_attention` is for: the kernel of `attention`, which has them in one tile then


def kernel_attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Operation | None:
    """What computes this attention in the place of PyTorch's, if anything does: arguments as `ops.attention`."""
    if causal:
        return None
    apart = ops.split_heads(heads, q, k, v)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if half and q.shape[-1] // heads > 256 and takes("wide_attention", *apart):
        return by_heads(kernels().wide_attention)
    few = k.shape[1] <= FEW and takes("cross_attention", *apart)
    if (few or takes("attention", *apart)) and copyable(*apart):
        return by_heads(kernels().attention)
    if compiled.takes(q, k, v, heads):
        return compiled.compiled_attention
    slow = q.device.type == "cpu" and q.dtype == torch.bfloat16  # PyTorch's, which is no faster than in float32
    return by_heads(on_cpu.attention_by_sigmoids) if slow and on_cpu.pays(*apart[:2]) else None


def by_heads(attend: Operation) -> Operation:
    """An attention over (B, heads, L, d) as one over (B, L, heads*d)."""

    @wraps(attend)
    def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
        return ops.joined_heads(attend(*ops.split_heads(heads, q, k, v)))

    return attention


def attention_by(q: Tensor, k: Tensor, v: Tensor, heads: int) -> str:
    """Who computes this attention: a kernel of ours, or which of PyTorch's own, by its name and, of cuDNN's, the version."""
    taken = kernel_attention(q, k, v, heads)
    if taken is not None:
        return taken.__name__
    q, k, v = ops.split_heads(heads, q, k, v)
    found = SDPBackend(torch._fused_sdp_choice(q, k, v))  # which a GPU's driver and libraries decide
    version = f" {torch.backends.cudnn.version()}" if found == SDPBackend.CUDNN_ATTENTION else ""
    return f"PyTorch's {found.name}{version}"


def attentions_of(network: nn.Module) -> str:
    """Who computes the attentions of a UNet here, among 1024 pixels of two pictures and from these to a prompt's 77 words: one
    name for each width of head."""
    among, to_prompt = (said_of(network, keys) for keys in (1024, 77))
    return among if among == to_prompt else f"{among}; to a prompt by {to_prompt}"


def said_of(network: nn.Module, keys: int) -> str:
    said: dict[str, list[int]] = {}
    for block in network.modules():
        if isinstance(block, BasicTransformerBlock):
            heads, like = block.attn1.heads, block.norm1.weight  # which is never in float8
            q, k = (like.new_empty(2, count, len(like)) for count in (1024, keys))
            widths = said.setdefault(attention_by(q, k, k, heads), [])
            if len(like) // heads not in widths:
                widths.append(len(like) // heads)
    return "; ".join(f"{name} for {', '.join(map(str, widths))} channels a head" for name, widths in said.items())


def has_copy_engine(x: Tensor) -> bool:
    """Whether tensors there can be fetched by one: without, what is written for it is slower than PyTorch's own, and spills."""
    return kernels().checks.capability(x) >= 90


def copyable(*tensors: Tensor) -> bool:
    """Whether tensors (B, heads, L, d) are laid out so that the copy engine can fetch them, where there is one."""
    if not has_copy_engine(tensors[0]):
        return False
    unit = 16 // tensors[0].element_size()
    strides = [stride for x in tensors for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(x.shape[3] <= 512 and x.stride(3) == 1 and x.data_ptr() % 16 == 0 for x in tensors)
    return aligned and all(stride > 0 and stride % unit == 0 for stride in strides)


def kernel_group_norm(x: Tensor, groups: int, weight: Tensor, bias: Tensor, *how: float) -> Operation | None:
    if takes("group_norm", x, weight, bias):
        return lambda x, *others: kernels().group_norm(channels_last(x), *others, **launches(x))
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
    known: Any = None,
) -> Tensor:
    """GroupNorm over [x + shift, skip], then SiLU where there is one.

    x (B, C, H, W), shift (B, C), skip (B, C2, H, W) -> (B, C + C2, H, W); from the kernel always channels-last.
    known: what the kernel that wrote x said of it: see `add_bias`.
    """
    if takes("group_norm", x, weight, bias, shift, skip):
        skip = None if skip is None else channels_last(skip)
        more = launches(x) if known is None else {"known": known}
        return kernels().group_norm(channels_last(x), groups, weight, bias, eps, silu, shift, skip, **more)
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    x = x if skip is None else torch.cat([x, skip], dim=1)
    return ops.group_norm(x, groups, weight, bias, eps, silu)


def channels_last(x: Tensor) -> Tensor:
    """x itself where the channels of a pixel are neighbours in memory, a slice of them too; else a copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def layer_norm(x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm of x + shift: (..., C), (C,) -> (..., C)."""
    if takes("layer_norm", x, shift, weight, bias) and even_rows(x) and x.shape[-1] <= 16384:
        return kernels().layer_norm(x, weight, bias, eps, shift=shift)
    return F.layer_norm(x if shift is None else x + shift.to(x.dtype), x.shape[-1:], weight, bias, eps)


def add_linear(total: Tensor, x: Tensor, weight: Tensor) -> Tensor:
    """total += x weight^T, in place where total (..., N) is rows next to each other: x (..., K), weight (N, K) -> the sum.

    By the product itself (`residual_product`), in the precision that it sums in; else by an operation of its own.
    """
    rows = total.reshape(-1, total.shape[-1])
    if not wants("residual_product", total.device):
        return rows.add_(F.linear(x, weight).view(rows.shape)).view(total.shape)
    return rows.addmm_(x.reshape(-1, x.shape[-1]), weight.T).view(total.shape)


def even_rows(x: Tensor) -> bool:
    """Whether (..., C) is rows at an even distance, as of every tensor that is contiguous or a slice of the last dimension."""
    try:
        return x.view(-1, x.shape[-1]).stride(-1) == 1
    except RuntimeError:
        return False


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """geglu of a linear layer: x (..., K), weight (2*C, K), bias (2*C,) -> (..., C)."""
    if takes("linear_geglu", x, weight, bias) and even_rows(x) and has_copy_engine(x):
        aligned = x.stride(-2) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and weight.is_contiguous()
        if aligned and weight.shape[1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0:
            return kernels().linear_geglu(x, weight, bias)
    return ops.geglu(F.linear(x, weight, bias))


class Following(NamedTuple):
    """A GroupNorm that reads a map next: its groups, and what it adds to the map, (C,)."""

    groups: int
    shift: Tensor | None = None


def add_bias(x: Tensor, bias: Tensor, residual: Tensor, after: Following | None = None) -> tuple[Tensor, Any]:
    """x + bias + residual: (B, C, H, W), (C,), (B, C, H, W) -> (B, C, H, W); x may be written over.

    With it, for the norm that follows, what its kernel need not find out again, or None.
    """
    dense = all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, residual))
    if takes("add_bias", x, bias, residual) and dense:
        if after and of_use(x.shape[2] * x.shape[3], x):
            total, *known = kernels().add_bias(x, bias, residual, groups=after.groups, shift=after.shift)
            return total, tuple(known)
        return kernels().add_bias(x, bias, residual), None
    return x.add_(bias[:, None, None]).add_(residual), None


def of_use(pixels: int, x: Tensor) -> bool:
    """Whether the kernel of GroupNorm would make statistics in a launch of their own, for maps of so many pixels."""
    large = pixels > kernels().KERNELS["group_norm"].WHOLE or not takes("small_norm", x)
    return takes("statistics", x) and takes("group_norm", x) and large


def launches(x: Tensor) -> dict[str, Any]:
    """What the kernel of GroupNorm is told where small maps, too, are to be done in two launches."""
    return {} if takes("small_norm", x) else {"tile": kernels().KERNELS["group_norm"].TILE}


def upsample_conv(
    x: Tensor, weight: Tensor, bias: Tensor, phases: Tensor | None, after: Following | None = None
) -> tuple[Tensor, Any]:
    """A 3x3 convolution of x at twice its size: (B, C, H, W), (C', C, 3, 3), (C',) -> (B, C', 2*H, 2*W), and as `add_bias`.

    phases: kernels.phase_weights(weight), made once, for the kernel; None where it is not wanted.
    """
    if phases is not None and takes("upsample_conv", x, phases, bias):
        if after and of_use(4 * x.shape[2] * x.shape[3], x):
            image, *known = kernels().upsample_conv(channels_last(x), phases, bias, groups=after.groups)
            return image, tuple(known)
        return kernels().upsample_conv(channels_last(x), phases, bias), None
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1), None


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
