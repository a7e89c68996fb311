"""A checkpoint block by block: parameters, bytes, arithmetic and, where the file is read, the size of the numbers."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from ..errors import UsageError
from ..files.checkpoint import Checkpoint
from ..files.model import build
from ..files.tensors import TORCH, stored_pieces
from ..files.writers import is_unneeded
from ..models.blocks import group_of, in_order
from ..models.family import Recognition
from ..options import MAX_SIDE
from ..text.tokenizer import LENGTH

STEPS = 20  # of the picture whose arithmetic is counted, with guidance: two passes a step


def tree(checkpoint: Checkpoint, found: Recognition, size: tuple[int, int] | None, read: bool) -> dict[str, Any]:
    """Facts about every block, ready for JSON.

    blocks: tensors, parameters and bytes of each and, as far as it works in every picture, `flops` of a picture of `size`
    (width, height in pixels; by default the native one); with `read` also `rms` and `max`, of the absolute numbers.
    flops: those of a picture in all, and of its parts: text encoders (twice), 20 steps with guidance, decoding.
    Multiplications and additions of matrix products, convolutions and attention.
    """
    blocks: dict[str, dict[str, Any]] = {}
    for key, entry in checkpoint.entries.items():
        if not is_unneeded(key):
            block = blocks.setdefault(group_of(key), {"tensors": 0, "parameters": 0, "bytes": 0, "flops": 0})
            block["tensors"] += 1
            block["parameters"] += entry.numel
            block["bytes"] += entry.nbytes
    for group, count in arithmetic(checkpoint, found, size or found.size).items():
        if group in blocks:
            blocks[group]["flops"] = count
    if read:
        add_norms(checkpoint, blocks)
    parts = {
        part: sum(block["flops"] for group, block in blocks.items() if part_in_words(group) == part)
        for part in ("text encoders", "UNet", "VAE decoder")
    }
    width, height = size or found.size
    flops = {"width": width, "height": height, "steps": STEPS, **parts, "picture": sum(parts.values())}
    return {"blocks": {group: blocks[group] for group in in_order(blocks)}, "flops": flops}


def part_in_words(group: str) -> str:
    return {"text": "text encoders", "vae": "VAE decoder"}.get(group.split(".")[0], "UNet")


@torch.no_grad()
def arithmetic(checkpoint: Checkpoint, found: Recognition, size: tuple[int, int]) -> dict[str, int]:
    """FLOPs of a picture by group, counted while modules without data run; "" is the whole UNet.  Raises UsageError."""
    if any(length % 8 or not 64 <= length <= MAX_SIDE for length in size):
        raise UsageError(f"size: expected multiples of 8 from 64 to {MAX_SIDE}, found {size[0]}x{size[1]}")
    model = build(checkpoint, found.family)
    unet, vae = model.unet, model.vae
    totals: dict[str, int] = {}
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        for path, module in model.named_modules():
            group = group_of(f"{path}.")
            if group != group_of(f"{path.rpartition('.')[0]}.") and not isinstance(module, nn.ModuleList):
                watch(module, group, counter, totals)
        ids = torch.empty(2, LENGTH, dtype=torch.long)
        context = torch.cat([encoder.hidden_states(ids)[-1] for encoder in model.text_encoders], dim=-1)
        latents = torch.empty(2, unet.in_channels, size[1] // vae.downscale, size[0] // vae.downscale)
        unet(latents, torch.empty(2), context, torch.empty(2, unet.vector_channels) if unet.vector_channels else None)
        vae.decode(latents[:1, : vae.latent_channels])
    return {group: flops * (STEPS if part_in_words(group) == "UNet" else 1) for group, flops in totals.items()}


def watch(module: nn.Module, group: str, counter: FlopCounterMode, totals: dict[str, int]) -> None:
    """Adds to the group what is counted between the module's beginning and end."""
    before: list[int] = []
    module.register_forward_pre_hook(lambda *_: before.append(counter.get_total_flops()))

    def after(*_: object) -> None:
        totals[group] = totals.get(group, 0) + counter.get_total_flops() - before.pop()

    module.register_forward_hook(after)


def add_norms(checkpoint: Checkpoint, blocks: dict[str, dict[str, Any]]) -> None:
    """Adds the root mean square and the largest absolute number; None where something is not finite."""
    sums: dict[str, list[float]] = {group: [0.0, 0.0] for group in blocks}
    for key, entry in checkpoint.entries.items():
        if entry.dtype in TORCH and not is_unneeded(key):
            group = sums[group_of(key)]
            for piece in stored_pieces(checkpoint, key):
                numbers = piece.float()
                group[0] += float(torch.linalg.vector_norm(numbers)) ** 2
                group[1] = max(group[1], float(numbers.abs().max())) if numbers.numel() else group[1]
    for name, (squares, largest) in sums.items():
        finite = math.isfinite(squares) and math.isfinite(largest)
        blocks[name]["rms"] = math.sqrt(squares / max(blocks[name]["parameters"], 1)) if finite else None
        blocks[name]["max"] = largest if finite else None
