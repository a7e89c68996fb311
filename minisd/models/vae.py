"""The autoencoder between pictures and latents, built from the names and shapes of its weights.

Reference: CompVis/stable-diffusion, ldm/modules/diffusionmodules/model.py and ldm/models/autoencoder.py (AutoencoderKL).
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from .layers import GroupNorm, Pointwise, conv
from .ops import attention
from .shapes import Shapes, below, numbered

EPS = 1e-6  # model.py, Normalize


def norm(shapes: Shapes, name: str, silu: bool = True) -> GroupNorm:
    return GroupNorm(shapes[f"{name}.weight"][0], EPS, silu)


class ResnetBlock(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(shapes, "norm1"), conv(shapes, "conv1")
        self.norm2, self.conv2 = norm(shapes, "norm2"), conv(shapes, "conv2")
        has_shortcut = "nin_shortcut.weight" in shapes
        self.nin_shortcut = conv(shapes, "nin_shortcut") if has_shortcut else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        h = self.conv1(self.norm1(x))
        return self.nin_shortcut(x) + self.conv2(self.norm2(h))


class AttnBlock(nn.Module):
    """Self-attention over the pixels, with a single head as wide as the feature map."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.norm = norm(shapes, "norm", silu=False)
        self.q, self.k, self.v, self.proj_out = (Pointwise(shapes, name) for name in ("q", "k", "v", "proj_out"))

    def forward(self, x: Tensor) -> Tensor:
        b, c, height, width = x.shape
        h = self.norm(x).permute(0, 2, 3, 1).reshape(b, height * width, c)  # (B, H*W, C)
        h = self.proj_out(attention(self.q(h), self.k(h), self.v(h), heads=1))
        return x + h.view(b, height, width, c).permute(0, 3, 1, 2)  # (B, C, H, W)


class Middle(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(below(shapes, "block_1"))
        self.attn_1 = AttnBlock(below(shapes, "attn_1"))
        self.block_2 = ResnetBlock(below(shapes, "block_2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Downsample(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        out_channels, in_channels, size, _ = shapes["conv.weight"]
        self.conv = nn.Conv2d(in_channels, out_channels, size, stride=2)

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H/2, W/2)
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # on the right and below only: unlike the UNet's


class Upsample(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv = conv(shapes, "conv")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, 2*H, 2*W)
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, then the step to the next one, where there is a next."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.block = nn.ModuleList(ResnetBlock(part) for part in numbered(below(shapes, "block")))
        if "downsample.conv.weight" in shapes:
            self.downsample = Downsample(below(shapes, "downsample"))
        if "upsample.conv.weight" in shapes:
            self.upsample = Upsample(below(shapes, "upsample"))

    def forward(self, x: Tensor) -> Tensor:
        for step in (*self.block, *(getattr(self, name) for name in ("downsample", "upsample") if hasattr(self, name))):
            x = step(x)
        return x


class Encoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv_in = conv(shapes, "conv_in")
        self.down = nn.ModuleList(Level(part) for part in numbered(below(shapes, "down")))
        self.mid = Middle(below(shapes, "mid"))
        self.norm_out, self.conv_out = norm(shapes, "norm_out"), conv(shapes, "conv_out")

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, 2*C, H/f, W/f)
        x = self.conv_in(x)
        for level in self.down:
            x = level(x)
        return self.conv_out(self.norm_out(self.mid(x)))


class Decoder(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.conv_in = conv(shapes, "conv_in")
        self.mid = Middle(below(shapes, "mid"))
        self.up = nn.ModuleList(Level(part) for part in numbered(below(shapes, "up")))
        self.norm_out, self.conv_out = norm(shapes, "norm_out"), conv(shapes, "conv_out")

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H/f, W/f) -> (B, 3, H, W)
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):  # numbered from the picture down: the coarsest level is the last
            x = level(x)
        return self.conv_out(self.norm_out(x))


class AutoencoderKL(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.encoder = Encoder(below(shapes, "encoder"))
        self.decoder = Decoder(below(shapes, "decoder"))
        self.quant_conv, self.post_quant_conv = conv(shapes, "quant_conv"), conv(shapes, "post_quant_conv")
        self.latent_channels = shapes["post_quant_conv.weight"][1]
        self.downscale = 2 ** (len(self.decoder.up) - 1)  # 8 for the published models: four levels, three steps

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and logvar of the latents, each (B, C, H/f, W/f), before the scale factor."""
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)  # distributions.py, DiagonalGaussianDistribution

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H/f, W/f), after dividing by the scale factor -> image (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(latents))
