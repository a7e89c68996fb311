from __future__ import annotations

import hashlib
import json
from pathlib import Path

from helpers import clip_tokenizer

from minisd.text.tokenizer import END_ID, START_ID, encode, merges_text, tokenize

GOLDEN = json.loads((Path(__file__).parent / "clip_vectors.json").read_text())
MORE = [
    "don't won't they're I'm we'll she'd it's",
    "\u00e9 e\u0301",
    "👩‍👩‍👧‍👦 🇩🇪",
    "a\u00a0b\u2003c\td\n\ne",
    "x" * 300,
    "İstanbul ẞ ǅ",
    "1234567890",
    "!?!?…—“”",
]


def test_merges_are_those_of_openai():
    text = "#version: 0.2\n" + merges_text()
    assert hashlib.sha256(text.encode()).hexdigest() == "9fd691f7c8039210e0fced15865466c65820d09b63988b0174bfe25de299051a"


def test_ids_of_hard_strings_equal_recorded_ones():
    assert len(GOLDEN) == 243
    assert [text for text, ids in GOLDEN if encode(text) != ids] == []


def test_ids_of_hard_strings_equal_those_of_transformers(tmp_path):
    reference = clip_tokenizer(tmp_path)
    for text in [*(text for text, _ in GOLDEN), *MORE]:
        assert encode(text) == reference(text, add_special_tokens=False, truncation=False).input_ids, text


def test_77_ids_with_padding():
    (row,) = tokenize(["a photograph of an astronaut riding a horse"])
    assert row == [START_ID, 320, 8853, 539, 550, 18376, 6765, 320, 4558, *[END_ID] * 68]
    assert tokenize([""])[0] == [START_ID, *[END_ID] * 76]
    assert tokenize(["a"], pad=0)[0] == [START_ID, 320, END_ID, *[0] * 74]


def test_longer_texts_are_cut_into_chunks_of_75():
    assert tokenize(["cat " * 75])[0] == [START_ID, *[2368] * 75, END_ID]
    long, short = tokenize(["cat " * 75 + "dog dog", "a"], pad=0)
    assert long == [START_ID, *[2368] * 75, END_ID, START_ID, 1929, 1929, END_ID, *[0] * 73]
    assert short == [START_ID, 320, END_ID, *[0] * 74, START_ID, END_ID, *[0] * 75]
