"""The models of the library by their names.  It is by this list alone that a request reaches a file: no name becomes a path."""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Sequence
from difflib import get_close_matches

from ..errors import shown
from ..library.names import Listed, is_name, list_models
from ..library.places import SUFFIXES, tiny_checkpoint
from .errors import RefusedError

FRESH = 2.0  # seconds in which a name that is not known is not looked for again
TITLE = re.compile(r" \[[0-9a-f]{6,64}\]$")  # what A1111 puts behind the name of a checkpoint
PREFIX = "octoai:"  # before the names of that service's public models


class Index:
    """only: the checkpoints that may be drawn with, where not all of them may."""

    def __init__(self, only: Sequence[str] = ()) -> None:
        self.lock = threading.Lock()
        self.listed: list[Listed] = []
        self.read = 0.0
        self.only: set[str] | None = None
        self.refresh()
        self.first = [self.find(name, "checkpoint", "model") for name in only]
        self.only = {each.name for each in self.first} or None

    def refresh(self) -> None:
        """Looks at the library again: only files that are new are opened."""
        found = [each for each in list_models() if each.kind != "other" and is_name(each.name) and each.name != str(each.path)]
        with self.lock:
            self.listed, self.read = found, time.monotonic()

    def all(self, kind: str) -> list[Listed]:
        with self.lock:
            listed = self.listed
        return [
            each for each in listed if each.kind == kind and (kind != "checkpoint" or not self.only or each.name in self.only)
        ]

    def find(self, name: str, kind: str, field: str) -> Listed:
        """The model of a name, with or without the folders above it, its suffix, A1111's hash or OctoAI's prefix.

        field: of the request, for the error.  Raises RefusedError.
        """
        hits = self.hits(name, kind)
        if not hits and time.monotonic() - self.read > FRESH:
            self.refresh()
            hits = self.hits(name, kind)
        if len(hits) == 1:
            return hits[0]
        if hits:
            raise RefusedError(422, f"{field}: is the name of several models: {', '.join(each.name for each in hits[:5])}", field)
        close = get_close_matches(plain(name), [each.name.casefold() for each in self.all(kind)], 1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise RefusedError(
            422, f"{field}: no {kind} of the library is called {shown(name, 60)!r}{meant}", field, "model_not_found"
        )

    def hits(self, name: str, kind: str) -> list[Listed]:
        wanted = plain(name)
        models = self.all(kind)
        for called in (lambda each: each.name, lambda each: each.name.rsplit("/", 1)[-1]):
            if found := [each for each in models if plain(called(each)) == wanted]:
                return found
        return []

    def default(self) -> Listed:
        """What draws where nobody says: the first that the server was started with, else the tiny one in the box."""
        if self.first:
            return self.first[0]
        tiny = [each for each in self.all("checkpoint") if each.path.resolve() == tiny_checkpoint().resolve()]
        if not (tiny or self.all("checkpoint")):
            raise RefusedError(422, "model: there is no checkpoint in the library", "model", "model_not_found")
        return (tiny or self.all("checkpoint"))[0]


def plain(name: str) -> str:
    text = TITLE.sub("", name.removeprefix(PREFIX)).casefold()
    return next((text.removesuffix(suffix) for suffix in SUFFIXES if text.endswith(suffix)), text)


def id_of(model: Listed) -> str:
    """Of a model, for programs: the same as long as it has its kind and name."""
    return f"asset_{hashlib.sha256(f'{model.kind}:{model.name}'.encode()).hexdigest()[:24]}"
