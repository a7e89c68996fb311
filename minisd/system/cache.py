"""What minisd remembers between its runs, under $XDG_CACHE_HOME/minisd.  All of it can be found out again from the files."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def place(name: str) -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisd" / f"{name}.json"


def recall(name: str) -> dict[str, Any]:
    """What was kept under this name; nothing if there is nothing, or no longer anything that can be read."""
    try:
        known = json.loads(place(name).read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return known if isinstance(known, dict) else {}


def keep(name: str, known: dict[str, Any]) -> None:
    """Keeps it until the next time.  A cache that cannot be written costs time, nothing else."""
    target = place(name)
    draft = target.with_suffix(f".{os.getpid()}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(known))
        draft.replace(target)
    except OSError:
        pass
