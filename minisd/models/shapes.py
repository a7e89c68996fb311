"""A checkpoint seen as a blueprint: the names of its tensors and their shapes, and how to walk them."""

from __future__ import annotations

from collections.abc import Mapping


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
    """The children 0, 1, 2, … 999 in numeric order.  Gaps (slots without weights, such as an activation) stay empty."""
    heads = {key.split(".", 1)[0] for key in shapes}
    numbers = [int(head) for head in heads if head.isdigit()]
    return [below(shapes, str(i)) for i in range(min(max(numbers, default=-1) + 1, 1000))]
