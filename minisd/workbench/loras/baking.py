"""Writing a checkpoint with LoRAs in its weights: tensor by tensor, so that a file of any size takes almost no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...addons.lora_file import Change, open_addon
from ...addons.stack import Active, layer, ready
from ...addons.wanted import Lora, facts
from ...errors import UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.model import build
from ...files.recognition import recognise
from ...files.saving import Planned, Progress, Read, described, with_markers, write_checkpoint
from ...files.tensors import TORCH, finite, read_stored, stored_pieces
from ...models.family import Family
from ..converting import check_dtype, narrowed, stored_name

LORAS = "minisd.loras"  # in the metadata: what was put into the weights


def bake(
    source: str | os.PathLike[str],
    loras: Sequence[Lora],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    rule: str = "paper",
    partial: bool = False,
    progress: Progress | None = None,
) -> Path:
    """Writes a checkpoint whose weights have the changes of LoRAs; returns its path.

    dtype: of the result; by default the checkpoint's.  rule, partial: see `addons.stack.Stack.set`.
    Raises CheckpointError (a file that is broken, or does not fit), UsageError, OutputError.
    """
    checkpoint = open_checkpoint(source)
    check_dtype(dtype)
    found = recognise(checkpoint, vae_given=True)
    build(checkpoint, found.family)  # raises before anything is written
    actives = opened(checkpoint, found.family, loras, partial)
    kept = {key: entry for key, entry in checkpoint.entries.items() if not key.startswith("model_ema.")}
    planned = {key: (stored_name(key, entry.dtype, entry.shape, dtype), entry.shape) for key, entry in kept.items()}

    planned, reading = with_markers(planned, reader(checkpoint, actives, planned, rule), found.training, checkpoint)
    said = [facts(each.lora, each.addon) for each in actives]
    metadata = described(checkpoint, found) | {
        "modelspec.title": Path(target).stem,
        LORAS: json.dumps({"loras": said, "rule": rule}),
    }
    return write_checkpoint(target, planned, reading, metadata, found, progress)


def opened(checkpoint: Checkpoint, family: Family, loras: Sequence[Lora], partial: bool) -> list[Active]:
    """The add-ons, their numbers read and sound: nothing is written before that."""
    addons = [(open_addon(lora.source, checkpoint.shapes, family), lora) for lora in loras]
    return [ready(addon, lora, family, checkpoint.entries, partial) for addon, lora in addons]


def reader(checkpoint: Checkpoint, actives: Sequence[Active], planned: Planned, rule: str) -> Read:
    """What gives the numbers of a tensor of the result."""
    by_key: dict[str, list[tuple[Active, Change]]] = {}
    for active in actives:
        for change in active.addon.changes:
            by_key.setdefault(change.target.key, []).append((active, change))

    def read(key: str) -> Iterable[Tensor]:
        if planned[key][0] not in TORCH:
            return stored_pieces(checkpoint, key)
        kind = TORCH[planned[key][0]]
        if key not in by_key:
            return (narrowed(piece, kind) for piece in stored_pieces(checkpoint, key))
        base = read_stored(checkpoint, key).float()
        changed = base.clone()
        layer(changed, base, by_key[key], rule)
        result = narrowed(changed.flatten(), kind)
        if not finite(result):
            raise UsageError(f"merge: {key} becomes too large for {planned[key][0]}; choose smaller strengths, or float32")
        return [result]

    return read
