"""The library: the models that lie on this machine, what each of them is, and short names for them.

`list_models` shows it, `resolve` finds a file by its name, importing.py adds one.  Files are told by what is in them, never by
their names or folders.  What a file is, is remembered by its path, size and time of change, so only new files are opened.
Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from .. import __version__
from ..errors import CheckpointError, UsageError, shown, taken_apart
from ..files.checkpoint import file_sha256, known_hashes, open_checkpoint, state_of
from ..files.recognition import looks_like, recognise
from ..models.shapes import Shapes
from ..system.cache import keep, recall
from .places import File, model_files, searched, stem

# Kinds of files that are no checkpoints, by what `family.looks_like` calls them.  Anything else is of the kind "other".
KINDS = {"a LoRA": "lora", "a ControlNet": "controlnet", "a T2I-Adapter": "controlnet", "a VAE": "vae", "a tiny auto": "vae"}
KINDS |= {"a textual inv": "embedding"}
ORDER = ("checkpoint", "vae", "lora", "controlnet", "embedding", "other")  # in a list

# What a LoRA or a ControlNet goes on top of is told by the width of the text that its cross-attention reads.
BY_CONTEXT = {768: "sd1", 1024: "sd2", 2048: "sdxl", 1280: "sdxl-refiner"}
CROSS = re.compile(r".*attn2[._](processor\.)?to_k(_lora)?\.(weight|(lora_)?down\.weight|lora_A(\.default)?\.weight|hada_w1_b)")

MAX_KEPT = 10_000  # files that are remembered


@dataclass(frozen=True)
class Facts:
    """What a file is."""

    kind: str  # one of ORDER
    family: str | None  # minisd's name of the family that it is of, or goes on top of, where its keys and shapes tell
    what: str  # in words; of the kind "other", why minisd has no use for it


@dataclass(frozen=True)
class Listed:
    """A model of the library."""

    name: str  # the shortest that `resolve` finds it by
    kind: str
    family: str | None
    what: str
    bytes: int
    model_hash: str | None  # first 10 digits of the sha256; None where nobody has asked for it yet, which would read the file
    path: Path


def list_models(with_hash: bool = False) -> list[Listed]:
    """Every model file in the searched folders, by kind and name; also those of the kind "other", which minisd cannot use.

    with_hash: also the model hashes that are not known yet, which reads those files to their end.
    """
    known = identified(model_files())
    hashes = known_hashes()
    listed = []
    for (file, state, facts), name in zip(known, names(known), strict=True):
        with contextlib.suppress(OSError):  # a file that has gone meanwhile, or whose numbers cannot be read
            sha256 = hashes.get(state) or (file_sha256(file.path) if with_hash and facts.kind != "other" else None)
            size = file.path.stat().st_size
            listed.append(Listed(name, facts.kind, facts.family, facts.what, size, sha256 and sha256[:10], file.path))
    return sorted(listed, key=lambda model: (ORDER.index(model.kind), model.name.casefold(), str(model.path)))


def as_text(models: Iterable[Listed]) -> str:
    """One line for each model, in columns.  Names come from files and folders, and are shown escaped: they may hold anything."""
    rows = [
        (
            shown(model.name, 60),
            model.kind + (f" for {model.family}" if model.family and model.kind != "checkpoint" else ""),
            shown(model.what, 100),
            f"{model.bytes / 1e9:.2f} GB" if model.bytes >= 1e8 else f"{model.bytes / 1e6:.2f} MB",
            model.model_hash or "-",
            shown(str(model.path), 500),
        )
        for model in models
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in rows)


def identified(files: Iterable[File]) -> list[tuple[File, str, Facts]]:
    """(file, its state, what it is) of files, without those that cannot be reached.  Opens only what is not remembered."""
    files = list(files)
    if not files:
        return []
    version = minisd_version()
    memory = recall("library")
    known = memory.get("known") if memory.get("version") == version else None
    known = known if isinstance(known, dict) else {}
    found, new = [], {}
    for file in files:
        with contextlib.suppress(OSError):
            state = state_of(file.path)
            facts = remembered(known.get(state))
            if facts is None:
                facts = identify(file.path)
                if os.access(file.path, os.R_OK):  # else it may be another answer tomorrow, at the same size and time
                    new[state] = [facts.kind, facts.family, facts.what]
            found.append((file, state, facts))
    if new:
        keep("library", {"version": version, "known": dict(list((known | new).items())[-MAX_KEPT:])})
    return found


@cache
def minisd_version() -> str:
    """Changes whenever the code does: what another minisd found out may no longer be what this one says."""
    changed = max(file.stat().st_mtime_ns for file in Path(__file__).parents[1].rglob("*.py"))
    return f"{__version__}, {changed}"


def remembered(facts: Any) -> Facts | None:
    """The facts of one file, unless the cache holds something else in their place."""
    whole = isinstance(facts, list) and len(facts) == 3 and all(isinstance(fact, str | None) for fact in facts)
    known = whole and facts[0] in ORDER and facts[1] in (None, *BY_CONTEXT.values()) and facts[2] is not None
    return Facts(*facts) if known else None


def identify(path: Path) -> Facts:
    """What a file is, from its header.  Whatever is wrong with it costs this file its use, never the list it stands in."""
    try:
        with taken_apart(path), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # whoever opens the file will hear it
            return told(path)
    except (CheckpointError, MemoryError) as error:
        return Facts(
            "other", None, error.reason[:500] if isinstance(error, CheckpointError) else "needs more memory than there is"
        )


def told(path: Path) -> Facts:
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return Facts("other", None, error.reason[:500])
    try:
        found = recognise(checkpoint)
    except CheckpointError as error:
        what, _ = looks_like(checkpoint.shapes)
        kind = next((kind for start, kind in KINDS.items() if what.startswith(start)), None)
        if kind is None:
            return Facts("other", None, f"looks like {what}" if error.key is None else f"{error.key}: {error.reason}"[:500])
        return Facts(kind, base_family(checkpoint.shapes), what)
    what = found.family.title
    what += f", {found.task}" if found.task != "draw" else ""
    what += f", predicts {found.training.prediction}" if found.training.prediction != "epsilon" else ""
    return Facts("checkpoint", found.family.name, what)


def base_family(shapes: Shapes) -> str | None:
    """The family that a LoRA or a ControlNet goes on top of; None where no cross-attention tells it."""
    widths = [shape[1] for key, shape in shapes.items() if len(shape) >= 2 and CROSS.fullmatch(key)]
    return BY_CONTEXT.get(widths[0]) if widths else None


def names(known: list[tuple[File, str, Facts]]) -> list[str]:
    """For each file the shortest name that no other file of its kind has: its own, with its folders, or its path."""
    short = Counter((facts.kind, file.short.casefold()) for file, _, facts in known)
    full = Counter((facts.kind, file.full.casefold()) for file, _, facts in known)

    def name(file: File, kind: str) -> str:
        if not is_name(file.full) or full[kind, file.full.casefold()] > 1:
            return str(file.path)
        return file.short if is_name(file.short) and short[kind, file.short.casefold()] == 1 else file.full

    return [name(file, facts.kind) for file, _, facts in known]


def is_name(text: str) -> bool:
    """Whether a text can be the name of a model, and not only a path, an option or a trick on the terminal."""
    return text.isprintable() and not text.startswith((".", "-", "~", "/")) and text != ""


def resolve(name: str | os.PathLike[str], kind: str = "checkpoint") -> Path:
    """The path of a model file.  What exists is taken as a path, anything but a str, too; else it is a name in the library.

    A name is that of a file, with or without suffix and with or without the folders above it: "mymix", "sdxl/mymix.safetensors".
    Upper and lower case count only where they make a difference.
    kind: the kind of file that is wanted; one of another kind is taken only if none of this kind has the name, so that the
        caller's own error says what it is.
    Raises CheckpointError if there is no such file and no such name, UsageError if the name is that of several.
    """
    if not isinstance(name, str) or os.path.exists(name):
        return Path(name)
    if not is_name(name):
        raise CheckpointError(shown(name, 500), "does not exist", "check the path")
    files = list(model_files())
    ways = [(part, fold) for fold in (str, str.casefold) for part in ("full", "short")]  # the closest match first
    candidates = identified(file for file in files if any(called(file, name, *way) for way in ways))
    right = [entry for entry in candidates if entry[2].kind == kind] or candidates
    for way in ways:
        hits = [entry for entry in right if called(entry[0], name, *way)]
        if len({os.path.realpath(file.path) for file, _, _ in hits}) > 1:
            raise UsageError(ambiguous(name, hits))
        if hits:
            return hits[0][0].path
    raise CheckpointError(name, "does not exist, and no model has this name", unknown(name, files))


def called(file: File, name: str, part: str, fold: Callable[[str], str]) -> bool:
    """Whether a file has this name; part: "full" with its folders, "short" without."""
    label = getattr(file, part)
    return fold(name) in (fold(label), fold(label + file.path.suffix))


def ambiguous(name: str, hits: list[tuple[File, str, Facts]]) -> str:
    lines = [f"{shown(str(file.path), 500)} ({facts.what})" for file, _, facts in hits[:10]]
    more = f", … ({len(hits)} in all)" if len(hits) > 10 else ""
    return f"{name}: is the name of several models; give the path of one: {', '.join(lines)}{more}"


def unknown(name: str, files: list[File]) -> str:
    """Where a name was looked for, and which ones come close."""
    from difflib import get_close_matches

    close = get_close_matches(stem(name).casefold(), {file.short.casefold() for file in files}, 3)
    meant = f"did you mean {' or '.join(shown(match, 60) for match in close)}? " if close else ""
    return f"{meant}searched {', '.join(places_shown())}; minisd models lists what there is"


NONE = "minisd's own folder alone: there is no ./models, and MINISD_MODELS names none"


def places_shown() -> list[str]:
    """The searched folders as a person reads them, or what to do if there are none."""
    return [shown(str(folder), 200) for folder in searched()] or [NONE]
