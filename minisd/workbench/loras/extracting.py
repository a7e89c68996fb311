"""A LoRA out of two checkpoints: their difference, every weight cut to a rank."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...addons.lora_file import part_of
from ...addons.lora_names import Target, targets, written_names
from ...errors import UsageError
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.recognition import recognise
from ...files.saving import HASH, NAMES, Progress, write_checkpoint
from ...files.tensors import read_stored
from ...models.family import Family
from ..merging import check_alike

Tensors = dict[str, Tensor]
NAMED = ("kohya", "peft")
BASES = {
    "sd1": "sd_v1",
    "sd2": "sd_v2",
    "sdxl": "sdxl_base_v1-0",
    "sdxl-refiner": "sdxl_refiner_v1-0",
}  # kohya's ss_base_model_version
ENDS = (".lora_up.weight", ".lora_B.weight", ".diff_b", ".w_norm", ".b_norm")
SPARE = 16  # singular values beyond those that are wanted, for the accuracy of those (Halko et al. 2011, arXiv 0909.4061)


@dataclass(frozen=True)
class Made:
    """A file that was written, and how much of the change is in it."""

    path: Path
    modules: int
    kept: float  # share of the squared change that is left after the cut to a rank
    left_out: tuple[str, ...] = ()  # weights that differ, and are in no LoRA


def extract(
    base: str | os.PathLike[str],
    tuned: str | os.PathLike[str],
    target: str | os.PathLike[str],
    rank: int = 32,
    energy: float | None = None,
    dtype: torch.dtype = torch.float16,
    names: str = "kohya",
    progress: Progress | None = None,
) -> Made:
    """The difference tuned - base as a LoRA: of every matrix and convolution the best approximation of a rank (Eckart-Young).

    energy: 0 … 1, take for each only as many ranks, up to `rank`, as keep this share of its squared change.
    Biases and norms that differ are kept whole.  Raises CheckpointError, UsageError, OutputError.
    """
    check(rank, energy, names)
    first, second = open_checkpoint(base), open_checkpoint(tuned)
    family = recognise(first).family
    check_alike(first, second)
    known = written_names(targets(first.shapes, family), family, names)
    tensors: Tensors = {}
    whole = lost = 0.0
    for done, (aim, name) in enumerate(known.items()):
        change = difference(first, second, aim)
        if change is not None and change.dim() > 1:
            up, down, left = cut(change, rank, energy)
            tensors |= pair(name, up, down, names)
            whole, lost = whole + float(change.square().sum()), lost + left
        elif change is not None:
            tensors[f"{name}.w_norm"] = change
        bias = difference(first, second, Target(aim.bias, aim.rows)) if aim.bias != aim.key else None
        if bias is not None:
            tensors[f"{name}.b_norm" if len(first.shapes[aim.key]) == 1 else f"{name}.diff_b"] = bias
        if progress:
            progress(done + 1, len(known))
    if not tensors:
        raise UsageError(f"lora extract: {second.path} differs from {first.path} in nothing that a LoRA can hold")
    told = {aim.key for aim in known} | {aim.bias for aim in known}
    left_out = tuple(key for key in first.entries if key not in told and key in second.entries and differs(first, second, key))
    path = write(target, tensors, dtype, about(family, tensors) | {"ss_sd_model_name": first.path.name})
    modules = sum(any(f"{name}{end}" in tensors for end in ENDS) for name in known.values())
    return Made(path, modules, 1 - lost / whole if whole else 1.0, left_out)


def check(rank: int, energy: float | None, names: str = "kohya") -> None:
    if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= 4096:
        raise UsageError(f"rank: expected a whole number from 1 to 4096, found {rank!r}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy: expected a number above 0 to 1, found {energy!r}")
    if names not in NAMED:
        raise UsageError(f"names: expected {' or '.join(NAMED)}, found {names!r}")


def difference(first: Checkpoint, second: Checkpoint, aim: Target) -> Tensor | None:
    """What is different in a weight, or its part, float32; None where nothing is, or one of them has not got it."""
    if aim.key not in first.entries or aim.key not in second.entries:
        return None
    ours, theirs = (read_stored(each, aim.key) for each in (first, second))
    if ours.numel() != theirs.numel():
        return None
    change = part_of(theirs.reshape(ours.shape).float() - ours.float(), aim)
    return change if change.any() else None


def differs(first: Checkpoint, second: Checkpoint, key: str) -> bool:
    return difference(first, second, Target(key)) is not None


def cut(change: Tensor, rank: int, energy: float | None) -> tuple[Tensor, Tensor, float]:
    """(up, down, squared change that is lost) of a change (O, I) or (O, I, kh, kw): up (O, r, …), down (r, I, kh, kw)."""
    matrix = change.flatten(1)
    most = min(matrix.shape)
    if 4 * (rank + SPARE) > most:
        u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix, rank + SPARE, niter=4)
        vh = v.T
    total = float(matrix.square().sum())
    share = s.square().cumsum(0) / total
    r = min(rank, most)
    if energy is not None:
        r = min(r, 1 + int((share < energy).sum()))
    root = s[:r].sqrt()
    up, down = u[:, :r] * root, root[:, None] * vh[:r]
    kernel = change.shape[2:]
    return up.reshape(-1, r, *(1 for _ in kernel)), down.reshape(r, -1, *kernel), total * max(0.0, 1 - float(share[r - 1]))


def pair(name: str, up: Tensor, down: Tensor, names: str) -> Tensors:
    """A module as a file has it; PEFT's have no alpha, which means the rank."""
    if names == "peft":
        return {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down}
    alpha = torch.tensor(float(len(down)))
    return {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": alpha}


def about(family: Family, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata as kohya's scripts write it, and ModelSpec's."""
    ranks = [len(value) for key, value in tensors.items() if key.endswith((".lora_down.weight", ".lora_A.weight"))]
    rank = str(max(ranks, default=0))
    return {
        "ss_network_module": "networks.lora",
        "ss_network_dim": rank if len(set(ranks)) == 1 else "Dynamic",
        "ss_network_alpha": rank if len(set(ranks)) == 1 else "Dynamic",
        "ss_base_model_version": BASES[family.name],
    }


def write(target: str | os.PathLike[str], tensors: Mapping[str, Tensor], dtype: torch.dtype, metadata: Mapping[str, str]) -> Path:
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype: expected float32, float16 or bfloat16, found {str(dtype).removeprefix('torch.')}")
    stored = {key: value.to(dtype).contiguous() for key, value in tensors.items()}
    for key, value in stored.items():
        if not value.isfinite().all():
            raise UsageError(f"lora: {key} becomes too large for {NAMES[dtype]}; write float32 or bfloat16")
    planned = {key: (NAMES[dtype], tuple(value.shape)) for key, value in stored.items()}
    said = {"format": "pt", "modelspec.sai_model_spec": "1.0.1", "modelspec.title": Path(target).stem}
    said |= dict(metadata) | {HASH: "", "sshs_model_hash": ""}
    return write_checkpoint(target, planned, lambda key: [stored[key]], said)
