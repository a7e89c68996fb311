"""Weights in a prompt, as ComfyUI writes them: (x) and (x:1.3), where a number takes the place of what stands around it.

Rules: ComfyUI comfy/sd1_clip.py, parse_parentheses and token_weights.  Everything else, square brackets, BREAK and AND among it,
is words.
"""

from __future__ import annotations

import re

from .attention import Piece

LARGER = 1.1
DEEPEST = 500  # brackets within one another
ESCAPED = {"\\)": "\0\1", "\\(": "\0\2"}  # set aside while brackets are read: NUL is in no prompt


def weighted(text: str) -> tuple[Piece, ...]:
    """A text as segments with their weights, none joined.  Raises ValueError for brackets too deep within one another."""
    for escape, code in ESCAPED.items():
        text = text.replace(escape, code)
    found: list[Piece] = []
    waiting = [(segment, 1.0, 1) for segment in reversed(segments(text))]
    while waiting:
        segment, weight, depth = waiting.pop()
        if len(segment) < 2 or segment[0] != "(" or segment[-1] != ")":
            found.append(Piece(unescaped(segment), weight))
            continue
        if depth > DEEPEST:
            raise ValueError(f"expected at most {DEEPEST} brackets within one another, found more")
        inner, weight = with_weight(segment[1:-1], weight * LARGER)
        waiting += [(each, weight, depth + 1) for each in reversed(segments(inner))]
    return tuple(found)


def segments(text: str) -> list[str]:
    """Groups in round brackets, and what stands between them.

    A surplus bracket takes the depth below zero, and those after it open nothing until it is zero again; an unclosed one makes
    one segment of the rest.
    """
    found, start, depth = [], 0, 0
    for match in re.finditer(r"[()]", text):
        at = match.start()
        if match[0] == "(":
            if depth == 0:
                found.append(text[start:at])
                start = at
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                found.append(text[start : at + 1])
                start = at + 1
    return [segment for segment in (*found, text[start:]) if segment]


def with_weight(text: str, weight: float) -> tuple[str, float]:
    """The text before its last colon, and what Python takes for a number behind it, in the place of `weight`."""
    before, colon, number = text.rpartition(":")
    if not (before and colon):
        return text, weight
    try:
        return before, float(number)
    except ValueError:
        return text, weight


def unescaped(text: str) -> str:
    for escape, code in ESCAPED.items():
        text = text.replace(code, escape[1:])
    return text
