"""Every option of a drawing, once: command line, checks, recipe, parameters text and axes of a comparison are made from it.

`request.Request` has a field for each (a test holds names and defaults together), which is where Python's types are.
Nothing here imports torch.
"""

from __future__ import annotations

import numbers
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .errors import UsageError

MAX_SIDE = 4096  # pixels
MAX_IMAGES = 1000  # in one call
MAX_STEPS = 999
MAX_SEED = 2**63 - 1 - MAX_IMAGES


@dataclass(frozen=True)
class Kind:
    """What a value may be."""

    expected: str
    parse: Callable[[str], Any]  # from the command line
    convert: Callable[[Any], Any]  # from Python or JSON; raises TypeError or ValueError, or returns None for what does not fit

    def check(self, name: str, value: object) -> Any:
        """The value as plain Python has it.  Raises UsageError, which names the argument, what was expected and found."""
        try:
            found = self.convert(value)
        except (TypeError, ValueError, OverflowError):
            found = None
        if found is None:
            raise UsageError(f"{name}: expected {self.expected}, found {repr(value)[:80]}")
        return found


def whole(low: int, high: int, at_least: int | None = None) -> Kind:
    """at_least: a number below `low` that is taken as well, such as the seed -1."""

    def convert(value: Any) -> int | None:
        number = operator.index(value)  # NumPy's, too, but no float and no text
        return number if not isinstance(value, bool) and (low <= number <= high or number == at_least) else None

    return Kind(f"a whole number from {low} to {high}", int, convert)


def number(low: float, high: float) -> Kind:
    def convert(value: Any) -> int | float | None:
        if not isinstance(value, numbers.Real) or isinstance(value, bool):
            return None
        plain = value if isinstance(value, int | float) else float(value)
        return plain if low <= plain <= high else None  # which NaN is not, either

    return Kind(f"a number from {low} to {high}", float, convert)


def one_of(*names: str) -> Kind:
    return Kind(f"one of {', '.join(names)}", str, lambda value: value if isinstance(value, str) and value in names else None)


def pair(text: str) -> tuple[int, int]:
    width, mark, height = text.lower().partition("x")
    if not (mark and width.isdecimal() and height.isdecimal()):
        raise ValueError(f"expected WIDTHxHEIGHT such as 512x768, found {text!r}")
    return int(width), int(height)


def two_numbers(value: Any) -> tuple[int, int] | None:
    first, second = (operator.index(each) for each in value)
    return (first, second) if 0 <= first <= 65_536 and 0 <= second <= 65_536 else None


TEXT = Kind("a text", str, lambda value: value if isinstance(value, str) else None)
FLAG = Kind("true or false", bool, lambda value: bool(value) if isinstance(value, bool) else None)
PAIR = Kind("two whole numbers from 0 to 65,536", pair, two_numbers)
TEXTS = Kind("texts", str, lambda value: [TEXT.check("", each) for each in value] if isinstance(value, list) else None)
NUMBERS = Kind("numbers", str, lambda value: [number(0, 1e30).check("", each) for each in value])
FUNCTION = Kind("a function", str, lambda value: value if callable(value) else None)
# Names, functions, pictures and tensors, which are looked at where they are used.
ANYTHING = Kind("a name, a function or a picture", str, lambda value: value)
