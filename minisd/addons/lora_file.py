"""Opening a LoRA or one of its relatives: which weights of a checkpoint it changes, how, and what of it does not fit.

From the header alone: the numbers are read when they are first needed.  Shapes are checked by letting the formulas run on the
meta device.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, shown, taken_apart
from ..files.checkpoint import Checkpoint, data_sha256, open_checkpoint
from ..files.recognition import listing, looks_like
from ..files.tensors import STORED, TORCH, finite, read_stored
from ..files.writers_table import CONV_IN
from ..library.names import base_family
from ..models.family import Family
from ..models.shapes import Shapes
from .lora_formulas import delta
from .lora_names import WITHOUT_EFFECT, Target, targets

# What stands behind a module's name, and the part of the formula that it is.
UPS = (".lora_up.weight", "_lora.up.weight", ".lora.up.weight", ".lora_linear_layer.up.weight", "_lora_B.weight")
DOWNS = (".lora_down.weight", "_lora.down.weight", ".lora.down.weight", ".lora_linear_layer.down.weight", "_lora_A.weight")
ENDINGS = dict.fromkeys((*UPS, ".lora_B.weight", ".lora_B.default.weight", ".lora_B"), "up")
ENDINGS |= dict.fromkeys((*DOWNS, ".lora_A.weight", ".lora_A.default.weight", ".lora_A"), "down")
ENDINGS |= {".lora_mid.weight": "mid", ".alpha": "alpha", ".dora_scale": "dora", ".rescale": "rescale"}
ENDINGS |= dict.fromkeys([f".lora_magnitude_vector{end}" for end in ("", ".weight", ".default.weight", ".default")], "magnitude")
ENDINGS |= {f".{name}": name for name in ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2")}
ENDINGS |= {f".{name}": name for name in ("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2")}
ENDINGS |= {f".{name}.weight": name for name in ("a1", "a2", "b1", "b2")}
ENDINGS |= {".oft_blocks": "oft_blocks", ".diff": "diff", ".diff_b": "diff_b", ".w_norm": "diff", ".b_norm": "diff_b"}
ENDINGS |= dict.fromkeys((".lora_B.bias", ".lora_B.default.bias", ".lora_up.bias"), "diff_b")
ENDINGS |= {".set_weight": "set", ".on_input": "on_input", ".weight": "weight"}
BY_LENGTH = sorted(ENDINGS, key=len, reverse=True)

# The parts that tell a kind; each set is needed whole.
NEEDED: dict[str, Sequence[set[str]]] = {
    "LoRA": ({"up", "down"},),
    "LoHa": ({"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},),
    "LoKr": tuple(
        {*first, *second}
        for first in (("lokr_w1",), ("lokr_w1_a", "lokr_w1_b"))
        for second in (("lokr_w2",), ("lokr_w2_a", "lokr_w2_b"))
    ),
    "GLoRA": ({"a1", "a2", "b1", "b2"},),
    "OFT": ({"oft_blocks"},),
    "IA3": ({"weight", "on_input"},),
    "full": ({"diff"},),
    "set": ({"set"},),
}
BESIDE = {"alpha", "dora", "magnitude", "mid", "hada_t1", "hada_t2", "lokr_t2", "rescale", "diff_b"}  # may be there or not
SETTINGS = "lora_adapter_metadata"  # where diffusers writes what PEFT's files have no tensors for
LATENTS = 4  # channels


@dataclass(frozen=True)
class Change:
    """What a file does to one weight, or to a part of one."""

    target: Target
    kind: str  # a key of lora_formulas.KINDS
    parts: Mapping[str, str]  # the formula's names -> the file's
    module: str  # as the file calls it
    alpha: float | None = None  # where the metadata says it, and no tensor
    channels: int | None = None  # of the input, if the add-on knows fewer than the weight has (inpainting models)

    @property
    def is_product(self) -> bool:
        """Whether it is up @ down, scaled, and no more: most are, and need no memory for the change by itself."""
        return self.kind == "LoRA" and self.channels is None and self.parts.keys() <= {"up", "down", "alpha"}


@dataclass(frozen=True)
class Misfit:
    """A key of the file without a use, and why."""

    key: str
    reason: str


@dataclass(frozen=True)
class Addon:
    """An open file of the LoRA family, held against a checkpoint."""

    file: Checkpoint
    changes: tuple[Change, ...]
    misfits: tuple[Misfit, ...]  # what does not fit, or lacks its other half
    idle: tuple[str, ...]  # keys that say nothing to any checkpoint of the family
    modules: int  # that the file has

    @cached_property
    def factors(self) -> dict[str, Tensor]:
        """Every tensor that a change needs, float32, read once.  Raises CheckpointError for NaN and infinity."""
        found = {}
        for change in self.changes:
            for key in change.parts.values():
                found[key] = read_stored(self.file, key).float()
                if not finite(found[key]):
                    raise CheckpointError(self.file.path, "holds NaN or infinity", "the file is broken; get another copy", key)
        return found

    @cached_property
    def autov3(self) -> str | None:
        """The hash that A1111 knows it by, of its tensors alone; None for other files, and for one that is gone."""
        found = data_sha256(self.file.path) if self.file.is_still_there() else None
        return found and found[:12]

    def scale(self, change: Change) -> float:
        """alpha / r of a product."""
        alpha = float(self.factors[change.parts["alpha"]]) if "alpha" in change.parts else change.alpha
        return 1.0 if alpha is None else alpha / len(self.factors[change.parts["down"]])

    def change_of(self, change: Change, weight: Tensor, strength: float, rule: str) -> Tensor:
        """What is to be added to the target's part of a weight; weight: that part, float32, on the device to compute on."""
        parts = {name: self.factors[key].to(weight.device) for name, key in change.parts.items()}
        return computed(change, parts, weight, strength, rule)


def computed(change: Change, parts: Mapping[str, Tensor], weight: Tensor, strength: float = 1.0, rule: str = "paper") -> Tensor:
    if change.alpha is not None:
        parts = {**parts, "alpha": torch.full((), change.alpha, device=weight.device)}
    if change.channels is None:
        return delta(change.kind, parts, weight, strength, rule)
    known = delta(change.kind, parts, weight[:, : change.channels], strength, rule)
    return torch.nn.functional.pad(known, (0, 0, 0, 0, 0, weight.shape[1] - change.channels))


def part_of(weight: Tensor, target: Target) -> Tensor:
    """The part of a weight that a target means, as a view."""
    part = weight if target.rows is None else weight[target.rows[0] : target.rows[1]]
    return part.T if target.transposed else part


def open_addon(path: str | os.PathLike[str], shapes: Shapes, family: Family) -> Addon:
    """Holds a file against the weights of a checkpoint.  Raises CheckpointError where it is nothing of the LoRA family."""
    file = open_checkpoint(path)
    with taken_apart(path):
        return held_against(file, shapes, family)


def held_against(file: Checkpoint, shapes: Shapes, family: Family) -> Addon:
    modules, strange = by_module(file)
    if not any(kind_of(set(parts)) for parts in modules.values()):
        what, hint = looks_like(file.shapes)
        raise CheckpointError(file.path, f"expected a LoRA, found {what}{listing(file.shapes)}", hint)
    known, settings = targets(shapes, family), adapter_settings(file)
    changes: dict[tuple[str, tuple[int, int] | None], Change] = {}
    misfits, idle = [Misfit(key, "is no part of a LoRA that minisd knows") for key in strange], list[str]()
    for module, parts in modules.items():
        if module not in known and WITHOUT_EFFECT.fullmatch(module):
            idle += parts.values()
            continue
        for target, own in aims(known.get(module), parts):
            try:
                change = fitted(module, target, own, file, shapes, settings)
                place = change.target.key, change.target.rows
                if place in changes:
                    raise ValueError(f"changes what {changes[place].module} changes, too")
                changes[place] = change
            except ValueError as error:
                misfits += [Misfit(key, str(error)) for key in own.values()]
    return Addon(file, tuple(changes.values()), tuple(misfits), tuple(idle), len(modules))


def by_module(file: Checkpoint) -> tuple[dict[str, dict[str, str]], list[str]]:
    """The parts of every module, by its name, and the keys that are none; without embeddings that are bundled with them."""
    modules: dict[str, dict[str, str]] = {}
    strange = []
    for key in file.entries:
        ending = next((each for each in BY_LENGTH if key.endswith(each)), None)
        if key.startswith("bundle_emb."):
            continue
        if ending is None or ENDINGS[ending] in modules.get(key.removesuffix(ending), {}):
            strange.append(key)
        else:
            modules.setdefault(key.removesuffix(ending), {})[ENDINGS[ending]] = key
    return modules, strange


def kind_of(parts: set[str]) -> str | None:
    """The kind that these parts make up, with nothing missing and nothing left."""
    return next((kind for kind, sets in NEEDED.items() for needed in sets if needed <= parts and parts <= needed | BESIDE), None)


def aims(target: Target | None, parts: Mapping[str, str]) -> Iterator[tuple[Target | None, dict[str, str]]]:
    """The weight that a module changes, its bias, or both, and with what."""
    own = {name: key for name, key in parts.items() if name != "diff_b"}
    if "diff_b" in parts:
        yield target and replace(target, key=target.bias), {"diff": parts["diff_b"]}
    if set(own) - {"alpha"} or "diff_b" not in parts:
        yield target, own


def fitted(
    module: str,
    target: Target | None,
    parts: Mapping[str, str],
    file: Checkpoint,
    shapes: Shapes,
    settings: Mapping[str, Any],
) -> Change:
    """The change of a module as it fits the checkpoint.  Raises ValueError, which says why it does not."""
    kind = kind_of(set(parts))
    if target is None or target.key not in shapes:
        raise ValueError("has no place in the checkpoint")
    if kind is None:
        raise ValueError(f"is not whole: {', '.join(sorted(parts))} make no change that minisd knows")
    for name, key in parts.items():
        if file.entries[key].dtype not in (STORED if name in ("alpha", "on_input") else TORCH):
            raise ValueError(f"holds {file.entries[key].dtype}, no floating-point numbers")
    if kind == "OFT" and len(file.entries[parts["oft_blocks"]].shape) == 4:
        kind = "BOFT"
    change = Change(target, kind, parts, module, alpha_of(module, parts, file, settings))
    weight = part_of(torch.empty(shapes[target.key], device="meta"), target)
    tensors = {name: torch.empty(file.entries[key].shape, device="meta") for name, key in parts.items()}
    narrow = target.key == CONV_IN and weight.shape[1] > LATENTS  # an inpainting model knows more than the add-on may
    for each in (change, *([replace(change, channels=LATENTS)] if narrow else [])):
        with contextlib.suppress(RuntimeError, IndexError, ValueError):
            if computed(each, tensors, weight).shape == weight.shape:
                return each
    found = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items() if tensor.dim())
    raise ValueError(f"does not fit {target.key} {tuple(weight.shape)}: {found}")


def adapter_settings(file: Checkpoint) -> dict[str, Any]:
    """PEFT's settings as diffusers keeps them in the metadata, by names such as "unet.lora_alpha"."""
    try:
        found = json.loads(file.metadata.get(SETTINGS, "{}"))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise CheckpointError(file.path, f"its metadata has {SETTINGS}, which is no JSON object", "save the LoRA again")
    return found


def alpha_of(module: str, parts: Mapping[str, str], file: Checkpoint, settings: Mapping[str, Any]) -> float | None:
    """What the settings say of a module without an alpha of its own (peft LoraConfig: lora_alpha, alpha_pattern, use_rslora)."""
    encoder, _, name = module.partition(".")
    default = settings.get(f"{encoder}.lora_alpha")
    if "alpha" in parts or "down" not in parts or default is None:
        return None
    patterns = settings.get(f"{encoder}.alpha_pattern") or {}
    alpha = next((value for ending, value in patterns.items() if name == ending or name.endswith(f".{ending}")), default)
    if not isinstance(alpha, int | float):
        raise ValueError(f"has an alpha in the metadata that is no number: {shown(str(alpha), 80)}")
    rank = file.entries[parts["down"]].shape[0]
    return float(alpha) * (math.sqrt(rank) if settings.get(f"{encoder}.use_rslora") else 1)


def check_fits(addon: Addon, family: Family) -> None:
    """Raises CheckpointError, which counts what fits and names the first key that does not, unless all does."""
    if not addon.misfits and not addon.changes:
        raise CheckpointError(addon.file.path, f"changes nothing in {family.title}", "minisd inspect LORA says what it holds")
    if not addon.misfits:
        return
    fit, first = len({change.module for change in addon.changes}), addon.misfits[0]
    other = base_family(addon.file.shapes)
    made = f", it is made for {other}" if other not in (None, family.name) else ""
    count = f"{fit} of its {addon.modules} modules fit {family.title}{made}, {len(addon.misfits)} keys do not"
    reason = f"{first.reason}; {count}"
    hint = "minisd inspect LORA -m CHECKPOINT shows all; lora_partial (--lora-partial) takes what fits"
    raise CheckpointError(addon.file.path, reason, hint, first.key)
