"""The UNet a second time, as a GPU likes it: the same weights and numbers, fewer and larger operations.

unet.py and vae.py are the definition; this file says only what is done differently, and tests hold the two together.  What
depends on the timestep or on the prompt alone is computed outside of the step (`shifts`, `keys_values`).  Inside it

    q, k and v come from one matrix product;
    the time embedding and the bias of the convolution before it are added inside the GroupNorm that follows;
    a skip connection is never concatenated: the norm reads both parts, and the 1x1 shortcut is two products that add up;
    a residual sum is made by the matrix product whose result is added, and its bias is left to the norms that follow;
    the kernel that writes a map also makes the statistics for the norm that reads it;
    convolutions from or to a few channels have zeros up to a multiple of 8.

Feature maps are channels-last.  Joined matrices take no memory of their own: the modules' weights become views of them, so the
modules work as before, and `state_dict` has the same keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ops, unet
from ..models.layers import GroupNorm, LayerNorm
from . import operations
from .choice import kernels, wants
from .operations import Following
from .ways import lasting

Known = Any  # the statistics of a map, of the kernel that wrote it for the norm that reads it; None: not known


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


def normed(
    x: Tensor, norm: GroupNorm, shift: Tensor | None = None, skip: Tensor | None = None, known: Known = None
) -> Tensor:  # fmt: skip
    return operations.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, norm.silu, shift, skip, known)


class ResBlock:
    """Of the UNet or of the VAE, which differ in what `shift` holds and in their names."""

    def __init__(
        self, norm1: GroupNorm, conv1: nn.Conv2d, norm2: GroupNorm, conv2: nn.Conv2d, shortcut: nn.Conv2d | nn.Identity
    ) -> None:
        self.norm1, self.conv1, self.norm2, self.conv2, self.shortcut = norm1, conv1, norm2, conv2, shortcut
        self.following: Transformer | None = None  # whose bias is added in this block: see there
        self.after: Following | None = None
        self.bias = self.biases()

    def biases(self) -> Tensor:
        """Of all that is added to the result, in float32."""
        added = [self.conv2.bias]
        added += [self.shortcut.bias] if not isinstance(self.shortcut, nn.Identity) else []
        added += [self.following.bias] if self.following else []
        return torch.stack([bias.float() for bias in added if bias is not None]).sum(dim=0)

    def precede(self, transformer: Transformer) -> None:
        """Its bias is added in this block: see there."""
        self.following, transformer.lent = transformer, True
        self.after = Following(transformer.norm.num_groups, transformer.shift)
        self.bias = self.biases()

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands."""
        if self.following is not None:
            self.following.refresh()
        self.bias.copy_(self.biases())

    def __call__(
        self, x: Tensor, shift: Tensor, skip: Tensor | None = None, known: Known = None
    ) -> tuple[Tensor, Known]:  # fmt: skip
        """x (B, C, H, W), skip (B, C2, H, W), shift (B, C_out): the bias of conv1 and what is added to it -> (B, C_out, H, W),
        and what is known of it for `after`, the norm that reads it."""
        h = normed(x, self.norm1, skip=skip, known=known)
        h = F.conv2d(h, self.conv1.weight, padding=1)
        h = normed(h, self.norm2, shift)
        h = F.conv2d(h, self.conv2.weight, padding=1)
        if isinstance(self.shortcut, nn.Identity):
            return operations.add_bias(h, self.bias, x, self.after)
        weight = self.shortcut.weight.flatten(1)
        straight = F.linear(rows(x), weight[:, : x.shape[1]])
        if skip is not None:
            straight = operations.add_linear(straight, rows(skip), weight[:, x.shape[1] :])
        return operations.add_bias(h, self.bias, image(straight, h), self.after)


class Upsample:
    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.phases: Tensor | None = None
        self.after: Following | None = None

    def refresh(self) -> None:
        if self.phases is not None:
            self.phases.copy_(kernels().phase_weights(self.conv.weight))

    def __call__(self, x: Tensor, size: torch.Size | None = None) -> tuple[Tensor, Known]:  # (B, C, H, W) -> (B, C, *size)
        assert self.conv.bias is not None
        if size is not None and (size[0], size[1]) != (2 * x.shape[2], 2 * x.shape[3]):
            return self.conv(F.interpolate(x, size=size, mode="nearest")), None
        if self.phases is None and wants("upsample_conv", x.device):
            with lasting():
                self.phases = kernels().phase_weights(self.conv.weight)
        return operations.upsample_conv(x, self.conv.weight, self.conv.bias, self.phases, self.after)


class NarrowConv:
    """A convolution from or to a few channels.

    cuDNN's kernels for the matrix units of a GPU want multiples of 8.  There (`padded_conv`) the weights, once, and what is
    convolved are padded by zeros, and of the result the channels that count are a view.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        self.conv = conv
        self.padded: tuple[Tensor, Tensor] | None = None

    def channels(self, device: torch.device) -> int:
        """How many of them it would like to be given."""
        narrow = self.conv.in_channels
        return -(-narrow // 8) * 8 if wants("padded_conv", device) else narrow

    def refresh(self) -> None:
        if self.padded is not None:
            for held, new in zip(self.padded, self.wide(), strict=True):
                held.copy_(new)

    def wide(self) -> tuple[Tensor, Tensor]:
        weight, bias = self.conv.weight, self.conv.bias
        assert bias is not None
        outputs, inputs = (-size % 8 for size in weight.shape[:2])
        weight = F.pad(weight, (0, 0, 0, 0, 0, inputs, 0, outputs))
        return weight.contiguous(memory_format=torch.channels_last), F.pad(bias, (0, outputs))

    def __call__(self, x: Tensor) -> Tensor:
        """x (B, C, H, W), or with zeros beyond C as `channels` says -> (B, C', H, W)."""
        if not wants("padded_conv", x.device):
            return self.conv(x)
        if self.padded is None:
            with lasting():
                self.padded = self.wide()
        weight, bias = self.padded
        if x.shape[1] < weight.shape[1]:
            x = F.pad(x, (0, 0, 0, 0, 0, weight.shape[1] - x.shape[1]))
        return F.conv2d(x, weight, bias, padding=self.conv.padding)[:, : self.conv.out_channels]


class TransformerBlock:
    def __init__(self, block: unet.BasicTransformerBlock) -> None:
        self.block, self.heads = block, block.attn1.heads
        self.qkv = joined(block.attn1.to_q, block.attn1.to_k, block.attn1.to_v)
        self.proj: nn.Linear = block.ff.net[0].proj  # type: ignore[assignment, union-attr]

    def biases(self) -> list[Tensor]:
        """Of what its three parts add to the stream."""
        layers = (self.block.attn1.to_out[0], self.block.attn2.to_out[0], self.block.ff.net[2])
        return [layer.bias.float() for layer in layers]  # type: ignore[operator, misc]

    def __call__(self, x: Tensor, shifts: Sequence[Tensor | None], keys_values: Tensor) -> Tensor:
        """The stream x (B, L, C), which is written over; shifts: what each of the norms has still to add to it, (C,);
        keys_values (B, S, 2*C) -> the stream, without the biases of its parts."""
        block = self.block
        q, k, v = F.linear(layer_normed(x, block.norm1, shifts[0]), self.qkv).chunk(3, dim=-1)
        x = operations.add_linear(x, ops.attention(q, k, v, self.heads), weight_of(block.attn1.to_out))
        q, (k, v) = block.attn2.to_q(layer_normed(x, block.norm2, shifts[1])), keys_values.chunk(2, dim=-1)
        x = operations.add_linear(x, ops.attention(q, k, v, self.heads), weight_of(block.attn2.to_out))
        h = operations.linear_geglu(layer_normed(x, block.norm3, shifts[2]), self.proj.weight, self.proj.bias)
        return operations.add_linear(x, h, block.ff.net[2].weight)  # type: ignore[arg-type]


def weight_of(to_out: nn.Module) -> Tensor:
    return to_out[0].weight  # type: ignore[index]


def layer_normed(x: Tensor, norm: LayerNorm, shift: Tensor | None) -> Tensor:
    return operations.layer_norm(x, shift, norm.weight, norm.bias, norm.eps)


class Transformer:
    """What it adds to its input comes with a bias, and with what its layer out of the stream makes of the biases in there.

    The product that adds it cannot add them, too.  So the ResBlock before adds them to its result (`lent`), and the norm here,
    which must not see them, takes them off again.
    """

    block: type[TransformerBlock] = TransformerBlock

    def __init__(self, transformer: unet.SpatialTransformer) -> None:
        self.norm, self.proj_in, self.proj_out = transformer.norm, transformer.proj_in, transformer.proj_out
        self.blocks = [self.block(block) for block in transformer.transformer_blocks]  # type: ignore[arg-type]
        self.lent = False
        self.owed = self.collected()
        self.bias = self.biases()
        self.shift = -self.bias

    def collected(self) -> Tensor:
        """The biases that the stream lacks after each part of each block, (3 * blocks, C), float32."""
        return torch.stack([bias for block in self.blocks for bias in block.biases()]).cumsum(dim=0)

    def biases(self) -> Tensor:
        return self.proj_out.bias.float() + self.proj_out.weight.flatten(1).float() @ self.owed[-1]

    def refresh(self) -> None:
        self.owed.copy_(self.collected())
        self.bias.copy_(self.biases())
        self.shift.copy_(-self.bias)

    def __call__(self, x: Tensor, keys_values: Iterator[Tensor], known: Known = None) -> Tensor:
        """x (B, C, H, W), which is written over, and what is known of it -> (B, C, H, W)."""
        x = x if self.lent else x + self.bias[:, None, None].to(x.dtype)
        h = self.proj_in(rows(normed(x, self.norm, self.shift.expand(len(x), -1), known=known)))
        shifts = [None, *self.owed]
        for i, block in enumerate(self.blocks):
            h = block(h, shifts[3 * i :], next(keys_values))
        return image(self.added(rows(x), h), x)

    def added(self, total: Tensor, h: Tensor) -> Tensor:
        """total (B, H*W, C), which is written over, and what the layer out of the stream makes of h (B, H*W, C')."""
        return operations.add_linear(total, h, self.proj_out.weight.flatten(1))


Layer = ResBlock | Transformer | Upsample | NarrowConv | nn.Module


def layer(
    module: nn.Module,
    res_block: type[ResBlock] = ResBlock,
    transformer: type[Transformer] = Transformer,
    upsample: type[Upsample] = Upsample,
) -> Layer:
    """The fused form of a part of a UNet, in the classes of a GPU or in others."""
    if isinstance(module, unet.ResBlock):
        norms_and_convs = (module.in_layers[0], module.in_layers[2], module.out_layers[0], module.out_layers[3])
        return res_block(*norms_and_convs, module.skip_connection)  # type: ignore[arg-type]
    if isinstance(module, unet.SpatialTransformer):
        return transformer(module)
    if isinstance(module, nn.Conv2d):
        return NarrowConv(module)
    return upsample(module.conv) if isinstance(module, unet.Upsample) else module


Make = Callable[[nn.Module], Layer]


def layers_of(block: nn.Module, make: Make) -> list[Layer]:
    layers = [make(part) for part in block.children()]
    for before, after in pairwise(layers):
        if isinstance(before, ResBlock) and isinstance(after, Transformer):
            before.precede(after)
    return layers


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

    @property
    def conv_in(self) -> NarrowConv:
        return self.down[0][0]  # type: ignore[return-value]

    def biases(self) -> Tensor:
        """Of every ResBlock's first convolution and of its projection of the time embedding, summed."""
        pairs = zip(self.projections, self.resblocks, strict=True)
        return torch.cat([layer.bias.float() + block.in_layers[2].bias for layer, block in pairs])  # type: ignore[operator]

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands, so that recordings stay."""
        self.shift_bias.copy_(self.biases())
        for layer in self.layers:
            if isinstance(layer, ResBlock | Transformer | Upsample | NarrowConv):
                layer.refresh()

    def shifts(self, t: Tensor, y: Tensor | None) -> Tensor:
        """What each ResBlock adds in the middle, bias included, side by side, for every timestep: t (N,), y (B, A) ->
        (N, B, sum of channels), float32; without y it is the same for each picture, (N, 1, sum)."""
        network = self.network
        dtype = self.conv_in.conv.weight.dtype
        emb = network.time_embed(unet.timestep_embedding(t, network.channels).to(dtype))[:, None]  # (N, 1, E)
        if network.label_emb is not None:
            emb = emb + network.label_emb(y)
        return self.projected(emb)

    def projected(self, emb: Tensor) -> Tensor:
        """The same of the time embedding: (…, E) -> (…, sum of channels), float32."""
        return F.linear(F.silu(emb), self.shift).float() + self.shift_bias

    def keys_values(self, context: Tensor) -> Tensor:
        """What all cross-attentions make of the prompt, side by side: (B, S, D) -> (B, S, sum of 2*C)."""
        return F.linear(context, self.kv)


class FusedUNet(FusedTrunk):
    """Computes what `unet.UNet` does, from its weights."""

    def __init__(self, network: unet.UNet, make: Make = layer) -> None:
        super().__init__(network, make)
        self.up = [layers_of(block, make) for block in network.output_blocks]
        self.norm_out: GroupNorm = network.out[0]  # type: ignore[assignment]
        self.conv_out = NarrowConv(network.out[2])  # type: ignore[arg-type]
        self.out: Callable[[Tensor], Tensor] | None = None  # what computes the last norm and convolution in another way

    @property
    def layers(self) -> list[Layer]:
        return [*(part for block in (*self.down, *self.up) for part in block), self.conv_out]

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
        return self.last(x)

    def last(self, x: Tensor) -> Tensor:
        """The last norm and convolution: (B, C, H, W) -> (B, C', H, W)."""
        return self.out(x) if self.out else self.conv_out(normed(x, self.norm_out))


def walk(
    block: Sequence[Layer], x: Tensor, shifts: Iterator[Tensor], prompt: Iterator[Tensor], skip: Tensor | None = None,
    size: torch.Size | None = None,
) -> Tensor:  # fmt: skip
    known: Known = None
    for part in block:
        if isinstance(part, ResBlock):
            (x, known), skip = part(x, next(shifts), skip), None
        elif isinstance(part, Transformer):
            x = part(x, prompt, known)
        elif isinstance(part, Upsample):
            x, _ = part(x, size)
        else:
            x = part(x)
    return x
