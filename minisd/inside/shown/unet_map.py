"""The UNet as its key list draws it: blocks, skips, attention, shapes, parameters and arithmetic, from a checkpoint's header."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ...errors import UsageError, shown
from ...files.checkpoint import open_checkpoint
from ...files.model import build
from ...files.recognition import recognise
from ...models.unet import SpatialTransformer, UNet
from ...options import MAX_SIDE
from ...text.tokenizer import LENGTH
from . import svg

WIDTH, TOP, PITCH, HEIGHT, INSET = 1240.0, 92.0, 54.0, 30.0, 22.0
LEFT, RIGHT = 260.0, 710.0  # where the blocks of the way down begin, and those of the way up
LAYERS = {  # by the class of a layer: what it is called, its width and its colour
    "Conv2d": ("conv", 48.0, "#dfe3e8"),
    "ResBlock": ("ResBlock", 74.0, "#cddcec"),
    "SpatialTransformer": ("attention", 88.0, "#f3dcc0"),
    "Downsample": ("down", 52.0, "#d5e5d3"),
    "Upsample": ("up", 52.0, "#d5e5d3"),
}


@dataclass(frozen=True)
class Block:
    """A block as it ran; shapes are (C, H, W)."""

    name: str
    layers: tuple[tuple[str, int], ...]  # class, and of a SpatialTransformer how many transformer blocks
    given: tuple[int, ...]
    made: tuple[int, ...]
    parameters: int
    flops: int  # of one row, such as the prompt's


@dataclass(frozen=True)
class Blueprint:
    title: str
    size: tuple[int, int]  # of the picture, (width, height)
    blocks: tuple[Block, ...]  # in the order in which they run
    parameters: int  # of the whole UNet
    flops: int
    context: tuple[int, int]  # (tokens, channels) of the text


def blueprint_of(path: str | os.PathLike[str], size: tuple[int, int] | None = None) -> Blueprint:
    """Of a checkpoint, from its header alone.  size: of the picture, (width, height), by default the model's own.

    Raises CheckpointError, UsageError.
    """
    checkpoint = open_checkpoint(path)
    found = recognise(checkpoint, vae_given=True)
    size = size or found.size
    if any(length % 8 or not 8 <= length <= MAX_SIDE for length in size):
        raise UsageError(f"size: expected multiples of 8 from 8 to {MAX_SIDE}, found {size[0]}x{size[1]}")
    model = build(checkpoint, found.family)
    downscale = model.vae.downscale if hasattr(model, "first_stage_model") else 8
    blocks, flops = run(model.unet, (size[1] // downscale, size[0] // downscale))
    count = sum(weight.numel() for weight in model.unet.parameters())
    title = f"{checkpoint.path.name}: {found.family.title}"
    return Blueprint(title, size, tuple(blocks), count, flops, (LENGTH, model.unet.context_channels))


@torch.no_grad()
def run(unet: UNet, latents: tuple[int, int]) -> tuple[list[Block], int]:
    """The blocks in the order in which they run, seen by hooks on the meta device, and the arithmetic of all."""
    blocks: list[Block] = []
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for name, module in unet.named_modules():
            if name == "middle_block" or name.rpartition(".")[0] in ("input_blocks", "output_blocks"):
                watch(name, module, counter, blocks)
        y = torch.empty(1, unet.vector_channels) if unet.vector_channels else None
        unet(torch.empty(1, unet.in_channels, *latents), torch.empty(1), torch.empty(1, LENGTH, unet.context_channels), y)
        return blocks, counter.get_total_flops()


def watch(name: str, module: nn.Module, counter: FlopCounterMode, blocks: list[Block]) -> None:
    before: list[int] = []

    def after(block: nn.Module, given: tuple[Any, ...], made: torch.Tensor) -> None:
        layers = [(type(each).__name__, depth(each)) for each in block.children()]
        count = sum(weight.numel() for weight in block.parameters())
        flops = counter.get_total_flops() - before.pop()
        blocks.append(Block(name, tuple(layers), tuple(given[0].shape[1:]), tuple(made.shape[1:]), count, flops))

    module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))
    module.register_forward_hook(after)


def depth(layer: nn.Module) -> int:
    return len(layer.transformer_blocks) if isinstance(layer, SpatialTransformer) else 0


def written(shape: Sequence[int]) -> str:
    return " × ".join(map(str, shape))


def millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count / 1e3:,.1f} k"


def drawn(plan: Blueprint, heat: Mapping[str, float] | None = None, heat_words: str = "") -> str:
    """The UNet as an SVG.  heat: a number from 0 to 1 by block, shown as a mark beside it; heat_words: what it is."""
    down = [block for block in plan.blocks if block.name.startswith("input")]
    up = [block for block in plan.blocks if block.name.startswith("output")][::-1]  # beside the block whose output it takes
    (middle,) = (block for block in plan.blocks if block.name == "middle_block")
    bottom = TOP + PITCH * max(len(down), len(up))
    height = bottom + 150 + (20 if heat else 0)
    parts = [svg.box(0, 0, WIDTH, height, svg.PAPER), *headline(plan), *bands(down)]
    for side, blocks in ((0, down), (1, up)):
        for row, block in enumerate(blocks):
            parts += [*arrow(side, row, blocks), *block_parts(plan, block, side, row, depth_of(block, down), heat)]
    for row, (block, other) in enumerate(zip(down, up, strict=False)):
        parts += skip(block, other, row, depth_of(block, down), depth_of(other, down))
    parts += middle_parts(plan, middle, bottom + 28, heat, depth_of(middle, down))
    notes = "Grey lines are skips: an output block is given what the block beside it made, behind the output of the one before."
    parts.append(svg.text(WIDTH / 2, height - 34, notes, 12, svg.PALE, text_anchor="middle"))
    more = f"Every ResBlock is told the timestep; every attention reads the text, {written(plan.context)} numbers."
    more += " The bar below a block is its arithmetic beside the largest."
    parts.append(svg.text(WIDTH / 2, height - 16, more, 12, svg.PALE, text_anchor="middle"))
    if heat:
        parts.append(svg.text(WIDTH / 2, height - 54, heat_words, 12, svg.PALE, text_anchor="middle"))
    return svg.picture(WIDTH, height, parts, plan.title)


def headline(plan: Blueprint) -> Iterator[str]:
    yield svg.text(WIDTH / 2, 30, f"The UNet of {shown(plan.title, 110)}", 18, text_anchor="middle", font_weight="600")
    picture = f"{plan.size[0]}×{plan.size[1]} pixels"
    facts = f"{millions(plan.parameters)} parameters, {plan.flops / 1e9:,.1f} GFLOPs for one row at {picture}"
    facts += "; shapes are channels × height × width"
    yield svg.text(WIDTH / 2, 52, facts, 12, svg.PALE, text_anchor="middle")
    first, last = plan.blocks[0], plan.blocks[-1]
    yield svg.text(LEFT + 40, TOP - 18, f"noisy latents {written(first.given)}", 12, text_anchor="middle")
    yield svg.text(RIGHT + 100, TOP - 18, f"the noise in them, by out, of {last.made[0]} channels", 12, text_anchor="middle")


def depth_of(block: Block, down: Sequence[Block]) -> int:
    """How often the feature maps were halved."""
    return max(0, round(down[0].made[1] / max(block.made[1], 1)).bit_length() - 1)


def bands(down: Sequence[Block]) -> Iterator[str]:
    """A shade for every other resolution."""
    for row, block in enumerate(down):
        if depth_of(block, down) % 2 == 0:
            yield svg.box(0, TOP - 12 + PITCH * row, WIDTH, PITCH, "#f6f7f9")


def place(side: int, row: int, depth: int) -> tuple[float, float]:
    return (LEFT + INSET * depth if side == 0 else RIGHT - INSET * depth), TOP + PITCH * row


def chips(block: Block, x: float, y: float) -> Iterator[str]:
    for kind, depth in block.layers:
        words, width, colour = LAYERS.get(kind, (kind, 80.0, "#eeeeee"))
        words = f"{words} ×{depth}" if depth > 1 else words
        yield svg.box(x, y, width, HEIGHT, colour, kind, stroke=svg.PAPER, stroke_width=1.5, rx=3)
        yield svg.text(x + width / 2, y + HEIGHT / 2 + 4, words, 12, text_anchor="middle")
        x += width


def width_of(block: Block) -> float:
    return sum(LAYERS.get(kind, ("", 80.0, ""))[1] for kind, _ in block.layers)


def block_parts(
    plan: Blueprint, block: Block, side: int, row: int, depth: int, heat: Mapping[str, float] | None
) -> Iterator[str]:
    x, y = place(side, row, depth)
    yield from chips(block, x, y)
    yield from share(plan, block, x, y + HEIGHT + 3)
    edge, anchor = (x - 10, "end") if side == 0 else (x + width_of(block) + 10, "start")
    yield svg.text(edge, y + 12, block.name, 12, text_anchor=anchor, font_weight="600")
    facts = f"{written(block.made)}  ·  {millions(block.parameters)}"
    yield svg.text(edge, y + 27, facts, 11, svg.PALE, text_anchor=anchor)
    yield from mark(block, x, y, heat)


def share(plan: Blueprint, block: Block, x: float, y: float) -> Iterator[str]:
    part = block.flops / max(plan.flops, 1)
    title = f"{block.name}: {100 * part:.1f} % of the arithmetic, {block.flops / 1e9:,.2f} GFLOPs"
    yield svg.box(x, y, width_of(block), 4, "#e9ebee", rx=2)
    largest = max(each.flops for each in plan.blocks)
    yield svg.box(x, y, width_of(block) * block.flops / max(largest, 1), 4, "#7f93a8", title, rx=2)


def mark(block: Block, x: float, y: float, heat: Mapping[str, float] | None) -> Iterator[str]:
    if heat and block.name in heat:
        level = min(max(heat[block.name], 0.0), 1.0)
        title = f"{block.name}: {100 * level:.0f} % of the largest"
        yield svg.box(
            x - 3, y - 3, width_of(block) + 6, HEIGHT + 6, "none", title,
            stroke="#c2410c", stroke_width=0.6 + 4.4 * level, stroke_opacity=0.15 + 0.8 * level, rx=5,
        )  # fmt: skip


def arrow(side: int, row: int, blocks: Sequence[Block]) -> Iterator[str]:
    """From the block above on the way down, to it on the way up."""
    if row == 0:
        return
    x = 24.0 + max(place(side, each, depth_of(blocks[each], blocks))[0] for each in (row - 1, row))
    upper, lower = TOP + PITCH * (row - 1) + HEIGHT + 7, TOP + PITCH * row - 1
    yield svg.line([(x, upper), (x, lower)], svg.INK, 1.2)
    tip, base = (lower, lower - 5) if side == 0 else (upper, upper + 5)
    yield svg.line([(x - 4, base), (x, tip), (x + 4, base)], svg.INK, 1.2)


def skip(block: Block, other: Block, row: int, depth: int, other_depth: int) -> Iterator[str]:
    start, end = place(0, row, depth)[0] + width_of(block) + 4, place(1, row, other_depth)[0] - 4
    y = TOP + PITCH * row + HEIGHT / 2
    yield svg.line([(start, y), (end, y)], svg.LINE, 1.3)
    words = f"{other.given[0] - block.made[0]} + {block.made[0]}"
    yield svg.text((start + end) / 2, y - 5, words, 11, svg.PALE, text_anchor="middle")


def middle_parts(plan: Blueprint, block: Block, y: float, heat: Mapping[str, float] | None, depth: int) -> Iterator[str]:
    width = width_of(block)
    x = (LEFT + RIGHT + 80) / 2 - width / 2
    yield from chips(block, x, y)
    yield from share(plan, block, x, y + HEIGHT + 3)
    yield svg.text(x + width / 2, y - 8, block.name, 12, text_anchor="middle", font_weight="600")
    facts = f"{written(block.made)}  ·  {millions(block.parameters)}"
    yield svg.text(x + width / 2, y + HEIGHT + 22, facts, 11, svg.PALE, text_anchor="middle")
    yield from mark(block, x, y, heat)
    left, right, centre = LEFT + INSET * depth + 24, RIGHT - INSET * depth + 24, y + HEIGHT / 2
    yield svg.line([(left, y - 34), (left, centre), (x - 6, centre)], svg.INK, 1.2)
    yield svg.line([(x + width + 6, centre), (right, centre), (right, y - 34)], svg.INK, 1.2)
    yield svg.line([(x - 11, centre - 4), (x - 6, centre), (x - 11, centre + 4)], svg.INK, 1.2)
    yield svg.line([(right - 4, y - 29), (right, y - 34), (right + 4, y - 29)], svg.INK, 1.2)
