"""A checkpoint seen as a blueprint: the names of its tensors and their shapes, and how to walk them."""

from __future__ import annotations

import math
from collections.abc import Mapping
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

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * PLAIN.get(self.dtype, 0)


class Shapes(dict[str, tuple[int, ...]]):
    """Shapes by name, below some name of the checkpoint; what is missing is reported by its whole name."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], name: str = "") -> None:
        super().__init__(shapes)
        self.name = name

    def __missing__(self, key: str) -> tuple[int, ...]:
        raise KeyError(f"{self.name}{key}")


def below(shapes: Mapping[str, tuple[int, ...]], name: str) -> Shapes:
    """What stands below `name`, with `name.` taken off: below({"a.b.c": s}, "a") is {"b.c": s}."""
    prefix = f"{name}."
    parent = shapes.name if isinstance(shapes, Shapes) else ""
    return Shapes({key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}, parent + prefix)


def numbered(shapes: Shapes) -> list[Shapes]:
    """The children 0, 1, 2, … in numeric order.  Gaps (slots without weights, such as an activation) stay empty."""
    heads = {key.split(".", 1)[0] for key in shapes}
    numbers = [int(head) for head in heads if head.isdigit()]
    return [below(shapes, str(i)) for i in range(max(numbers, default=-1) + 1)]
