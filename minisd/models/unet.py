"""The UNet of Stable Diffusion, built from the names and shapes of its weights.

Reference: CompVis/stable-diffusion, ldm/modules/diffusionmodules/openaimodel.py and ldm/modules/attention.py.
Attribute names are the checkpoint's, so `UNet(shapes).state_dict()` has exactly the keys of `shapes`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .layers import GroupNorm, LayerNorm, Pointwise, conv, linear
from .ops import attention, geglu
from .shapes import Shapes, below, numbered

RESNET_EPS = 1e-5  # torch's default, which GroupNorm32 keeps
TRANSFORMER_EPS = 1e-6  # attention.py, Normalize
MAX_PERIOD = 10_000  # util.py, timestep_embedding
Maps = Mapping[int, Tensor] | None  # feature maps by the number of an input block; the middle block counts as the last


def timestep_embedding(t: Tensor, dim: int) -> Tensor:
    """Sinusoids of a timestep, cosines first: (B,) -> (B, dim), in float32 (util.py, timestep_embedding)."""
    half = dim // 2
    freqs = torch.exp(-math.log(MAX_PERIOD) * torch.arange(half, device=t.device, dtype=torch.float32) / half)
    args = t.float()[:, None] * freqs
    return torch.cat([args.cos(), args.sin()], dim=-1)


class ResBlock(nn.Module):
    """Two 3x3 convolutions with the time embedding added between them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        channels = (shapes[f"{name}.0.weight"][0] for name in ("in_layers", "out_layers"))
        norm_in, norm_out = (GroupNorm(count, RESNET_EPS, silu=True) for count in channels)
        # The empty slots are those of the SiLU, which the norm applies, and of a dropout that inference has no use for.
        self.in_layers = nn.Sequential(norm_in, nn.Identity(), conv(shapes, "in_layers.2"))
        self.emb_layers = nn.Sequential(nn.SiLU(), linear(shapes, "emb_layers.1"))
        self.out_layers = nn.Sequential(norm_out, nn.Identity(), nn.Identity(), conv(shapes, "out_layers.3"))
        self.skip_connection = conv(shapes, "skip_connection") if "skip_connection.weight" in shapes else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:  # (B, C_in, H, W), (B, E) -> (B, C_out, H, W)
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class CrossAttention(nn.Module):
    """Attention to `context`, or to x itself where there is none."""

    def __init__(self, shapes: Shapes, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = linear(shapes, "to_q", bias=False)
        self.to_k = linear(shapes, "to_k", bias=False)
        self.to_v = linear(shapes, "to_v", bias=False)
        self.to_out = nn.Sequential(linear(shapes, "to_out.0"))

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:  # (B, L, C), (B, S, D) -> (B, L, C)
        context = x if context is None else context
        return self.to_out(attention(self.to_q(x), self.to_k(context), self.to_v(context), self.heads))


class GEGLU(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.proj = linear(shapes, "proj")

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C) -> (B, L, 4*C)
        return geglu(self.proj(x))


class FeedForward(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(below(shapes, "net.0")), nn.Identity(), linear(shapes, "net.2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicTransformerBlock(nn.Module):
    """Self-attention, cross-attention to the prompt, feed-forward: each behind a LayerNorm, each added to its input."""

    def __init__(self, shapes: Shapes, heads: int) -> None:
        super().__init__()
        channels = shapes["norm1.weight"][0]
        self.attn1 = CrossAttention(below(shapes, "attn1"), heads)
        self.ff = FeedForward(below(shapes, "ff"))
        self.attn2 = CrossAttention(below(shapes, "attn2"), heads)
        self.norm1, self.norm2, self.norm3 = (LayerNorm(channels) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:  # (B, L, C), (B, S, D) -> (B, L, C)
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the pixels of a feature map."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        channels = shapes["norm.weight"][0]
        # The one structural fact that shapes do not tell.  SD 1.x, which stores proj_in as a 1x1 convolution, has 8 heads
        # everywhere (v1-inference.yaml, num_heads); all since have 64 channels a head (v2-inference.yaml, num_head_channels).
        heads = 8 if len(shapes["proj_in.weight"]) == 4 else channels // 64
        self.norm = GroupNorm(channels, TRANSFORMER_EPS)
        self.proj_in = Pointwise(shapes, "proj_in")
        blocks = numbered(below(shapes, "transformer_blocks"))
        self.transformer_blocks = nn.ModuleList(BasicTransformerBlock(block, heads) for block in blocks)
        self.proj_out = Pointwise(shapes, "proj_out")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)  # (B, H*W, C)
        h = self.proj_in(h)
        for block in self.transformer_blocks:
            h = block(h, context)
        h = self.proj_out(h)
        return x + h.view(b, height, width, c).permute(0, 3, 1, 2)  # (B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.op = conv(shapes, "op", stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, ceil(H/2), ceil(W/2))
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv = conv(shapes, "conv")

    def forward(self, x: Tensor, size: torch.Size) -> Tensor:  # (B, C, H, W) -> (B, C, *size)
        return self.conv(F.interpolate(x, size=size, mode="nearest"))


def layer(shapes: Shapes) -> nn.Module:
    """The layer that these weights belong to."""
    names = {key.split(".")[0] for key in shapes}
    if "in_layers" in names:
        return ResBlock(shapes)
    if "transformer_blocks" in names:
        return SpatialTransformer(shapes)
    if "op" in names:
        return Downsample(shapes)
    if "conv" in names:
        return Upsample(shapes)
    return conv(Shapes({"conv.weight": shapes["weight"]}), "conv")


class Block(nn.Sequential):
    """Layers in a row, each given what it asks for (openaimodel.py, TimestepEmbedSequential)."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(*(layer(part) for part in numbered(shapes)))

    def forward(self, x: Tensor, emb: Tensor, context: Tensor, size: torch.Size | None = None) -> Tensor:  # type: ignore[override]
        for part in self:
            if isinstance(part, ResBlock):
                x = part(x, emb)
            elif isinstance(part, SpatialTransformer):
                x = part(x, context)
            elif isinstance(part, Upsample):
                x = part(x, size)
            else:
                x = part(x)
        return x


def mlp(shapes: Shapes, name: str) -> nn.Sequential:
    return nn.Sequential(linear(shapes, f"{name}.0"), nn.SiLU(), linear(shapes, f"{name}.2"))


class Trunk(nn.Module):
    """The first half of a UNet, which a ControlNet has as well: from the latents down to the middle."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_channels = shapes["input_blocks.0.0.weight"][1]
        self.channels = shapes["time_embed.0.weight"][1]
        self.time_embed = mlp(shapes, "time_embed")
        self.context_channels = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight")), 0)
        self.vector_channels = shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else 0
        self.label_emb = nn.Sequential(mlp(below(shapes, "label_emb"), "0")) if self.vector_channels else None
        self.input_blocks = nn.ModuleList(Block(part) for part in numbered(below(shapes, "input_blocks")))
        self.middle_block = Block(below(shapes, "middle_block"))

    def embed(self, t: Tensor, y: Tensor | None, dtype: torch.dtype) -> Tensor:
        """t (B,), y (B, A) where the network takes a vector -> (B, E)."""
        emb = self.time_embed(timestep_embedding(t, self.channels).to(dtype))
        return emb if self.label_emb is None else emb + self.label_emb(y)

    def down(self, x: Tensor, emb: Tensor, context: Tensor, added: Maps = None) -> list[Tensor]:
        """What every input block makes of x, (B, C_i, H_i, W_i), and the middle block last; added: to these, by their number."""
        outputs = []
        for i, block in enumerate((*self.input_blocks, self.middle_block)):
            x = block(x, emb, context)
            x = x + added[i] if added and i in added else x
            outputs.append(x)
        return outputs


class UNet(Trunk):
    """Predicts the noise (or v) in x at timestep t.  residuals: of a ControlNet, one for each output of `down`."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.output_blocks = nn.ModuleList(Block(part) for part in numbered(below(shapes, "output_blocks")))
        norm_out = GroupNorm(shapes["out.0.weight"][0], RESNET_EPS, silu=True)
        self.out = nn.Sequential(norm_out, nn.Identity(), conv(shapes, "out.2"))

    def forward(
        self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None, residuals: Sequence[Tensor] = (), added: Maps = None
    ) -> Tensor:
        """x (B, C, H, W), t (B,) in training timesteps (may be fractional), context (B, L, D), y (B, A) -> (B, C', H, W)."""
        emb = self.embed(t, y, x.dtype)
        outputs = self.down(x, emb, context, added)
        *skips, x = [h + residual for h, residual in zip(outputs, residuals, strict=True)] if residuals else outputs
        for block in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            # An upsampling goes to the size of the next skip, which is not always twice that of this one.
            x = block(x, emb, context, skips[-1].shape[-2:] if skips else None)
        return self.out(x)
