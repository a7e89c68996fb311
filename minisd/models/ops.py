"""The operations that the models are written in.  The one place that chooses how each of them is computed.

On a CUDA device most of them are kernels of ours (minisd.kernels), elsewhere they are PyTorch's own.  The environment variable
MINISD_KERNELS, or `use` in Python, says otherwise:

    auto      on a GPU those in AUTO, the default
    triton    all of them; on a CPU too, where Triton's interpreter is on (TRITON_INTERPRET=1), which is for tests
    torch     none
    or some of their names, with commas between: group_norm,layer_norm

Training, empty tensors and float64 always go to PyTorch: the kernels have no backward pass and no double precision.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UsageError

# What `auto` takes on a GPU.  By the measurements of the prototypes: PyTorch's GroupNorm reaches 2 to 7 % of an H200's bandwidth,
# LayerNorm takes 8 us where 3 would do, and no library attention that is fast takes 512 channels a head (4.0 ms for 16,384
# pixels, where two matrix products and a softmax make 1.4 by computation).  The others are by computation, and these kernels
# themselves are yet to be timed: `minisd bench kernels` and `minisd bench unet` do it.
# Not in it: `attention`, because cuDNN's, which PyTorch chooses for up to 128 channels on a Hopper GPU, was measured at 258 (40
# channels a head) and 444 TFLOP/s (64); `linear_geglu`, which must keep 80 % of cuBLAS's speed to pay.
AUTO = frozenset({"group_norm", "layer_norm", "wide_attention", "geglu", "upsample_conv", "add_bias", "guided_step"})
ALL = AUTO | {"attention", "linear_geglu"}

chosen_by_call: frozenset[str] | None = None  # by `use`; without it the environment is asked


def parse(choice: str, source: str) -> frozenset[str]:
    words = {"auto": AUTO, "triton": ALL, "torch": frozenset[str]()}
    if choice in words:
        return words[choice]
    names = frozenset(choice.split(","))
    if not names <= ALL:
        raise UsageError(f"{source}: expected auto, triton, torch or some of {', '.join(sorted(ALL))}, found {choice!r}")
    return names


def chosen() -> frozenset[str]:
    """The kernels that are to be used.  Raises UsageError for a wrong MINISD_KERNELS."""
    if chosen_by_call is not None:
        return chosen_by_call
    return parse(os.environ.get("MINISD_KERNELS") or "auto", "MINISD_KERNELS")


def use(choice: str | None) -> None:
    """From now on: "auto", "triton", "torch" or names of kernels; None: what the environment says.  Raises UsageError."""
    global chosen_by_call
    chosen_by_call = None if choice is None else parse(choice, "kernels")


@contextmanager
def using(choice: str) -> Iterator[None]:
    """`use` for the length of a with block."""
    global chosen_by_call
    before = chosen_by_call
    use(choice)
    try:
        yield
    finally:
        chosen_by_call = before


@cache
def kernels() -> ModuleType:
    """minisd.kernels, imported when it is first needed: Triton takes a while."""
    return import_module("minisd.kernels")


@cache
def has_triton() -> bool:
    return kernels().checks.triton is not None


@cache
def triton_builds() -> bool:
    """Whether a kernel can be built here, for which Triton needs a C compiler; a warning says why not."""
    if not has_triton():
        return False
    try:
        kernels().geglu(torch.zeros(1, 16, device="cuda", dtype=torch.float16))
    except Exception as error:  # whatever it is, drawing goes on without
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        warnings.warn(f"Triton cannot build kernels here, so PyTorch's own operations take their place: {reason}", stacklevel=2)
        return False
    return True


def wants(name: str, device: torch.device) -> bool:
    """Whether operation `name` on this device is a kernel's.  Raises UsageError where a kernel is asked for and cannot be."""
    names = chosen()
    if name not in names or not names:
        return False
    if names is AUTO:  # the word, and not the same names one by one
        return device.type == "cuda" and triton_builds()
    if not has_triton():
        raise UsageError("kernels: expected Triton to be installed, found none: `pip install triton`, or MINISD_KERNELS=torch")
    if device.type not in kernels().checks.DEVICES:
        raise UsageError(
            f"kernels: expected a CUDA device (or TRITON_INTERPRET=1, set before Triton is imported), found {device.type!r}: "
            "use MINISD_KERNELS=auto or torch"
        )
    return True


def fits(*tensors: Tensor | None) -> bool:
    """Whether kernels take such tensors: they know three number formats, no gradients and no empty tensors."""
    given = [x for x in tensors if x is not None]
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in given)
    return not learns and all(x.numel() > 0 and x.dtype in (torch.float32, torch.float16, torch.bfloat16) for x in given)


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for each head.

    q (B, L, heads*d), k and v (B, S, heads*d) -> (B, L, heads*d).  No padding mask: Stable Diffusion uses none.
    """
    b, length, channels = q.shape
    q, k, v = (x.view(b, -1, heads, channels // heads).transpose(1, 2) for x in (q, k, v))  # (B, heads, L, d)
    half = q.dtype in (torch.float16, torch.bfloat16)
    if not causal and half and channels // heads > 256 and wants("wide_attention", q.device) and fits(q, k, v):
        out = kernels().wide_attention(q, k, v)
    elif not causal and kernel_attends(q, k, v):
        out = kernels().attention(q, k, v)
    elif q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] >= 1024 and not causal:
        out = attention_by_rows(q, k, v)
    else:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return out.transpose(1, 2).reshape(b, length, channels)


def kernel_attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether attention over (B, heads, L, d) is the kernel's: chosen, and laid out so that the copy engine can fetch it."""
    if not wants("attention", q.device) or q.shape[3] > 512 or not fits(q, k, v):
        return False
    unit = 16 // q.element_size()
    strides = [stride for x in (q, k, v) for size, stride in zip(x.shape[:3], x.stride()[:3], strict=True) if size > 1]
    aligned = all(x.stride(3) == 1 and x.data_ptr() % 16 == 0 for x in (q, k, v))
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
    """GroupNorm over [x + shift, skip], followed by SiLU where the network has one there.

    x (B, C, H, W), shift (B, C), skip (B, C2, H, W) -> (B, C + C2, H, W); from the kernel always channels-last.
    """
    if wants("group_norm", x.device) and fits(x, weight, bias, shift, skip):
        skip = None if skip is None else channels_last(skip)
        return kernels().group_norm(channels_last(x), groups, weight, bias, eps, silu, shift, skip)
    x = x if shift is None else x + shift[:, :, None, None].to(x.dtype)
    x = x if skip is None else torch.cat([x, skip], dim=1)
    x = F.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x


def channels_last(x: Tensor) -> Tensor:
    """x itself where the channels of a pixel are neighbours in memory, a slice of them too; else a copy."""
    return x if x.stride(1) == 1 else x.contiguous(memory_format=torch.channels_last)


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """LayerNorm over the last dimension: (..., C) -> (..., C)."""
    if wants("layer_norm", x.device) and fits(x, weight, bias) and even_rows(x) and x.shape[-1] <= 16384:
        return kernels().layer_norm(x, weight, bias, eps)
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def add_layer_norm(x: Tensor, residual: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + residual, and LayerNorm of it: (..., C) each."""
    rows = even_rows(x) and even_rows(residual) and x.shape[-1] <= 16384
    if wants("layer_norm", x.device) and fits(x, residual, weight, bias) and rows:
        return kernels().layer_norm(x, weight, bias, eps, residual=residual)
    total = x + residual
    return total, F.layer_norm(total, x.shape[-1:], weight, bias, eps)


def even_rows(x: Tensor) -> bool:
    """Whether (..., C) is rows at an even distance, as of every tensor that is contiguous or a slice of the last dimension."""
    try:
        return x.view(-1, x.shape[-1]).stride(-1) == 1
    except RuntimeError:
        return False


def geglu(x: Tensor) -> Tensor:
    """(..., 2*C) -> (..., C): the first half times GELU (exact, erf) of the second (CompVis attention.py, GEGLU)."""
    if wants("geglu", x.device) and fits(x) and even_rows(x):
        return kernels().geglu(x)
    value, gate = x.chunk(2, dim=-1)
    return value * F.gelu(gate)


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """geglu of a linear layer: x (..., K), weight (2*C, K), bias (2*C,) -> (..., C)."""
    if wants("linear_geglu", x.device) and fits(x, weight, bias) and even_rows(x):
        aligned = x.stride(-2) * x.element_size() % 16 == 0 and x.data_ptr() % 16 == 0 and weight.is_contiguous()
        if aligned and weight.shape[1] * weight.element_size() % 16 == 0 and weight.data_ptr() % 16 == 0:
            return kernels().linear_geglu(x, weight, bias)
    return geglu(F.linear(x, weight, bias))


def add_bias(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual: (B, C, H, W), (C,), (B, C, H, W) -> (B, C, H, W); x may be written over."""
    dense = all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, residual))
    if wants("add_bias", x.device) and fits(x, bias, residual) and dense:
        return kernels().add_bias(x, bias, residual)
    return x.add_(bias[:, None, None]).add_(residual)


def upsample_conv(x: Tensor, weight: Tensor, bias: Tensor, phases: Tensor | None) -> Tensor:
    """A 3x3 convolution of x at twice its size: (B, C, H, W), (C', C, 3, 3), (C',) -> (B, C', 2*H, 2*W).

    phases: kernels.phase_weights(weight), made once, for the kernel; None where it is not wanted.
    """
    if phases is not None and wants("upsample_conv", x.device) and fits(x, phases, bias):
        return kernels().upsample_conv(channels_last(x), phases, bias)
    return F.conv2d(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias, padding=1)


def guided_step(x: Tensor, prediction: Tensor, table: Tensor, step: Tensor, model_input: Tensor, denoised: Tensor) -> None:
    """Guidance and one step of the sampler, in place: see kernels/guided_step.py."""
    if wants("guided_step", x.device) and fits(x, prediction, model_input):
        kernels().guided_step(x, prediction, table, step, model_input, denoised)
        return
    results = kernels().KERNELS["guided_step"].reference(x, prediction, table, step, model_input, denoised)
    for target, result in zip((x, model_input, denoised), results, strict=True):
        target.copy_(result)
