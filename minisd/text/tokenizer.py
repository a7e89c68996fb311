"""CLIP's byte-pair encoding, on the `tokenizers` package.

Reference: openai/CLIP, simple_tokenizer.py, in the form that transformers' fast CLIP tokenizer gives it (no ftfy, no HTML
unescaping).  Only the merges are shipped; the 49,408 ids follow from them.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

MERGES = Path(__file__).with_name("clip_merges.txt.xz")
START, END = "<|startoftext|>", "<|endoftext|>"
START_ID, END_ID = 49_406, 49_407
LENGTH = 77  # positions of the text encoder: start, 75 tokens, end
TOKENS = LENGTH - 2
WORDS = r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"


def byte_letters() -> list[str]:
    """The 256 letters that stand for bytes, in the order of their ids (simple_tokenizer.py, bytes_to_unicode).

    Bytes that print stand for themselves and come first; the 68 others are mapped to U+0100 and up.
    """
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(256 - len(printable))]


def merges_text() -> str:
    """The merges, one pair a line, most frequent first."""
    with lzma.open(MERGES, "rt", encoding="utf-8") as file:
        return file.read()


@cache
def bpe() -> Tokenizer:
    merges = [(left, right) for left, right in (line.split(" ") for line in merges_text().splitlines())]
    letters = byte_letters()
    words = [*letters, *(letter + "</w>" for letter in letters), *(left + right for left, right in merges), START, END]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(
        models.BPE(vocabulary, merges, continuing_subword_prefix="", end_of_word_suffix="</w>", unk_token=END, fuse_unk=False)
    )
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([START, END])  # typed by a user they become their own ids, as in every implementation
    return tokenizer


def encode(text: str) -> list[int]:
    """The ids of a text, without start and end, of any length."""
    return bpe().encode(text, add_special_tokens=False).ids


def tokenize(texts: Sequence[str], pad: int = END_ID, chunks: int = 1) -> list[list[int]]:
    """Each text as k times 77 ids: start, 75 tokens, end, and again for the next 75; (B, 77*k).

    k is what the longest text needs, and `chunks` at least; shorter ones go on with empty chunks (A1111 sd_hijack_clip.py).
    pad: fills the last chunk of a text; 49407 for OpenAI's encoder, 0 for open_clip's.
    """
    encoded = [encode(text) for text in texts]
    chunks = max(chunks, *(-(-len(ids) // TOKENS) for ids in encoded))
    rows = []
    for ids in encoded:
        row: list[int] = []
        for first in range(0, chunks * TOKENS, TOKENS):
            row += [START_ID, *ids[first : first + TOKENS], END_ID]
            row += [pad] * (-len(row) % LENGTH)
        rows.append(row)
    return rows
