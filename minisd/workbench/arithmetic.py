"""The formulas of merging, each on one tensor of every model.  All of them take and give float32 (or float64, in tests).

weighted sum       A + sum of r_i (B_i - A), with a base A + sum of r_i (B_i - base)
slerp              along the circle from A to B, by r of the angle between them                       Shoemake 1985
TIES               base + r * (mean of the large changes that agree in sign)              Yadav et al., arXiv:2306.01708
DARE               the weighted sum over a random part of the changes, enlarged             Yu et al., arXiv:2311.03099
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def weighted(a: Tensor, others: Sequence[Tensor], ratios: Sequence[float], base: Tensor | None = None) -> Tensor:
    """Without a base (1 - sum of r_i) A + sum of r_i B_i, with one A + sum of r_i (B_i - base)."""
    result = a * (1 - sum(ratios)) if base is None else a - sum(ratios) * base
    for other, ratio in zip(others, ratios, strict=True):
        result.add_(other, alpha=ratio)
    return result


def slerp(a: Tensor, b: Tensor, ratio: float) -> Tensor:
    """Straight where the two point the same way, or one is zero: the circle says nothing there."""
    cosine = torch.nn.functional.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).clamp(-1, 1)
    angle = torch.arccos(cosine)
    if not 1e-3 < float(angle) < torch.pi - 1e-3 or not (a.any() and b.any()):
        return weighted(a, [b], [ratio])
    share_a, share_b = torch.sin((1 - ratio) * angle) / torch.sin(angle), torch.sin(ratio * angle) / torch.sin(angle)
    return float(share_a) * a + float(share_b) * b


def ties(models: Sequence[Tensor], base: Tensor, ratio: float, density: float) -> Tensor:
    """Trim, elect, merge: of each model's change the `density` largest part; of these, by number, the mean of those with the
    sign that has the larger sum."""
    changes = [trimmed(model - base, density) for model in models]
    sign = sum(changes, torch.zeros_like(base)).sign_()
    total, count = torch.zeros_like(base), torch.zeros_like(base)
    for change in changes:
        agrees = change.sign() == sign
        total.add_(change.mul_(agrees))
        count.add_(change != 0)
    return base + total.div_(count.clamp_(min=1)).mul_(ratio)


def trimmed(change: Tensor, density: float) -> Tensor:
    """The largest part of the numbers, by magnitude; the rest becomes zero."""
    dropped = change.numel() - round(density * change.numel())
    if dropped == change.numel():
        return change.zero_()
    limit = np.partition(change.abs().flatten().numpy(), dropped)[dropped]  # a third of torch.kthvalue's memory
    return change.mul_(change.abs() >= limit)


def dare(
    a: Tensor, others: Sequence[Tensor], ratios: Sequence[float], base: Tensor, density: float, generator: torch.Generator
) -> Tensor:
    """A + sum of r_i * (a random `density` part of B_i - base) / density: the sum stays the same on average."""
    result = a.clone()
    for other, ratio in zip(others, ratios, strict=True):
        kept = torch.rand(a.shape, generator=generator) < density
        result += ratio / density * torch.where(kept, other - base, 0)
    return result


def generator_for(seed: int, key: str) -> torch.Generator:
    """The same for a tensor of this name whatever was drawn before it."""
    digest = hashlib.sha256(f"{seed} {key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
