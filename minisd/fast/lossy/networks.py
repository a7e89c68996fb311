"""The UNet in float8 as a GPU likes it: fast/unet.py with the products of its transformers in float8, and who draws by it.

What differs from there.  A product in float8 cannot add to what is there: what it made is left to the next norm to add, as biases
are there and here.  What products make is bfloat16, and goes on so where nobody minds.  Weights of convolutions are dequantised
when they are used, and so are an upsampling's, whose phases would stay in half precision.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import UsageError
from ...files.model import StableDiffusion
from ...models import ops, unet
from .. import unet as fused
from ..engine import Engine
from ..unet import Known
from ..ways import AsLoaded
from .float8 import (
    MULTIPLE,
    Float8Linear,
    StoredConv,
    StoredLinear,
    dequantised,
    fits,
    gated,
    is_float8,
    normed,
    product,
    scale_of,
    to_float8,
    whole,
    widened,
)


class Dequantised:
    """A layer whose weight is in float8 as the fused form reads a layer: the weight is made when it is asked for."""

    def __init__(self, layer: StoredConv) -> None:
        self.layer, self.bias = layer, layer.bias

    @property
    def weight(self) -> Tensor:
        assert self.bias is not None
        return whole(self.layer, self.bias.dtype)


def readable(layer: nn.Module) -> Any:
    return Dequantised(layer) if isinstance(layer, StoredConv) else layer


class ResBlock(fused.ResBlock):
    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*map(readable, modules))


class Upsample(fused.Upsample):
    def __call__(self, x: Tensor, size: torch.Size | None = None) -> tuple[Tensor, Known]:  # (B, C, H, W) -> (B, C, *size)
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        return self.conv(F.interpolate(x, size=(height, width), mode="nearest")), None


class Stream(NamedTuple):
    """A residual stream (B, L, C), and what is still to be added to it, of the same shape."""

    total: Tensor
    addend: Tensor | None = None


class TransformerBlock(fused.TransformerBlock):
    def __init__(self, block: unet.BasicTransformerBlock) -> None:
        super().__init__(block)
        self.qkv_scale = joined_scales(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)

    def __call__(  # type: ignore[override]
        self, stream: Tensor | Stream, shifts: Sequence[Tensor | None], keys_values: Tensor
    ) -> Stream:
        """See there; what the last part made is still to be added to the stream."""
        block, (x, addend) = self.block, stream if isinstance(stream, Stream) else Stream(stream)
        q, k, v = product(normed(x, block.norm1, shifts[0], addend), self.qkv, self.qkv_scale).chunk(3, dim=-1)
        addend = unbiased(ops.attention(q, k, v, self.heads), block.attn1.to_out[0])
        q, (k, v) = block.attn2.to_q(normed(x, block.norm2, shifts[1], addend)), keys_values.chunk(2, dim=-1)
        addend = unbiased(ops.attention(q, k, v, self.heads), block.attn2.to_out[0])
        h = product(normed(x, block.norm3, shifts[2], addend), self.proj.weight, scale_of(self.proj), self.proj.bias)
        return Stream(x, unbiased(gated(h), block.ff.net[2]))


class Transformer(fused.Transformer):
    block = TransformerBlock

    def biases(self) -> Tensor:
        weight = widened(self.proj_out.weight, torch.float32).flatten(1) * scale_of(self.proj_out).flatten(1)
        return self.proj_out.bias.float() + weight @ self.owed[-1]

    def added(self, total: Tensor, h: Stream) -> Tensor:  # type: ignore[override]
        assert h.addend is not None  # of the last block
        return total.add_(unbiased(h.total.add_(h.addend), self.proj_out))


def joined_scales(*layers: nn.Module) -> Tensor:
    """Of layers with the same input, one above the other, (N, 1); each layer's own becomes a view of it, as of weights."""
    scale = torch.cat([scale_of(layer).flatten(1) for layer in layers])
    for layer, part in zip(layers, scale.split([len(scale_of(layer)) for layer in layers]), strict=True):
        layer.weight_scale = part.view(scale_of(layer).shape)
    return scale


def unbiased(x: Tensor, layer: nn.Module) -> Tensor:
    """What a linear layer makes of x without its bias: (..., K) -> (..., N)."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    return product(x, weight.flatten(1), scale_of(layer).flatten(1))


def layer(module: nn.Module) -> fused.Layer:
    return fused.layer(module, ResBlock, Transformer, Upsample)


class UNet(fused.FusedUNet):
    """Computes what a `unet.UNet` that is in float8 does, from its weights."""

    def __init__(self, network: unet.UNet) -> None:
        super().__init__(network, layer)
        self.shift_scale = joined_scales(*self.projections)
        attentions = [block.attn2 for block in network.modules() if isinstance(block, unet.BasicTransformerBlock)]
        self.kv_scale = joined_scales(*(layer for attention in attentions for layer in (attention.to_k, attention.to_v)))

    def projected(self, emb: Tensor) -> Tensor:
        return F.linear(F.silu(emb), dequantised(self.shift, self.shift_scale, emb.dtype)).float() + self.shift_bias

    def keys_values(self, context: Tensor) -> Tensor:
        return product(context, self.kv, self.kv_scale).to(context.dtype)


def form_of(network: unet.UNet) -> Callable[[unet.UNet], fused.FusedUNet] | None:
    """What makes the fused form of a UNet, in float8 or not; None where not all of the layers that this form joins are in it."""
    if not is_float8(network):
        return fused.FusedUNet
    blocks = [each for each in network.modules() if isinstance(each, unet.SpatialTransformer)]
    inside = [each for block in blocks for each in block.modules() if isinstance(each, nn.Linear | nn.Conv2d)]
    times = [each.emb_layers[1] for each in network.modules() if isinstance(each, unet.ResBlock)]
    fit = all(isinstance(each, Float8Linear) for each in inside) and all(isinstance(each, StoredLinear) for each in times)
    return UNet if fit else None


class Loaded(Protocol):
    """A pipeline, as far as it is changed here."""

    model: StableDiffusion
    unet: unet.UNet
    engine: Engine
    as_loaded: AsLoaded


def in_float8(pipe: Loaded) -> None:
    """Draws in float8 from now on.  Raises UsageError where a LoRA is on, or for a UNet without layers that fit."""
    stack = getattr(pipe, "stack", None)
    if stack is not None and stack.active:
        raise UsageError("fp8: expected no LoRA on the weights, found some: merge them into a file first")
    if not any(map(fits, pipe.unet.modules())):
        raise UsageError(f"fp8: expected linear layers whose sizes are multiples of {MULTIPLE}, found none")
    pipe.as_loaded.weights.clear()  # or none would be let go before the last is in float8
    to_float8(pipe.unet)
    on_gpu = next(pipe.unet.parameters()).device.type == "cuda"
    pipe.engine.reform(form_of(pipe.unet) if on_gpu else None)  # a CPU has none for it
    pipe.as_loaded = AsLoaded((pipe.model.unet, *pipe.model.text_encoders, pipe.model.vae))
    if stack is not None:
        stack.layering = pipe.as_loaded.layering
