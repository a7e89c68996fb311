"""A checkpoint seen as a blueprint: the names of its tensors and their shapes, and how to walk them."""

from __future__ import annotations

from typing import TypeVar

Shapes = dict[str, tuple[int, ...]]
Value = TypeVar("Value")


def below(shapes: dict[str, Value], name: str) -> dict[str, Value]:
    """What stands below `name`, with `name.` taken off: below({"a.b.c": s}, "a") is {"b.c": s}."""
    prefix = name + "."
    return {key[len(prefix) :]: shape for key, shape in shapes.items() if key.startswith(prefix)}


def numbered(shapes: Shapes) -> list[Shapes]:
    """The children 0, 1, 2, … in numeric order.  Gaps (slots without weights, such as an activation) stay empty."""
    heads = {key.split(".", 1)[0] for key in shapes}
    numbers = [int(head) for head in heads if head.isdigit()]
    return [below(shapes, str(i)) for i in range(max(numbers, default=-1) + 1)]
