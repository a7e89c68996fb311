"""Styles: words that go around a prompt, by name.  A plain table, styles.csv beside this file, in the form that A1111 has for it.

Own ones come first, from the files that MINISD_STYLES names, from styles.csv in the working folder, and from that of A1111 or
Forge where the library looks for their models.  Reference for the form: AUTOMATIC1111 webui, modules/styles.py.
"""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..errors import UsageError, shown
from ..system.regular import open_regular
from .places import PROGRAMS, searched

NAME = "styles.csv"
PLACE = "{prompt}"  # where the prompt goes; without it the style comes behind, after a comma
MAX_FILE = 4 << 20  # bytes
COLUMNS = ("name", "prompt", "negative_prompt")


@dataclass(frozen=True)
class Style:
    name: str
    prompt: str
    negative_prompt: str
    source: Path


def styles() -> dict[str, Style]:
    """All there are, by name; of two with one name, the one of the file that comes first.  Raises UsageError."""
    found: dict[str, Style] = {}
    for path in files():
        for style in read(path):
            found.setdefault(style.name, style)
    return found


def files() -> list[Path]:
    """Where styles are read from, in this order."""
    given = [Path(os.path.expanduser(part)) for part in os.environ.get("MINISD_STYLES", "").split(os.pathsep) if part]
    programs = [folder / NAME for folder in searched() if folder.name in PROGRAMS]
    found = [*given, *(path for path in (Path(NAME), *programs) if path.is_file()), Path(__file__).with_name(NAME)]
    return list(dict.fromkeys(found))


def read(path: Path) -> Iterator[Style]:
    """The styles of a file; rows without a name or without any words are none, as A1111's dividers.  Raises UsageError."""
    try:
        with open_regular(path, MAX_FILE) as file:
            rows = csv.DictReader(io.StringIO(file.read().decode("utf-8-sig")))
            if not {"name", "prompt"} <= set(rows.fieldnames or ()):
                raise UsageError(f"styles {path}: expected a first line {','.join(COLUMNS)}, found another")
            for row in rows:
                name, prompt, negative = (row.get(column) or "" for column in COLUMNS)
                if name and (prompt or negative or name == "base"):
                    yield Style(name, prompt, negative, path)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        why = getattr(error, "strerror", None) or "it is not a table in UTF-8"
        raise UsageError(f"styles {path}: cannot be read: {why}") from None


def named(name: str) -> Style:
    """Raises UsageError where there is none."""
    known = styles()
    if name in known:
        return known[name]
    from difflib import get_close_matches

    folded = {each.casefold(): each for each in known}
    close = [folded[each] for each in get_close_matches(name.casefold(), folded, 1)]
    if name.casefold() in folded:
        return known[folded[name.casefold()]]
    meant = f"did you mean {close[0]}? " if close else ""
    raise UsageError(f"style: there is none called {shown(name, 60)!r}; {meant}minisd styles lists them")


def styled(style: Style, prompt: str, negative: str = "") -> tuple[str, str]:
    """Prompt and negative prompt with the words of a style."""
    return around(style.prompt, prompt), around(style.negative_prompt, negative)


def around(words: str, prompt: str) -> str:
    if PLACE in words:
        return words.replace(PLACE, prompt)
    return ", ".join(part for part in (prompt.strip(), words.strip()) if part) if words.strip() else prompt


def as_text(listed: dict[str, Style]) -> str:
    """A line each, for people."""
    wide = max((len(shown(name, 40)) for name in listed), default=0)
    return "\n".join(f"{shown(name, 40).ljust(wide)}  {shown(each.prompt, 120)}" for name, each in listed.items())
