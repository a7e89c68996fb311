"""What a prompt is made of, once it is read."""

from __future__ import annotations

from typing import NamedTuple


class Piece(NamedTuple):
    """Words that go to the text encoder together, and how much they count."""

    text: str
    weight: float = 1.0


BREAK = Piece("BREAK", -1.0)  # the text goes on in the next chunk (A1111 marks it so)
