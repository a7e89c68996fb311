"""The VAE's decoder a second time, as a GPU likes it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..models import ops, vae
from .unet import ResBlock, Upsample, image, joined, normed, rows


class Attention:
    """vae.AttnBlock with one product for q, k and v."""

    def __init__(self, block: vae.AttnBlock) -> None:
        self.block, self.qkv = block, joined(block.q, block.k, block.v)
        self.bias = torch.cat([block.q.bias, block.k.bias, block.v.bias])

    def refresh(self) -> None:
        self.bias.copy_(torch.cat([self.block.q.bias, self.block.k.bias, self.block.v.bias]))

    def __call__(self, x: Tensor) -> Tensor:
        q, k, v = F.linear(rows(normed(x, self.block.norm)), self.qkv, self.bias).chunk(3, dim=-1)
        return image(self.block.proj_out(ops.attention(q, k, v, heads=1)), x).add_(x)


def vae_layer(module: nn.Module) -> ResBlock | Attention | Upsample:
    if isinstance(module, vae.ResnetBlock):
        return ResBlock(module.norm1, module.conv1, module.norm2, module.conv2, module.nin_shortcut)
    if isinstance(module, vae.AttnBlock):
        return Attention(module)
    assert isinstance(module, vae.Upsample)
    return Upsample(module.conv)


Make = Callable[[nn.Module], ResBlock | Attention | Upsample]


class FusedDecoder:
    """Computes what `vae.AutoencoderKL.decode` does, from its weights.  make: the fused form of one of its layers."""

    def __init__(self, network: vae.AutoencoderKL, make: Make = vae_layer) -> None:
        self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        decoder = network.decoder
        steps = [step for level in reversed(decoder.up) for step in level.children()]
        parts = [part for step in steps for part in (step if isinstance(step, nn.ModuleList) else [step])]
        self.parts = [make(part) for part in (decoder.mid.block_1, decoder.mid.attn_1, decoder.mid.block_2, *parts)]

    def refresh(self) -> None:
        """The weights were written to: what is kept of them is made again where it stands."""
        for part in self.parts:
            part.refresh()

    def __call__(self, latents: Tensor) -> Tensor:  # (B, C, H/f, W/f) -> (B, 3, H, W)
        x = self.network.decoder.conv_in(self.network.post_quant_conv(latents))
        for part in self.parts:
            if isinstance(part, ResBlock):
                assert part.conv1.bias is not None
                x = part(x, part.conv1.bias.expand(len(x), -1))
            else:
                x = part(x)
        return self.network.decoder.conv_out(normed(x, self.network.decoder.norm_out))
