"""LoRAs for the reduced checkpoint, as kohya's scripts write them."""

from __future__ import annotations

import re

import torch
from helpers import REDUCED

from minisd.addons.lora_names import targets, written_names
from minisd.models.family import SD1

SHAPES = REDUCED.shapes()
KNOWN = targets(SHAPES, SD1)
WRITTEN = written_names(KNOWN, SD1, "kohya")
ATTENTION = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1"


def product(name: str, key: str, rank: int = 4, seed: int = 0, scale: float = 0.1, **names: str) -> dict[str, torch.Tensor]:
    """A LoRA of one weight, as kohya's scripts write it or with other endings."""
    shape, generator = SHAPES[key], torch.Generator().manual_seed(seed)
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * scale
    down = torch.randn(rank, *shape[1:], generator=generator) * scale
    ends = {"up": ".lora_up.weight", "down": ".lora_down.weight", "alpha": ".alpha"} | names
    tensors = {name + ends["up"]: up, name + ends["down"]: down}
    return tensors | ({name + ends["alpha"]: torch.tensor(rank / 2)} if ends["alpha"] else {})


def whole(seed: int = 0, scale: float = 0.02) -> dict[str, torch.Tensor]:
    """A LoRA of every attention and feed-forward of the reduced checkpoint."""
    tensors = {}
    for i, (target, name) in enumerate(WRITTEN.items()):
        if re.search(r"attn\d_|_ff_|self_attn|mlp", name):
            tensors |= product(name, target.key, 4, seed + i, scale)
    return tensors
