"""What is layered on a model right now: weights change in place, and are the file's again, to the bit, once nothing is on them.

Each add-on changes the file's weight and the changes add, so their order does not matter.  The file's weights are kept in main
memory from the first time that they are changed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, UsageError
from ..models.blocks import block_of, block_ratios
from ..models.family import UNET, Family
from ..models.shapes import Shapes
from .lora_file import Addon, Change, check_fits, open_addon, part_of
from .lora_formulas import RULES

MOST = 100.0  # a strength: beyond it is a slip of the hand


@dataclass(frozen=True)
class Lora:
    """A LoRA or one of its relatives, and how strong it is.

    source: a file, or as a text a name in the library; strength: times the change that was trained, negative turns it round;
    text_strength: for the text encoders, by default the same; blocks: other strengths for blocks of the UNet, as a text in the
    words of models.blocks.block_ratios ("input.0-3=0, middle=0.5", a preset or a number for each block) or by block: they
    multiply `strength`.
    """

    source: str | os.PathLike[str]
    strength: float = 1.0
    text_strength: float | None = None
    blocks: str | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "text_strength"):
            value = getattr(self, name)
            if value is None and name == "text_strength":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST <= value <= MOST:
                raise UsageError(f"lora {name}: expected a number from {-MOST:g} to {MOST:g}, found {value!r}")


def as_lora(given: object) -> Lora:
    """Of a Lora, a path, or (path, strength) and (path, strength, text strength)."""
    if isinstance(given, Lora):
        return given
    if isinstance(given, str | os.PathLike):
        return Lora(given)
    if isinstance(given, tuple | list) and 1 <= len(given) <= 3 and isinstance(given[0], str | os.PathLike):
        return Lora(*given)
    raise UsageError(f"loras: expected a path, (path, strength) or (path, strength, text_strength), found {repr(given)[:80]}")


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

    def __init__(self, model: nn.Module, family: Family) -> None:
        self.model, self.family = model, family
        self.base: dict[str, Tensor] = {}  # of the weights that were ever changed, in main memory
        self.opened: dict[tuple[str, int, int], Addon] = {}
        self.active: tuple[Active, ...] = ()
        self.rule = RULES[0]
        self.scratch: Tensor | None = None

    def open(self, path: str | os.PathLike[str]) -> Addon:
        """A file by its path, size and time of change.  Raises CheckpointError."""
        try:
            stat = os.stat(path)
            state = os.path.realpath(path), stat.st_size, stat.st_mtime_ns
        except OSError:  # opening it says why
            return self.fresh(path)
        if state not in self.opened:
            self.opened[state] = self.fresh(path)
        return self.opened[state]

    def fresh(self, path: str | os.PathLike[str]) -> Addon:
        shapes = {key: tuple(value.shape) for key, value in self.model.state_dict().items()}
        return open_addon(path, Shapes(shapes), self.family)

    @torch.no_grad()
    def set(self, loras: Sequence[Lora], rule: str = "paper", partial: bool = False) -> None:
        """These and no others are on from now on.

        rule: "paper", or "comfyui" to meet a picture of it: see lora_formulas.delta; there each add-on also changes what those
        before it left.  partial: take what fits of a file, where else it is refused.
        Raises CheckpointError and UsageError, before any weight is touched.
        """
        if rule not in RULES:
            raise UsageError(f"lora_rule: expected {' or '.join(RULES)}, found {rule!r}")
        active = [self.ready(lora, partial) for lora in loras]
        weights = dict(self.model.state_dict())
        by_key: dict[str, list[tuple[Active, Change]]] = {key: [] for key in self.touched()}
        for each in active:
            for change in each.addon.changes:
                by_key.setdefault(change.target.key, []).append((each, change))
        self.active, self.rule = tuple(active), rule
        for key, changes in by_key.items():
            if key not in self.base:
                self.base[key] = weights[key].to("cpu", copy=True)
            self.write(weights[key], self.base[key], [pair for pair in changes if pair[0].strength(pair[1])])

    def touched(self) -> Iterable[str]:
        """The weights that are not the file's now."""
        return {change.target.key for each in self.active for change in each.addon.changes}

    def ready(self, lora: Lora, partial: bool) -> Active:
        """An add-on whose numbers are read and sound."""
        addon = self.open(lora.source)
        if not addon.changes:
            partial = False
        if not partial:
            check_fits(addon, self.family)
        if not addon.changes:
            raise CheckpointError(addon.file.path, "changes nothing", "get another copy")
        addon.factors  # noqa: B018  reads them, once
        return Active(addon, lora, ratios(lora.blocks, self.model.state_dict()))

    def write(self, weight: Tensor, base: Tensor, changes: Sequence[tuple[Active, Change]]) -> None:
        """The file's weight with the changes of all add-ons, in place; in float32 until the end."""
        result = weight if weight.dtype == torch.float32 or not changes else self.wide(weight)
        result.copy_(base)
        for active, change in changes:
            strength, part = active.strength(change), part_of(result, change.target)
            if change.is_product and part.is_contiguous():
                up, down = (active.addon.factors[change.parts[name]].to(weight.device).flatten(1) for name in ("up", "down"))
                part.view(len(part), -1).addmm_(up, down, alpha=strength * active.addon.scale(change))
            else:
                before = part_of(base.to(weight.device), change.target).float() if self.rule == "paper" else part.clone()
                part.add_(active.addon.change_of(change, before, strength, self.rule))
        if result is not weight:
            weight.copy_(result)

    def wide(self, weight: Tensor) -> Tensor:
        """Memory for a weight in float32, the same each time."""
        if self.scratch is None or self.scratch.numel() < weight.numel() or self.scratch.device != weight.device:
            self.scratch = torch.empty(weight.numel(), device=weight.device)
        return self.scratch[: weight.numel()].view(weight.shape)


def ratios(blocks: str | Mapping[str, float] | None, keys: Iterable[str]) -> Mapping[str, float]:
    return block_ratios(blocks, keys) if isinstance(blocks, str) else blocks or {}
