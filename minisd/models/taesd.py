"""The tiny autoencoders TAESD (for SD 1.x and 2.x) and TAESDXL: they take the place of the VAE, at a fiftieth of its work.

Reference: madebyollin/taesd, taesd.py; the same network as AutoencoderTiny in diffusers.

Published files hold one half, its layers numbered ("7.weight"), or both halves ("decoder.layers.6.weight").  The attributes
have the names of the second kind; of a half, `prefix_of` says what its keys lack in front.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from .shapes import Shapes, below, numbered

LAYER = re.compile(r"\d{1,3}\.((conv\.[024]\.)?(weight|bias)|skip\.weight)")
BOTH = re.compile(rf"(encoder|decoder)\.layers\.{LAYER.pattern}")
CERTAIN = -30.0  # logvar of a latent that is no draw but a value: the lowest that AutoencoderKL gives


def conv(shapes: Shapes, stride: int = 1) -> nn.Conv2d:
    out_channels, in_channels, size, _ = shapes["weight"]
    return nn.Conv2d(in_channels, out_channels, size, stride, padding=size // 2, bias="bias" in shapes)


class Block(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        first, second, third = (conv(below(shapes, f"conv.{i}")) for i in (0, 2, 4))
        self.conv = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.skip = conv(below(shapes, "skip")) if "skip.weight" in shapes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        return F.relu(self.conv(x) + self.skip(x))


class Encoder(nn.Module):
    """A row of convolutions and blocks.  A convolution without bias halves height and width."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(self.layer(part) for part in numbered(below(shapes, "layers"))))

    def layer(self, part: Shapes) -> nn.Module:
        return conv(part, stride=1 if "bias" in part else 2) if "weight" in part else Block(part)

    def forward(self, image: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, C, H/f, W/f)
        return self.layers((image + 1) / 2)  # trained on [0, 1]


class Decoder(nn.Module):
    """A row of convolutions and blocks.  Before a convolution without bias, height and width are doubled."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        parts = numbered(below(shapes, "layers"))
        self.layers = nn.Sequential(*(self.layer(*pair) for pair in zip(parts, [*parts[1:], Shapes({})], strict=True)))

    def layer(self, part: Shapes, following: Shapes) -> nn.Module:
        if part:
            return conv(part) if "weight" in part else Block(part)
        if "weight" not in following:
            return nn.ReLU()
        return nn.Identity() if "bias" in following else nn.Upsample(scale_factor=2)

    def forward(self, latents: Tensor) -> Tensor:  # (B, C, H/f, W/f) -> (B, 3, H, W)
        latents = torch.tanh(latents / 3) * 3  # a layer without weights, which only the files of one half count
        return self.layers(latents) * 2 - 1  # trained on [0, 1]


class TinyAutoencoder(nn.Module):
    """For use in place of AutoencoderKL, whose methods it has.  Without the half that `shapes` lacks; there must be one."""

    unit_variance = True  # its latents are those of the UNet: no scale factor comes between

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        encoder, decoder = below(shapes, "encoder"), below(shapes, "decoder")
        self.encoder = Encoder(encoder) if encoder else None
        self.decoder = Decoder(decoder) if decoder else None
        half = self.decoder or self.encoder
        assert half is not None
        convs = [layer for layer in half.layers if isinstance(layer, nn.Conv2d)]
        self.latent_channels = convs[0].in_channels if self.decoder else convs[-1].out_channels
        self.downscale = 2 ** sum(conv.bias is None for conv in convs)  # 8 for the published models

    def encode(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """image (B, 3, H, W) in [-1, 1] -> mean and logvar of the latents, each (B, C, H/f, W/f); nothing is left to chance.

        Raises UsageError if the file held the decoder alone.
        """
        if self.encoder is None:
            raise UsageError("vae: expected an encoder, found the decoder half of TAESD; give both of its files")
        latents = self.encoder(image)
        return latents, torch.full_like(latents, CERTAIN)

    def decode(self, latents: Tensor) -> Tensor:
        """latents (B, C, H/f, W/f) of unit variance -> image (B, 3, H, W), about [-1, 1], not clamped.

        Raises UsageError if the file held the encoder alone.
        """
        if self.decoder is None:
            raise UsageError("vae: expected a decoder, found the encoder half of TAESD; give both of its files")
        return self.decoder(latents)


def prefix_of(shapes: Mapping[str, object]) -> str | None:
    """What the keys of a TAESD file lack in front: "encoder.layers." or "decoder.layers." for one half, "" for both, None if
    the file is something else."""
    if shapes and all(BOTH.fullmatch(key) for key in shapes):
        return ""
    if shapes and all(LAYER.fullmatch(key) for key in shapes):
        return "encoder.layers." if "0.weight" in shapes else "decoder.layers."  # layer 0 of a decoder has no weights
    return None


def build_tiny(path: object, weights: Mapping[str, Tensor], latent_channels: int) -> TinyAutoencoder:
    """A TinyAutoencoder of these weights; raises CheckpointError in the name of the file `path` if they make none."""
    try:
        with torch.device("meta"):
            model = TinyAutoencoder(Shapes({key: tuple(value.shape) for key, value in weights.items()}))
            if model.decoder:
                model.decode(torch.empty(1, model.latent_channels, 2, 2))
            if model.encoder:
                model.encode(torch.empty(1, 3, 2 * model.downscale, 2 * model.downscale))
        model.load_state_dict(weights, strict=True, assign=True)
    except KeyError as error:
        raise CheckpointError(path, "this looks like a TAESD, but a key is missing", key=str(error.args[0])) from None
    except (ValueError, RuntimeError, IndexError) as error:
        raise CheckpointError(
            path, f"this looks like a TAESD, but its shapes fit no network: {str(error).splitlines()[0]}"
        ) from None
    if model.latent_channels != latent_channels:
        reason = f"is a TAESD for latents of {model.latent_channels} channels, this checkpoint has {latent_channels}"
        raise CheckpointError(path, reason, "take taesd for SD 1.x and 2.x, taesdxl for SDXL")
    return model.requires_grad_(False).eval()
