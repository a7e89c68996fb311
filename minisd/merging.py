"""Mixing checkpoints: arithmetic on keys, in float32, one tensor at a time.

The first model decides: its keys, its dtype, its metadata.  Sources are only read; the result may replace one of them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, UsageError
from .family import CONV_IN, UNET, VAE, is_spare, listing, recognise
from .saving import described, write_checkpoint
from .tensors import TORCH, finite, read_stored

PARTS = ("unet", "text", "vae")


def merge(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    target: str | os.PathLike[str],
    ratio: float = 0.5,
    base: str | os.PathLike[str] | None = None,
    by_part: Mapping[str, float] | None = None,
) -> Path:
    """Writes (1 - ratio) A + ratio B, or with a base A + ratio (B - base), which adds to A what B learned since the base.

    by_part: other ratios for "unet", "text" or "vae".  A ratio of 0 copies A, of 1 (without a base) B, to the bit.
    Where A is an inpainting model and B is not, A keeps the five channels that B lacks (A1111 extras.py, run_modelmerger).
    Raises CheckpointError (a source that is broken, or of another family than A), UsageError, OutputError.
    """
    ratios = {part: (by_part or {}).get(part, ratio) for part in PARTS}
    for name, value in ratios.items():
        if not -10 <= value <= 10:
            raise UsageError(f"ratio of the {name}: expected a number from -10 to 10, found {value!r}")
    models = [open_checkpoint(path) for path in (a, b, *([base] if base is not None else []))]
    for other in models[1:]:
        check_alike(models[0], other)
    planned = {key: (entry.dtype, entry.shape) for key, entry in models[0].entries.items()}

    def read(key: str) -> Tensor:
        own = read_stored(models[0], key)
        if is_spare(key) or planned[key][0] not in TORCH:
            return own
        return mixed(models, key, own, ratios[part_of(key)])

    recipe = {
        "a": names(models[0]),
        "b": names(models[1]),
        "base": names(models[2]) if base is not None else None,
        "ratios": ratios,
    }
    merged = {"minisd.merge": json.dumps(recipe), "modelspec.merged_from": ", ".join(names(model) for model in models)}
    return write_checkpoint(Path(target), planned, read, described(models[0]) | {"modelspec.title": Path(target).stem} | merged)


def names(model: Checkpoint) -> str:
    return model.path.name


def part_of(key: str) -> str:
    return "unet" if key.startswith(f"{UNET}.") else "vae" if key.startswith(f"{VAE}.") else "text"


def check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raises CheckpointError unless the other has every weight of the first, in its shape but for extra input channels."""
    ours, theirs = recognise(first), recognise(other)
    if ours.family is not theirs.family:
        raise CheckpointError(other.path, f"is {theirs.family.title}, expected {ours.family.title} as {first.path}")
    lacking = [key for key in first.entries if not is_spare(key) and key not in other.entries]
    if lacking:
        raise CheckpointError(other.path, f"lacks {len(lacking)} keys of {first.path}{listing(lacking)}")
    for key, entry in first.entries.items():
        if is_spare(key) or entry.shape == other.entries[key].shape:
            continue
        if key == CONV_IN and entry.shape[1] > other.entries[key].shape[1]:
            continue
        hint = "name the inpainting model first" if key == CONV_IN else ""
        raise CheckpointError(
            other.path, f"expected shape {entry.shape} as in {first.path}, found {other.entries[key].shape}", hint, key
        )


def mixed(models: list[Checkpoint], key: str, own: Tensor, ratio: float) -> Tensor:
    """One tensor of the result, in A's dtype."""
    others = [read_stored(model, key) for model in models[1:]]
    for model, tensor in zip(models, (own, *others), strict=True):
        if not finite(tensor):
            raise CheckpointError(model.path, "holds NaN or infinity", "it would spread; get another copy", key)
    if ratio == 0:
        return own
    if others[0].shape != own.shape:  # A's extra input channels stay
        seen = others[0].shape[1]
        return torch.cat([combined(own[:, :seen], [other[:, :seen] for other in others], ratio), own[:, seen:]], dim=1)
    return combined(own, others, ratio)


def combined(own: Tensor, others: list[Tensor], ratio: float) -> Tensor:
    if len(others) == 1:
        if ratio == 1:
            return others[0].to(own.dtype)
        return ((1 - ratio) * own.float() + ratio * others[0].float()).to(own.dtype)
    return (own.float() + ratio * (others[0].float() - others[1].float())).to(own.dtype)
