"""T2I-Adapter (Mou et al. 2023, arXiv 2302.08453): feature maps of a picture, added to a UNet's on the way down.

Reference: TencentARC/T2I-Adapter, ldm/modules/encoders/adapter.py (Adapter, Adapter_light); for SDXL its branch XL.  Attribute
names are those of its files.  It sees neither the latents nor the timestep: once for a picture is enough.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ShapeError, UsageError
from ..fit import beside, through
from ..layers import conv
from ..shapes import Shapes, below, numbered
from ..unet import Downsample

LEVELS = 4
# By the channels that the first convolution takes: squares of so many pixels a side, and whether the picture is grey.
PATCHES = {192: (8, False), 64: (8, True), 768: (16, False), 256: (16, True)}
PLACES = {8: (2, 5, 8, 11), 16: (3, 5, 8, 9)}  # by the same: the input blocks that are added to; SDXL's middle block counts as 9
HALVED = {8: (1, 2, 3), 16: (2,)}  # by the same: the levels before which height and width are halved


class ResBlock(nn.Module):
    """x + block2(relu(block1(x))), behind a convolution to the block's width where that changes."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_conv = conv(shapes, "in_conv") if "in_conv.weight" in shapes else nn.Identity()
        self.block1, self.block2 = conv(shapes, "block1"), conv(shapes, "block2")

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        x = self.in_conv(x)
        return x + self.block2(F.relu(self.block1(x)))


class LightBlock(nn.Module):
    """Blocks at a quarter of the width."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_conv, self.out_conv = conv(shapes, "in_conv"), conv(shapes, "out_conv")
        self.body = nn.Sequential(*(ResBlock(part) for part in numbered(below(shapes, "body"))))

    def forward(self, x: Tensor) -> Tensor:  # (B, C_in, H, W) -> (B, C_out, H, W)
        return self.out_conv(self.body(self.in_conv(x)))


class T2IAdapter(nn.Module):
    """`features(picture)` for the UNet's argument `added`, by the numbers in `places`."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.light = is_light(shapes)
        parts = numbered(below(shapes, "body"))
        self.patch, self.grey = PATCHES[first_convolution(shapes)[1]]
        self.places = PLACES[self.patch]
        self.each = len(parts) // LEVELS  # blocks of a level
        last = "out_conv.weight" if self.light else "block2.weight"
        self.channels = [part[last][0] for part in parts[self.each - 1 :: self.each]]  # of the four feature maps
        self.conv_in = nn.Identity() if self.light else conv(shapes, "conv_in")
        self.body = nn.ModuleList(LightBlock(part) if self.light else ResBlock(part) for part in parts)
        for block, part in zip(self.body, parts, strict=True):
            if "down_opt.op.weight" in part:
                block.down_opt = Downsample(below(part, "down_opt"))

    def features(self, picture: Tensor) -> list[Tensor]:
        """picture (B, 3 or 1, 8h, 8w) in [0, 1] -> four feature maps, of h x w and halves of it (SDXL's: from a half on).

        A picture that is no whole number of patches is continued by its last row and column.  Halves are rounded up, as the
        UNet has them (and diffusers); the reference rounds down.  Raises UsageError.
        """
        if picture.shape[1] not in (1, 3):
            raise UsageError(f"hint: expected a picture (B, 3, H, W) or (B, 1, H, W), found {tuple(picture.shape)}")
        wanted = 1 if self.grey else 3
        if picture.shape[1] != wanted:
            picture = picture.mean(1, keepdim=True) if self.grey else picture.expand(-1, 3, -1, -1)
        height, width = picture.shape[-2:]
        picture = F.pad(picture, (0, -width % self.patch, 0, -height % self.patch), mode="replicate")
        x = self.conv_in(F.pixel_unshuffle(picture, self.patch))  # (B, C, h, w)
        found = []
        for i, block in enumerate(self.body):
            if i % self.each == 0 and i // self.each in HALVED[self.patch]:
                halve = getattr(block, "down_opt", None)
                x = halve(x) if halve else F.avg_pool2d(x, 2, ceil_mode=True)
            x = block(x)
            if i % self.each == self.each - 1:
                found.append(x)
        return found

    def added(self, picture: Tensor) -> dict[int, Tensor]:
        """The same as `UNet.forward` takes it."""
        return dict(zip(self.places, self.features(picture), strict=True))


def is_light(shapes: Shapes) -> bool:
    return "body.0.out_conv.weight" in shapes


def first_convolution(shapes: Shapes) -> tuple[int, ...]:
    return shapes["body.0.in_conv.weight" if is_light(shapes) else "conv_in.weight"]


def check_adapter(shapes: Shapes) -> None:
    """Whether the tensors of an adapter fit each other (see fit.py).  Raises ShapeError, and KeyError for what is missing."""
    light = is_light(shapes)
    first = "body.0.in_conv.weight" if light else "conv_in.weight"
    for key, shape in shapes.items():
        expected = 1 if key.endswith(".bias") else 4
        if key.startswith(("conv_in.", "body.")) and (len(shape) != expected or 0 in shape):
            raise ShapeError(key, f"expected {expected} dimensions of 1 or more, found the shape {shape}")
    channels, parts = shapes[first][1], numbered(below(shapes, "body"))
    if channels not in PATCHES:
        raise ShapeError(first, f"expected {', '.join(map(str, sorted(PATCHES)))} channels, found {channels}")
    if len(parts) % LEVELS or not parts or (light and len(parts) != LEVELS):
        raise ShapeError("body", f"expected {LEVELS} levels of as many blocks each, found {len(parts)} blocks")
    if not light:
        channels = through(shapes, channels, "conv_in")
    for i, part in enumerate(parts):
        if "down_opt.op.weight" in part and i * LEVELS / len(parts) not in HALVED[PATCHES[shapes[first][1]][0]]:
            raise ShapeError(f"{part.name}down_opt.op.weight", "halves a level that no published adapter halves")
        for name in ("down_opt.op", "in_conv"):
            channels = through(part, channels, name) if f"{name}.weight" in part else channels
        for inner in numbered(below(part, "body")) if light else [part]:
            beside(inner, channels, "block1", "block2")
        channels = through(part, channels, "out_conv") if light else channels
