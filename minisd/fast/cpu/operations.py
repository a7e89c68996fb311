"""Matrix products and convolutions on a CPU, with what is added to them, over channels-last maps.

Two libraries in PyTorch compute products: MKL and oneDNN.  Both know AVX2 and AVX-512, but MKL takes no AVX-512 on an AMD
processor.  oneDNN also adds, multiplies and applies GELU to a result while it is in the cache, for which MKL has no call.

    float32, AVX2           MKL: 80 GFLOP/s of a core against 70 (AMD Zen 3)
    float32, AVX-512, AMD   oneDNN: 241 GFLOP/s of two cores against 167
    bfloat16                oneDNN, PyTorch's own choice, where the processor has instructions for it

Which one it is follows from the processor and the number format alone, so that a picture is the same each time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from itertools import product
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .packing import Weight, hold

ROWS = 1024  # of a feed-forward at a time: 1 to 3 % faster than 256 or all of 8192
MANY = 1024  # rows of products from which on `packed` pays
PIXELS = 2048  # of `upsample_conv` at a time
OUTPUTS = 32  # channels of `phase_weights` at a time, which stay in the cache: 20 ms for 1280 of them, all at once 140


@cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether products are oneDNN's."""
    if not torch.backends.mkldnn.is_available():
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32 and torch.backends.cpu.get_cpu_capability() == "AVX512" and is_amd()


def is_amd() -> bool:
    try:
        return "AuthenticAMD" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return False


def held(weight: Tensor, *layers: nn.Module, parts: int = 1) -> Weight | Tensor:
    """A weight of layers, one above the other, which is kept in oneDNN's order from now on, in so many equal parts.

    weight (N, K), or (C', C, 3, 3) of a convolution.  Where products are not oneDNN's, the same weight.
    """
    weight = weight.detach()
    made = Weight(weight, parts)
    return made if onednn(weight.dtype) and hold(made, layers) else weight


def packed(weight: Tensor, count: int) -> Tensor:
    """A weight (N, K) in the order that oneDNN multiplies in, for products of so many rows in all: it makes no other numbers.

    A product puts its weight into that order by itself, piece by piece and more than once. Microseconds of two cores (AMD EPYC,
    Zen 5, bfloat16) for the order, the product in it and the product without: 114, 4959, 6057 (8192 rows, 320 to 960 channels);
    235, 4945, 5858 (2048, 640 to 1920); but 743, 5032, 5541 (512, 1280 to 3840). It lasts for one call.
    """
    if count < MANY or not onednn(weight.dtype):
        return weight
    return torch.ops.mkldnn._reorder_linear_weight(weight, count)  # type: ignore[no-any-return]


def ordered(weight: Tensor | Weight, count: int, parts: int = 1) -> Sequence[Tensor]:
    """What to multiply so many rows with, in parts: a weight that stays in oneDNN's order, or is brought into it for a call."""
    if isinstance(weight, Weight):
        return weight.packed(lambda part: torch.ops.mkldnn._reorder_linear_weight(part, count))
    return [part if part.is_mkldnn else packed(part, count) for part in (weight.chunk(parts) if parts > 1 else [weight])]


def linear(x: Tensor, weight: Tensor | Weight, bias: Tensor | None = None, add: Tensor | None = None) -> Tensor:
    """x (..., K), weight (N, K), bias (N,), add (..., N) -> (..., N): the linear layer, and a sum."""
    if onednn(x.dtype):
        (weight,) = ordered(weight, x.numel() // x.shape[-1])
        if add is None:
            return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, add, weight, bias, "add")
    out = F.linear(x, weight, bias)  # type: ignore[arg-type]
    return out if add is None else out.add_(add)


def geglu(x: Tensor, values: Tensor, gates: Tensor, bias: Tensor) -> Tensor:
    """ops.geglu of a linear layer, its weight (2*C, K) in two parts of (C, K): x (..., K), bias (2*C,) -> (..., C)."""
    value_bias, gate_bias = bias.chunk(2)
    if onednn(x.dtype):
        gate = torch.ops.mkldnn._linear_pointwise(x, gates, gate_bias, "gelu", [], "none")
        return torch.ops.mkldnn._linear_pointwise.binary(x, gate, values, value_bias, "mul")
    return F.linear(x, values, value_bias).mul_(F.gelu(F.linear(x, gates, gate_bias)))


def conv3x3(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None = None, stride: int = 1, add: Tensor | None = None
) -> Tensor:  # fmt: skip
    """A convolution with a border of one pixel, and a sum: x (B, C, H, W), weight (C', C, 3, 3), add (B, C', H', W') -> such.

    Where its weight does not stay in oneDNN's order, that is made at every call, which takes as long as the convolution where
    the map is small: there it is one product over the pixels' neighbourhoods.  Times faster on one core (AMD Zen 3, float32), by
    the pixels of a batch of two and the channels: 3.5 (32, 1280), 2.0 (128, 1280), 1.2 (512, 1280), 1.1 (128, 640); but 0.96
    (512, 640).  The batch itself decides nothing: a picture is the same beside others.
    """
    if isinstance(weight, Weight):
        (ready,) = weight.packed(lambda whole: convolution_order(whole, x, stride), (*x.shape[2:], stride))
        return packed_conv3x3(x, ready, bias, stride, add)
    b, c, height, width = x.shape
    height, width = (height - 1) // stride + 1, (width - 1) // stride + 1
    if 4 * height * width > c or not weight.is_contiguous(memory_format=torch.channels_last):
        out = F.conv2d(x, weight, bias, stride, padding=1)
        return out if add is None else out.add_(add)
    pixels = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()  # (B, H + 2, W + 2, C)
    batch, down, right, _ = pixels.stride()
    strides = (batch, stride * down, stride * right, down, right, 1)
    neighbourhoods = pixels.as_strided((b, height, width, 3, 3, c), strides).reshape(b * height * width, 9 * c)
    rows = None if add is None else add.permute(0, 2, 3, 1).reshape(b * height * width, len(weight))
    out = linear(neighbourhoods, weight.permute(0, 2, 3, 1).reshape(len(weight), 9 * c), bias, rows)
    return out.view(b, height, width, len(weight)).permute(0, 3, 1, 2)


def convolution_order(weight: Tensor, x: Tensor, stride: int) -> Tensor:
    """A weight (C', C, 3, 3) in oneDNN's order, which depends on the size of the map x (B, C, H, W)."""
    return torch.ops.mkldnn._reorder_convolution_weight(weight, [1, 1], [stride] * 2, [1, 1], 1, list(x.shape))  # type: ignore[no-any-return]


def packed_conv3x3(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, add: Tensor | None) -> Tensor:
    where = ([1, 1], [stride] * 2, [1, 1], 1)  # padding, stride, dilation, groups
    x = x.contiguous(memory_format=torch.channels_last)
    if add is None:
        return torch.ops.mkldnn._convolution_pointwise(x, weight, bias, *where, "none", [], "")
    add = add.contiguous(memory_format=torch.channels_last)
    return torch.ops.mkldnn._convolution_pointwise.binary(x, add, weight, bias, *where, "add", None, None, [], None)


def upsample_conv(x: Tensor, phases: Tensor, bias: Tensor | None) -> Tensor:
    """conv3x3 of x at twice its size, each pixel four times: (B, C, H, W), `phase_weights`, (C',) -> (B, C', 2*H, 2*W).

    Of the nine pixels under a weight some are the same: in even rows the second and third, in odd ones the first and second, and
    so with columns.  Those weights are summed once, and what is left is 2x2 pixels of x for each of four phases: 4/9 of the
    arithmetic.  Times as fast on two cores (AMD EPYC, Zen 5): 1.8 to 2.0 in bfloat16, 1.8 to 2.1 in float32.
    """
    b, c, height, width = x.shape
    pixels = F.pad(x, (1, 1, 1, 1)).permute(0, 2, 3, 1)  # (B, H + 2, W + 2, C)
    out = x.new_empty(b, height, 2, width, 2, phases.shape[2])
    lines = max(1, PIXELS // (b * width))
    for row, column in product((0, 1), repeat=2):
        weight = packed(phases[row, column], b * height * width)
        for top in range(0, height, lines):
            here = out[:, top : top + lines, row, :, column]  # (B, lines, W, C')
            end = top + here.shape[1]
            four = [pixels[:, top + row + i : end + row + i, column + j : column + j + width] for i in (0, 1) for j in (0, 1)]
            neighbourhoods = torch.cat(four, dim=-1).view(-1, 4 * c)
            here.copy_(linear(neighbourhoods, weight, bias).view(here.shape))
    return out.view(b, 2 * height, 2 * width, -1).permute(0, 3, 1, 2)


def phase_weights(weight: Tensor) -> Tensor:
    """(C', C, 3, 3) -> (2, 2, C', 4*C), by the rows' phase and the columns', the pixels' channels side by side."""

    def halves(w: Tensor, dim: int) -> Tensor:
        first, second, third = w.unbind(dim)
        return torch.stack([torch.stack([first, second + third], dim), torch.stack([first + second, third], dim)])

    out = weight.new_empty(2, 2, len(weight), 4 * weight.shape[1])
    for here, some in zip(out.split(OUTPUTS, dim=2), weight.split(OUTPUTS), strict=True):
        rows = halves(some.permute(0, 2, 3, 1).float(), 1)  # (2, n, 2, 3, C), summed in float32
        here.copy_(halves(rows, 3).transpose(0, 1).flatten(3))  # of (2, 2, n, 2, 2, C)
    return out
