"""What is different between two checkpoints: keys, shapes, dtypes, and by how much the numbers."""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..errors import shown
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.saving import Progress
from ..files.tensors import TORCH, read_stored, stored_pieces
from ..models.blocks import KINDS, block_of, group_of, in_order, kind_of, part_of

LISTED = 10  # keys of a list that are shown


class Change:
    """Sums over the tensors of a group, which give its relative change ||B - A|| / ||A||."""

    def __init__(self) -> None:
        self.difference = self.size = 0.0
        self.tensors = self.changed = 0

    def add(self, difference: float, size: float) -> None:
        self.difference += difference
        self.size += size
        self.tensors += 1
        self.changed += difference != 0

    def facts(self) -> dict[str, Any]:
        """change: None where A is all zero, or something is not finite: there is no ratio."""
        ratio = math.sqrt(self.difference / self.size) if self.size > 0 else 0.0 if self.difference == 0 else math.nan
        return {"tensors": self.tensors, "changed": self.changed, "change": ratio if math.isfinite(ratio) else None}


def diff(a: str | os.PathLike[str], b: str | os.PathLike[str], progress: Progress | None = None) -> dict[str, Any]:
    """Compares two files, ready for JSON.  Raises CheckpointError.

    only_a, only_b: keys; shape, dtype: by key what A and B have; parts ("unet", "text", "vae"), blocks (see blocks.group_of) and
    layers (blocks of the UNet, by kind): of each the number of tensors, how many differ, and the relative change
    ||B - A|| / ||A|| over all of its numbers.
    """
    first, second = open_checkpoint(a), open_checkpoint(b)
    both = [key for key in first.entries if key in second.entries]
    tables: dict[str, dict[str, Change]] = {"parts": {}, "blocks": {}, "layers": {}}
    if not both:
        warnings.warn("the two have no key in common: they are models of different kinds, or one is a part alone", stacklevel=2)
    total, done = sum(first.entries[key].nbytes for key in both), 0
    for key in both:
        entry, other = first.entries[key], second.entries[key]
        done += entry.nbytes
        if entry.dtype in TORCH and other.dtype in TORCH and entry.numel == other.numel:
            sums = squares(first, second, key)
            tables["parts"].setdefault(part_of(key), Change()).add(*sums)
            tables["blocks"].setdefault(group_of(key), Change()).add(*sums)
            if block := block_of(key):
                tables["layers"].setdefault(f"{block} {kind_of(key)}", Change()).add(*sums)
        if progress:
            progress(done, total)
    differs = {
        what: {
            key: [getattr(file.entries[key], what) for file in (first, second)]
            for key in both
            if getattr(first.entries[key], what) != getattr(second.entries[key], what)
        }
        for what in ("shape", "dtype")
    }
    return {
        "a": str(first.path),
        "b": str(second.path),
        "common": len(both),
        "only_a": [key for key in first.entries if key not in second.entries],
        "only_b": [key for key in second.entries if key not in first.entries],
        **differs,
        **{name: {group: change.facts() for group, change in table.items()} for name, table in tables.items()},
    }


def squares(first: Checkpoint, second: Checkpoint, key: str) -> tuple[float, float]:
    """(||B - A||^2, ||A||^2) of one tensor."""
    if not all(file.entries[key].in_one_piece for file in (first, second)):
        pairs = [(read_stored(first, key).flatten(), read_stored(second, key).flatten())]
    else:
        pairs = zip(stored_pieces(first, key), stored_pieces(second, key), strict=True)  # type: ignore[assignment]
    difference = size = 0.0
    for a, b in pairs:
        difference += 0.0 if a.dtype == b.dtype and torch.equal(a, b) else squared(b.float() - a.float())
        size += squared(a.float())
    return difference, size


def squared(numbers: Tensor) -> float:
    return float(torch.linalg.vector_norm(numbers)) ** 2


def as_text(facts: Mapping[str, Any]) -> str:
    lines = [f"A {shown(facts['a'], 500)}", f"B {shown(facts['b'], 500)}", f"  {facts['common']:,} keys in both"]
    for what, keys in (("only in A", facts["only_a"]), ("only in B", facts["only_b"])):
        if keys:
            lines.append(f"  {len(keys):,} {what}: {listed(keys)}")
    if facts["shape"]:
        pairs = [f"{key} {tuple(a)} -> {tuple(b)}" for key, (a, b) in facts["shape"].items()]
        lines.append(f"  {len(pairs):,} in another shape: {listed(pairs)}")
    kinds: dict[str, int] = {}
    for a, b in facts["dtype"].values():
        kinds[f"{a} -> {b}"] = kinds.get(f"{a} -> {b}", 0) + 1
    lines += [f"  {count:,} in another dtype: {kind}" for kind, count in kinds.items()]
    for title in ("parts", "blocks"):
        lines.append(f"  {title:<24}{'tensors':>8}{'changed':>9}   relative change")
        for group in in_order(facts[title]):
            each = facts[title][group]
            lines.append(f"  {shown(group, 22):<24}{each['tensors']:>8}{each['changed']:>9}   {percent(each['change']):>9}")
    return "\n".join(lines)


def listed(texts: list[str]) -> str:
    return shown(", ".join(texts[:LISTED]), 1000) + (", …" if len(texts) > LISTED else "")


def percent(change: float | None) -> str:
    return "no ratio" if change is None else "same" if change == 0 else f"{change:.3%}" if change < 0.1 else f"{change:.1%}"


CELL = (116, 22)
LABELS = 90


def heat_map(facts: Mapping[str, Any]) -> Image.Image:
    """The blocks of the UNet from top to bottom, what is in them from left to right; white: the same, dark: changed by 100 %."""
    layers = facts["layers"]
    blocks = in_order({layer.split(" ")[0] for layer in layers})
    kinds = ["convolution", "transformer", *KINDS.values()]
    font = ImageFont.load_default(12)
    sheet = Image.new("RGB", (LABELS + len(kinds) * CELL[0], (len(blocks) + 1) * CELL[1] + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for column, kind in enumerate(kinds):
        draw.text((LABELS + column * CELL[0] + 6, 6), kind, "black", font)
    for row, block in enumerate(blocks, start=1):
        draw.text((6, row * CELL[1] + 6), block, "black", font)
        for column, kind in enumerate(kinds):
            if f"{block} {kind}" in layers:
                change = layers[f"{block} {kind}"]["change"]
                x, y = LABELS + column * CELL[0], row * CELL[1] + 2
                dark = darkness(change)
                draw.rectangle((x, y, x + CELL[0] - 2, y + CELL[1] - 2), colour(dark))
                draw.text((x + 6, y + 3), percent(change), "white" if dark > 0.5 else "black", font)
    return sheet


def darkness(change: float | None) -> float:
    """0 for a change of 0.01 % or less, 1 for 100 % or more, by its logarithm."""
    if change is None:
        return 1.0
    return min(max(1 + math.log10(change) / 4, 0), 1) if change > 0 else 0.0


def colour(dark: float) -> tuple[int, int, int]:
    white, blue = (255, 255, 255), (16, 42, 110)
    return tuple(round(a + (b - a) * dark) for a, b in zip(white, blue, strict=True))  # type: ignore[return-value]
