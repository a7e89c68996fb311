"""Files of textual inversion: words with rows of their own, in every form that trainers and programs write.

Reference: AUTOMATIC1111 textual_inversion.py; ComfyUI sd1_clip.py, load_embed; diffusers loaders/textual_inversion.py; the
bundles of OneTrainer's LoRAs.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError, shown
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.recognition import listing, looks_like
from ..files.tensors import TORCH, finite, read_stored
from ..library.names import identified, resolve
from ..library.places import File, model_files
from ..text.added import MARK, MOST_ROWS, NONE, Added, Run, reading, vocabulary_of
from ..text.conditioner import Conditioner
from ..text.tokenizer import encode

BUNDLE = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\.\*|emb_params|(clip_[lg]))")
TOWERS = {"clip_l": 0, "clip_g": -1}  # of SDXL


@dataclass(frozen=True)
class Embedding:
    """A word: its rows, (n, D) float32, by "clip_l", "clip_g" where the file says for which encoder, else ""."""

    name: str
    rows: Mapping[str, Tensor]
    file: Checkpoint

    def rows_for(self, tower: int, towers: int, width: int) -> Tensor | None:
        """Those for one of so many encoders, of this width; None where there are none."""
        fitting = [
            rows
            for name, rows in self.rows.items()
            if rows.shape[1] == width and (name == "" or towers == 1 or TOWERS[name] % towers == tower)
        ]
        return fitting[0] if fitting else None

    def facts(self) -> dict[str, Any]:
        """What a recipe says of it."""
        return {"name": self.name, "path": os.path.abspath(self.file.path), "sha256": self.file.sha256()}


def read_embeddings(path: str | os.PathLike[str], name: str | None = None) -> list[Embedding]:
    """The word of a file, or the words that a LoRA has with it; name: the word, by default the file's name.

    Raises CheckpointError for what is none, holds NaN, or more rows than a chunk.
    """
    file = open_checkpoint(path)
    bundles: dict[str, dict[str, str]] = {}
    for key in file.entries:
        if found := BUNDLE.fullmatch(key):
            bundles.setdefault(found[1], {})[found[2] or ""] = key
    if bundles:
        named = bundles.items()
        return [Embedding(each, {what: rows_of(file, [key]) for what, key in keys.items()}, file) for each, keys in named]
    return [Embedding(name or file.path.stem, {what: rows_of(file, keys) for what, keys in keys_of(file).items()}, file)]


def keys_of(file: Checkpoint) -> dict[str, list[str]]:
    """Where the rows are: by encoder the tensors that follow one another."""
    keys = list(file.entries)
    if any(key in TOWERS for key in keys):
        return {key: [key] for key in TOWERS if key in keys}
    for wanted in (r"string_to_param\..+", r"emb_params", r"\d+\..+"):
        if found := [key for key in keys if re.fullmatch(wanted, key)]:
            return {"": found if wanted[0] == "\\" else found[:1]}
    if len(keys) == 1 and len(file.entries[keys[0]].shape) in (1, 2):
        return {"": keys}
    what, hint = looks_like(file.shapes)
    raise CheckpointError(file.path, f"expected a textual inversion embedding, found {what}{listing(file.shapes)}", hint)


def rows_of(file: Checkpoint, keys: Sequence[str]) -> Tensor:
    """(n, D), float32, of tensors (D,) or (n, D) of one width."""
    found = []
    for key in keys:
        entry = file.entries[key]
        if entry.dtype not in TORCH or len(entry.shape) not in (1, 2) or 0 in entry.shape:
            expected = "expected rows of numbers (n, D)"
            raise CheckpointError(file.path, f"{expected}, found {entry.dtype} {entry.shape}", key=key)
        rows = read_stored(file, key).float()
        if not finite(rows):
            raise CheckpointError(file.path, "holds NaN or infinity", "the file is broken; get another copy", key)
        found.append(rows.reshape(-1, rows.shape[-1]))
    if len({rows.shape[1] for rows in found}) > 1:
        raise CheckpointError(file.path, "expected rows of one width, found several", key=keys[0])
    rows = torch.cat(found)
    if len(rows) > MOST_ROWS:
        raise CheckpointError(file.path, f"expected at most {MOST_ROWS} rows, which a chunk of a prompt holds, found {len(rows)}")
    return rows


FITS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner"}


def with_embedding(added: Sequence[Added], embedding: Embedding, widths: Sequence[int]) -> tuple[Added, ...]:
    """The added words of encoders of these widths, and one more.  Raises CheckpointError where one finds no rows for it."""
    if not encode(embedding.name):
        raise UsageError(f"name: expected a word, found {embedding.name!r}")
    rows = [embedding.rows_for(i, len(widths), width) for i, width in enumerate(widths)]
    if any(each is None for each in rows):
        theirs = [each.shape[1] for each in embedding.rows.values()]
        made_for = "SDXL" if len(theirs) > 1 else FITS.get(theirs[0], "another family")
        found, expected = (" and ".join(map(str, each)) for each in (theirs, widths))
        reason = f"has rows of {found} numbers, for {made_for}; the text encoders of this checkpoint take {expected}"
        raise CheckpointError(embedding.file.path, reason, "take one of the checkpoint's own family")
    known = added or [NONE] * len(widths)
    return tuple(each.with_word(embedding.name, one) for each, one in zip(known, rows, strict=True) if one is not None)


def taught(conditioner: Conditioner, run: Run, path: Path, name: str | None) -> tuple[Conditioner, dict[str, Embedding]]:
    """A conditioner that knows the words of a file, too, and these words; run: what runs its encoders otherwise."""
    added, found = conditioner.added, read_embeddings(path, name)
    widths = [vocabulary_of(encoder).embedding_dim for encoder in conditioner.encoders]
    for embedding in found:
        added = with_embedding(added, embedding, widths)
    knowing = replace(conditioner, added=added, run=reading(run, conditioner.encoders, added))
    return knowing, {embedding.name: embedding for embedding in found}


def named_in(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """Embeddings of the library that prompts name, (name, file): those after embedding:, and bare names of files in folders
    called embeddings, as A1111 has it.  Raises CheckpointError, UsageError."""
    whole = "\n".join(texts)
    found: dict[str, File] = {}
    for file in model_files():
        if file.short.casefold() in whole.casefold() and "embeddings" in (part.casefold() for part in file.path.parts):
            found.setdefault(file.short, file)
    kinds = {entry.path: facts.kind for entry, _, facts in identified(found.values())}
    names = {name: file.path for name, file in found.items() if kinds.get(file.path) == "embedding"}
    for mark in MARK.findall(whole):
        name = re.sub(r"\.(safetensors|pt|bin)$", "", mark.rstrip(",)"))
        name = name.split(":")[0]  # a weight in brackets stands behind it
        if name not in names and not name.startswith(("/", ".")):
            names[name] = resolve(name, "embedding")
    return list(names.items())


def facts_of(embeddings: Mapping[str, Embedding], texts: Sequence[str]) -> list[dict[str, Any]]:
    """What a recipe says of those that prompts may have named."""
    whole = "\n".join(texts).casefold()
    return [each.facts() for name, each in embeddings.items() if name.casefold() in whole]


def found_again(said: Mapping[str, Any]) -> tuple[str, Path]:
    """An embedding of a recipe: by its path, else by its name.  Raises UsageError, CheckpointError."""
    name, path = said.get("name"), said.get("path")
    if not isinstance(name, str) or not isinstance(path, str):
        raise UsageError(f"embeddings: expected name and path of each, found {shown(str(said), 80)}")
    return name, Path(path) if os.path.exists(path) else resolve(name, "embedding")
