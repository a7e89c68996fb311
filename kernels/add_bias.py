"""The bias of a convolution and the residual sum after it, in one kernel.

    y[b, p, c] = x[b, p, c] + bias[c] + residual[b, p, c]                p: one of the H*W pixels, channels-last

Memory traffic.  x and residual are read once, y written once: 3 N elements, and the floor is that over the bandwidth.  128
channels at 1024x1024 in half precision: 805 MB, 0.19 ms at 4.2 TB/s.  PyTorch's convolution adds its bias in a kernel of its own
(2 N), the sum is another (3 N).

Work split.  Every output is independent: a program takes 16 pixels of up to 128 channels, one 16-byte load a thread from each.
The sum is made in float32 and rounded once, so it is no less precise than PyTorch's two roundings.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .checks import MapShape, check, check_vector, expect, jit, launcher, tl


def reference(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return x + bias[:, None, None].to(x.dtype) + residual


@jit(do_not_specialize=["pixels"])
def add_bias_kernel(x, bias, residual, y, pixels, channels, ROWS: tl.constexpr, BLOCK_C: tl.constexpr):
    pixel = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    mask = (pixel < pixels)[:, None] & (channel < channels)[None, :]
    at = pixel.to(tl.int64)[:, None] * channels + channel[None, :]
    offset = tl.load(bias + channel, mask=channel < channels, other=0.0).to(tl.float32)
    values = tl.load(x + at, mask=mask, other=0.0).to(tl.float32) + offset[None, :]
    values += tl.load(residual + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, values.to(y.dtype.element_ty), mask=mask)


@launcher
def add_bias(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    """x + bias + residual: (B, C, H, W), (C,), (B, C, H, W), the maps dense and channels-last, as the result is, in x's dtype.

    ValueError for other shapes, dtypes, strides or devices.
    """
    check("x", x, (None, None, None, None))
    b, channels, height, width = x.shape
    check_vector("bias", bias, channels, like=x)
    check("residual", residual, tuple(x.shape), like=x, dtypes=(x.dtype,))
    for name, tensor in (("x", x), ("residual", residual)):
        dense = tensor.is_contiguous(memory_format=torch.channels_last)
        expect(dense, name, "dense channels-last memory (torch.channels_last)", f"strides {tensor.stride()}")
    y = torch.empty(x.shape, device=x.device, dtype=x.dtype, memory_format=torch.channels_last)
    grid = (-(-b * height * width // 16), -(-channels // 128))
    add_bias_kernel[grid](x, bias, residual, y, b * height * width, channels, ROWS=16, BLOCK_C=128, num_warps=8)
    return y


SHAPES = [
    *MapShape.of("SD 1.5", 2, (320, 64), (1280, 8)),
    *MapShape.of("SDXL", 2, (320, 128), (1280, 32)),
    *MapShape.of("VAE", 1, (512, 64), (128, 512), (128, 1024)),
]


def make(shape: MapShape, device: torch.device | str, dtype: torch.dtype) -> dict[str, Any]:
    def image() -> Tensor:
        x = torch.randn(shape.batch, shape.channels, shape.size, shape.size, device=device, dtype=dtype)
        return x.to(memory_format=torch.channels_last)

    return {"x": image(), "bias": torch.randn(shape.channels, device=device), "residual": image()}  # a sum, in float32


def traffic(shape: MapShape, element_size: int) -> int:
    return 3 * shape.batch * shape.channels * shape.size**2 * element_size


def flops(shape: MapShape) -> int:
    return 2 * shape.batch * shape.channels * shape.size**2


def library(**arguments: Any) -> dict[str, Callable[[], Any]]:
    return {"PyTorch": lambda: reference(**arguments)}
