"""How a prompt is read: parts joined by AND, each with entries for the steps of its editing, each of weighted pieces.

Two dialects.  A1111's has all of that (prompt_parser.py); its text is read in this order: AND, the weight at the end of a part,
editing, brackets.  ComfyUI's ("comfy") has round brackets only.  "plain" is no dialect: the text is words.  Wildcards and {a|b}
are what dynamicprompts is for, before a prompt comes here.  Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from . import attention, comfy
from .attention import Piece
from .editing import schedule

AND = re.compile(r"\bAND\b")
TAIL = re.compile(r":\s*([-+]?(?:\d+\.?|\d*\.\d+))$")  # of a part whose blanks at the end are gone

MAX_PARTS = 50  # each is asked of the network at every call


@dataclass(frozen=True)
class Entry:
    last: int  # the call of the network, counted from 0, up to which it holds
    text: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Part:
    """What is guided to with a weight of its own."""

    weight: float
    text: str
    entries: tuple[Entry, ...]  # rising


@dataclass(frozen=True)
class Prompt:
    parts: tuple[Part, ...]


def parse(text: str, steps: int, emphasis: str = "original", joins: bool = True) -> Prompt:
    """Reads a prompt.  Raises ValueError where a weight is no number, and for too many parts.

    steps: of the schedule that `when` in [from:to:when] is about: calls of the network, as A1111 counts them.
    emphasis: one of options.EMPHASES, or "plain".
    joins: whether AND joins parts and a number at a part's end is its weight; in a negative prompt, both are words.
    """
    if emphasis in ("comfy", "plain"):
        pieces = comfy.weighted(text) if emphasis == "comfy" else (Piece(text),)
        return Prompt((Part(1.0, text, (Entry(steps, text, pieces),)),))
    parts = [with_weight(part) for part in AND.split(text)] if joins else [(text, 1.0)]
    if len(parts) > MAX_PARTS:
        raise ValueError(f"expected at most {MAX_PARTS} parts joined by AND, found {len(parts)}")
    return Prompt(tuple(Part(weight, part, entries(part, steps, emphasis)) for part, weight in parts))


def all_pieces(text: str, joins: bool, steps: int, reading: str) -> list[Piece]:
    """Those of a prompt at any time; steps: of samplers that ask the network twice in each.  Raises ValueError."""
    parts = parse(text, 2 * steps, reading, joins).parts
    return list(dict.fromkeys(piece for part in parts for entry in part.entries for piece in entry.pieces))


def entries(text: str, steps: int, emphasis: str) -> tuple[Entry, ...]:
    found = schedule(text, steps)
    read = {said: (Piece(said),) if emphasis == "none" else attention.weighted(said) for _, said in found}
    return tuple(Entry(last, said, read[said]) for last, said in found)


def with_weight(part: str) -> tuple[str, float]:
    """A part without the weight at its end, `a cat :1.5`, and that; blanks before it stay (A1111, get_multicond_prompt_list)."""
    part = part.rstrip()
    tail = TAIL.search(part)
    return (part, 1.0) if tail is None else (part[: tail.start()].rstrip(), float(tail[1]))


def lone_weight(text: str) -> str | None:
    """The weight at the end of a prompt that has no AND: often meant otherwise, such as a time of day."""
    tail = None if AND.search(text) else TAIL.search(text.rstrip())
    return tail[0] if tail else None


def checked(text: str, emphasis: str = "original", joins: bool = True) -> Prompt:
    """Reads a prompt whatever the steps are.  Raises ValueError also for weights that no picture survives: ComfyUI's are all that
    Python calls a number, `inf` and `nan` among them."""
    prompt = parse(text, 1, emphasis, joins)
    for part in prompt.parts:
        for weight in (part.weight, *(piece.weight for entry in part.entries for piece in entry.pieces)):
            if not math.isfinite(weight):
                raise ValueError(f"expected weights that are finite, found {weight}")
    return prompt
