"""How a prompt is read, for `minisd tokens`."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

from ..models.family import Tower
from .added import FIRST_ID, NONE, Added
from .attention import Piece
from .chunks import Chunk, chunked
from .grammar import Prompt
from .tokenizer import END_ID, START_ID, bpe


def listed(prompt: Prompt, towers: Sequence[Tower], emphasis: str, added: Sequence[Added] = ()) -> dict[str, Any]:
    """Ready for JSON.

    parts: those that AND joins, each with its weight and its steps; call k of the network, from 0, takes the first of the steps
        whose `until` is at least k.  Each has `chunks`: for each text encoder a list of 77 ids and weights.
    chunks, steps: of the first part, the chunks at its first step.
    beyond: what programs that read one chunk alone would leave out.
    added: the words of each encoder beside its vocabulary.
    cut: what an encoder does not see because <|endoftext|> is written before it.
    """

    readers = list(zip(towers, added or [NONE] * len(towers), strict=True))

    def chunks(pieces: Sequence[Piece]) -> list[list[dict[str, Any]]]:
        return [[as_facts(chunk, emphasis) for chunk in chunked(pieces, emphasis, tower.pad, words)] for tower, words in readers]

    parts: list[dict[str, Any]] = []
    for part in prompt.parts:
        steps = [{"until": entry.last, "text": entry.text, "chunks": chunks(entry.pieces)} for entry in part.entries]
        parts.append({"weight": part.weight, "text": part.text, "steps": steps})
    first, steps = prompt.parts[0].entries[0], parts[0]["steps"]
    return {
        "emphasis": emphasis,
        "encoders": [tower.title for tower in towers],
        "chunks": steps[0]["chunks"],
        "steps": [{"until": step["until"], "text": step["text"]} for step in steps],
        "parts": parts,
        "beyond": " ".join(words(chunk["ids"]) for chunk in steps[0]["chunks"][0][1:]),
        "cut": [hidden(first.pieces, emphasis, tower, words) for tower, words in readers],
    }


def as_facts(chunk: Chunk, emphasis: str) -> dict[str, Any]:
    """With the weights that are in force."""
    return {"ids": list(chunk.ids), "weights": [1.0] * len(chunk.weights) if emphasis == "ignore" else list(chunk.weights)}


def hidden(pieces: Sequence[Piece], emphasis: str, tower: Tower, added: Added) -> str:
    whole, seen = (chunked(pieces, emphasis, pad, added) for pad in (END_ID, tower.pad))
    pairs = (pair for both in zip(whole, seen, strict=True) for pair in zip(both[0].ids, both[1].ids, strict=True))
    return words([own for own, other in pairs if own != other])


def words(ids: Sequence[int]) -> str:
    """What ids spell, without start and end."""
    return str(bpe().decode([each for each in ids if each < START_ID])).replace("</w>", " ").strip()


def as_text(facts: dict[str, Any]) -> str:
    """Tokens with their ids, a line for each run of one weight."""
    lines = []
    for i, part in enumerate(facts["parts"]):
        if len(facts["parts"]) > 1 or part["weight"] != 1:
            lines.append(f"part {i + 1}, {part['weight']:g} times the guidance")
        for step in part["steps"]:
            if len(part["steps"]) > 1:
                lines.append(f"until step {step['until']}: {step['text']!r}")
            lines += chunk_lines(step["chunks"][0])
    lines += [
        f"not seen by {name}, behind an end of text: {cut}"
        for name, cut in zip(facts["encoders"], facts["cut"], strict=True)
        if cut
    ]
    if facts["beyond"]:
        lines.append(f"nothing is cut; programs that read 77 tokens alone leave out: {facts['beyond']}")
    return "\n".join(lines)


def chunk_lines(chunks: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for i, chunk in enumerate(chunks):
        rows = list(zip(chunk["ids"], chunk["weights"], strict=True))
        while len(rows) > 1 and rows[-1] == (END_ID, 1.0):  # what fills up
            rows.pop()
        lines.append(f"  chunk {i + 1} of {len(chunks)}: {len(rows) - 1} of 75 tokens")
        for weight, run in groupby(rows[1:], key=lambda row: row[1]):
            lines.append(f"    {weight:<8.4g}" + "  ".join(shown(token) for token, _ in run))
    return lines


def shown(token: int) -> str:
    """A token and its id; some are a part of a letter, which is none by itself, and some are rows of an added word."""
    if token >= FIRST_ID:
        return f"[row] {token}"
    text = words([token])
    return f"{text} {token}" if text and "\ufffd" not in text else str(token)
