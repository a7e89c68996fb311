"""The shapes that a checkpoint's own networks hand to a kernel, from its header alone.

The networks are built on the meta device, in the form that a GPU runs, and called once at the size that the checkpoint draws at:
the UNet with guidance (batch 2), the VAE's decoder for one picture, the text encoders for two prompts.  What asks for the kernel
on the way is written down, chosen by the same rules as when a picture is drawn.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from ..fast import choice, operations
from ..fast import unet as fused_networks
from ..fast.lossy import float8
from ..files.checkpoint import open_checkpoint
from ..files.model import build
from ..files.recognition import recognise
from ..library.names import resolve
from ..warmup.networks import walk

Sizes = dict[str, Any]


def group_norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    shift: Tensor | None = None,
    skip: Tensor | None = None,
    known: Any = None,
) -> tuple[str, Sizes]:
    more = 0 if skip is None else skip.shape[1]
    label = f"{x.shape[1]}{f'+{more}' if more else ''}@{x.shape[2]}x{x.shape[3]}{', shift' if shift is not None else ''}"
    sizes = {"batch": x.shape[0], "channels": x.shape[1], "size": x.shape[2], "skip": more}
    return label + ("" if silu else ", no SiLU"), sizes | {"shift": shift is not None, "silu": bool(silu)}


def layer_norm(x: Tensor, *_: Any, shift: Tensor | None = None) -> tuple[str, Sizes]:
    rows, channels = x.numel() // x.shape[-1], x.shape[-1]
    label = f"{channels}, {rows} rows" + (", shift" if shift is not None else "")
    return label, {"rows": rows, "channels": channels, "shift": shift is not None}


def attention(q: Tensor, k: Tensor, v: Tensor) -> tuple[str, Sizes]:
    batch, heads, queries, dim = q.shape
    label = f"{heads} x d={dim}, {queries} to {k.shape[2]}"
    return label, {"batch": batch, "heads": heads, "queries": queries, "keys": k.shape[2], "dim": dim}


def geglu(x: Tensor) -> tuple[str, Sizes]:
    rows, columns = x.numel() // x.shape[-1], x.shape[-1] // 2
    return f"{columns}, {rows} rows", {"rows": rows, "columns": columns}


def linear_geglu(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[str, Sizes]:
    m, k, n = x.numel() // x.shape[-1], x.shape[-1], len(weight) // 2
    return f"{k}->{n}, {m} rows", {"m": m, "k": k, "n": n}


def feature_map(x: Tensor, *_: Any, groups: int | None = None) -> tuple[str, Sizes]:
    batch, channels, height, width = x.shape
    label = f"{channels}@{height}x{width}{', statistics' if groups else ''}"
    return label, {"batch": batch, "channels": channels, "size": height, "statistics": groups is not None}


def add_bias(x: Tensor, *_: Any, groups: int | None = None, shift: Tensor | None = None) -> tuple[str, Sizes]:
    label, sizes = feature_map(x, groups=groups)
    return label + (", shift" if shift is not None else ""), sizes | {"shift": shift is not None}


def rows(x: Tensor) -> tuple[str, Sizes]:
    count, channels = x.numel() // x.shape[-1], x.shape[-1]
    return f"{channels}, {count} rows", {"rows": count, "channels": channels}


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> tuple[str, Sizes]:
    outputs, inputs, size = *weight.shape[:2], weight.shape[-1] if weight.dim() == 4 else 1
    return f"{inputs} to {outputs}, {size}x{size}", {"outputs": outputs, "inputs": inputs, "kernel": size}


# From what a kernel is called with to a label and the fields of its Shape.
SIZES: dict[str, Callable[..., tuple[str, Sizes]]] = {
    "group_norm": group_norm,
    "layer_norm": layer_norm,
    "attention": attention,
    "wide_attention": attention,
    "geglu": geglu,
    "linear_geglu": linear_geglu,
    "upsample_conv": feature_map,
    "add_bias": add_bias,
    "quantise_rows": rows,
    "dequantise": dequantise,
}


def shapes_of(name: str, checkpoint: str, dtype: torch.dtype) -> list[Any]:
    """The kernel's own Shapes, in the order of their first call; none if the checkpoint's networks never call it.

    checkpoint: a path, or a name in the library.  Raises CheckpointError.
    """
    file = open_checkpoint(resolve(checkpoint))
    found = recognise(file)
    model = build(file, found.family).to(dtype)
    if name in choice.FLOAT8:
        float8.to_float8(model.unet)
    # The kernels' shapes are square: of a checkpoint that draws at another form, the square of as many pixels.
    side = round(math.sqrt(found.size[0] * found.size[1]) / model.vae.downscale / 8) * 8
    kind = type(choice.kernels().KERNELS[name].SHAPES[0])
    if name in SIZES:
        calls = Calls(name)
        with calls.watched():
            walk(model, (side, side), calls.begin)
        return [kind(label=f"{label}, {times(count)}", **dict(sizes)) for (label, sizes), count in calls.seen.items()]
    # The sampler's step is no network's: all that there is to it is the size of the latents.
    names = {field.name for field in fields(kind)}
    return [kind(label=f"latents {side}x{side}", batch=1, size=side)] if names >= {"label", "batch", "size"} else []


def times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"


class Calls:
    """Stands in the place of minisd.kernels, and counts what its kernel `name` is called with."""

    def __init__(self, name: str) -> None:
        self.name, self.real, self.part = name, choice.kernels(), ""
        self.seen: Counter[tuple[str, tuple[tuple[str, Any], ...]]] = Counter()

    def __getattr__(self, name: str) -> Any:
        if name not in self.real.KERNELS:
            return getattr(self.real, name)

        def call(*given: Any, **more: Any) -> Any:
            if name == self.name:
                label, sizes = SIZES[name](*given, **more)
                self.seen[f"{self.part} {label}", tuple(sizes.items())] += 1
            result = self.real.KERNELS[name].reference(*given, **more)
            if isinstance(result, tuple):  # a map or rows, and what is known of them
                return as_written(result[0], given[0]), *result[1:]
            return as_written(result, given[0])

        return call

    def begin(self, part: str) -> None:
        self.part = part

    def watched(self) -> AbstractContextManager[None]:
        """Every kernel of `auto` and this one are asked for, as on a GPU."""
        return in_the_place_of_kernels(lambda real: self, self.name)


@contextmanager
def in_the_place_of_kernels(make: Callable[[Any], Any], *more: str) -> Iterator[None]:
    """What `make` makes of minisd.kernels stands in its place, and is asked for whatever `auto` takes on a GPU, and more."""
    names, stand_in = choice.AUTO | {*more}, make(choice.kernels())
    asked = {"wants": lambda name, device: name in names, "kernels": lambda: stand_in}
    places = [(module, name) for module in (choice, operations, fused_networks, float8) for name in asked if name in vars(module)]
    before = [vars(module)[name] for module, name in places]
    for module, name in places:
        vars(module)[name] = asked[name]
    try:
        yield
    finally:
        for (module, name), value in zip(places, before, strict=True):
            vars(module)[name] = value


def as_written(result: Tensor, x: Tensor) -> Tensor:
    """As a kernel writes it: in the dtype of what it was given, unless one of the two is float8, and channels-last."""
    dtype = result.dtype if torch.float8_e4m3fn in (result.dtype, x.dtype) else x.dtype
    return result.to(dtype, memory_format=torch.channels_last if result.dim() == 4 else torch.preserve_format)
