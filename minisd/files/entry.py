"""A tensor as a file describes it."""

from __future__ import annotations

import math
from dataclasses import dataclass

MAX_TENSORS = 10_000  # in a file; SDXL has 2,500; a million empty ones would take 5 s and 0.9 GB to list


FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}  # bytes of a number, by safetensors' name


PLAIN = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}


@dataclass(frozen=True)
class Entry:
    """A tensor as a file describes it, and where it lies there."""

    dtype: str  # safetensors' name: F16, BF16, F32, …
    shape: tuple[int, ...]
    offset: int  # of its first byte in the file; its numbers are little-endian, one behind the other
    stride: tuple[int, ...] | None = None  # in elements, where their order is not that of the axes
    others: tuple[int, ...] = ()  # offsets of further parts of one size, below the first, where it does not lie in one place

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def in_one_piece(self) -> bool:
        """Whether its numbers lie in the file in their order, one behind the other."""
        return self.stride is None and not self.others

    @property
    def runs(self) -> list[tuple[int, int]]:
        """The places where its numbers lie, in their order: (offset of the first byte, how many numbers)."""
        offsets = (self.offset, *self.others)
        return [(offset, self.numel // len(offsets)) for offset in offsets]

    @property
    def nbytes(self) -> int:
        return self.numel * PLAIN.get(self.dtype, 0)
