"""Noise that belongs to one path: whatever steps a sampler takes, it meets the same random course between two noise levels.

Independent draws make another picture for every number of steps; the increments of one Brownian motion do not, as more steps
only look at the same motion more closely.  k-diffusion draws so for the samplers of SDEs (BrownianTreeNoiseSampler, on
torchsde's tree), and A1111 and ComfyUI with it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from .denoiser import Noise
from .noise import STREAMS, Origin, Stream

KEPT = 64  # pieces of a path that are not drawn anew for the next step
DIGITS = 6  # of a noise level: finer it is not looked at


def path(seed: int, shape: tuple[int, ...], low: float, high: float, stream: Callable[[int], Stream]) -> Noise:
    """(sigma, following) -> the increment on the way between two levels within [low, high], over the root of its length: unit
    noise (*shape), float32.  Levels outside count as the nearest inside.

    A Brownian bridge, halved as often as it takes: an interval that is cut in two gives the left half its share and a normal
    number times the bridge's deviation, and the right half the rest.  The seed of that number is hashed from the path's and from
    the place in the tree, so that the order of the questions does not matter (torchsde, BrownianTree; brownian_interval.py).
    """
    ends = round(single(low), DIGITS), round(single(high), DIGITS)

    def normal(words: np.random.SeedSequence, count: int) -> Tensor:
        return stream(int(words.generate_state(count)[0]))(shape)

    whole = normal(np.random.SeedSequence(seed, pool_size=24), 3) * math.sqrt(single(high) - single(low))

    @lru_cache(KEPT)
    def cut(key: int, depth: int) -> Tensor:
        return normal(np.random.SeedSequence(seed, spawn_key=(key, depth), pool_size=24), 4)

    def over(start: float, end: float, inside: tuple[float, float], at: tuple[int, int], total: Tensor) -> Tensor:
        """The increment from start to end, of a piece that has `total`."""
        low, high = inside
        if (start, end) == inside:
            return total
        middle = round(0.5 * (low + high), DIGITS)
        before, after = middle - low, high - middle
        left = before * total / (high - low) + math.sqrt(before * after / (high - low)) * cut(*at)
        below, above = (2 * at[0], at[1] + 1), (2 * at[0] + 1, at[1] + 1)
        if end <= middle:
            return over(start, end, (low, middle), below, left)
        if start >= middle:
            return over(start, end, (middle, high), above, total - left)
        return over(start, middle, (low, middle), below, left) + over(middle, end, (middle, high), above, total - left)

    def increment(sigma: float, following: float) -> Tensor:
        way = sorted((single(sigma), single(following)))
        start, end = (round(min(max(level, ends[0]), ends[1]), DIGITS) for level in way)
        if start == end:
            return torch.zeros(shape)
        sign = 1 if sigma < following else -1  # downward is backward
        return sign * over(start, end, ends, (0, 0), whole) / math.sqrt(way[1] - way[0])

    return increment


def single(level: float) -> float:
    """As the references have it, whose levels are in single precision: the tree's cuts depend on the last digit."""
    return float(np.float32(float(level)))


def brownian(
    dialect: str, origins: Sequence[Origin], shape: tuple[int, ...], ends: tuple[float, float], device: torch.device
) -> Noise:
    """The noise of B pictures of shape (C, h, w) on the way between two levels: (B, C, h, w).

    ends: the least level above 0 and the greatest.  A path for each picture, by its seed alone (A1111), or in dialect comfy one
    for each batch.
    """
    if dialect != "comfy":
        paths = [path(origin.seed, shape, *ends, STREAMS[dialect]) for origin in origins]
        return lambda sigma, following: torch.stack([each(sigma, following) for each in paths]).to(device)
    keys = {(origin.seed, origin.batch) for origin in origins}
    batches = {(seed, count): path(seed, (count, *shape), *ends, STREAMS[dialect]) for seed, count in keys}

    def draw(sigma: float, following: float) -> Tensor:
        drawn = {key: each(sigma, following) for key, each in batches.items()}
        return torch.stack([drawn[origin.seed, origin.batch][origin.index] for origin in origins]).to(device)

    return draw
