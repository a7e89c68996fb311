"""Files of textual inversion: words with rows of their own, in every form that trainers and programs write.

Reference: AUTOMATIC1111 textual_inversion.py; ComfyUI sd1_clip.py, load_embed; diffusers loaders/textual_inversion.py; the
bundles of OneTrainer's LoRAs.
"""

from __future__ import annotations

import base64
import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..errors import CheckpointError, UsageError, shown, taken_apart
from ..files.checkpoint import Checkpoint, first_bytes, open_checkpoint
from ..files.recognition import listing, looks_like
from ..files.tensors import TORCH, finite, read_stored
from ..pictures.metadata import check_head
from ..system.regular import open_regular
from ..text.added import MOST_ROWS, NONE, Added, Run, reading, vocabulary_of
from ..text.conditioner import Conditioner
from ..text.tokenizer import encode

BUNDLE = re.compile(r"bundle_emb\.(.+?)\.(?:string_to_param\.\*|emb_params|(clip_[lg]))")
FITS = {768: "SD 1.x", 1024: "SD 2.x", 1280: "the SDXL refiner"}
MOST_NUMBERS = 1 << 20  # of a tensor; 75 rows of 1280 are a tenth of it
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
    """The word of a file, or the words that a LoRA has with it, or a file of diffusers, each by its own name.

    name: the word, by default the file's name; of several words the one that is wanted.  Raises CheckpointError for what is none,
    holds NaN, or more rows than a chunk.
    """
    head, *_ = first_bytes(Path(path))
    if head.startswith(b"\x89PNG"):
        return [from_picture(Path(path), name)]
    file = open_checkpoint(path)
    bundles: dict[str, dict[str, str]] = {}
    for key in file.entries:
        if found := BUNDLE.fullmatch(key):
            bundles.setdefault(found[1], {})[found[2] or ""] = key
    if not bundles and len(file.entries) > 1 and all(is_token(key, file) for key in file.entries):
        bundles = {key: {"": key} for key in file.entries}
    if bundles:
        named = chosen(file, bundles, name)
        return [Embedding(each, {what: rows_of(file, [key]) for what, key in keys.items()}, file) for each, keys in named.items()]
    return [Embedding(name or file.path.stem, {what: rows_of(file, keys) for what, keys in keys_of(file).items()}, file)]


def is_bundle(file: Checkpoint) -> bool:
    """Whether this is a LoRA that has embeddings with it."""
    return any(BUNDLE.fullmatch(key) for key in file.entries)


def brings_words(path: str | os.PathLike[str]) -> bool:
    """Whether a LoRA has embeddings with it.  Raises CheckpointError."""
    return is_bundle(open_checkpoint(path))


def is_token(key: str, file: Checkpoint) -> bool:
    """Whether this may be a word as diffusers stores it: the token, and its row or rows."""
    shape = file.entries[key].shape
    return len(shape) in (1, 2) and shape[-1] in FITS and "." not in key and key not in TOWERS


def chosen(file: Checkpoint, bundles: Mapping[str, dict[str, str]], name: str | None) -> Mapping[str, dict[str, str]]:
    """Of several words the named one, or all; a single one takes the name.  Raises CheckpointError."""
    if name is None or name in bundles:
        return bundles if name is None else {name: bundles[name]}
    if len(bundles) == 1:
        return {name: next(iter(bundles.values()))}
    raise CheckpointError(file.path, f"holds no word {shown(name, 60)!r}", f"it holds {shown(', '.join(bundles), 200)}")


def from_picture(path: Path, name: str | None) -> Embedding:
    """A PNG that A1111 puts an embedding into: its .pt as JSON, in base64, in a chunk (A1111 image_embedding.py).

    Those that are hidden in pixels alone are not read.
    """
    with taken_apart(path), open_regular(path) as file:
        stat = os.fstat(file.fileno())
        check_head(file)
        with Image.open(file, formats=("PNG",)) as image:
            text = image.info.get("sd-ti-embedding")
        if text is None:
            hint = "those in the pixels alone are not read; take the .pt"
            raise CheckpointError(path, "is a PNG picture without an embedding in a chunk sd-ti-embedding", hint)
        data = json.loads(base64.b64decode(text))
        rows = {key: torch.tensor(each["TORCHTENSOR"]) for key, each in data["string_to_param"].items()}
        key = "*" if "*" in rows else next(iter(rows))
    checkpoint = Checkpoint(path, {}, {}, stat.st_size, stat.st_mtime_ns)
    return Embedding(name or str(data.get("name") or path.stem), {"": joined(path, {key: rows[key]})}, checkpoint)


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
    for key in keys:
        entry = file.entries[key]
        if entry.dtype not in TORCH or entry.numel > MOST_NUMBERS:
            raise CheckpointError(file.path, f"expected rows of numbers (n, D), found {entry.dtype} {entry.shape}", key=key)
    return joined(file.path, {key: read_stored(file, key) for key in keys})


def joined(path: Path, tensors: Mapping[str, Tensor]) -> Tensor:
    """The same of what is read.  Raises CheckpointError."""
    for key, rows in tensors.items():
        if rows.dim() not in (1, 2) or 0 in rows.shape:
            raise CheckpointError(path, f"expected rows of numbers (n, D), found {tuple(rows.shape)}", key=key)
        if not finite(rows.float()):
            raise CheckpointError(path, "holds NaN or infinity", "the file is broken; get another copy", key)
    if len({rows.shape[-1] for rows in tensors.values()}) > 1:
        raise CheckpointError(path, "expected rows of one width, found several", key=next(iter(tensors)))
    rows = torch.cat([each.float().reshape(-1, each.shape[-1]) for each in tensors.values()])
    if len(rows) > MOST_ROWS:
        raise CheckpointError(path, f"expected at most {MOST_ROWS} rows, which a chunk of a prompt holds, found {len(rows)}")
    return rows


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
    made = replace(conditioner, added=added, run=reading(run, conditioner.encoders, added))
    return made, {embedding.name: embedding for embedding in found}


def knowing(conditioner: Conditioner, run: Run, embeddings: Iterable[Embedding]) -> Conditioner:
    """A conditioner that knows these words and no others; run: what runs its encoders otherwise."""
    added: tuple[Added, ...] = ()
    for embedding in embeddings:
        added = with_embedding(added, embedding, [vocabulary_of(encoder).embedding_dim for encoder in conditioner.encoders])
    return replace(conditioner, added=added, run=reading(run, conditioner.encoders, added) if added else run)
