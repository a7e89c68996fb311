"""Embeddings of the library that prompts name, for those who draw: a Python caller names files, with `Pipeline.add_embedding`."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from ..addons.wanted import without_tags
from ..library.embeddings import named_in
from ..options import checked
from ..pipeline import Pipeline
from ..plan import as_in, check_text, reading_of
from ..request import Request
from ..text.grammar import all_pieces


def teach(pipes: Sequence[Pipeline], request: Request) -> None:
    """Has them know the embeddings of the library that the texts of a request name.  Raises CheckpointError, UsageError."""
    settled, _ = without_tags(as_in(request))
    reading, steps = reading_of(settled.emphasis, settled.plain_prompt), checked("steps", settled.steps)
    pieces = []
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        text = getattr(settled, name) or ""
        with warnings.catch_warnings(action="ignore"):  # the drawing says them
            check_text(name, text, reading)
        pieces += all_pieces(text, name == "prompt", steps, reading)
    for found in named_in(pieces, reading):
        for pipe in pipes:
            found.teach(pipe.add_embedding)
