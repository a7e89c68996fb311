"""From a record of a manifest to a row that can be drawn, or what is wrong with it.  Nothing here imports torch."""

from __future__ import annotations

import json
import os
import unicodedata
from collections.abc import Mapping
from dataclasses import dataclass, replace
from hashlib import blake2b, sha256
from typing import Any

from ..errors import CheckpointError, MinisdError, UsageError, shown
from ..files.checkpoint import open_checkpoint
from ..files.recognition import recognise
from ..library.names import resolve
from ..options import CONTROLS, FLAG, LEVELS, LORAS, NUMBERS_BY_NAME, OPTIONS, PAIR, checked, pair, unknown
from .manifest import Cell, Record

MAX_PROMPT = 10_000  # characters, as plan.MAX_PROMPT
LONGEST = 150  # bytes of an id: with a suffix and the rest of a draft's name, file systems take 255
SEEDS = 2**32  # of rows that name none
FORBIDDEN = set('/\\<>:"|?*')  # in names of files, on one system or another
RESERVED = {"con", "prn", "aux", "nul", *(f"{name}{i}" for name in ("com", "lpt") for i in range(1, 10))}  # on Windows
FILES = ("model", "vae", "refiner")  # which are no options of a drawing, but files
PICTURES = ("init_image", "mask")
# What a row cannot say: it is one picture, and a manifest holds no functions and tensors.
CLOSED = {"num_images", "seeds", "latents", "guide", "progress", "transform", "observe"}
# Fields by their Python names, and by those of the command line ("cfg", "init", "size").
FIELDS = {option.flag.removeprefix("--").replace("-", "_"): name for name, option in OPTIONS.items() if option.flag}
FIELDS |= {name: name for name in OPTIONS if name not in CLOSED}
FIELDS = {**FIELDS, **{name: name for name in ("id", "prompt", "size", *FILES)}, "lora": "loras", "control": "controls"}
FIELDS = {word: name for word, name in FIELDS.items() if name not in CLOSED}


@dataclass(frozen=True)
class Row:
    """A picture that is wanted.  fields: of `request.Request`, with the seed settled, and the names of FILES."""

    line: int
    id: str
    shard: int
    fields: Mapping[str, Any]


class RowError(UsageError):
    """A row that cannot be drawn; id: its own, where that much is known."""

    def __init__(self, line: int, reason: str, id: str | None = None) -> None:
        self.line, self.id = line, id
        super().__init__(reason)


def row_id(record: Record) -> str:
    """The id of a record, which is the name of a file.  Raises RowError."""
    if record.fields is None:
        raise RowError(record.line, record.wrong or "expected fields, found none")
    given = record.fields.get("id")
    text = str(given) if isinstance(given, int) and not isinstance(given, bool) and abs(given) < 10**18 else given
    if not isinstance(text, str):
        found = "none" if given is None else f"{shown(repr(given), 60)}"
        raise RowError(record.line, f"id: expected a text or a whole number, found {found}")
    if why := no_name(text):
        raise RowError(record.line, f"id: expected what can be the name of a file, found {shown(repr(str(text)), 60)}: {why}")
    return str(text)


def no_name(text: str) -> str | None:
    """Why a text can be no name of a file on every system; None where it can."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        return "it is no UTF-8"
    if not text or size > LONGEST:
        return f"it has {size} bytes, expected 1 to {LONGEST}"
    if found := sorted(FORBIDDEN & set(text)):
        return f"it has a {found[0]!r}"
    if not text.isprintable():
        return "it has characters that cannot be shown"
    if text[0] in ". " or text[-1] in ". ":
        return "it begins or ends with a dot or a space"
    return "it is a device on Windows" if text.split(".")[0].casefold() in RESERVED else None


def mark(text: str) -> int:
    """64 bits of an id by which it is known again, as file systems know names: whatever the case, and the Unicode form."""
    if not text.isascii():
        text = unicodedata.normalize("NFC", unicodedata.normalize("NFC", text).casefold())
    return int.from_bytes(blake2b(text.lower().encode(), digest_size=8).digest(), "big")


def seed_of(job_seed: int, id: str, what: str = "seed") -> int:
    """The seed of a row that names none: it depends on the job's and the id alone."""
    return int.from_bytes(sha256(f"{job_seed}\0{what}\0{id}".encode()).digest()[:8], "big") % SEEDS


def row_of(record: Record, id: str, shard: int, job_seed: int, folder: str) -> Row:
    """A record, checked as far as that goes without its model.  folder: where paths of pictures begin.  Raises RowError."""
    assert record.fields is not None
    try:
        fields = named(record.fields)
        if "size" in fields:
            fields |= sides(fields.pop("size"), fields)
        found = {name: settled(name, value, folder) for name, value in fields.items()}
        if not isinstance(found.get("prompt"), str):
            raise UsageError(f"prompt: expected a text, found {shown(repr(found.get('prompt')), 60)}")
        if found.get("seed") in (None, -1):
            found["seed"] = seed_of(job_seed, id)
        if found.get("subseed_strength") and found.get("subseed") in (None, -1):
            found["subseed"] = seed_of(job_seed, id, "subseed")
        return Row(record.line, id, shard, found)
    except MinisdError as error:
        raise RowError(record.line, " ".join(str(error).split()), id) from None


def named(given: Mapping[str, Any]) -> dict[str, Any]:
    """Fields by the names that Request has.  Raises UsageError."""
    found: dict[str, Any] = {}
    for word, value in given.items():
        name = FIELDS.get(word)
        if word == "id":
            continue
        if name is None:
            if word in CLOSED:
                raise UsageError(f"{word}: a row of a manifest is one picture, and has no such field")
            raise unknown([shown(word, 60)])
        if name in found:
            raise UsageError(f"{name}: expected it once, found it by two names")
        if value is not None:
            found[name] = value
    return found


def sides(value: Any, fields: Mapping[str, Any]) -> dict[str, int]:
    """Width and height of a size: 512x768, or [512, 768]."""
    if "width" in fields or "height" in fields:
        raise UsageError("size: expected none beside width and height")
    try:
        width, height = pair(value) if isinstance(value, str) else value
    except (ValueError, TypeError):
        raise UsageError(f"size: expected WIDTHxHEIGHT such as 512x768, found {shown(repr(value), 60)}") from None
    return {"width": width, "height": height}


def settled(name: str, value: Any, folder: str) -> Any:
    """A field's value as Request takes it.  Raises UsageError."""
    if name == "prompt" or name in FILES or name in PICTURES:
        return text_of(name, value, folder)
    if isinstance(value, Cell):
        value = of_cell(name, value)
    if isinstance(value, list | tuple) and OPTIONS[name].by_picture:
        raise UsageError(f"{name}: expected one value, found a list; a row is one picture")
    if name == "sampler" and not isinstance(value, str):
        raise UsageError(f"sampler: expected the name of one, found {shown(repr(value), 60)}")
    value = checked(name, value)
    if isinstance(value, str):
        text_of(name, value, folder)
    if name == "controls":
        return [control(each, folder) for each in value]
    return list(value) if isinstance(value, tuple) else value


def text_of(name: str, value: Any, folder: str) -> str:
    if not isinstance(value, str):
        raise UsageError(f"{name}: expected a text, found {shown(repr(value), 60)}")
    text = str(value)
    if len(text) > MAX_PROMPT:
        raise UsageError(f"{name}: expected at most {MAX_PROMPT:,} characters, found {len(text):,}")
    if "\0" in text or any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UsageError(f"{name}: expected text in UTF-8 without a NUL, found {shown(repr(text), 60)}")
    if name in PICTURES or name == "image":
        return os.path.abspath(os.path.join(folder, text))
    return text


def control(given: Any, folder: str) -> dict[str, Any]:
    if not isinstance(given, Mapping) or not {"source", "image"} <= set(given):
        raise UsageError(f"controls: expected objects with source and image, found {shown(repr(given), 60)}")
    return {**given, "image": text_of("image", given["image"], folder)}


def of_cell(name: str, cell: str) -> Any:
    """What a cell of CSV says, in the words of the command line, or JSON.  Raises UsageError."""
    kind, text = OPTIONS[name].kind, str(cell)
    try:
        if text[:1] in "[{" and kind in (LORAS, CONTROLS, NUMBERS_BY_NAME, LEVELS, PAIR):
            return json.loads(text)
        if kind is FLAG:
            return {"true": True, "1": True, "false": False, "0": False}[text.casefold()]
        if kind is LORAS:
            return [kind.parse(each.strip()) for each in text.split(";")]
        return kind.parse(text)
    except (ValueError, KeyError, RecursionError):
        raise UsageError(f"{name}: expected {kind.expected}, found {shown(repr(text), 60)}") from None


class Models:
    """The files of models that rows name, each looked at once, by its header."""

    def __init__(self) -> None:
        self.known: dict[tuple[str, str, bool], tuple[str, str | None]] = {}  # the path, and what is wrong with it

    def checked(self, row: Row) -> Row:
        """The row with paths in the place of names.  Raises RowError where a file is none that draws."""
        paths = {}
        for name in FILES:
            if (model := row.fields.get(name)) is None:
                continue
            key = (name, model, "vae" in row.fields)
            if key not in self.known:
                self.known[key] = looked_at(*key)
            path, wrong = self.known[key]
            if wrong is not None:
                raise RowError(row.line, wrong, row.id)
            paths[name] = path
        return replace(row, fields={**row.fields, **paths}) if paths else row


def looked_at(kind: str, name: str, vae_given: bool) -> tuple[str, str | None]:
    try:
        path = resolve(name, "vae" if kind == "vae" else "checkpoint").absolute()
        file = open_checkpoint(path)
        if kind != "vae":
            recognise(file, vae_given)
    except (CheckpointError, UsageError) as error:
        return "", " ".join(str(error).split())
    return str(path), None
