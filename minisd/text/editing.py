"""Prompts that change on the way, as A1111 writes them: [from:to:when], [to:when], [from::when], and [a|b|...].

Rules: A1111 prompt_parser.py, get_learned_conditioning_prompt_schedules and its lark grammar, read here by one pass with a stack
of open brackets.  A bracket that turns out to be no edit, no alternation and no balanced pair is a letter, and so are those
around it; what was complete within it stays what it is.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

TOKENS = re.compile(r"\\.|[^\\\[\]():|]+|[\[\]():|]|\\")  # an escaped character; a run of plain ones; a sign; a lone backslash
WHEN = re.compile(r"\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*")
CLOSING = {"(": ")", "[": "]"}


@dataclass
class Open:
    """A bracket that is not closed yet: texts and the signs between them."""

    bracket: str = ""
    texts: list[str] = field(default_factory=lambda: [""])
    marks: list[str] = field(default_factory=list)
    plain: bool = True  # whether the last of the texts is as it was written, with nothing resolved in it

    def add(self, text: str, plain: bool) -> None:
        self.texts[-1] += text
        self.plain &= plain

    def mark(self, sign: str) -> None:
        self.marks.append(sign)
        self.texts.append("")
        self.plain = True

    def as_written(self) -> str:
        pairs = zip(["", *self.marks], self.texts, strict=True)
        return self.bracket + "".join(mark + text for mark, text in pairs)


def schedule(text: str, steps: int) -> list[tuple[int, str]]:
    """What a text says at which steps: (last step, text), rising, the last of them (steps, text).

    steps: how many there are, counted from 1; A1111 counts calls of the network and doubles them for samplers of second order.
    A text that cannot be read so (a `|` outside of an alternation, a lone backslash) has one entry, itself.
    """
    ends = {steps}
    if at_step(text, steps, steps, ends) is None:
        return [(steps, text)]
    return [(end, at_step(text, end, steps, ends) or "") for end in sorted(ends)]


def at_step(text: str, step: int, steps: int, ends: set[int]) -> str | None:
    """The text at a step, counted from 1; None if it is no schedule.  Adds the last steps of all its edits to `ends`."""
    stack = [Open()]
    for token in TOKENS.findall(text):
        if token in ("\\", "\\\n"):
            return None
        if token in CLOSING:
            stack.append(Open(token))
        elif token in (":", "|") and len(stack) > 1:
            stack[-1].mark(token)
        elif token == "|":
            return None
        elif token in CLOSING.values():
            closed = resolved(stack[-1], token, step, steps, ends) if len(stack) > 1 else None
            if closed is not None:
                stack.pop()
                stack[-1].add(closed, plain=False)
            elif not give_up(stack):
                return None
            else:
                stack[0].add(token, plain=True)
        else:
            stack[-1].add(token, plain=True)
    return stack[0].texts[0] if give_up(stack) else None


def give_up(stack: list[Open]) -> bool:
    """Makes letters of all open brackets; False where a `|` would become one."""
    for each in stack[1:]:
        if "|" in each.marks:
            return False
        stack[0].add(each.as_written(), plain=True)
    del stack[1:]
    return True


def resolved(found: Open, closing: str, step: int, steps: int, ends: set[int]) -> str | None:
    """What a closed pair of brackets says at a step; None if it is no pair."""
    texts, marks = found.texts, set(found.marks)
    if closing != CLOSING[found.bracket]:
        return None
    if found.bracket == "(":
        return found.as_written() + ")" if found.marks in ([], [":"]) else None
    if not marks:
        return found.as_written() + "]"
    if marks == {"|"}:
        ends.update(range(1, steps + 1))
        return texts[(step - 1) % len(texts)]
    when = WHEN.fullmatch(texts[-1]) if found.plain else None
    if marks != {":"} or len(texts) > 3 or when is None:
        return None
    last = last_step(when[1], steps)
    if last >= 1:
        ends.add(last)
    before = texts[0] if len(texts) == 3 else ""
    return before if step <= last else texts[-2]


def last_step(when: str, steps: int) -> int:
    """Up to which step, inclusively: a number with a dot is a share of the steps, without one a count (A1111, collect_steps)."""
    value = float(when) * steps if "." in when else float(when)
    return steps if value >= steps else int(max(value, 0.0))  # truncated, in binary floating point: 0.29 * 100 is 28
