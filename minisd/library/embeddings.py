"""The embeddings of the library that prompts name, by listing its folders; files are opened only when a prompt names them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError, shown
from ..files.checkpoint import file_sha256
from ..text.added import FIRST_ID, MARK, Added, called
from ..text.attention import BREAK, Piece
from .names import identified, resolve
from .places import File, model_files


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


def of_library(name: str) -> Path:
    return resolve(name, "embedding")


def named_in(pieces: Iterable[Piece], reading: str, find: Callable[[str], Path] = of_library) -> list[Named]:
    """Embeddings of the library that prompts name: those after embedding:, and bare names of files in folders called embeddings,
    as A1111 has it.

    find: the file of a name after embedding:.  Raises CheckpointError, UsageError.
    """
    texts = [piece.text for piece in pieces if piece != BREAK]
    found: dict[str, Named] = {}
    for mark in (mark for text in texts for mark in MARK.findall(text) if reading != "plain"):
        name = re.sub(r"\.(safetensors|pt|bin)$", "", mark.rstrip(","))
        if not name.startswith(("/", ".")) and ".." not in name.split("/"):
            found[name] = Named(name, find(name), bare=False)
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
