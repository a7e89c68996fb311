"""Weighted pieces as what a text encoder reads: chunks of 77 ids, and how much each of them counts.

A1111 (sd_hijack_clip.py, tokenize_line) and ComfyUI (sd1_clip.py, tokenize_with_weights) cut long texts at different places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from .attention import BREAK, Piece
from .tokenizer import END_ID, LENGTH, START_ID, TOKENS, encode

COMMA = 267  # the id of "," at the end of a word
BACKTRACK = 20  # tokens that may move to the next chunk with their comma left behind (A1111's comma_padding_backtrack)
SHORT = 8  # tokens; ComfyUI cuts a segment of fewer at no border

Token = tuple[int, float]  # id, weight


class Chunk(NamedTuple):
    ids: tuple[int, ...]  # 77: start, up to 75 tokens, end, and what fills up
    weights: tuple[float, ...]


def chunked(pieces: Sequence[Piece], emphasis: str, pad: int) -> list[Chunk]:
    """A text for an encoder; pad: what fills a chunk up, 49407 for OpenAI's, 0 for open_clip's."""
    pairs = [(piece, [(token, piece.weight) for token in encode(piece.text)]) for piece in pieces]
    if emphasis == "plain":
        tokens = [token for _, some in pairs for token in some]
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


def at_commas(pairs: Sequence[tuple[Piece, list[Token]]]) -> list[list[Token]]:
    """A1111's rule: what follows the last comma of a full chunk goes to the next, if it is no more than 20 tokens."""
    done: list[list[Token]] = []
    chunk: list[Token] = []
    comma: int | None = None  # place of the last one in this chunk
    for piece, tokens in pairs:
        if piece == BREAK:
            done.append(chunk)
            chunk, comma = [], None
            continue
        for token in tokens:
            moved: list[Token] = []
            if token[0] == COMMA:
                comma = len(chunk)
            elif len(chunk) == TOKENS and comma is not None and TOKENS - comma <= BACKTRACK:
                chunk, moved = chunk[: comma + 1], chunk[comma + 1 :]
            if len(chunk) == TOKENS or moved:
                done.append(chunk)
                chunk, comma = moved, None
            chunk.append(token)
    return [*done, chunk] if chunk or not done else done


def by_segments(pairs: Sequence[tuple[Piece, list[Token]]]) -> list[list[Token]]:
    """ComfyUI's rule: a segment of fewer than 8 tokens that does not fit goes to the next chunk, a longer one is cut."""
    done: list[list[Token]] = [[]]
    for _, tokens in pairs:
        rest = tokens
        while len(rest) > (room := TOKENS - len(done[-1])):
            if len(tokens) >= SHORT:
                done[-1] += rest[:room]
                rest = rest[room:]
            done.append([])
        done[-1] += rest
    return done
