"""Weights in a prompt, as A1111 writes them: (x), [x], (x:1.3), BREAK, and a backslash before what is to be a letter.

Rules: A1111 prompt_parser.py, parse_prompt_attention.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Piece(NamedTuple):
    """Words that go to the text encoder together, and how much they count."""

    text: str
    weight: float = 1.0


BREAK = Piece("BREAK", -1.0)  # the text goes on in the next chunk (A1111 marks it so)

# In order of preference: an escape, a lone backslash, brackets, a weight with its bracket, a run of other characters, a colon.
TOKENS = re.compile(r"\\[()\[\]\\]|\\|[(\[]|:\s*([-+]?[.\d]+)\s*\)|[)\]]|[^\\()\[\]:]+|:")
AROUND_BREAK = re.compile(r"\s*\bBREAK\b\s*")
LARGER = 1.1  # what round brackets multiply by; square ones by its inverse


def weighted(text: str) -> tuple[Piece, ...]:
    """A text as pieces, neighbours of different weights; BREAK stands between them as a piece of its own.

    Brackets multiply everything since they were opened, and unclosed ones everything to the end.  Raises ValueError where a
    weight is no number, such as 1.2.3.
    """
    texts: list[str] = []
    weights: list[float] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}  # two stacks that know nothing of each other

    def multiply(bracket: str, factor: float) -> None:
        for i in range(opened[bracket].pop(), len(weights)):
            weights[i] *= factor

    def add(text: str, weight: float = 1.0) -> None:
        texts.append(text)
        weights.append(weight)

    for match in TOKENS.finditer(text):
        token, number = match[0], match[1]
        if token[0] == "\\":
            add(token[1:])
        elif token in opened:
            opened[token].append(len(texts))
        elif number is not None and opened["("]:
            multiply("(", number_of(number, token))
        elif token == ")" and opened["("]:
            multiply("(", LARGER)
        elif token == "]" and opened["["]:
            multiply("[", 1 / LARGER)
        else:
            for i, plain in enumerate(AROUND_BREAK.split(token) if BREAK.text in token else [token]):
                if i > 0:
                    add(BREAK.text, BREAK.weight)
                add(plain)
    for bracket, factor in (("(", LARGER), ("[", 1 / LARGER)):
        while opened[bracket]:
            multiply(bracket, factor)
    return joined(texts, weights)


def number_of(text: str, token: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"expected a number as a weight, found {token[:40]!r}; a backslash makes its bracket a letter") from None


def joined(texts: list[str], weights: list[float]) -> tuple[Piece, ...]:
    """Neighbours of exactly the same weight in one piece."""
    runs: list[tuple[list[str], float]] = []
    for text, weight in zip(texts, weights, strict=True):
        if runs and runs[-1][1] == weight:
            runs[-1][0].append(text)
        else:
            runs.append(([text], weight))
    return tuple(Piece("".join(run), weight) for run, weight in runs) or (Piece(""),)
