"""The UNet in float8: weights in e4m3 with a scale for each row, and in its transformers activations likewise (--fp8).

    w[n, k] = s[n] q[n, k],   s[n] = max_k |w[n, k]| / 448,   q in e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)
    y[m, n] = a[m] s[n] sum_k p[m, k] q[n, k] + bias[n],   a[m] = max_k |x[m, k]| / 448,   p = e4m3(x[m, k] / a[m])

A linear layer of a transformer multiplies in float8: by `torch._scaled_mm` on a GPU that has it (RTX 4090, H100 and later), and
elsewhere the same numbers are multiplied wider (`reference`), so a CPU can say what a GPU would lose.  LayerNorm and GEGLU hand
their rows on in float8; on a GPU their kernels write them so, and another makes rows of what PyTorch wrote.  Convolutions, which
are two thirds of SD 1.5's UNet, and the time embedding keep their weights in float8, with a scale for each output channel, and
dequantise them when they are used.  Norms, biases and the two convolutions from and to the latents stay as they are.

The UNet takes half the memory of float16.  It is lossy: `minisd bench accuracy` says how much.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from ...errors import UsageError
from ...models import ops
from ...models.layers import LayerNorm
from ...models.unet import GEGLU, SpatialTransformer
from ...system.device import gpu_computes_bfloat16
from ...system.memory import first_line
from ..choice import kernels, takes
from ..operations import even_rows, kernel_geglu, kernel_layer_norm, layer_norm

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
MULTIPLE = 16  # of rows and columns that `_scaled_mm` takes


def quantised(x: Tensor, over: Sequence[int] = (-1,)) -> tuple[Tensor, Tensor]:
    """x -> the same in e4m3, and the scales, float32, to multiply it with: one for all that is in the dimensions `over`."""
    wide = x.float()
    scale = wide.abs().amax(tuple(over), keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def widened(x: Tensor, dtype: torch.dtype) -> Tensor:
    """e4m3 -> the same numbers in float32 or bfloat16.

    On a CPU by their bits, in a quarter of the time: moved by 7 places they are a float16, of 2^-8 times the number (but NaN).
    """
    if x.device.type != "cpu" or x.dtype != E4M3:  # a block that is rescued is in float32
        return x.to(dtype)
    bits = x.view(torch.int8).to(torch.int16).bitwise_left_shift_(7).bitwise_and_(~0x4000)  # one of the two signs goes
    return bits.view(torch.float16).to(dtype).mul_(256)


class Rows(Tensor):
    """(..., K) as e4m3 and the scales (..., 1), for linear layers; all else that is computed with it gets it dequantised."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, values: Tensor, scale: Tensor, dtype: torch.dtype) -> Rows:
        return Tensor._make_wrapper_subclass(cls, values.shape, dtype=dtype, device=values.device)  # type: ignore[no-any-return, attr-defined]

    def __init__(self, values: Tensor, scale: Tensor, dtype: torch.dtype) -> None:
        self.e4m3, self.scale = values, scale

    @classmethod
    def of(cls, x: Tensor) -> Rows:
        if isinstance(x, cls):
            return x
        if takes("quantise_rows", x) and writes_float8(x) and even_rows(x) and x.shape[-1] <= 16384:
            values, scale = kernels().quantise_rows(x)
        else:
            values, scale = quantised(x)
        return cls(values, scale, x.dtype)

    def whole(self) -> Tensor:
        return (widened(self.e4m3, torch.float32) * self.scale).to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, given: Any = (), named: Any = None) -> Any:  # type: ignore[override]
        given, named = tree_map_only(cls, cls.whole, (given, named or {}))
        return function(*given, **named)


def writes_float8(x: Tensor) -> bool:
    """Whether kernels can write float8 where x is."""
    return kernels().checks.capability(x) >= kernels().float8.SINCE  # type: ignore[no-any-return]


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (..., K), weight e4m3 (N, K), scale (N, 1) -> (..., N), in x's dtype: products of float8 numbers, summed in float32.

    They are exact in bfloat16 as well, in which many processors are faster; a sum is rounded to it then.  (float16 is too small.)
    """
    rows, half = Rows.of(x), x.is_cuda and x.dtype == torch.float16 and gpu_computes_bfloat16(x.device)
    exact = torch.bfloat16 if half or x.dtype == torch.bfloat16 else torch.float32
    y = F.linear(widened(rows.e4m3, exact), widened(weight, exact)) * rows.scale * scale.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def scaled_product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same by the GPU's own float8 product, whose result is bfloat16."""
    rows, half = Rows.of(x), torch.bfloat16
    values, own = rows.e4m3.reshape(-1, x.shape[-1]).contiguous(), rows.scale.reshape(-1, 1)
    bias = None if bias is None else bias.to(half)
    return torch._scaled_mm(values, weight.T, own, scale.T, bias, out_dtype=half).view(*x.shape[:-1], -1)


def product(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the faster of the two that runs where x is; so in bfloat16 or in x's dtype."""
    if x.device.type == "cuda":
        compute = scaled_product if has_scaled_product(x.device) else reference
    else:
        compute = scaled_product if x.device.type == "meta" and writes_float8(x) else reference
    return compute(x, weight, scale, bias)


@cache
def has_scaled_product(device: torch.device) -> bool:
    """Whether a GPU multiplies in float8 with a scale for each row, which depends on how PyTorch was built, too, and is tried.

    A warning says where it does not.  Raises torch.OutOfMemoryError.
    """
    one, scale = torch.zeros(MULTIPLE, MULTIPLE, device=device).to(E4M3), torch.ones(MULTIPLE, 1, device=device)
    try:
        return bool(scaled_product(Rows(one, scale, torch.bfloat16), one, scale, scale[:, 0]).isfinite().all())
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, ValueError) as error:  # "Rowwise scaling is not currently supported on your device" and the like
        warnings.warn(f"fp8: no products in float8 here, so it is slower than without: {first_line(error)}", stacklevel=2)
        return False


Layer = nn.Linear | nn.Conv2d


def store(new: Layer, layer: Layer) -> None:
    """In the place of a layer: `new.weight` is e4m3, and there is no gradient."""
    weight, scale = quantised(layer.weight.data, range(1, layer.weight.dim()))
    new.weight, new.bias = nn.Parameter(weight, requires_grad=False), layer.bias
    new.register_buffer("weight_scale", scale, persistent=False)  # (N, 1, …), as many dimensions as the weight
    new.as_loaded = layer.weight.dtype  # type: ignore[assignment]
    new.register_state_dict_post_hook(as_numbers)
    new.register_load_state_dict_pre_hook(refuse)


def as_numbers(layer: nn.Module, tensors: dict[str, Tensor], prefix: str, more: object) -> None:
    """In a `state_dict` the weight is what it stands for; with keep_vars, for which it is the parameter, it stays as it is."""
    if tensors[f"{prefix}weight"] is not layer.weight:
        tensors[f"{prefix}weight"] = whole(layer, layer.as_loaded)  # type: ignore[arg-type]


def refuse(layer: nn.Module, tensors: dict[str, Tensor], prefix: str, *more: object) -> None:
    raise UsageError(f"load_state_dict: expected no weights for a UNet in float8, found {prefix}weight: load without fp8")


def dequantised(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight (N, …), e4m3, and scale (N, 1, …) -> the weight itself."""
    if takes("dequantise", scale) and weight.dtype == E4M3:
        return kernels().dequantise(weight, scale.flatten(), dtype)  # type: ignore[no-any-return]
    return (widened(weight, torch.float32) * scale).to(dtype)


def whole(layer: Layer, dtype: torch.dtype) -> Tensor:
    return dequantised(layer.weight, scale_of(layer), dtype)


def scale_of(layer: nn.Module) -> Tensor:
    return layer.weight_scale  # type: ignore[return-value]


class Float8Linear(nn.Linear):
    """Multiplies in float8.  Of a map over pixels that a file stores as a 1x1 convolution, too."""

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        store(self, layer)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        compute = product if self.weight.dtype == E4M3 else reference  # a block that is rescued is in float32
        return compute(x, self.weight.flatten(1), scale_of(self).flatten(1), self.bias).to(x.dtype)


class StoredLinear(Float8Linear):
    """Keeps its weight in float8, and multiplies as it always did."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, whole(self, x.dtype), self.bias)


class StoredConv(nn.Conv2d):
    """Likewise."""

    def __init__(self, layer: nn.Conv2d) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_channels, layer.out_channels, layer.kernel_size, layer.stride, layer.padding)  # type: ignore[arg-type]
        store(self, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, whole(self, x.dtype), self.bias)


FLOAT8 = (Float8Linear, StoredConv)


class Float8LayerNorm(LayerNorm):
    def __init__(self, layer: nn.LayerNorm) -> None:
        with torch.device("meta"):
            super().__init__(layer.normalized_shape, layer.eps)
        self.weight, self.bias = layer.weight, layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return normed(x, self)


def normed(x: Tensor, norm: nn.LayerNorm, shift: Tensor | None = None, addend: Tensor | None = None) -> Rows:
    """LayerNorm of x + shift: (..., C), (C,) -> (..., C).  addend (..., C): is added to x first, in place."""
    given = (norm.weight, norm.bias, norm.eps)
    kernel = kernel_layer_norm(x, *given)
    if kernel and writes_float8(x):
        values, scale = kernel(x, *given, shift=shift, addend=addend, float8=True)
        return Rows(values, scale, x.dtype)
    if addend is not None:
        x.add_(addend)
    return Rows.of(layer_norm(x, shift, *given))


class Float8GEGLU(GEGLU):
    def __init__(self, layer: GEGLU) -> None:
        nn.Module.__init__(self)
        self.proj = layer.proj

    def forward(self, x: Tensor) -> Tensor:
        return gated(self.proj(x))


def gated(x: Tensor) -> Rows:
    """GEGLU: (..., 2*C) -> (..., C)."""
    kernel = kernel_geglu(x)
    if kernel and writes_float8(x):
        values, scale = kernel(x, float8=True)
        return Rows(values, scale, x.dtype)
    return Rows.of(ops.geglu(x))


def fits(layer: nn.Module) -> bool:
    """Whether it is a layer whose weights go into float8: all but those from or to the few channels of latents."""
    return (
        isinstance(layer, Layer)
        and not isinstance(layer, FLOAT8)
        and all(size % MULTIPLE == 0 and size > MULTIPLE for size in layer.weight.shape[:2])
    )


def in_float8_of(layer: nn.Module, inside: bool) -> nn.Module | None:
    """What takes the place of a layer; inside: of a transformer."""
    if isinstance(layer, FLOAT8):
        return None
    if isinstance(layer, nn.Linear) and fits(layer):
        return Float8Linear(layer) if inside else StoredLinear(layer)
    if isinstance(layer, nn.Conv2d) and fits(layer):
        return StoredConv(layer)
    if inside and isinstance(layer, LayerNorm):
        return Float8LayerNorm(layer)
    return Float8GEGLU(layer) if inside and isinstance(layer, GEGLU) else None


def to_float8(network: nn.Module, inside: bool = False) -> int:
    """Puts the layers of a UNet into float8, for good; returns how many now have their weights so."""
    inside |= isinstance(network, SpatialTransformer)
    count = 0
    for name, layer in [*network.named_children()]:
        count += to_float8(layer, inside)
        new = in_float8_of(layer, inside)
        if new is not None:
            setattr(network, name, new)
            count += isinstance(new, FLOAT8)
    return count


def is_float8(unet: nn.Module) -> bool:
    return any(isinstance(module, FLOAT8) for module in unet.modules())
