"""The VAE's decoder a second time, as a GPU likes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ops, vae
from ..models.layers import GroupNorm
from . import operations
from .operations import Following
from .unet import Known, NarrowConv, ResBlock, Upsample, image, joined, normed, rows


class Attention:
    """vae.AttnBlock with one product for q, k and v."""

    def __init__(self, block: vae.AttnBlock) -> None:
        self.block, self.qkv = block, joined(block.q, block.k, block.v)
        self.after: Following | None = None
        self.bias, self.bias_out = torch.cat([block.q.bias, block.k.bias, block.v.bias]), block.proj_out.bias.float()

    def refresh(self) -> None:
        self.bias.copy_(torch.cat([self.block.q.bias, self.block.k.bias, self.block.v.bias]))
        self.bias_out.copy_(self.block.proj_out.bias)

    def __call__(self, x: Tensor, known: Known) -> tuple[Tensor, Known]:
        q, k, v = F.linear(rows(normed(x, self.block.norm, known=known)), self.qkv, self.bias).chunk(3, dim=-1)
        h = F.linear(ops.attention(q, k, v, heads=1), self.block.proj_out.weight.flatten(1))
        return operations.add_bias(image(h, x), self.bias_out, x, self.after)


def first_norm(part: ResBlock | Attention | Upsample) -> GroupNorm | None:
    """The norm that a part begins with, if it does."""
    return part.norm1 if isinstance(part, ResBlock) else part.block.norm if isinstance(part, Attention) else None


def vae_layer(
    module: nn.Module,
    res_block: type[ResBlock] = ResBlock,
    attention: type[Attention] = Attention,
    upsample: type[Upsample] = Upsample,
) -> ResBlock | Attention | Upsample:
    """The fused form of a part of a decoder, in the classes of a GPU or in others."""
    if isinstance(module, vae.ResnetBlock):
        return res_block(module.norm1, module.conv1, module.norm2, module.conv2, module.nin_shortcut)
    if isinstance(module, vae.AttnBlock):
        return attention(module)
    assert isinstance(module, vae.Upsample)
    return upsample(module.conv)


Make = Callable[[nn.Module], ResBlock | Attention | Upsample]


class FusedDecoder:
    """Computes what `vae.AutoencoderKL.decode` does, from its weights.  make: the fused form of one of its layers."""

    def __init__(self, network: vae.AutoencoderKL, make: Make = vae_layer) -> None:
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decoder = network.decoder
        steps = [step for level in reversed(decoder.up) for step in level.children()]
        parts = [part for step in steps for part in (step if isinstance(step, nn.ModuleList) else [step])]
        ends = (network.post_quant_conv, decoder.conv_in, decoder.conv_out)
        self.post_quant_conv, self.conv_in, self.conv_out = (NarrowConv(conv) for conv in ends)
        self.modules = (decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2, *parts)  # in the order that they run in
        self.parts = [make(part) for part in self.modules]
        self.shifts = self.biases()
        norms = [first_norm(part) for part in self.parts[1:]] + [decoder.norm_out]
        for part, norm in zip(self.parts, norms, strict=True):
            part.after = Following(norm.num_groups) if norm else None

    def biases(self) -> list[Tensor]:
        """Of the first convolution of every block, in float32: what the norm after it adds."""
        blocks = (part for part in self.parts if isinstance(part, ResBlock))
        return [block.conv1.bias.float() for block in blocks]  # type: ignore[union-attr]

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands."""
        for part in (self.post_quant_conv, self.conv_in, *self.parts, self.conv_out):
            part.refresh()
        for shift, new in zip(self.shifts, self.biases(), strict=True):
            shift.copy_(new)

    def __call__(self, latents: Tensor) -> Tensor:  # (B, C, H/f, W/f) -> (B, 3, H, W)
        x = self.conv_in(self.post_quant_conv(latents))
        shifts, known = iter(self.shifts), None
        for part in self.parts:
            if isinstance(part, ResBlock):
                x, known = part(x, next(shifts).expand(len(x), -1), known=known)
            elif isinstance(part, Attention):
                x, known = part(x, known)
            else:
                x, known = part(x)
        return self.conv_out(normed(x, self.network.decoder.norm_out, known=known))
