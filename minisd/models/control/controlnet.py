"""ControlNet (Zhang et al. 2023, arXiv 2302.05543): a copy of a UNet's encoder that sees a picture beside the latents.

Reference: lllyasviel/ControlNet, cldm/cldm.py.  Attribute names are those of its files, depth and widths those of their shapes:
SD 1.x, 2.x, SDXL and its smaller ones are one class.
"""

from __future__ import annotations

from torch import Tensor, nn

from ...errors import ShapeError, UsageError
from ..fit import check_dimensions, through, trunk
from ..layers import conv
from ..shapes import Shapes, below, numbered
from ..unet import Trunk

OWN = ("time_embed", "label_emb", "input_blocks", "middle_block")  # what it has in common with a UNet
BESIDE = ("input_hint_block", "zero_convs", "middle_block_out")


def hint_layers(shapes: Shapes) -> nn.Sequential:
    """Convolutions with a SiLU between each two (cldm.py, input_hint_block): from the picture to the size of its latents."""
    layers: list[nn.Module] = []
    for i, part in enumerate(numbered(shapes)):
        halves = i % 4 == 0 and i > 0  # every second convolution after the first
        layers.append(conv(Shapes({"conv.weight": part["weight"]}), "conv", stride=1 + halves) if i % 2 == 0 else nn.SiLU())
    return nn.Sequential(*layers)


def downscale_of(layers: int) -> int:
    """How many times smaller than the picture the latents are: 8, with 15 layers, in all that are published."""
    return 2 ** ((layers - 3) // 4)


def out_layer(shapes: Shapes) -> nn.Sequential:
    """A 1x1 convolution, which was all zeros when training began."""
    return nn.Sequential(conv(shapes, "0"))


class ControlNet(Trunk):
    """What a UNet is to add to its skips and to its middle, at every step, to follow a picture.

    pooled: of each addition only the mean over the picture counts; so "shuffle" was trained (global_average_pooling in its
    control_v11e_sd15_shuffle.yaml), which no tensor tells.
    """

    def __init__(self, shapes: Shapes, pooled: bool = False) -> None:
        super().__init__(shapes)
        self.pooled = pooled
        self.input_hint_block = hint_layers(below(shapes, "input_hint_block"))
        self.downscale = downscale_of(len(self.input_hint_block))
        self.zero_convs = nn.ModuleList(out_layer(part) for part in numbered(below(shapes, "zero_convs")))
        self.middle_block_out = out_layer(below(shapes, "middle_block_out"))

    def hint(self, picture: Tensor) -> Tensor:
        """What the network makes of a picture (B, 3, 8h, 8w) in [0, 1], the same at every step -> (B, C, h, w)."""
        return self.input_hint_block(picture)

    def residuals(self, x: Tensor, hint: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> list[Tensor]:
        """What is to be added, (B, C_i, h_i, w_i) each: to the skips in the order of the input blocks, and to the middle.

        x (B, C, h, w), t (B,), context (B, L, D), y (B, A) as the UNet takes them; hint (B or 1, 3, 8h, 8w), the picture in
        [0, 1], or (B or 1, C, h, w), what `hint` made of it.  Raises UsageError if the hint has another size.
        """
        return self.outputs(x, self.embed(t, y, x.dtype), context, self.seen(hint, x))

    def seen(self, hint: Tensor, x: Tensor) -> Tensor:
        """A hint in either form, for latents x, as what is added to them: (B or 1, C, h, w).  Raises UsageError."""
        if hint.shape[1] == self.input_hint_block[0].in_channels:
            hint = self.hint(hint)
        if hint.shape[-2:] != x.shape[-2:]:
            height, width = (self.downscale * size for size in x.shape[-2:])
            found = "x".join(str(self.downscale * size) for size in reversed(hint.shape[-2:]))
            raise UsageError(f"hint: expected a picture of {width}x{height}, {self.downscale} times the latents, found {found}")
        return hint

    def outputs(self, x: Tensor, emb: Tensor, context: Tensor, hint: Tensor) -> list[Tensor]:
        found = self.down(x, emb, context, {0: hint})
        added = [out(h) for out, h in zip((*self.zero_convs, self.middle_block_out), found, strict=True)]
        return [each.mean((2, 3), keepdim=True).expand_as(each) for each in added] if self.pooled else added

    def forward(self, x: Tensor, hint: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> list[Tensor]:
        return self.residuals(x, hint, t, context, y)


def check_control(shapes: Shapes) -> None:
    """Whether the tensors of a ControlNet fit each other (see fit.py); context and vector have the widths that the file gives.

    Raises ShapeError, and KeyError for what is missing.
    """
    check_dimensions(Shapes({key: shape for key, shape in shapes.items() if key.split(".")[0] in (*OWN, *BESIDE)}))
    context = next((shape[1] for key, shape in shapes.items() if key.endswith("attn2.to_k.weight") and len(shape) > 1), 0)
    vector = shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else 0
    _, (*skips, middle) = trunk(shapes, context, vector)
    hint = numbered(below(shapes, "input_hint_block"))
    if len(hint) not in (11, 15):  # 3 of 8 convolutions halve the picture, as the VAE does; 2 of 6 for a VAE as the tiny one
        raise ShapeError(f"{shapes.name}input_hint_block", f"expected layers 0 to 14, found {len(hint)} of them")
    channels = shapes["input_hint_block.0.weight"][1]
    channels = through(shapes, channels, *(f"input_hint_block.{i}" for i in range(0, len(hint), 2)))
    if channels != skips[0]:
        last = f"{shapes.name}input_hint_block.{len(hint) - 1}.weight"
        raise ShapeError(last, f"expected {skips[0]} channels, found {channels}")
    outs = numbered(below(shapes, "zero_convs"))
    if len(outs) != len(skips):
        raise ShapeError(f"{shapes.name}zero_convs", f"expected {len(skips)}, one for each input block, found {len(outs)}")
    for i, width in enumerate(skips):
        through(shapes, width, f"zero_convs.{i}.0")
    through(shapes, middle, "middle_block_out.0")
