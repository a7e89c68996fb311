"""Writing a checkpoint with LoRAs in its weights: tensor by tensor, so that a file of any size takes almost no memory."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from ...addons.lora_file import Change, check_fits, open_addon
from ...addons.stack import Active, layer, ratios
from ...addons.wanted import Lora, facts
from ...errors import UsageError
from ...files.checkpoint import open_checkpoint
from ...files.model import build
from ...files.recognition import recognise
from ...files.saving import Progress, described, with_markers, write_checkpoint
from ...files.tensors import TORCH, finite, read_stored, stored_pieces
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
    by_key: dict[str, list[tuple[Active, Change]]] = {}
    actives = []
    for lora in loras:
        addon = open_addon(lora.source, checkpoint.shapes, found.family)
        if not (partial and addon.changes):
            check_fits(addon, found.family)
        addon.factors  # noqa: B018  reads them, and says what is broken, before anything is written
        actives.append(Active(addon, lora, ratios(lora.blocks, checkpoint.entries)))
        for change in addon.changes:
            by_key.setdefault(change.target.key, []).append((actives[-1], change))
    kept = {key: entry for key, entry in checkpoint.entries.items() if not key.startswith("model_ema.")}
    planned = {key: (stored_name(key, entry.dtype, entry.shape, dtype), entry.shape) for key, entry in kept.items()}

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

    planned, reading = with_markers(planned, read, found.training, checkpoint)
    said = [facts(each.lora, each.addon.file, len(each.addon.misfits)) for each in actives]
    metadata = described(checkpoint, found) | {
        "modelspec.title": Path(target).stem,
        LORAS: json.dumps({"loras": said, "rule": rule}),
    }
    return write_checkpoint(target, planned, reading, metadata, found, progress)
