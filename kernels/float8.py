"""Rows in float8, as a matrix product in float8 takes them: what LayerNorm and GEGLU may write in the place of their result.

    s[r] = max_c |y[r, c]| / 448,     p[r, c] = e4m3(y[r, c] / s[r]),     y = s p

with e4m3's largest number, 448, at the largest of every row (Micikevicius et al. 2022, arXiv 2209.05433).

Why here.  As a pass of its own the scaling reads y twice and writes half of it: 5 bytes for each number in half precision, beside
the 2 that wrote y.  A program that still has the whole row in its registers writes 1 byte in the place of those 7.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checks import capability, expect, jit, tl

E4M3, LARGEST, LEAST = torch.float8_e4m3fn, 448.0, 1e-12  # LEAST: of a row's largest number, so that zeros stay zeros
SINCE = 89  # the compute capability that can convert to it


def scaled(y: Tensor) -> tuple[Tensor, Tensor]:
    """y (..., C) -> p (..., C), e4m3, and s (..., 1): float32, of float64 float64."""
    wide = y if y.dtype == torch.float64 else y.float()
    scale = wide.abs().amax(-1, keepdim=True).clamp(min=LEAST) / LARGEST
    return (wide / scale).clamp(-LARGEST, LARGEST).to(E4M3), scale


@jit
def row_scale(values):  # (ROWS, C), zero beyond the last channel -> (ROWS,)
    return tl.maximum(tl.max(tl.abs(values), axis=1), 1e-12) / 448.0


def empty_rows(x: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Memory for p (..., columns) and s (..., 1), as many rows as x has.  ValueError for a GPU that has no float8."""
    expect(capability(x) >= SINCE, "float8", "a GPU of compute capability 8.9 or later", capability(x) / 10)
    given: dict[str, Any] = {"device": x.device}
    return torch.empty(*x.shape[:-1], columns, dtype=E4M3, **given), torch.empty(*x.shape[:-1], 1, dtype=torch.float32, **given)
