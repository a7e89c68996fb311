"""Embeddings of the library that prompts name, for those who draw: a Python caller names files, with `Pipeline.add_embedding`."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from ..addons.embeddings import brings_words, is_bundle, knowing
from ..addons.wanted import as_loras, in_style, without_tags
from ..library.embeddings import named_in, of_library
from ..options import checked
from ..pipeline import Pipeline
from ..plan import as_in, check_text, reading_of
from ..request import Request
from ..text.grammar import all_pieces


def teach(pipes: Sequence[Pipeline], request: Request, find: Callable[[str], Path] = of_library) -> None:
    """Has them know the embeddings of the library that the texts of a request name, and the first of them those in its LoRAs.

    find: the file of a name after embedding:.  Raises CheckpointError, UsageError.
    """
    settled, tags = without_tags(in_style(as_in(request)))
    teach_bundles(pipes[0], [Path(lora.source) for lora in as_loras([*(settled.loras or ()), *tags])])
    reading, steps = reading_of(settled.emphasis, settled.plain_prompt), checked("steps", settled.steps)
    pieces = []
    for name in ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2"):
        text = getattr(settled, name) or ""
        with warnings.catch_warnings(action="ignore"):  # the drawing says them
            check_text(name, text, reading)
        pieces += all_pieces(text, name == "prompt", steps, reading)
    for found in named_in(pieces, reading, find):
        for pipe in pipes:
            found.teach(pipe.add_embedding)


def teach_bundles(pipe: Pipeline, loras: Sequence[Path]) -> None:
    """The words inside these LoRAs, and no longer those inside others.  Raises CheckpointError."""
    kept = {name: each for name, each in pipe.embeddings.items() if each.file.path in loras or not is_bundle(each.file)}
    if len(kept) < len(pipe.embeddings):
        pipe.embeddings, pipe.conditioner = kept, knowing(pipe.conditioner, pipe.engine.read, kept.values())
    for path in loras:
        if brings_words(path):
            pipe.add_embedding(path)
