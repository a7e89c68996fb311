"""What is layered on a model right now: weights change in place, and are the file's again, to the bit, once nothing is on them.

Each add-on changes the file's weight and the changes add, so their order does not matter.  The file's weights are kept in main
memory from the first time that they are changed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UsageError
from ..fast.lossy.float8 import is_float8
from ..models.blocks import block_of, block_ratios
from ..models.family import UNET, Family
from ..models.shapes import Shapes
from .lora_file import Addon, Change, check_fits, open_addon, part_of
from .lora_formulas import RULES
from .wanted import Lora, Wanted, facts

# Of a weight at a time.  Half and twice as many measured the same, an eighth took a third longer, all at once a fifth.
NUMBERS = 1 << 21


@dataclass(frozen=True)
class Active:
    """An add-on that is on."""

    addon: Addon
    lora: Lora
    blocks: Mapping[str, float]

    def strength(self, change: Change) -> float:
        key = change.target.key
        if not key.startswith(f"{UNET}."):
            return self.lora.strength if self.lora.text_strength is None else self.lora.text_strength
        return self.lora.strength * self.blocks.get(block_of(key) or "", 1.0)


class Stack:
    """The add-ons of one model.  Files that were once open stay so: to change a strength reads nothing again."""

    def __init__(
        self, model: nn.Module, family: Family, layering: Callable[[], AbstractContextManager[None]] = nullcontext
    ) -> None:
        """layering: within it weights are written to."""
        self.model, self.family, self.layering = model, family, layering
        self.base: dict[str, Tensor] = {}  # of the weights that were ever changed, in main memory
        self.opened: dict[str, Addon] = {}
        self.active: tuple[Active, ...] = ()
        self.rule = RULES[0]
        self.kept = self.on = Wanted()  # what is on where a request says nothing, and now
        self.holders = 0  # pictures in the making, which want it to stay
        self.scratch: Tensor | None = None

    def open(self, path: str | os.PathLike[str]) -> Addon:
        """A file by its path, size and time of change; one that is gone meanwhile as it was.  Raises CheckpointError."""
        known = self.opened.get(os.path.realpath(path))
        if known is not None and (known.file.is_still_there() or not os.path.exists(path)):
            return known
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict(keep_vars=True).items()}
        addon = self.opened[os.path.realpath(path)] = open_addon(path, Shapes(shapes), self.family)
        return addon

    def keep(self, wanted: Wanted) -> None:
        """On from now on, where a request says nothing.  Raises CheckpointError and UsageError, before any weight is touched."""
        self.put_on(wanted)
        self.kept = wanted

    @contextmanager
    def holding(self, wanted: Wanted) -> Iterator[None]:
        """On while a picture is drawn.  Raises as `keep`."""
        self.put_on(wanted)
        self.holders += 1
        try:
            yield
        finally:
            self.holders -= 1

    def put_on(self, wanted: Wanted) -> None:
        if wanted == self.on and all(self.open(each.lora.source) is each.addon for each in self.active):
            return
        if self.holders:
            raise UsageError("loras: a picture is being drawn with others; finish or close that stream first, or load twice")
        self.set(self.check(wanted), wanted.rule)
        self.on = wanted

    def check(self, wanted: Wanted) -> list[Active]:
        """What putting it on would make active; raises what that would raise, and touches nothing."""
        if wanted.rule not in RULES:
            raise UsageError(f"lora_rule: expected {' or '.join(RULES)}, found {wanted.rule!r}")
        keys = [*self.model.state_dict(keep_vars=True)]
        if wanted.loras and is_float8(self.model):
            raise UsageError("loras: expected none with fp8, whose weights are rounded: merge them into a file first")
        return [ready(self.open(lora.source), lora, self.family, keys, wanted.partial) for lora in wanted.loras]

    @torch.no_grad()
    def set(self, active: Sequence[Active], rule: str) -> None:
        """These and no others.

        rule: "paper", or "comfyui" to meet a picture of it: see lora_formulas.delta; there each add-on also changes what those
        before it left.
        """
        weights = dict(self.model.state_dict(keep_vars=True))  # as they are: not all need be made plain (fast/cpu/packing.py)
        before = {change.target.key for each in self.active for change in each.addon.changes}
        by_key: dict[str, list[tuple[Active, Change]]] = {key: [] for key in before}
        for each in active:
            for change in each.addon.changes:
                by_key.setdefault(change.target.key, []).append((each, change))
        self.active, self.rule = tuple(active), rule
        with self.layering():
            for key, changes in by_key.items():
                if key not in self.base:
                    self.base[key] = torch.empty_like(weights[key], device="cpu")
                if key in before:
                    weights[key].copy_(self.base[key])
                else:  # somebody may have trained it since it was last changed
                    self.base[key].copy_(weights[key])
                self.change(weights[key], self.base[key], [pair for pair in changes if pair[0].strength(pair[1])])

    def changed_from(self) -> dict[str, Tensor]:
        """What the file has, in main memory, of the weights that are changed now."""
        return {change.target.key: self.base[change.target.key] for each in self.active for change in each.addon.changes}

    def facts(self) -> list[dict[str, Any]]:
        """What a recipe says of what is on."""
        return [facts(each.lora, each.addon) for each in self.active]

    def change(self, weight: Tensor, base: Tensor, changes: Sequence[tuple[Active, Change]]) -> None:
        """Adds the changes of all add-ons to the file's weight, in place; in float32 until the end."""
        if not changes:
            return
        numbers = weight.detach()  # of one that is packed, those that are multiplied with next (fast/cpu/packing.py)
        if is_dense(numbers) and all(change.is_product and change.target.is_whole for _, change in changes):
            self.add_products(numbers, changes)
        else:
            wide = self.wide(numbers)
            layer(wide, base, changes, self.rule)
            numbers.copy_(wide)
        if not weight.is_inference():  # which nobody counts
            torch.autograd.graph.increment_version(weight)

    def add_products(self, weight: Tensor, changes: Sequence[tuple[Active, Change]]) -> None:
        """Some rows at a time, which stay in a processor's cache, so that main memory gives and takes each number once."""
        factors = [(strength_of(*each), *factors_of(*each, weight)) for each in changes]
        some = max(1, NUMBERS * len(weight) // weight.numel()) if weight.device.type == "cpu" else len(weight)
        for start in range(0, len(weight), some):
            rows = weight[start : start + some]
            wide = self.wide(rows)
            for strength, up, down in factors:
                as_matrix(wide).addmm_(up[start : start + some], down, alpha=strength)
            if wide is not rows:
                rows.copy_(wide)

    def wide(self, weight: Tensor) -> Tensor:
        """A weight in float32, in memory that is the same each time; one that is so, itself."""
        if weight.dtype == torch.float32:
            return weight
        if self.scratch is None or self.scratch.numel() < weight.numel() or self.scratch.device != weight.device:
            self.scratch = torch.empty(weight.numel(), device=weight.device)
        order = torch.channels_last if lies_channels_last(weight) else torch.contiguous_format
        strides = torch.empty_like(weight, device="meta", memory_format=order).stride()
        return self.scratch[: weight.numel()].as_strided(weight.shape, strides).copy_(weight)


def layer(result: Tensor, base: Tensor, changes: Sequence[tuple[Active, Change]], rule: str) -> None:
    """Adds changes to a weight, float32, in place; base: what the file has."""
    for active, change in changes:
        strength, part = active.strength(change), part_of(result, change.target)
        if change.is_product and is_dense(part):
            up, down = factors_of(active, change, part)
            as_matrix(part).addmm_(up, down, alpha=strength_of(active, change))
        elif strength:
            before = part_of(base.to(part.device), change.target).float() if rule == "paper" else part.clone()
            part.add_(active.addon.change_of(change, before, strength, rule))


def strength_of(active: Active, change: Change) -> float:
    """How much of a product is added."""
    return active.strength(change) * active.addon.scale(change)


def factors_of(active: Active, change: Change, part: Tensor) -> tuple[Tensor, Tensor]:
    """The product's (N, R) and (R, K), as `as_matrix` has the part of a weight that it is for."""
    up, down = (active.addon.factors[change.parts[name]].to(part.device) for name in ("up", "down"))
    down = down.reshape(len(down), *part.shape[1:])  # some files have it as a matrix
    return up.flatten(1), (down.permute(0, 2, 3, 1) if lies_channels_last(part) else down).flatten(1)


def as_matrix(weight: Tensor) -> Tensor:
    """(N, K) or (N, C, h, w) -> (N, K), as a view, the numbers of a row in the order in which they lie in memory."""
    return (weight.permute(0, 2, 3, 1) if lies_channels_last(weight) else weight).view(len(weight), -1)


def is_dense(weight: Tensor) -> bool:
    """Whether `as_matrix` is a view of it."""
    return weight.is_contiguous() or lies_channels_last(weight)


def lies_channels_last(weight: Tensor) -> bool:
    return weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def ready(addon: Addon, lora: Lora, family: Family, keys: Iterable[str], partial: bool) -> Active:
    """An add-on whose numbers are read and sound; keys: of the checkpoint, whose blocks have names.

    partial: take what fits of a file, where else it is refused.  Raises CheckpointError, UsageError.
    """
    if not (partial and addon.changes):
        check_fits(addon, family)
    addon.factors  # noqa: B018  reads them, once
    return Active(addon, lora, block_ratios(lora.blocks, keys) if isinstance(lora.blocks, str) else lora.blocks or {})
