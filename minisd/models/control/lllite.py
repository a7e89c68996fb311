"""ControlNet-LLLite (kohya): a small network before each of many linear layers of a UNet, most of them queries, keys and values,
which changes what the layer sees by what is at that place of a picture.

Reference: kohya-ss/sd-scripts, networks/control_net_lllite.py.  Names are those of its files: lllite_unet_, and the name of the
layer with underscores for dots.  What the picture is to a layer is computed once; `applied` lends the changes to a UNet.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...errors import ShapeError
from ..fit import same, through
from ..layers import linear
from ..shapes import Shapes, below, numbered

PREFIX = "lllite_unet_"
TEXT = ("attn2_to_k", "attn2_to_v")  # which see the text, where there are no places of a picture


def patches(shapes: Shapes, name: str) -> nn.Conv2d:
    """A convolution over pieces that lie side by side."""
    out, channels, size, _ = shapes[f"{name}.weight"]
    return nn.Conv2d(channels, out, size, stride=size)


class Change(nn.Module):
    """x -> up(mid(the picture beside down(x))), what is added to the input of one linear layer."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        layers = [
            patches(shapes, f"conditioning1.{2 * i}") for i in range((len(numbered(below(shapes, "conditioning1"))) + 1) // 2)
        ]
        self.conditioning1 = nn.Sequential(*[each for layer in layers for each in (layer, nn.ReLU())][:-1])
        self.patch = prod(layer.stride[0] for layer in layers)  # pixels that one place of the layer stands for
        self.down = nn.Sequential(linear(shapes, "down.0"), nn.ReLU())
        self.mid = nn.Sequential(linear(shapes, "mid.0"), nn.ReLU())
        self.up = nn.Sequential(linear(shapes, "up.0"))

    def seen(self, picture: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, L, C), for the places of this layer; a last piece that is not whole is continued."""
        height, width = picture.shape[-2:]
        picture = F.pad(picture, (0, -width % self.patch, 0, -height % self.patch), mode="replicate")
        return self.conditioning1(picture).flatten(2).transpose(1, 2)

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:  # (B, L, D), (B or 1, L, C) -> (B, L, D)
        seen = seen.expand(len(x), -1, -1)
        return self.up(self.mid(torch.cat([seen, self.down(x)], dim=2)))


class LLLite(nn.Module):
    """The changes by name, as the file has them."""

    def __init__(self, shapes: Shapes) -> None:
        super().__init__()
        for name in names_of(shapes):
            self.add_module(name, Change(below(shapes, name)))

    def changes(self) -> dict[str, Change]:
        return {name: each for name, each in self.named_children() if isinstance(each, Change)}

    def seen(self, picture: Tensor) -> dict[str, Tensor]:
        """What a picture (B, 3, 8h, 8w) in [0, 1] is to each of them; the same at every step."""
        return {name: each.seen(2 * picture - 1) for name, each in self.changes().items()}


@dataclass(frozen=True, eq=False)
class Lent:
    """An LLLite to lend to a UNet: with what it has seen, times a strength, for some rows of the batch."""

    network: LLLite
    seen: Mapping[str, Tensor]
    strength: float = 1.0
    rows: Tensor | None = None  # (B,), true where it acts; None for all


@contextmanager
def applied(unet: nn.Module, lent: Sequence[Lent]) -> Iterator[None]:
    """While this is open, each layer sees its input with the sum of the changes added.  Nothing of the UNet is written to."""
    layers = layers_of(unet)
    with ExitStack() as open_hooks:
        for name in dict.fromkeys(name for each in lent for name in each.seen):
            acting = [each for each in lent if name in each.seen]
            hook = layers[name].register_forward_pre_hook(
                lambda _, given, name=name, acting=acting: (changed(given[0], name, acting),)
            )
            open_hooks.callback(hook.remove)
        yield


def changed(x: Tensor, name: str, acting: Sequence[Lent]) -> Tensor:  # (B, L, D) -> (B, L, D)
    total = x
    for each in acting:
        change = each.strength * each.network.get_submodule(name)(x, each.seen[name])
        total = total + (change if each.rows is None else change * each.rows[:, None, None])
    return total


def layers_of(unet: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a UNet, by what LLLite calls them."""
    return {PREFIX + name.replace(".", "_"): each for name, each in unet.named_modules() if isinstance(each, nn.Linear)}


def names_of(shapes: Shapes) -> list[str]:
    return list(dict.fromkeys(key.split(".")[0] for key in shapes if key.startswith(PREFIX)))


def check_lllite(shapes: Shapes) -> None:
    """Whether the tensors fit each other.  Raises ShapeError, and KeyError for what is missing."""
    for name in names_of(shapes):
        part = below(shapes, name)
        if name.endswith(TEXT):
            raise ShapeError(name, "acts on a layer that sees the text, which has no places in a picture")
        for key, shape in part.items():
            wanted = 1 if key.endswith(".bias") else 4 if key.startswith("conditioning1.") else 2
            if len(shape) != wanted or 0 in shape:
                what = "; those that act on convolutions are not known here" if len(shape) == 4 else ""
                raise ShapeError(f"{name}.{key}", f"expected {wanted} dimensions of 1 or more, found the shape {shape}{what}")
        layers = range(0, max(1, len(numbered(below(part, "conditioning1")))), 2)
        channels = through(part, 3, *(f"conditioning1.{i}" for i in layers))
        rank = part["down.0.weight"][0]
        same(part, "mid.0.weight", through(part, channels + rank, "mid.0"), part["up.0.weight"][1])
        through(part, part["down.0.weight"][1], "down.0")
        same(part, "up.0.weight", part["up.0.weight"][0], part["down.0.weight"][1])
