"""Files of textual inversion: words with rows of their own, in every form that trainers and programs write.

Reference: AUTOMATIC1111 textual_inversion.py; ComfyUI sd1_clip.py, load_embed; diffusers loaders/textual_inversion.py; the
bundles of OneTrainer's LoRAs.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError, shown
from ..files.checkpoint import Checkpoint, file_sha256, open_checkpoint
from ..files.recognition import listing, looks_like
from ..files.tensors import TORCH, finite, read_stored
from ..library.names import identified, resolve
from ..library.places import File, model_files
from ..text.added import FIRST_ID, MARK, MOST_ROWS, NONE, Added, Run, called, reading, vocabulary_of
from ..text.attention import BREAK, Piece
from ..text.conditioner import Conditioner
from ..text.grammar import parse
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


def all_pieces(text: str, joins: bool, steps: int, reading: str) -> list[Piece]:
    """Those of a prompt at any time; steps: of samplers that ask the network twice in each.  Raises ValueError."""
    parts = parse(text, 2 * steps, reading, joins).parts
    return list(dict.fromkeys(piece for part in parts for entry in part.entries for piece in entry.pieces))


@dataclass(frozen=True)
class Named:
    """A file of the library that a prompt names."""

    name: str
    path: Path
    bare: bool  # by its bare name, which may as well be a word

    def teach(self, add: Callable[[Path, str], object]) -> None:
        """Adds it.  One by a bare name that does not fit, such as one for another family, is set aside with a warning, as A1111
        does; of one by embedding:NAME it raises CheckpointError."""
        try:
            add(self.path, self.name)
        except CheckpointError as error:
            if not self.bare:
                raise
            warnings.warn(f"{error}; {self.name!r} is read as plain words", stacklevel=2)


def named_in(pieces: Iterable[Piece], reading: str) -> list[Named]:
    """Embeddings of the library that prompts name: those after embedding:, and bare names of files in folders called embeddings,
    as A1111 has it.  Raises CheckpointError, UsageError."""
    texts = [piece.text for piece in pieces if piece != BREAK]
    found: dict[str, Named] = {}
    for mark in (mark for text in texts for mark in MARK.findall(text) if reading != "plain"):
        name = re.sub(r"\.(safetensors|pt|bin)$", "", mark.rstrip(","))
        if not name.startswith(("/", ".")) and ".." not in name.split("/"):
            found[name] = Named(name, resolve(name, "embedding"), bare=False)
    if reading in ("plain", "comfy"):
        return list(found.values())
    files = lying_there("".join(texts))
    names = Added({name: range(FIRST_ID + i, FIRST_ID + i + 1) for i, name in enumerate({**files, **found})})
    bare = [name for name in called((Piece(text) for text in texts), names, reading) if name not in found]
    kinds = {file.path: facts.kind for file, _, facts in identified(files[name] for name in bare)}
    return [
        *found.values(),
        *(Named(name, files[name].path, bare=True) for name in bare if kinds.get(files[name].path) == "embedding"),
    ]


def lying_there(text: str) -> dict[str, File]:
    """Files in folders called embeddings whose names, but for blanks, are somewhere in a text."""
    whole = "".join(text.casefold().split())
    files: dict[str, File] = {}
    for file in model_files():
        if "".join(file.short.casefold().split()) in whole and "embeddings" in (part.casefold() for part in file.path.parts):
            files.setdefault(file.short, file)
    return files


def found_again(said: Mapping[str, Any]) -> tuple[str, Path]:
    """An embedding of a recipe: by its path, else by its name; warns where it is another.  Raises UsageError, CheckpointError."""
    name, path = said.get("name"), said.get("path")
    if not isinstance(name, str) or not isinstance(path, str):
        raise UsageError(f"embeddings: expected name and path of each, found {shown(str(said), 80)}")
    file = Path(path) if os.path.exists(path) else resolve(name, "embedding")
    if said.get("sha256") not in (None, file_sha256(file)):
        warnings.warn(f"{file} is not the embedding that this picture was made with ({shown(name, 60)})", stacklevel=2)
    return name, file
