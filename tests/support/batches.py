"""Manifests for tests, and what is in the folders that were drawn from them."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")
COLOURS = ("red", "green", "blue", "yellow", "orange", "purple", "pink", "cyan", "white", "black")
QUICK = ["--size", "16x16", "--steps", "1", "--device", "cpu"]


def rows(count: int) -> list[dict[str, Any]]:
    rng = random.Random(count)
    found = []
    for i in range(count):
        colour, ground = rng.sample(COLOURS, 2)
        found.append({"id": f"row-{i:05}", "prompt": f"a {colour} {rng.choice(SHAPES)} on a {ground} background"})
    return found


def write(path: Path, lines: Iterable[dict[str, Any] | bytes]) -> str:
    """A manifest of rows, or of lines as they stand."""
    path.write_bytes(b"".join(line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines))
    return str(path)


def drawn(out: Path) -> dict[str, bytes]:
    """Every file of a run by its name below the folder, without what is about the run itself."""
    files = {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.is_file()}
    return {name: data for name, data in files.items() if name != "job.json" and not name.startswith("errors")}


def errors(out: Path) -> dict[int, str]:
    """What errors.jsonl says, by line."""
    lines = [json.loads(line) for line in (out / "errors.jsonl").read_text().splitlines()]
    assert len({line["line"] for line in lines}) == len(lines)
    return {line["line"]: line["error"] for line in lines}
