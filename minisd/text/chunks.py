"""Weighted pieces as what a text encoder reads: chunks of 77 ids, and how much each of them counts.

A1111 (sd_hijack_clip.py, tokenize_line) and ComfyUI (sd1_clip.py, tokenize_with_weights) cut long texts at different places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .added import NONE, Added, groups
from .attention import BREAK, Piece
from .tokenizer import END_ID, LENGTH, START_ID, TOKENS

COMMA = 267  # the id of "," at the end of a word
BACKTRACK = 20  # tokens that may move to the next chunk with their comma left behind (A1111's comma_padding_backtrack)
SHORT = 8  # tokens; ComfyUI cuts a segment of fewer at no border

Token = tuple[int, float]  # id, weight
Fragment = list[list[Token]]  # groups: of a single token, or of the rows of an added word


class Chunk(NamedTuple):
    ids: tuple[int, ...]  # 77: start, up to 75 tokens, end, and what fills up
    weights: tuple[float, ...]


def chunked(pieces: Sequence[Piece], emphasis: str, pad: int, added: Added = NONE) -> list[Chunk]:
    """A text for an encoder; pad: what fills a chunk up, 49407 for OpenAI's, 0 for open_clip's; added: its own words."""
    pairs = [
        (piece, [[(token, piece.weight) for token in group] for group in fragment])
        for piece in pieces
        for fragment in groups(piece.text, added, emphasis)
    ]
    if emphasis == "plain":
        tokens = [token for _, fragment in pairs for group in fragment for token in group]
        cut = [tokens[i : i + TOKENS] for i in range(0, len(tokens), TOKENS)] or [[]]
    else:
        cut = by_segments(pairs) if emphasis == "comfy" else at_commas(pairs)
    return [closed(tokens, emphasis, pad) for tokens in cut]


def empty(pad: int) -> Chunk:
    """What fills a text up to the length of another."""
    return closed([], "plain", pad)


def closed(tokens: Sequence[Token], emphasis: str, pad: int) -> Chunk:
    ids = [START_ID, *(token for token, _ in tokens), END_ID]
    if emphasis not in ("comfy", "plain"):  # whatever follows the first end, also one that was typed, is filling
        end = ids.index(END_ID)
        ids[end + 1 :] = [pad] * (len(ids) - end - 1) if pad != END_ID else ids[end + 1 :]
    ids += [pad] * (LENGTH - len(ids))
    weights = [1.0, *(weight for _, weight in tokens)]
    return Chunk(tuple(ids), (*weights, *[1.0] * (LENGTH - len(weights))))


def at_commas(pairs: Sequence[tuple[Piece, Fragment]]) -> list[list[Token]]:
    """A1111's rule: what follows the last comma of a full chunk goes to the next, if it is no more than 20 tokens; a group that
    does not fit begins the next."""
    done: list[list[Token]] = []
    chunk: list[Token] = []
    comma: int | None = None  # place of the last one in this chunk
    for piece, fragment in pairs:
        if piece == BREAK:
            done.append(chunk)
            chunk, comma = [], None
            continue
        for group in fragment:
            moved: list[Token] = []
            if group[0][0] == COMMA:
                comma = len(chunk)
            elif len(chunk) == TOKENS and comma is not None and TOKENS - comma <= BACKTRACK:
                chunk, moved = chunk[: comma + 1], chunk[comma + 1 :]
            if len(chunk) == TOKENS or moved:
                done.append(chunk)
                chunk, comma = moved, None
            if len(chunk) + len(group) > TOKENS:
                done.append(chunk)
                chunk, comma = [], None
            chunk += group
    return [*done, chunk] if chunk or not done else done


def by_segments(pairs: Sequence[tuple[Piece, Fragment]]) -> list[list[Token]]:
    """ComfyUI's rule: a segment of fewer than 8 tokens that does not fit goes to the next chunk, a longer one is cut, but for the
    rows of an added word (which ComfyUI tears)."""
    done: list[list[Token]] = [[]]
    for _, fragment in pairs:
        tokens = rest = [token for group in fragment for token in group]
        whole = len(fragment) == 1
        while len(rest) > (room := TOKENS - len(done[-1])):
            if len(tokens) >= SHORT and not whole:
                done[-1] += rest[:room]
                rest = rest[room:]
            done.append([])
        done[-1] += rest
    return done
