"""What a checkpoint is, from its header alone: nothing is loaded, so a file of any size takes a fraction of a second."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from .checkpoint import file_sha256, open_checkpoint
from .family import CLIP, UNET, VAE, is_spare, looks_like, native_size, recognise
from .shapes import Entry

PARTS = {UNET: "UNet", VAE: "VAE", CLIP: "text encoder"}


def inspect(path: str | os.PathLike[str], with_hash: bool = False) -> dict[str, Any]:
    """Facts about a .safetensors or .ckpt file, ready for JSON.

    family: minisd's name for it, or None; looks_like: what it is in words; parts: parameters, bytes and dtypes of each.
    with_hash: also `sha256`, which reads the whole file, and `model_hash`, its first 10 digits.
    Raises CheckpointError if the file is neither.
    """
    checkpoint = open_checkpoint(path)
    family = recognise(checkpoint.shapes)
    parts: dict[str, list[Entry]] = {}
    for key, entry in checkpoint.entries.items():
        parts.setdefault(part_of(key), []).append(entry)
    what, hint = (family.title, "") if family else looks_like(checkpoint.shapes)
    facts: dict[str, Any] = {
        "path": str(checkpoint.path),
        "family": family.name if family else None,
        "looks_like": what,
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.entries),
        "parameters": sum(entry.numel for entry in checkpoint.entries.values()),
        "parts": {name: summary(entries) for name, entries in parts.items()},
        "metadata": dict(checkpoint.metadata),
    }
    if family:
        facts["native_size"] = native_size(family, checkpoint.metadata)
    if hint:
        facts["hint"] = hint
    if with_hash:
        facts["sha256"] = file_sha256(checkpoint.path)
        facts["model_hash"] = facts["sha256"][:10]
    return facts


def part_of(key: str) -> str:
    if is_spare(key):
        return "unused"
    return next((title for name, title in PARTS.items() if key.startswith(name + ".")), "other")


def summary(entries: Iterable[Entry]) -> dict[str, Any]:
    entries = list(entries)
    dtypes: dict[str, int] = {}
    for entry in entries:
        dtypes[entry.dtype] = dtypes.get(entry.dtype, 0) + entry.numel
    return {
        "tensors": len(entries),
        "parameters": sum(dtypes.values()),
        "bytes": sum(entry.nbytes for entry in entries),
        "dtypes": dtypes,
    }


def as_text(facts: dict[str, Any]) -> str:
    """The facts as a person reads them.  Text from the file is shown escaped and short: it may hold anything."""
    size = f", draws {facts['native_size'][0]}x{facts['native_size'][1]}" if "native_size" in facts else ""
    lines = [shown(facts["path"], 500), f"  {facts['looks_like']} ({facts['family'] or facts['hint']}){size}"]
    lines.append(f"  {facts['bytes'] / 1e6:,.1f} MB, {facts['tensors']:,} tensors, {facts['parameters']:,} parameters")
    for name, part in facts["parts"].items():
        dtypes = ", ".join(sorted(part["dtypes"]))
        lines.append(f"  {name:<14}{part['parameters']:>16,} parameters  {part['bytes'] / 1e6:>10,.1f} MB  {dtypes}")
    if "sha256" in facts:
        lines.append(f"  model hash    {facts['model_hash']}  (sha256 {facts['sha256']})")
    lines += [f"  {shown(key, 60)} = {shown(value, 100)}" for key, value in sorted(facts["metadata"].items())]
    return "\n".join(lines)


def shown(text: str, limit: int) -> str:
    """Printable characters only, and not too many of them."""
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: limit + 1])
    return safe if len(text) <= limit else f"{safe[:limit]}… ({len(text):,} characters)"
