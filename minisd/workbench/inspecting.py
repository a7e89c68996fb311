"""What a checkpoint is, from its header alone: nothing is loaded, so a file of any size takes a fraction of a second."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

from ..errors import CheckpointError, shown
from ..files.checkpoint import Checkpoint, data_sha256, file_sha256, legacy_hash, open_checkpoint
from ..files.entry import Entry
from ..files.recognition import looks_like, recognise
from ..files.writers import is_asked_for, is_unneeded, left_out, row_of, written_by
from ..models.family import FAMILIES, UNET, VAE

PARTS = {UNET: "UNet", VAE: "VAE"} | {tower.name: f"text: {tower.title}" for family in FAMILIES for tower in family.towers}


def inspect(
    path: str | os.PathLike[str],
    with_hash: bool = False,
    check: bool = False,
    with_tree: bool = False,
    size: tuple[int, int] | None = None,
) -> dict[str, Any]:
    """Facts about a .safetensors or .ckpt file, ready for JSON.

    family: minisd's name for it, or None; looks_like: what it is in words; why: the reasons; task, prediction, native_size,
    guidance_scale; parts: parameters, bytes and dtypes of each; unused: the tensors that nothing needs, and what they are;
    renamed: by the usual name of a tensor the one in the file; written_by: which programs do either, and the tensors by the
    names in the file (docs/writers.md); of a checkpoint also extra: names that no network has, and left_out: what is missing for
    drawing, and what to do.
    with_hash: also `sha256`, which reads the whole file, `model_hash`, its first 10 digits (AutoV2), and `legacy_hash`, A1111's
        first, of 8 digits; of a .safetensors also `data_sha256`, of its tensors alone, `autov3`, its first 12 digits, and
        `content`: whether that is what the file's ModelSpec metadata promises (None: it does not say).
    check: also `broken`, the tensors that hold NaN or infinity, which reads the whole file, too.
    with_tree: also what tree.py finds of a checkpoint, block by block; size: of the picture whose arithmetic it counts.
    Raises CheckpointError if the file is neither, UsageError (the size).
    """
    checkpoint = open_checkpoint(path)
    facts = contents(checkpoint)
    try:
        found = recognise(checkpoint)
        facts |= {"family": found.family.name, "looks_like": found.family.title, "why": list(found.reasons)}
        facts |= {
            "task": found.task,
            "prediction": found.training.prediction,
            "native_size": found.size,
            "guidance_scale": found.guidance,
        }
        facts["extra"] = [key for key in checkpoint.entries if not is_unneeded(key) and not is_asked_for(key)]
        facts["left_out"] = {key: row.what for key, row in left_out(checkpoint.entries, found.family).items()}
    except CheckpointError as error:
        what, hint = looks_like(checkpoint.shapes)
        facts |= {"family": None, "looks_like": what, "hint": hint, "why": [error.reason]}
        found = None
    if with_hash:
        facts["sha256"] = file_sha256(checkpoint.path)
        facts["model_hash"] = facts["sha256"][:10]
        facts["legacy_hash"] = legacy_hash(checkpoint.path)
        facts |= data_hashes(checkpoint)
    if check:
        from ..files.tensors import broken

        facts["broken"] = broken(checkpoint)
    if with_tree and found is not None:
        from .tree import tree

        facts |= tree(checkpoint, found, size, check)
    return facts


def contents(checkpoint: Checkpoint) -> dict[str, Any]:
    """What any file of tensors has, whether or not it is a model."""
    parts: dict[str, list[Entry]] = {}
    for key, entry in checkpoint.entries.items():
        parts.setdefault(part_of(key), []).append(entry)
    return {
        "path": str(checkpoint.path),
        "bytes": checkpoint.size,
        "tensors": len(checkpoint.entries),
        "parameters": sum(entry.numel for entry in checkpoint.entries.values()),
        "parts": {name: summary(entries) for name, entries in parts.items()},
        "unused": {key: row_of(key).what for key in checkpoint.entries if is_unneeded(key)},
        "renamed": dict(checkpoint.renamed),
        "written_by": [
            {"does": row.does, "what": row.what, "writer": row.writer, "tensors": names}
            for row, names in written_by({name: checkpoint.renamed.get(name, name) for name in checkpoint.entries}).items()
        ],
        "metadata": dict(checkpoint.metadata),
    }


def data_hashes(checkpoint: Checkpoint) -> dict[str, Any]:
    """The hash of the tensors without the header, which another name or note does not change; a .ckpt has none."""
    digest = data_sha256(checkpoint.path)
    if digest is None:
        return {}
    promised = checkpoint.metadata.get("modelspec.hash_sha256")
    content = None if promised is None else promised.lower() == f"0x{digest}"
    return {"data_sha256": digest, "autov3": digest[:12], "content": content}


def part_of(key: str) -> str:
    if is_unneeded(key):
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
    what = f"  {facts['looks_like']} ({facts['family'] or facts['hint']})"
    if facts["family"]:
        what += f", task {facts['task']}, predicts {facts['prediction']}, {'x'.join(map(str, facts['native_size']))}"
        what += f", guidance {facts['guidance_scale']:g}"
    lines = [shown(facts["path"], 500), what]
    lines.append(f"  {facts['bytes'] / 1e6:,.1f} MB, {facts['tensors']:,} tensors, {facts['parameters']:,} parameters")
    for name, part in facts["parts"].items():
        dtypes = ", ".join(sorted(part["dtypes"]))
        lines.append(f"  {name:<26}{part['parameters']:>16,} parameters  {part['bytes'] / 1e6:>10,.1f} MB  {dtypes}")
    lines += [f"  because: {shown(reason, 300)}" for reason in facts["why"] if facts["family"]]
    lines += writers_lines(facts)
    if "broken" in facts:
        bad = ", ".join(facts["broken"])
        lines.append(
            f"  NaN or infinity in {len(facts['broken'])} tensors: {shown(bad, 300)}" if bad else "  all numbers are finite"
        )
    if "sha256" in facts:
        lines.append(f"  model hash    {facts['model_hash']}  (AutoV2; sha256 {facts['sha256']})")
        lines.append(f"  legacy hash   {facts['legacy_hash']}  (A1111's first, which old pictures carry)")
    if "autov3" in facts:
        content = {None: "", True: ", as the metadata says", False: ", NOT what the metadata says: the numbers were changed"}
        lines.append(f"  tensor hash   {facts['autov3']}  (AutoV3; sha256 {facts['data_sha256']}{content[facts['content']]})")
    if "blocks" in facts:
        lines += tree_lines(facts)
    lines += [f"  {shown(key, 60)} = {shown(value, 100)}" for key, value in sorted(facts["metadata"].items())]
    return "\n".join(lines)


def writers_lines(facts: dict[str, Any]) -> list[str]:
    """What the program that wrote the file added, named its own way, and left out."""
    lines = []
    for row in facts["written_by"]:
        if row["does"] == "unneeded":
            lines += [f"  unused, {row['what']}: {shown(', '.join(row['tensors']), 200)}", f"    as {row['writer']}"]
    if extra := facts.get("extra"):
        lines.append(f"  unused, asked for by no network ({len(extra):,}): {shown(', '.join(extra[:10]), 500)}")
    if renamed := [f"{own} is {name}" for name, own in facts["renamed"].items()]:
        lines.append(f"  otherwise named ({len(renamed):,}): {shown(', '.join(renamed), 200)}")
        named = [row for row in facts["written_by"] if row["does"] != "unneeded"]
        lines += [f"    {len(row['tensors']):,} as {row['writer']}" for row in named]
    return [*lines, *(f"  missing: {key}: {hint}" for key, hint in facts.get("left_out", {}).items())]


def tree_lines(facts: dict[str, Any]) -> list[str]:
    norms = any("rms" in block for block in facts["blocks"].values())
    head = f"  {'block':<22}{'tensors':>8}{'parameters':>14}{'MB':>10}{'GFLOPs':>11}"
    lines = [head + (f"{'rms':>12}{'max':>10}" if norms else "")]
    for name, block in facts["blocks"].items():
        line = f"  {shown(name, 20):<22}{block['tensors']:>8}{block['parameters']:>14,}{block['bytes'] / 1e6:>10,.1f}"
        line += f"{block['flops'] / 1e9:>11,.1f}"
        if norms:
            line += f"{block['rms']:>12.4g}{block['max']:>10.4g}" if block["rms"] is not None else f"{'not finite':>22}"
        lines.append(line)
    flops = facts["flops"]
    parts = ", ".join(f"{part} {flops[part] / 1e12:.3g}" for part in ("text encoders", "UNet", "VAE decoder"))
    what = f"a picture of {flops['width']}x{flops['height']} in {flops['steps']} steps with guidance"
    return [*lines, f"  {what}: {flops['picture'] / 1e12:,.3g} TFLOPs ({parts})"]
