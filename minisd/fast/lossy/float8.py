"""The UNet's transformers in float8: weights in e4m3 with a scale for each row, activations likewise (--fp8).

    w[n, k] = s[n] q[n, k],   s[n] = max_k |w[n, k]| / 448,   q in e4m3 (Micikevicius et al. 2022, arXiv 2209.05433)
    y[m, n] = a[m] s[n] sum_k p[m, k] q[n, k] + bias[n],   a[m] = max_k |x[m, k]| / 448,   p = e4m3(x[m, k] / a[m])

On a GPU from Hopper on `torch._scaled_mm` multiplies in float8; elsewhere the same numbers are made in float32 (`reference`), so
a CPU can say what a GPU would lose.  Convolutions, the time embedding and all norms stay as they are.  It is lossy: `minisd
bench accuracy` says how much.  The weights take half the memory of float16.
"""

from __future__ import annotations

from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...files.model import StableDiffusion
from ...models.unet import SpatialTransformer, UNet
from ..engine import Engine, Plain
from ..ways import AsLoaded

E4M3, LARGEST = torch.float8_e4m3fn, 448.0
MULTIPLE = 16  # of rows and columns that `_scaled_mm` takes
HOPPER = (9, 0)  # scales for each row need it


def quantised(x: Tensor) -> tuple[Tensor, Tensor]:
    """(..., K) -> e4m3 (..., K), and the scales (..., 1), float32, that it is to be multiplied with."""
    wide = x.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=1e-12) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


def reference(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., K), weight e4m3 (N, K), scale (N, 1) -> (..., N), in x's dtype: products of float8 numbers, summed in float32."""
    values, own = quantised(x)
    y = F.linear(values.float(), weight.float()) * own * scale.T
    return (y if bias is None else y + bias.float()).to(x.dtype)


def multiplied(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
    """The same by the GPU's own float8 product, whose result is bfloat16."""
    values, own = quantised(x.reshape(-1, x.shape[-1]))
    y = torch._scaled_mm(values, weight.T, scale_a=own, scale_b=scale.T, out_dtype=torch.bfloat16)
    return (y if bias is None else y + bias).view(*x.shape[:-1], -1).to(x.dtype)


class Float8Linear(nn.Linear):
    """In the place of a linear layer: `weight` is e4m3, and there is no gradient."""

    def __init__(self, layer: nn.Linear) -> None:
        with torch.device("meta"):
            super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        weight, scale = quantised(layer.weight.data)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = layer.bias
        self.register_buffer("weight_scale", scale, persistent=False)

    def forward(self, x: Tensor) -> Tensor:  # (..., K) -> (..., N)
        here = x.device
        fast = here.type == "cuda" and torch.cuda.get_device_capability(here) >= HOPPER
        assert isinstance(self.weight_scale, Tensor)
        return (multiplied if fast else reference)(x, self.weight, self.weight_scale, self.bias)


def fits(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear and layer.in_features % MULTIPLE == 0 and layer.out_features % MULTIPLE == 0


def to_float8(unet: UNet) -> int:
    """Puts the linear layers of its transformers into float8, for good; returns how many there are now."""
    count = 0
    for transformer in [module for module in unet.modules() if isinstance(module, SpatialTransformer)]:
        for module in [*transformer.modules()]:
            for name, layer in module.named_children():
                if fits(layer):
                    setattr(module, name, Float8Linear(layer))  # type: ignore[arg-type]
                    count += 1
    return count


def is_float8(unet: nn.Module) -> bool:
    return any(isinstance(module, Float8Linear) for module in unet.modules())


class Loaded(Protocol):
    """A pipeline, as far as it is changed here."""

    model: StableDiffusion
    unet: UNet
    engine: Engine
    as_loaded: AsLoaded


def in_float8(pipe: Loaded) -> None:
    """Draws in float8 from now on.  Raises UsageError where a LoRA is on, or for a UNet without layers that fit.

    On a GPU it goes the plain way, module by module: the fused form knows no float8 yet.
    """
    stack = getattr(pipe, "stack", None)
    if stack is not None and stack.active:
        raise UsageError("fp8: expected no LoRA on the weights, found some: merge them into a file first")
    if not to_float8(pipe.unet):
        raise UsageError(f"fp8: expected linear layers whose sizes are multiples of {MULTIPLE}, found none")
    pipe.engine = Plain()
    pipe.as_loaded = AsLoaded((pipe.model.unet, *pipe.model.text_encoders, pipe.model.vae))
    if stack is not None:
        stack.layering = pipe.as_loaded.layering
