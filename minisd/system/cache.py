"""What minisd remembers between its runs, under $XDG_CACHE_HOME/minisd.  All of it can be found out again from the files."""

from __future__ import annotations

import atexit
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from threading import RLock
from typing import Any

from .atomic import drafting
from .regular import open_regular

MAX_KEPT = 64 << 20  # bytes; 10,000 files take about 3 MB
PATIENCE = 1  # seconds

# Held while a file is written, and for good at the end of the process: a thread that is ended in between would leave its draft.
# By a thread more than once, because the one that ends may still keep something.
WRITING = RLock()
atexit.register(WRITING.acquire, timeout=PATIENCE)


def folder() -> Path:
    """Raises OSError where a user has no home (in a container, say): nothing is remembered there."""
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if not os.path.isabs(caches):
        raise OSError(f"{caches} is no place for a cache")
    return Path(caches) / "minisd"


def place(name: str) -> Path:
    """Raises OSError as `folder` does."""
    return folder() / f"{name}.json"


def recall(name: str) -> dict[str, Any]:
    """What was kept under this name; nothing if there is nothing, or no longer anything that can be read."""
    try:
        with open_regular(place(name), MAX_KEPT) as file:
            known = json.load(file)
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def keep(name: str, known: dict[str, Any]) -> None:
    """Keeps it until the next time, for nobody else to read.  A cache that cannot be written costs time, nothing else."""
    try:
        target = place(name)
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(), drafting(target, 0o600) as draft:
            draft.write_text(json.dumps(known))
            draft.replace(target)
    except (OSError, ValueError, RuntimeError):  # an OutputError is an OSError
        pass


@contextmanager
def writing() -> Iterator[None]:
    """Raises TimeoutError where another thread writes for too long, or the process is ending."""
    if not WRITING.acquire(timeout=PATIENCE):
        raise TimeoutError
    try:
        yield
    finally:
        WRITING.release()
