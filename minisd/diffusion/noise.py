"""Where the samplers' noise comes from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .denoiser import Noise


def per_picture(seeds: Sequence[int | None], shape: tuple[int, ...], device: torch.device) -> tuple[Tensor, Noise]:
    """Unit noise (B, C, h, w) for B pictures of shape (C, h, w): what they start from, and the source of all that follows.

    Each picture has a generator of its own, on the CPU: picture i equals the single run with its seed, on every device.
    None, where the caller gives the first noise himself, counts as seed 0.
    """
    generators = [torch.Generator("cpu").manual_seed(seed or 0) for seed in seeds]

    def draw(sigma: float, following: float) -> Tensor:
        return torch.cat([torch.randn((1, *shape), generator=generator) for generator in generators]).to(device)

    return draw(0.0, 0.0), draw
