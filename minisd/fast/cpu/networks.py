"""The layers of the UNet and of the VAE's decoder as a CPU likes them: the same weights and numbers.

They take the places of those in fast/unet.py, whose networks put them together.  What differs: sums are made where the product
before them is written, the time embedding is the bias of a convolution, and a feed-forward goes through the cache in pieces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...models import ops, unet
from ...models.layers import GroupNorm
from .. import decoder
from .. import unet as fused
from ..unet import Known, image, rows
from .attention import attention
from .operations import ROWS, conv3x3, geglu, held, linear, ordered, phase_weights, upsample_conv

SMALL, NARROW = 1024, 1920  # pixels and channels of a map: with fewer and as many its norm goes through float32


def normed(x: Tensor, norm: GroupNorm) -> Tensor:
    """GroupNorm, and SiLU where there is one, of a map whose channels are neighbours in memory; so is the result.

    Of small maps through float32: PyTorch's kernel for them goes number by number in bfloat16. Microseconds of one core for a
    batch of two, with SiLU (AMD EPYC, Zen 5): 390 and 71 (64 channels, 16x16), 660 and 356 (1280, 16x16), 169 and 98 (1280, 8x8);
    but 642 and 709 (2560, 16x16).
    """
    x = x.contiguous(memory_format=torch.channels_last)
    if x.dtype == torch.float32 or x[0, 0].numel() >= SMALL or x.shape[1] > NARROW:
        return norm(x)
    wide = F.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps)
    return (F.silu(wide, inplace=True) if norm.silu else wide).to(x.dtype)


def last_layers(out: nn.Module) -> Callable[[Tensor], Tensor]:
    """The UNet's last norm and convolution in float32: a bfloat16 answer would cost up to 1.4 dB of the picture."""

    def predict(x: Tensor) -> Tensor:
        norm, conv = out[0], out[2]  # type: ignore[index]
        h = ops.group_norm(x.float(), norm.num_groups, norm.weight.float(), norm.bias.float(), norm.eps, norm.silu)
        return F.conv2d(h, conv.weight.float(), conv.bias.float(), padding=1)

    return predict


class ResBlock(fused.ResBlock):
    """Of the UNet or of the VAE."""

    def __init__(self, *modules: Any) -> None:
        super().__init__(*modules)
        self.weight1, self.weight2 = (held(conv.weight, conv) for conv in (self.conv1, self.conv2))
        if isinstance(self.shortcut, nn.Conv2d):
            self.straight = held(self.shortcut.weight.detach().flatten(1), self.shortcut)

    def precede(self, transformer: fused.Transformer) -> None:
        """Nothing: a product here adds its own bias."""

    def __call__(
        self, x: Tensor, shift: Tensor, skip: Tensor | None = None, known: Known = None
    ) -> tuple[Tensor, Known]:  # fmt: skip
        """x (B, C, H, W), skip (B, C2, H, W), shift (B, C_out): the bias of conv1 and what is added to it -> (B, C_out, H, W)."""
        x = x if skip is None else torch.cat([x, repeated(skip, len(x))], dim=1)
        h = normed(x, self.norm1)
        if len(shift) == 1 or shift.stride(0) == 0:  # the same for each picture
            h = conv3x3(h, self.weight1, shift[0].to(x.dtype))
        else:
            h = conv3x3(h, self.weight1).add_(shift[:, :, None, None].to(x.dtype))
        straight = x
        if isinstance(self.shortcut, nn.Conv2d):
            straight = image(linear(rows(x), self.straight, self.shortcut.bias), x)
        return conv3x3(normed(h, self.norm2), self.weight2, self.conv2.bias, add=straight), None


class Upsample(fused.Upsample):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__(conv)
        self.summed = phase_weights(conv.weight.detach())

    def refresh(self) -> None:
        self.summed.copy_(phase_weights(self.conv.weight))

    def __call__(self, x: Tensor, size: torch.Size | None = None) -> tuple[Tensor, Known]:  # (B, C, H, W) -> (B, C, *size)
        if size is not None and (size[0], size[1]) != (2 * x.shape[2], 2 * x.shape[3]):
            return conv3x3(F.interpolate(x, size=tuple(size), mode="nearest"), self.conv.weight, self.conv.bias), None
        return upsample_conv(x, self.summed, self.conv.bias), None


class Downsample:
    def __init__(self, conv: nn.Conv2d) -> None:
        self.weight, self.bias = held(conv.weight, conv), conv.bias

    def __call__(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))
        return conv3x3(x, self.weight, self.bias, stride=2)


class TransformerBlock(fused.TransformerBlock):
    def __init__(self, block: unet.BasicTransformerBlock) -> None:
        super().__init__(block)
        first, second = block.attn1, block.attn2
        self.weights = held(self.qkv, first.to_q, first.to_k, first.to_v)
        del self.qkv  # or somebody would hold it plain
        self.to_out1, self.to_q, self.to_out2, self.last = (
            held(layer.weight, layer)  # type: ignore[arg-type]
            for layer in (first.to_out[0], second.to_q, second.to_out[0], block.ff.net[2])
        )
        self.values_gates = held(self.proj.weight, self.proj, parts=2)

    def forward(self, x: Tensor, keys_values: Tensor) -> Tensor:
        """x (B, L, C), or those of them that differ before they see the prompt, keys_values (B, S, 2*C) -> (B, L, C)."""
        block = self.block
        q, k, v = linear(block.norm1(x), self.weights).chunk(3, dim=-1)
        x = linear(attention(q, k, v, self.heads), self.to_out1, bias_of(block.attn1), add=x)
        x = repeated(x, len(keys_values))
        k, v = keys_values.chunk(2, dim=-1)
        q = linear(block.norm2(x), self.to_q)
        x = linear(attention(q, k, v, self.heads), self.to_out2, bias_of(block.attn2), add=x)
        return self.feed_forward(x)

    def feed_forward(self, x: Tensor) -> Tensor:
        """x (B, L, C) -> same, with its feed-forward added."""
        norm, last = self.block.norm3, self.block.ff.net[2]
        stream = x.flatten(0, 1)
        values, gates = ordered(self.values_gates, len(stream), parts=2)
        (out_weight,) = ordered(self.last, len(stream))
        pieces = stream.split(ROWS)
        inner = (geglu(norm(piece), values, gates, self.proj.bias) for piece in pieces)
        out = [linear(h, out_weight, last.bias, piece) for h, piece in zip(inner, pieces, strict=True)]  # type: ignore[arg-type]
        return (out[0] if len(out) == 1 else torch.cat(out)).view(x.shape)


def bias_of(attention: unet.CrossAttention) -> Tensor:
    return attention.to_out[0].bias  # type: ignore[return-value]


class Transformer(fused.Transformer):
    blocks: list[TransformerBlock]  # type: ignore[assignment]

    def __init__(self, transformer: unet.SpatialTransformer) -> None:
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.weight_in, self.weight_out = (
            held(layer.weight.detach().flatten(1), layer) for layer in (self.proj_in, self.proj_out)
        )
        self.blocks = [TransformerBlock(block) for block in transformer.transformer_blocks]  # type: ignore[arg-type]

    def refresh(self) -> None:
        """Nothing: all is read from the modules."""

    def __call__(self, x: Tensor, keys_values: Iterator[Tensor], known: Known = None) -> Tensor:  # (B, C, H, W) -> same
        h = linear(rows(normed(x, self.norm)), self.weight_in, self.proj_in.bias)
        for block in self.blocks:
            h = block.forward(h, next(keys_values))
        return image(linear(h, self.weight_out, self.proj_out.bias, add=repeated(rows(x), len(h))), x)


def repeated(x: Tensor, count: int) -> Tensor:
    """Over and over, until there are so many: (B, …) -> (count, …), in the same order in memory."""
    return x if len(x) == count else torch.cat([x] * (count // len(x)))


def unet_layer(module: nn.Module) -> fused.Layer:
    if isinstance(module, unet.Downsample):
        return Downsample(module.op)  # type: ignore[return-value]
    return fused.layer(module, ResBlock, Transformer, Upsample)


class UNet(fused.FusedUNet):
    """With guidance a network is asked about the same latents with several prompts, and computes the same for each until it
    has read one.  Where nothing else differs that is done once: of SD 1.5 all before the first cross-attention, 3 % of a step."""

    def __call__(self, x: Tensor, shift: Tensor, keys_values: Tensor) -> Tensor:
        return super().__call__(x[: period(x)] if len(shift) == 1 else x, shift, keys_values)


def period(x: Tensor) -> int:
    """After how many pictures a batch repeats itself."""
    count = len(x)
    return next((n for n in range(1, count) if count % n == 0 and torch.equal(x[n:], x[:-n])), count)


class Attention(decoder.Attention):
    """Of the VAE."""

    def __call__(self, x: Tensor, known: Known = None) -> tuple[Tensor, Known]:
        q, k, v = linear(rows(normed(x, self.block.norm)), self.qkv, self.bias).chunk(3, dim=-1)
        out = self.block.proj_out
        return image(linear(attention(q, k, v, heads=1), out.weight.flatten(1), out.bias, add=rows(x)), x), None


def decoder_layer(module: nn.Module) -> fused.ResBlock | decoder.Attention | fused.Upsample:
    return decoder.vae_layer(module, ResBlock, Attention, Upsample)
