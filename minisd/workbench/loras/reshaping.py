"""LoRAs out of LoRAs: one of smaller rank, several as one, with other names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...addons.lora_file import by_module
from ...addons.lora_names import Target, targets, written_names
from ...errors import CheckpointError, UsageError, taken_apart
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.recognition import recognise
from ...files.tensors import read_stored
from ...library.names import base_family
from ...models.family import FAMILIES, Family
from .extracting import Made, Tensors, about, check, cut, pair, write
from .published import shapes_of


@dataclass(frozen=True)
class Pair:
    """One product of a file, float32: the change is up @ down."""

    up: Tensor  # (O, r), with alpha / r in it
    down: Tensor  # (r, I, …)
    plain: bool  # whether up is a matrix in the file, and no 1x1 convolution


def products(file: Checkpoint) -> tuple[dict[str, Pair], Tensors]:
    """The products of a LoRA by module, and its other tensors.  Raises CheckpointError where a half is missing."""
    with taken_apart(file.path):
        found, others = taken(file)
    if not found:
        raise CheckpointError(file.path, "expected a LoRA of products (lora_up and lora_down), found none in it")
    return found, others


def taken(file: Checkpoint) -> tuple[dict[str, Pair], Tensors]:
    modules, strange = by_module(file)
    found: dict[str, Pair] = {}
    others = {key: read_stored(file, key) for key in strange}
    for module, parts in modules.items():
        own = {name: read_stored(file, key) for name, key in parts.items()}
        if not {"up", "down"} <= own.keys() or not own.keys() <= {"up", "down", "alpha", "diff_b"}:
            others |= {parts[name]: value for name, value in own.items()}
            continue
        up, down = own["up"].float(), own["down"].float()
        scale = float(own["alpha"]) / len(down) if "alpha" in own else 1.0
        found[module] = Pair(up.flatten(1) * scale, down, up.dim() == 2)
        others |= {parts["diff_b"]: own["diff_b"]} if "diff_b" in own else {}
    return found, others


def resize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int,
    energy: float | None = None,
    dtype: torch.dtype = torch.float16,
) -> Made:
    """A LoRA of smaller rank, the nearest one; what is no product stays as it is.  energy: as for `extract`."""
    check(rank, energy)
    file = open_checkpoint(source)
    found, others = products(file)
    tensors: Tensors = dict(others)
    whole = lost = 0.0
    for module, product in found.items():
        up, down, left, total = smaller(product, rank, energy)
        whole, lost = whole + total, lost + left
        tensors |= pair(module, as_stored(up, down, product.plain), down, style_of(file, module))
    metadata = dict(file.metadata) | dims(tensors)
    return Made(write(target, tensors, dtype, metadata), len(found), 1 - lost / whole if whole else 1.0)


def dims(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {key: value for key, value in about(FAMILIES[0], tensors).items() if key in ("ss_network_dim", "ss_network_alpha")}


def style_of(file: Checkpoint, module: str) -> str:
    return "kohya" if any(f"{module}{end}" in file.entries for end in (".lora_up.weight", ".alpha")) else "peft"


def smaller(product: Pair, rank: int, energy: float | None) -> tuple[Tensor, Tensor, float, float]:
    """(up, down, squared change lost, and in all).  By the QR of both factors only a small matrix is taken apart."""
    q, r = torch.linalg.qr(product.up)
    p, t = torch.linalg.qr(product.down.flatten(1).T)
    core = r @ t.T
    total = float(core.square().sum())
    if total == 0:
        return product.up[:, :1], product.down[:1] * 0, 0.0, 0.0
    up, down, lost = cut(core, rank, energy)
    return q @ up, (down @ p.T).reshape(-1, *product.down.shape[1:]), lost, total


def names_for(files: Sequence[Checkpoint], model: str | os.PathLike[str] | None) -> tuple[Family, dict[str, Target]]:
    """What the modules of LoRAs mean: in this checkpoint, or in the family that their text widths tell.  Raises UsageError."""
    if model is not None:
        checkpoint = open_checkpoint(model)
        family = recognise(checkpoint, vae_given=True).family
        return family, targets(checkpoint.shapes, family)
    told = {base_family(file.shapes) for file in files}
    fitting = [each for each in FAMILIES if told == {each.name}]
    if not fitting:
        found = ", ".join(f"{file.path.name} {base_family(file.shapes) or 'unknown'}" for file in files)
        raise UsageError(f"model: the LoRAs tell no family that they share ({found}); name the checkpoint that they are for")
    return fitting[0], targets(shapes_of(fitting[0]), fitting[0])


def only_products(file: Checkpoint) -> dict[str, Pair]:
    found, others = products(file)
    if others:
        raise CheckpointError(file.path, "has more than products", "merge it into a checkpoint instead", min(others))
    return found


def merge(
    sources: Sequence[str | os.PathLike[str]],
    strengths: Sequence[float],
    target: str | os.PathLike[str],
    rank: int | None = None,
    energy: float | None = None,
    dtype: torch.dtype = torch.float16,
    model: str | os.PathLike[str] | None = None,
) -> Made:
    """One LoRA that does what several do together, each with its strength: exactly, with the sum of their ranks, or cut to one.

    model: the checkpoint that they are for, where their shapes do not tell the family.  A name is that of the first file that has
    the module, whatever the others call it.  Raises CheckpointError, UsageError, OutputError.
    """
    check(rank or 1, energy)
    files = [open_checkpoint(source) for source in sources]
    if len(files) < 2 or len(strengths) != len(files):
        raise UsageError(f"lora merge: expected two LoRAs or more and a strength for each, found {len(files)}, {len(strengths)}")
    _, known = names_for(files, model)
    together: dict[object, list[tuple[str, str, Pair]]] = {}  # by the weight that they change
    for file, strength in zip(files, strengths, strict=True):
        for module, each in only_products(file).items():
            own = replace(each, up=each.up * strength)
            together.setdefault(known.get(module, module), []).append((module, style_of(file, module), own))
    tensors: Tensors = {}
    for pieces in together.values():
        module, style, first = pieces[0]
        up = torch.cat([each.up for _, _, each in pieces], 1)
        down = torch.cat([each.down.reshape(-1, *first.down.shape[1:]) for _, _, each in pieces])
        if rank is not None:
            up, down, _, _ = smaller(Pair(up, down, first.plain), rank, energy)
        tensors |= pair(module, as_stored(up, down, first.plain), down, style)
    metadata = dict(files[0].metadata) | dims(tensors) | {"modelspec.merged_from": ", ".join(file.path.name for file in files)}
    return Made(write(target, tensors, dtype, metadata), len(together), 1.0)


def as_stored(up: Tensor, down: Tensor, plain: bool) -> Tensor:
    """An up of (O, r) or (O, r, 1, 1), as the file has it."""
    return up.flatten(1) if plain else up.flatten(1).reshape(len(up), -1, *(1 for _ in down.shape[2:]))


def rename(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    names: str,
    dtype: torch.dtype = torch.float16,
    model: str | os.PathLike[str] | None = None,
) -> Made:
    """The same LoRA with the names of kohya's scripts or of peft.  Raises CheckpointError, UsageError, OutputError."""
    check(1, None, names)
    file = open_checkpoint(source)
    family, known = names_for([file], model)
    written = written_names(known, family, names)
    tensors: Tensors = {}
    for module, each in only_products(file).items():
        aim = known.get(module)
        if aim is None or aim not in written:
            raise CheckpointError(file.path, f"has no place in {family.title}", key=module)
        tensors |= pair(written[aim], as_stored(each.up, each.down, each.plain), each.down, names)
    return Made(write(target, tensors, dtype, file.metadata), len(tensors) // (3 if names == "kohya" else 2), 1.0)
