"""ControlNet Union and ProMax (xinsir): one ControlNet for many kinds of pictures, several of them at once.

Reference: xinsir6/ControlNetPlus, models/controlnet_union.py, and diffusers' controlnet_union.py; the attribute names are theirs
("transformer_layes", too).  A kind of picture has a number: it is told beside the timestep, and a row of `task_embedding` is
added to what the hint is on average, from which a small transformer makes one number for each channel of the hint.

That transformer attends along the axis of the batch, in the original as in diffusers: over pictures that have the same hint, as
all of a call do here.  The average of equal values is the value, so queries and keys cancel, and no picture depends on what is
drawn beside it.  ComfyUI attends along the axis of the conditions and lets one of them through: the same numbers again.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ShapeError, UsageError
from ..fit import check_dimensions, same, through
from ..layers import LayerNorm, linear
from ..shapes import Shapes, below, numbered
from ..unet import timestep_embedding
from .controlnet import ControlNet, check_control

# By the number that a kind has: what the pictures are called (README of ControlNetPlus; the last two are ProMax's).
NUMBERS = (
    ("openpose",), ("depth",), ("hed", "pidi", "scribble", "ted", "softedge"), ("canny", "lineart", "anime_lineart", "mlsd"),
    ("normal",), ("segment",), ("tile",), ("inpaint",),
)  # fmt: skip
KINDS = {name: number for number, names in enumerate(NUMBERS) for name in names}
OWN = ("task_embedding", "control_add_embedding", "transformer_layes", "spatial_ch_projs")  # what no other ControlNet has


class Value(nn.Module):
    """Attention over copies of a token: its value, in the names of nn.MultiheadAttention."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.empty(shapes["in_proj_weight"]))
        self.in_proj_bias = nn.Parameter(torch.empty(shapes["in_proj_bias"]))
        self.out_proj = linear(shapes, "out_proj")

    def forward(self, x: Tensor) -> Tensor:  # (B, C) -> (B, C)
        first = -x.shape[-1]  # behind queries and keys
        return self.out_proj(F.linear(x, self.in_proj_weight[first:], self.in_proj_bias[first:]))


class MLP(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.c_fc, self.c_proj = linear(shapes, "c_fc"), linear(shapes, "c_proj")

    def forward(self, x: Tensor) -> Tensor:  # (B, C) -> (B, C)
        x = self.c_fc(x)
        return self.c_proj(x * torch.sigmoid(1.702 * x))  # CLIP's quick_gelu


class Layer(nn.Module):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.attn, self.mlp = Value(below(shapes, "attn")), MLP(below(shapes, "mlp"))
        self.ln_1, self.ln_2 = (LayerNorm(shapes[f"{name}.weight"][0]) for name in ("ln_1", "ln_2"))

    def forward(self, x: Tensor) -> Tensor:  # (B, C) -> (B, C)
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class KindEmbedding(nn.Module):
    """Which kinds of pictures there are, as what is added to the time embedding."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = linear(shapes, "linear_1"), linear(shapes, "linear_2")

    def forward(self, there: Tensor) -> Tensor:  # (K,), 1 for a kind that is there, else 0 -> (1, E)
        sinusoids = timestep_embedding(there, self.linear_1.in_features // len(there))  # (K, 256)
        return self.linear_2(F.silu(self.linear_1(sinusoids.flatten()[None].to(self.linear_1.weight.dtype))))


class ControlNetUnion(ControlNet):
    def __init__(self, shapes: Shapes) -> None:
        super().__init__(shapes)
        self.task_embedding = nn.Parameter(torch.empty(shapes["task_embedding"]))
        self.control_add_embedding = KindEmbedding(below(shapes, "control_add_embedding"))
        self.transformer_layes = nn.Sequential(*(Layer(part) for part in numbered(below(shapes, "transformer_layes"))))
        self.spatial_ch_projs = linear(shapes, "spatial_ch_projs")

    @property
    def kinds(self) -> list[str]:
        """The kinds of pictures that it was trained on."""
        return kinds_of(len(self.task_embedding))

    def residuals(  # type: ignore[override]
        self,
        x: Tensor,
        hint: Tensor | Sequence[Tensor],
        t: Tensor,
        context: Tensor,
        y: Tensor | None = None,
        kinds: Sequence[str] = (),
        strengths: Sequence[float] = (),
    ) -> list[Tensor]:
        """As a ControlNet's (see there), of one hint or of several at once.

        kinds: of each hint its name in KINDS.  strengths: times what a hint brings in, before the network, by default 1; so
        diffusers has it for several hints, and multiplies what comes out where there is one.  Raises UsageError.
        """
        hints = [self.seen(each, x) for each in ([hint] if isinstance(hint, Tensor) else hint)]
        if len(kinds) != len(hints):
            raise UsageError(f"kinds: expected one for each hint, found {len(kinds)} for {len(hints)}")
        numbers = [number_of(kind, len(self.task_embedding)) for kind in kinds]
        there = torch.zeros(len(self.task_embedding), device=x.device)
        there[numbers] = 1
        emb = self.embed(t, y, x.dtype) + self.control_add_embedding(there)
        return self.outputs(x, emb, context, self.fused(hints, numbers, strengths or [1.0] * len(hints)))

    def fused(self, hints: Sequence[Tensor], numbers: Sequence[int], strengths: Sequence[float]) -> Tensor:
        """What is added after the first convolution: (B or 1, C, h, w) each -> (B or 1, C, h, w)."""
        parts = []
        for hint, number, strength in zip(hints, numbers, strengths, strict=True):
            token = strength * (hint.mean((2, 3)) + self.task_embedding[number])  # (B, C)
            alpha = self.spatial_ch_projs(self.transformer_layes(token))[:, :, None, None]
            parts.append(strength * (hint + alpha))
        return sum(parts[1:], parts[0])

    def forward(self, *given: object, **options: object) -> list[Tensor]:
        return self.residuals(*given, **options)  # type: ignore[arg-type]


def kinds_of(count: int) -> list[str]:
    """The names of the first so many kinds."""
    return [name for names in NUMBERS[:count] for name in names]


def number_of(kind: object, count: int) -> int:
    """Of a name, where the network knows so many kinds.  Raises UsageError."""
    if not isinstance(kind, str) or KINDS.get(kind, count) >= count:
        known = ", ".join(kinds_of(count))
        more = ", which takes ProMax" if isinstance(kind, str) and kind in KINDS else ""
        raise UsageError(f"kind: expected one of {known}, found {repr(kind)[:80]}{more}")
    return KINDS[kind]


def check_union(shapes: Shapes) -> None:
    """As `check_control`, and whether what a Union has beside it fits.  Raises ShapeError, and KeyError for what is missing."""
    check_control(shapes)
    check_dimensions(Shapes({key: shape for key, shape in shapes.items() if key.split(".")[0] in OWN}))
    kinds, width = shapes["task_embedding"]
    hint = shapes["input_hint_block.14.weight"][0]
    if width != hint:
        raise ShapeError("task_embedding", f"expected {hint} channels, as a hint has, found {width}")
    emb, told = shapes["control_add_embedding.linear_1.weight"]
    if told % (2 * kinds):
        raise ShapeError(
            "control_add_embedding.linear_1.weight", f"expected as many channels for each of {kinds} kinds, found {told}"
        )
    time = shapes["time_embed.2.weight"][0]
    same(shapes, "control_add_embedding.linear_2.weight", through(shapes, emb, "control_add_embedding.linear_2"), time)
    for part in numbered(below(shapes, "transformer_layes")) or [below(shapes, "transformer_layes.0")]:
        for key, wanted in (("attn.in_proj_weight", (3 * width, width)), ("attn.in_proj_bias", (3 * width,))):
            if part[key] != wanted:
                raise ShapeError(f"{part.name}{key}", f"expected {wanted}, found {part[key]}")
        for names in (("attn.out_proj",), ("ln_1",), ("ln_2", "mlp.c_fc", "mlp.c_proj")):
            same(part, f"{names[-1]}.weight", through(part, width, *names), width)
    same(shapes, "spatial_ch_projs.weight", through(shapes, width, "spatial_ch_projs"), hint)
