"""The UNet a second time, as a GPU likes it: the same weights and numbers, fewer and larger operations.

unet.py and vae.py are the definition; this file says only what is done differently, and tests hold the two together.  What
depends on the timestep or on the prompt alone is computed outside of the step (`shifts`, `keys_values`).  Inside it

    q, k and v come from one matrix product;
    the time embedding and the bias of the convolution before it are added inside the GroupNorm that follows;
    a skip connection is never concatenated: the norm reads both parts, and the 1x1 shortcut is two products that add up;
    a residual sum is made by the LayerNorm that reads it.

Feature maps are channels-last.  Joined matrices take no memory of their own: the modules' weights become views of them, so the
modules work as before, and `state_dict` has the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ops, unet
from ..models.layers import GroupNorm, LayerNorm
from . import operations
from .choice import kernels, wants


def joined(*layers: nn.Linear) -> Tensor:
    """The weights of layers with the same input one above the other; each layer's own becomes a view of it.

    Each is let go as soon as it is copied: those of SDXL for the prompt are a tenth of its file.
    """
    first, sizes = layers[0].weight.detach().flatten(1), [len(layer.weight) for layer in layers]
    weight = first.new_empty(sum(sizes), first.shape[1])
    for layer, part in zip(layers, weight.split(sizes), strict=True):
        part.copy_(layer.weight.detach().flatten(1))
        layer.weight.data = part.view(layer.weight.shape)
    return weight


def rows(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, H*W, C), a view where x is channels-last."""
    b, c, height, width = x.shape
    return x.permute(0, 2, 3, 1).reshape(b, height * width, c)


def image(x: Tensor, like: Tensor) -> Tensor:
    """(B, H*W, C) -> (B, C, H, W), channels-last, as high and wide as another."""
    b, _, c = x.shape
    return x.view(b, *like.shape[-2:], c).permute(0, 3, 1, 2)


def normed(x: Tensor, norm: GroupNorm, shift: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
    return operations.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, norm.silu, shift, skip)


class ResBlock:
    """Of the UNet or of the VAE, which differ in what `shift` holds and in their names."""

    def __init__(
        self, norm1: GroupNorm, conv1: nn.Conv2d, norm2: GroupNorm, conv2: nn.Conv2d, shortcut: nn.Conv2d | nn.Identity
    ) -> None:
        self.norm1, self.conv1, self.norm2, self.conv2, self.shortcut = norm1, conv1, norm2, conv2, shortcut
        if isinstance(shortcut, nn.Conv2d):
            assert shortcut.bias is not None
            assert conv2.bias is not None
            self.bias = shortcut.bias + conv2.bias

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands."""
        if isinstance(self.shortcut, nn.Conv2d):
            self.bias.copy_(self.shortcut.bias + self.conv2.bias)  # type: ignore[operator]

    def __call__(self, x: Tensor, shift: Tensor, skip: Tensor | None = None) -> Tensor:
        """x (B, C, H, W), skip (B, C2, H, W), shift (B, C_out): the bias of conv1 and what is added to it -> (B, C_out, H, W)."""
        h = normed(x, self.norm1, skip=skip)
        h = F.conv2d(h, self.conv1.weight, padding=1)
        h = normed(h, self.norm2, shift)
        h = F.conv2d(h, self.conv2.weight, padding=1)
        if isinstance(self.shortcut, nn.Identity):
            assert self.conv2.bias is not None
            return operations.add_bias(h, self.conv2.bias, x)
        weight = self.shortcut.weight.flatten(1)
        straight = F.linear(rows(x), weight[:, : x.shape[1]], self.bias)
        if skip is not None:
            straight.view(-1, len(weight)).addmm_(rows(skip).flatten(0, 1), weight[:, x.shape[1] :].T)
        return h.add_(image(straight, h))


class Upsample:
    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.phases: Tensor | None = None

    def refresh(self) -> None:
        if self.phases is not None:
            self.phases.copy_(kernels().phase_weights(self.conv.weight))

    def __call__(self, x: Tensor, size: torch.Size | None = None) -> Tensor:  # (B, C, H, W) -> (B, C, *size)
        assert self.conv.bias is not None
        if size is not None and (size[0], size[1]) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=size, mode="nearest"))
        if self.phases is None and wants("upsample_conv", x.device):
            self.phases = kernels().phase_weights(self.conv.weight)
        return operations.upsample_conv(x, self.conv.weight, self.conv.bias, self.phases)


class TransformerBlock:
    def __init__(self, block: unet.BasicTransformerBlock) -> None:
        self.block, self.heads = block, block.attn1.heads
        self.qkv = joined(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.proj: nn.Linear = block.ff.net[0].proj  # type: ignore[assignment, union-attr]

    def __call__(self, x: Tensor, change: Tensor | None, keys_values: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, L, C), and what is still to be added to it, or nothing; keys_values (B, S, 2*C) -> the same two."""
        block = self.block
        x, h = add_norm(x, change, block.norm1)
        q, k, v = F.linear(h, self.qkv).chunk(3, dim=-1)
        x, h = add_norm(x, block.attn1.to_out(ops.attention(q, k, v, self.heads)), block.norm2)
        k, v = keys_values.chunk(2, dim=-1)
        x, h = add_norm(x, block.attn2.to_out(ops.attention(block.attn2.to_q(h), k, v, self.heads)), block.norm3)
        return x, block.ff.net[2](operations.linear_geglu(h, self.proj.weight, self.proj.bias))


def add_norm(x: Tensor, change: Tensor | None, norm: LayerNorm) -> tuple[Tensor, Tensor]:
    """x + change, and LayerNorm of it."""
    if change is None:
        return x, norm(x)
    return operations.add_layer_norm(change, x, norm.weight, norm.bias, norm.eps)


class Transformer:
    def __init__(self, transformer: unet.SpatialTransformer) -> None:
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.blocks = [TransformerBlock(block) for block in transformer.transformer_blocks]  # type: ignore[arg-type]

    def __call__(self, x: Tensor, keys_values: Iterator[Tensor]) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        h, change = self.proj_in(rows(normed(x, self.norm))), None
        for block in self.blocks:
            h, change = block(h, change, next(keys_values))
        h = self.proj_out(h if change is None else change.add_(h))
        return image(h, x).add_(x)


Layer = ResBlock | Transformer | Upsample | nn.Module


def layer(module: nn.Module) -> Layer:
    if isinstance(module, unet.ResBlock):
        norms_and_convs = (module.in_layers[0], module.in_layers[2], module.out_layers[0], module.out_layers[3])
        return ResBlock(*norms_and_convs, module.skip_connection)  # type: ignore[arg-type]
    if isinstance(module, unet.SpatialTransformer):
        return Transformer(module)
    return Upsample(module.conv) if isinstance(module, unet.Upsample) else module


Make = Callable[[nn.Module], Layer]


def layers_of(block: nn.Module, make: Make) -> list[Layer]:
    return [make(part) for part in block.children()]


class FusedTrunk:
    """Computes what `unet.Trunk` does, from its weights.  make: the fused form of one of its layers."""

    def __init__(self, network: unet.Trunk, make: Make = layer) -> None:
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.down = [layers_of(block, make) for block in (*network.input_blocks, network.middle_block)]
        self.resblocks = [module for module in network.modules() if isinstance(module, unet.ResBlock)]
        self.projections: list[nn.Linear] = [block.emb_layers[1] for block in self.resblocks]  # type: ignore[misc]
        self.shift = joined(*self.projections)
        self.shift_sizes = [len(layer.weight) for layer in self.projections]
        self.shift_bias = self.biases()
        blocks = [module for module in network.modules() if isinstance(module, unet.BasicTransformerBlock)]
        self.keys_values_sizes = [2 * len(block.attn2.to_k.weight) for block in blocks]
        self.kv = joined(*(layer for block in blocks for layer in (block.attn2.to_k, block.attn2.to_v)))

    @property
    def layers(self) -> list[Layer]:
        return [part for block in self.down for part in block]

    def biases(self) -> Tensor:
        """Of every ResBlock's first convolution and of its projection of the time embedding, summed."""
        pairs = zip(self.projections, self.resblocks, strict=True)
        return torch.cat([layer.bias.float() + block.in_layers[2].bias for layer, block in pairs])  # type: ignore[operator]

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands, so that recordings stay."""
        self.shift_bias.copy_(self.biases())
        for layer in self.layers:
            if isinstance(layer, ResBlock | Upsample):
                layer.refresh()

    def shifts(self, t: Tensor, y: Tensor | None) -> Tensor:
        """What each ResBlock adds in the middle, bias included, side by side, for every timestep: t (N,), y (B, A) ->
        (N, B, sum of channels), float32; without y it is the same for each picture, (N, 1, sum)."""
        network = self.network
        emb = network.time_embed(unet.timestep_embedding(t, network.channels).to(self.shift.dtype))[:, None]  # (N, 1, E)
        if network.label_emb is not None:
            emb = emb + network.label_emb(y)
        return F.linear(F.silu(emb), self.shift).float() + self.shift_bias

    def keys_values(self, context: Tensor) -> Tensor:
        """What all cross-attentions make of the prompt, side by side: (B, S, D) -> (B, S, sum of 2*C)."""
        return F.linear(context, self.kv)


class FusedUNet(FusedTrunk):
    """Computes what `unet.UNet` does, from its weights."""

    def __init__(self, network: unet.UNet, make: Make = layer) -> None:
        super().__init__(network, make)
        self.up = [layers_of(block, make) for block in network.output_blocks]
        self.out: Callable[[Tensor], Tensor] = network.out

    @property
    def layers(self) -> list[Layer]:
        return [part for block in (*self.down, *self.up) for part in block]

    def __call__(self, x: Tensor, shift: Tensor, keys_values: Tensor) -> Tensor:
        """x (B, C, H, W), shift (B or 1, sum of channels), a row of `shifts`, and `keys_values` -> (B, C', H, W)."""
        shifts = iter(shift.expand(len(x), -1).split(self.shift_sizes, dim=1))
        prompt = iter(keys_values.split(self.keys_values_sizes, dim=2))
        skips: list[Tensor] = []
        for block in self.down:
            x = walk(block, x, shifts, prompt)
            skips.append(x)
        skips.pop()  # what the middle made goes on as x
        for block in self.up:
            skip = skips.pop()
            x = walk(block, x, shifts, prompt, skip, skips[-1].shape[-2:] if skips else None)
        return self.out(x)


def walk(
    block: Sequence[Layer], x: Tensor, shifts: Iterator[Tensor], prompt: Iterator[Tensor], skip: Tensor | None = None,
    size: torch.Size | None = None,
) -> Tensor:  # fmt: skip
    for part in block:
        if isinstance(part, ResBlock):
            x, skip = part(x, next(shifts), skip), None
        elif isinstance(part, Transformer):
            x = part(x, prompt)
        elif isinstance(part, Upsample):
            x = part(x, size)
        else:
            x = part(x)
    return x
