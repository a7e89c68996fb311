"""From a text's ids, and from what the family wants to know beside them, to what conditions the UNet."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..diffusion.denoiser import Conditioning
from ..models.clip import OpenTextTransformer, TextEncoder
from ..models.family import Family, Tower, text_skip
from ..models.unet import timestep_embedding
from .tokenizer import END_ID, LENGTH

if TYPE_CHECKING:
    from .added import Added

AT_ONCE = 64  # texts: every layer's output of all of them is in memory
SIZE_CHANNELS = 256  # of the sinusoids of one number in SDXL's vector (sd_xl_base.yaml, ConcatTimestepEmbedderND)


def hidden_states(encoder: TextEncoder, ids: Tensor) -> Sequence[Tensor]:
    return encoder.hidden_states(ids)


@dataclass(frozen=True)
class Conditioner:
    """The text encoders of a model, and the family that says how they are read."""

    family: Family
    encoders: Sequence[TextEncoder]
    device: torch.device
    run: Callable[[TextEncoder, Tensor], Sequence[Tensor]] = hidden_states  # ids (B, 77) -> every layer's output, (B, 77, D)
    visit: Callable[[nn.Module], AbstractContextManager[object]] = nullcontext  # brings an encoder to the device while it works
    added: Sequence[Added] = ()  # the words that each encoder has beside its vocabulary

    def read(self, ids: Sequence[Tensor], clip_skip: int | None = None) -> tuple[list[Tensor], Tensor | None]:
        """ids (B, 77*k) for each encoder -> the context (B, 77*k, D) of each, and the pooled vector (B, P) where there is one.

        clip_skip: 1 takes the last layer of every encoder, 2 the one before it, …; by default that which the family has.
        """
        contexts, pooled = [], None
        for tower, encoder, texts in zip(self.family.towers, self.encoders, ids, strict=True):
            parts = []
            with self.visit(encoder):
                for rows in texts.to(self.device).split(AT_ONCE):
                    states = self.run(encoder, rows.view(-1, LENGTH))  # (B*k, 77): every chunk is a text of its own
                    parts.append(read_states(tower, encoder, rows, states, clip_skip))
            contexts.append(torch.cat([context for context, _ in parts]))
            pooled = torch.cat([vector for _, vector in parts if vector is not None]) if tower.pooled else pooled
        return contexts, pooled


def read_states(
    tower: Tower, encoder: TextEncoder, ids: Tensor, states: Sequence[Tensor], clip_skip: int | None
) -> tuple[Tensor, Tensor | None]:
    """ids (B, 77*k), states (B*k, 77, D) -> context (B, 77*k, D) and, from the first chunk, pooled (B, P)."""
    skip = text_skip(tower, len(states) - 1) if clip_skip is None else clip_skip - 1
    state = states[-1 - skip]
    if tower.final_norm:
        state = encoder.final_norm(state)
    context = state.view(*ids.shape, -1)
    if not (tower.pooled and isinstance(encoder, OpenTextTransformer)):
        return context, None
    count = ids.shape[1] // LENGTH
    known = ids.masked_fill(ids > END_ID, 0)  # without added words, or their ids would be the largest
    return context, encoder.pooled(known.view(-1, LENGTH), states[-1])[::count]


def with_sizes(conditioning: Conditioning, numbers: Sequence[float]) -> Conditioning:
    """Adds the UNet's vector: the pooled text, then the sinusoids of each number, (B, P + 256 * len(numbers)).

    SDXL: original height and width, crop top and left, target height and width; its refiner: the first four and the aesthetic
    score (generative-models, inference/helpers.py; Podell et al. 2023, arXiv 2307.01952, section 2.2).
    """
    assert conditioning.pooled is not None
    sinusoids = timestep_embedding(torch.tensor(numbers, device=conditioning.pooled.device), SIZE_CHANNELS).flatten()
    rows = sinusoids.to(conditioning.pooled.dtype).expand(len(conditioning.pooled), -1)
    return replace(conditioning, vector=torch.cat([conditioning.pooled, rows], dim=1))


def zeroed(conditioning: Conditioning, which: Sequence[bool]) -> Conditioning:
    """No text at all for some of the pictures, as SDXL was trained to take it: zeros in place of the encoding of no words."""
    assert conditioning.pooled is not None
    keep = torch.tensor([not each for each in which], device=conditioning.context.device)
    context = torch.where(keep[:, None, None], conditioning.context, 0)
    return replace(conditioning, context=context, pooled=torch.where(keep[:, None], conditioning.pooled, 0))
