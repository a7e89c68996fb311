"""Importing a model file into the library: checked first, never executed, copied whole or not at all, and in nobody's place."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path

from ..errors import CheckpointError, OutputError, UsageError, shown
from ..files.checkpoint import TORCH_SAVE, file_sha256, first_bytes, known_hashes, state_of
from ..system.atomic import check_place, check_room, drafting, placed
from ..system.cache import keep
from .names import Facts, identified, identify, is_name
from .places import SUFFIXES, model_files, stem

MAX_NAME = 100  # bytes
FORBIDDEN = '/\\:*?"<>|'  # what some system has another use for in a name
PIECE = 8 << 20  # bytes that are copied at once


def add(source: str | os.PathLike[str], name: str | None = None, folder: str | os.PathLike[str] | None = None) -> Path:
    """Copies a model file into the library; returns its path there.

    The file is opened and recognised before anything is copied, and never executed; the copy is read back before it gets its
    name, and appears whole or not at all.  The suffix tells what is inside: .safetensors or .ckpt.
    name: without folders and suffix; by default that of the source.
    folder: by default the first of $MINISD_MODELS, else ./models, which is made where it is missing.
    Where the library has the same file under this name, nothing is copied.  Raises CheckpointError (the source is no model that
    minisd knows), UsageError (the name), OutputError (another model has the name; no room; the copy could not be written).
    """
    source = Path(source)
    facts = identify(source)
    if facts.kind == "other":
        raise CheckpointError(source, facts.what, "nothing was imported")
    head, size, _ = first_bytes(source)
    name = checked_name(stem(source.name) if name is None else name)
    home = own_folder() if folder is None else Path(folder)
    for path in namesakes(name, facts.kind, home, everywhere=folder is None):
        if equal(path, source):
            warnings.warn(f"{shown(str(path), 500)} is the same file: nothing was copied", stacklevel=2)
            return path
        raise OutputError(f"output {home / name}: {shown(str(path), 500)} has this name already; choose another with --name")
    target = home / f"{name}{'.ckpt' if head.startswith(TORCH_SAVE) else '.safetensors'}"
    check_place(target)
    check_room(target, size)
    import_copy(source, target, facts)
    if not any(os.path.realpath(file.path) == os.path.realpath(target) for file in model_files()):
        warnings.warn(f"{home} is not searched for models; add it to MINISD_MODELS to use {name} by its name", stacklevel=2)
    return target


def own_folder() -> Path:
    """Where imports go if nobody says: the first folder of $MINISD_MODELS, else ./models."""
    first = os.environ.get("MINISD_MODELS", "").split(os.pathsep)[0]
    if first:
        return Path(os.path.expanduser(first))
    try:
        Path("models").mkdir(exist_ok=True)
    except OSError as error:
        raise OutputError(
            f"output models: the folder cannot be made here: {error.strerror}; name another with --folder"
        ) from error
    return Path("models")


def checked_name(name: str) -> str:
    """A name for a file, without the suffix of one.  Raises UsageError unless it is one part of a path on any system."""
    bare = stem(name) if name.lower().endswith(SUFFIXES) else name
    plain = is_name(bare) and bare == bare.strip() and not bare.endswith(".") and not any(mark in bare for mark in FORBIDDEN)
    if not plain or len(bare.encode()) > MAX_NAME:
        expected = f"expected 1 to {MAX_NAME} plain characters, none of {FORBIDDEN}, and no . - or ~ in front"
        raise UsageError(f"name: {expected}, found {shown(name, 120)}")
    return bare


def namesakes(name: str, kind: str, home: Path, everywhere: bool) -> list[Path]:
    """The files of a folder that have a name, with any suffix, and elsewhere in the library those of this kind."""
    here = [path for path in home.glob("*") if path.name.casefold() in [f"{name}{end}".casefold() for end in SUFFIXES]]
    others = (file for file in model_files() if everywhere and file.short.casefold() == name.casefold())
    return here + [file.path for file, _, facts in identified(others) if facts.kind == kind]


def equal(path: Path, other: Path) -> bool:
    try:
        return path.stat().st_size == other.stat().st_size and file_sha256(path) == file_sha256(other)
    except OSError:
        return False


def import_copy(source: Path, target: Path, facts: Facts) -> None:
    """Copies a file whose facts are known to a place that is free, and reads the copy back."""
    content = hashlib.sha256()
    with drafting(target) as draft:
        with source.open("rb") as original, draft.open("wb") as copy:
            while piece := original.read(PIECE):
                content.update(piece)
                copy.write(piece)
        known = identify(draft) == facts
        with draft.open("rb") as copy:
            same = hashlib.file_digest(copy, "sha256").digest() == content.digest()
        if not (known and same):
            raise OSError("what was written is not what was read back")
        try:
            placed(draft, [target])
        except FileExistsError:
            raise OutputError(f"output {target}: another model has just taken this name; choose another with --name") from None
    keep("sha256", known_hashes() | {state_of(target): content.hexdigest()})
