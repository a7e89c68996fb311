"""The blocks of a UNet by name, for merging and comparing: input.0 …, middle, output.0 …, and what stands outside of them.

Per-block merging gives each block its own ratio.  In what the community has written about it the blocks are IN00 to IN11, M00 and
OUT00 to OUT11 (SD 1.x) or IN00 to IN08, M00 and OUT00 to OUT08 (SDXL), and weights are lists of 25 or 19 numbers in this order.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable

from ..errors import UsageError
from .family import UNET, VAE

OUTSIDE = ("time_embed", "label_emb", "out")  # parts of the UNet that are in no block
COMFY = "comfy:"
PLACES = {"input": "input_blocks", "middle": "middle_block", "output": "output_blocks"}

# Ratio by the place t of a block, 0 for the first and 1 for the last.  The names are those of SuperMerger's preset file.
PRESETS: dict[str, Callable[[float], float]] = {
    "grad_v": lambda t: abs(2 * t - 1),
    "grad_a": lambda t: 1 - abs(2 * t - 1),
    "smoothstep": lambda t: t * t * (3 - 2 * t),
    "reverse-smoothstep": lambda t: 1 - t * t * (3 - 2 * t),
    "cosine": lambda t: (1 + math.cos(math.pi * t)) / 2,
    "reverse-cosine": lambda t: (1 - math.cos(math.pi * t)) / 2,
    "inputs": lambda t: float(t < 0.5),
    "outputs": lambda t: float(t > 0.5),
}


def block_of(key: str) -> str | None:
    """The block that a key of a checkpoint belongs to ("input.4", "middle", "output.11", "time_embed"); None outside the UNet."""
    if not key.startswith(f"{UNET}."):
        return None
    place, _, rest = key[len(UNET) + 1 :].partition(".")
    for name, prefix in PLACES.items():
        if place == prefix:
            return name if name == "middle" else f"{name}.{rest.split('.', 1)[0]}"
    return place


def part_of(key: str) -> str:
    """unet, vae or text."""
    return "unet" if key.startswith(f"{UNET}.") else "vae" if key.startswith(f"{VAE}.") else "text"


def group_of(key: str) -> str:
    """Where a key belongs in a table of a whole file: a block of the UNet, a layer of a text encoder ("text.11", in SDXL
    "text.1.31"), "vae.encoder"; of other files the first part of the name."""
    block = block_of(key)
    if block is not None:
        return block
    if key.startswith(f"{VAE}."):
        return f"vae.{key.split('.')[1]}"
    tower = re.match(r"cond_stage_model\.|conditioner\.embedders\.(\d+)\.", key)
    if not tower:
        return key.split(".", 1)[0]
    layer = re.search(r"\.(?:layers|resblocks)\.(\d+)\.", key)
    return ".".join(["text", *(number for number in (tower[1], layer and layer[1]) if number)])


KINDS = {"attn1": "self-attention", "attn2": "cross-attention", "ff": "feed-forward"}


def kind_of(key: str) -> str:
    """What a key of the UNet serves: a kind of attention, "feed-forward", "transformer" (the rest of one) or "convolution"."""
    for part in key.split("."):
        if part in KINDS:
            return KINDS[part]
    inner = ("transformer_blocks", "proj_in", "proj_out", "norm")
    return "transformer" if any(part in inner for part in key.split(".")) else "convolution"


def blocks_of(keys: Iterable[str]) -> list[str]:
    """The blocks of a UNet from its first to its last, without what stands outside."""
    return in_order({block for key in keys if (block := block_of(key)) and block.split(".")[0] in PLACES})


def in_order(groups: Iterable[str]) -> list[str]:
    """From the first block to the last; then what stands outside, and what is no block."""
    places = [*PLACES, *OUTSIDE, "text", "vae"]

    def rank(group: str) -> tuple[int, list[int], str]:
        place, *rest = group.split(".")
        known = places.index(place) if place in places else len(places)
        return known, [int(part) for part in rest if part.isdecimal()], group

    return sorted(groups, key=rank)


def block_ratios(spec: str, keys: Iterable[str], with_base: bool = False) -> dict[str, float]:
    """A ratio for each block that a text names; what it does not name keeps the ratio of its part.

    spec: a preset ("grad_v"); a number for each block ("0,0.1,…", 25 for SD 1.x); blocks and ranges of them with their ratio
    ("input.0-3=0.2, middle=0.5, output=1, time_embed=0, out=1"); or "comfy:" and the three numbers of ComfyUI's ModelMergeBlocks.
    Raises UsageError.
    """
    keys = list(keys)
    blocks = blocks_of(keys)
    if not blocks:
        raise UsageError("blocks: expected a model with the blocks of a UNet, found none in it")
    spec = spec.strip().lower()
    if spec in PRESETS:
        return {block: PRESETS[spec](i / max(len(blocks) - 1, 1)) for i, block in enumerate(blocks)}
    if spec.startswith(COMFY):
        if with_base:
            raise UsageError(f"blocks: {COMFY} says how much of the first of two models is kept; expected no base with it")
        return of_comfyui(spec.removeprefix(COMFY), keys)
    items = [item.strip() for item in spec.split(",")]
    if "=" not in spec:
        if len(items) != len(blocks):
            raise UsageError(
                f"blocks: expected {len(blocks)} numbers ({blocks[0]} to {blocks[-1]}), NAME=RATIO, …, "
                f"{COMFY}INPUT,MIDDLE,OUT, or one of {', '.join(PRESETS)}; found {spec!r}"
            )
        return {block: ratio(item) for block, item in zip(blocks, items, strict=True)}
    outside = {block_of(key) for key in keys} & set(OUTSIDE)
    return {
        block: ratio(value)
        for item in items
        for name, _, value in [item.partition("=")]
        for block in named(name.strip(), blocks, outside)
    }


def of_comfyui(numbers: str, keys: Iterable[str]) -> dict[str, float]:
    """Our ratios for "INPUT,MIDDLE,OUT" of ComfyUI's node ModelMergeBlocks (comfy_extras/nodes_model_merging.py).

    Its numbers say how much of the first model is kept, ours how much of the second comes in: 1 - r.  Its `out` is meant for all
    names that begin so, output_blocks and out; its `input` for those that no number is for, too: time_embed and label_emb.
    """
    kept = [ratio(number) for number in numbers.split(",")]
    if len(kept) != 3:
        raise UsageError(f"blocks: expected {COMFY}INPUT,MIDDLE,OUT as in ComfyUI's ModelMergeBlocks, found {COMFY}{numbers}")
    first, middle, last = (1 - each for each in kept)
    by_place = {"middle": middle, "output": last, "out": last}
    blocks = {block for key in keys if (block := block_of(key))}
    return {block: by_place.get(block.split(".")[0], first) for block in in_order(blocks)}


def ratio(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UsageError(f"blocks: expected a number as ratio, found {text!r}")
    return value


def named(name: str, blocks: list[str], outside: set[str | None]) -> list[str]:
    """The blocks behind "input", "input.3", "input.0-3", "middle" or "time_embed"."""
    if name in outside:
        return [name]
    place, first, last = (
        re.fullmatch(r"([a-z_]+)(?:\.([0-9]{1,4})(?:-([0-9]{1,4}))?)?", name) or re.match("()()()", "")
    ).groups()  # type: ignore[union-attr]
    numbers = range(int(first), int(last or first) + 1) if first else None
    wanted = [block for block in blocks if block.split(".")[0] == place] if numbers is None else [f"{place}.{i}" for i in numbers]
    if not wanted or not set(wanted) <= set(blocks):
        ends = [group for place in PLACES for group in [[block for block in blocks if block.split(".")[0] == place]] if group]
        ranges = [group[0] if len(group) == 1 else f"{group[0]} to {group[-1]}" for group in ends]
        known = ", ".join([*ranges, *sorted(filter(None, outside))])
        raise UsageError(f"blocks: expected blocks of this UNet ({known}), found {name!r}")
    return wanted
