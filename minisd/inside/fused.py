"""The fused UNet and decoder taken apart: each of their layers told, and answering, as the plain module of its name.

A fused layer is not always given what the module is, nor does it always make the same: keys, values and what the time embedding
adds come from outside, the skip connection is not yet joined, and on a GPU a bias is added by another layer than its own.  All
of that is made up for here, so that the numbers on both sides mean the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..fast.cpu.engine import Cpu
from ..fast.cpu.networks import Transformer as CpuTransformer
from ..fast.cpu.networks import decoder_layer
from ..fast.decoder import Attention, FusedDecoder, vae_layer
from ..fast.unet import FusedUNet, ResBlock, Transformer, TransformerBlock, normed
from ..files.model import StableDiffusion

See = Callable[[str, Tensor], None]


@dataclass(frozen=True)
class Part:
    """run: what the plain module is given -> what it is to make.  layer: the object in the fused network that is to be watched,
    if there is one.  plain: what that is given and makes in there -> what the plain module makes."""

    run: Callable[..., Tensor]
    layer: Any = None
    plain: Callable[[Any, Any], Tensor] = lambda given, made: first(made)


def see_plain(see: See, name: str, part: Part, given: Any, made: Any) -> None:
    see(name, part.plain(given, made))


class Fused:
    """The fused networks of a model.  on_cpu: in the form for a CPU, else in that for a GPU."""

    def __init__(self, model: StableDiffusion, on_cpu: bool) -> None:
        self.network = Cpu(model.unet).fuse() if on_cpu else FusedUNet(model.unet)
        self.decoder = FusedDecoder(model.vae, decoder_layer if on_cpu else vae_layer)
        self.pictures = 1  # of the call that is being computed: the time embedding is computed once for all
        names = {module: name for name, module in model.named_modules()}
        parts = (*self.embeddings(), *self.unet_parts(), *self.decoder_parts())
        self.parts = {names[module]: part for module, part in parts}  # by the checkpoint's names

    def unet(self, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> Tensor:
        """`unet.UNet.forward`, at one timestep for the whole batch."""
        self.pictures = len(x)
        given = x, self.network.shifts(t[:1], y)[0], self.network.keys_values(context)
        return FusedUNet.__call__(self.network, *given)  # each picture by itself, also where a CPU computes one for all

    @contextmanager
    def watching(self, see: See) -> Iterator[None]:
        """For the length of a with block, shows what every layer makes, as the plain module would make it."""
        with ExitStack() as watched:
            for name, part in self.parts.items():
                if part.layer is not None:
                    watched.enter_context(shown(part.layer, partial(see_plain, see, name, part)))
            yield

    def embeddings(self) -> Iterator[tuple[nn.Module, Part]]:
        for module in (self.network.network.time_embed, self.network.network.label_emb):
            if module is not None:
                yield module, Part(module, module, lambda given, made: made.expand(self.pictures, -1))

    def unet_parts(self) -> Iterator[tuple[nn.Module, Part]]:
        fused, network = self.network, self.network.network
        blocks = zip((*network.input_blocks, network.middle_block, *network.output_blocks), (*fused.down, *fused.up), strict=True)
        width = blocks_before = shifts_before = 0
        for block, layers in blocks:
            given = width  # channels that come from below; what is beyond them is the skip connection's
            for module, layer in zip(block.children(), layers, strict=True):
                if isinstance(layer, ResBlock):
                    yield module, self.res_block(layer, shifts_before, given)
                    shifts_before += 1
                elif isinstance(layer, Transformer):
                    yield from self.transformer(module, layer, blocks_before)
                    blocks_before += len(layer.blocks)
                else:
                    yield module, Part(partial(alone, layer), layer)
                width = next((len(w) for w in reversed([*module.parameters()]) if w.dim() == 4), width)
        yield network.out, Part(fused.last)

    def res_block(self, layer: ResBlock, place: int, width: int) -> Part:
        """place: among all of them.  width: of the map that its skip connection is joined to."""

        def plain(given: Any, made: Any) -> Tensor:
            return made[0] - layer.following.bias[:, None, None] if layer.following else made[0]

        def run(x: Tensor, emb: Tensor) -> Tensor:
            shift = self.network.projected(emb).split(self.network.shift_sizes, dim=-1)[place]
            skip = x[:, width:] if width < x.shape[1] else None
            return plain(x, layer(own(x if skip is None else x[:, :width]), shift, None if skip is None else own(skip)))

        return Part(run, layer, plain)

    def transformer(self, module: nn.Module, layer: Transformer, place: int) -> Iterator[tuple[nn.Module, Part]]:
        """place: of its first block among all of them."""
        on_cpu, count = isinstance(layer, CpuTransformer), len(layer.blocks)

        def prompt(context: Tensor) -> list[Tensor]:
            return [*self.network.keys_values(context).split(self.network.keys_values_sizes, dim=2)][place : place + count]

        def run(x: Tensor, context: Tensor) -> Tensor:
            x = own(x) if on_cpu or not layer.lent else own(x) + layer.bias[:, None, None].to(x.dtype)
            return layer(x, iter(prompt(context)))

        for i, (own_module, block) in enumerate(zip(module.transformer_blocks, layer.blocks, strict=True)):  # type: ignore[arg-type]
            yield own_module, self.block(layer, block, i, prompt)
        yield module, Part(run, layer)

    def block(self, layer: Transformer, block: TransformerBlock, i: int, prompt: Callable[[Tensor], list[Tensor]]) -> Part:
        """The i-th of a transformer, whose stream lacks some biases on a GPU."""
        if isinstance(layer, CpuTransformer):
            return Part(lambda x, context: layer.blocks[i].forward(own(x), prompt(context)[i]), block)

        def plain(given: Any, made: Tensor) -> Tensor:
            return made + layer.owed[3 * i + 2].to(made.dtype)

        def run(x: Tensor, context: Tensor) -> Tensor:
            shifts = [None, *layer.owed][3 * i :]
            x = own(x) if shifts[0] is None else own(x) - shifts[0].to(x.dtype)
            return plain(x, block(x, shifts, prompt(context)[i]))

        return Part(run, block, plain)

    def decoder_parts(self) -> Iterator[tuple[nn.Module, Part]]:
        fused, shifts = self.decoder, iter(self.decoder.shifts)
        ends = fused.network.decoder
        for conv in (fused.post_quant_conv, fused.conv_in, fused.conv_out):
            yield conv.conv, Part(partial(alone, conv), conv)
        yield ends.norm_out, Part(lambda x: normed(own(x), ends.norm_out), fused.conv_out, lambda given, made: given[0])
        for module, layer in zip(fused.modules, fused.parts, strict=True):
            more = (next(shifts),) if isinstance(layer, ResBlock) else (None,) if isinstance(layer, Attention) else ()
            yield module, Part(partial(with_more, layer, more), layer)


def own(x: Tensor) -> Tensor:
    """A copy in the order that fused layers want, which they may write over."""
    return x.clone(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def first(made: Any) -> Tensor:
    """Without what is known of it for the next norm."""
    return made[0] if isinstance(made, tuple) else made


def alone(layer: Any, x: Tensor, *more: Any) -> Tensor:
    return first(layer(own(x), *more))


def with_more(layer: Any, more: tuple[Any, ...], x: Tensor) -> Tensor:
    """A layer of the decoder; more: what a block's first convolution has still to be given, (C,)."""
    return first(layer(own(x), *(each if each is None else each.expand(len(x), -1) for each in more)))


@contextmanager
def shown(layer: Any, see: Callable[[Any, Any], None]) -> Iterator[None]:
    """Shows what one object is given and makes, by a class of its own: the fused networks ask which class a layer is of."""
    kind = type(layer)
    method = "forward" if "forward" in vars(kind) else "__call__"

    def call(self: Any, *given: Any, **named: Any) -> Any:
        made = getattr(kind, method)(self, *given, **named)
        see(given, made)
        return made

    layer.__class__ = type(kind.__name__, (kind,), {method: call})
    try:
        yield
    finally:
        layer.__class__ = kind
