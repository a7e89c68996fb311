"""Drawings and pages as files: text that is written whole or not at all."""

from __future__ import annotations

from pathlib import Path

from ...errors import UsageError
from ...system.atomic import check_place, replacing


def check_named(path: Path, ending: str) -> None:
    """Raises UsageError, OutputError now rather than after minutes of work."""
    if path.suffix.lower() != ending:
        raise UsageError(f"output {str(path)!r}: expected a name that ends in {ending}")
    check_place(path)


def check_svg(path: Path) -> None:
    check_named(path, ".svg")


def write_text(path: Path, text: str) -> Path:
    with replacing(path) as draft:
        draft.write_text(text, encoding="utf-8")
    return path
