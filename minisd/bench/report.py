"""Tables that show every row as soon as it is there: on the terminal, in a JSON file, as a picture."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from ..errors import MinisdError, UsageError
from ..system.device import name_of
from .timing import Clock

Row = dict[str, Any]
UNITS = {"s": (1.0, ".3g"), "ms": (1e3, ".3f"), "us": (1e6, ".1f")}  # of time: how many are a second, how many digits are shown


@dataclass
class Report:
    """What is measured, row by row.  A part that fails becomes a row that says so, and the rest goes on."""

    clock: Clock
    json_path: Path | None = None
    debug: bool = False  # show the traceback of what fails
    tables: list[dict[str, Any]] = field(default_factory=list)
    drawn: Callable[[Path], None] | None = None  # what is to be drawn in the place of bars

    def table(self, title: str, columns: tuple[str, ...]) -> None:
        """Starts a table.  A column whose name ends in " s", " ms" or " us" holds times in that unit."""
        self.tables.append({"title": title, "columns": columns, "rows": []})
        print(f"\n{title}\n  {'':<44}" + "".join(f"{name:>16}" for name in columns), flush=True)

    def add(self, label: str, **values: Any) -> None:
        """A row: its label, and for each column a value or nothing, under the column's name, spaces written as underscores.

        Times are given in seconds and without a unit, `time` for the column "time us"; the row has "time_us" in microseconds.
        """
        table = self.tables[-1]
        text = values.pop("error_text", None)
        places = dict(place(column) for column in table["columns"])
        if unknown := values.keys() - places.keys():
            raise ValueError(f"expected values for {', '.join(places)}, found {', '.join(sorted(unknown))}")
        row: Row = {"label": label} | ({"error_text": text} if text else {})
        for name, value in values.items():
            key, scale = places[name]
            row[key] = value if value is None or scale is None else value * scale
        table["rows"].append(row)
        cells = [shown(name, row.get(name.replace(" ", "_"))) for name in table["columns"]]
        print(
            f"  {label:<44}"
            + (f"  failed: {text}" if text else "".join(f"{cell:>16}" if len(cell) < 16 else f"  {cell}" for cell in cells)),
            flush=True,
        )
        self.write()

    def note(self, text: str) -> None:
        print(f"  {text}", flush=True)
        self.tables[-1].setdefault("notes", []).append(text)

    @contextmanager
    def attempt(self, label: str) -> Iterator[None]:
        """What goes wrong inside becomes a row."""
        try:
            yield
        except MinisdError as error:
            self.add(label, error_text=str(error))
        except Exception as error:
            if self.debug:
                traceback.print_exc(limit=-3, file=sys.stderr)
            lines = str(error).splitlines() or [""]
            self.add(label, error_text=f"{type(error).__name__}: {lines[0][:160]}")
        finally:
            if self.clock.is_cuda:
                torch.cuda.empty_cache()

    def skip(self, label: str, why: str) -> None:
        """A part that has no table of its own to fail in."""
        print(f"  {label}: {why}", flush=True)
        self.tables.append({"title": label, "columns": (), "rows": [{"label": label, "error_text": why}]})

    def as_json(self) -> dict[str, Any]:
        return {"machine": machine(self.clock), "tables": self.tables}

    def write(self) -> None:
        if self.json_path:
            write_json(self.json_path, self.as_json())

    def plot(self, path: Path) -> None:
        if self.drawn:
            self.drawn(path)
        else:
            plot(self.tables, path)


def place(column: str) -> tuple[str, tuple[str, float | None]]:
    """The name that a column's value is given under, the key that a row has it under, and, of a time, how many are a second."""
    key = column.replace(" ", "_")
    name, _, unit = key.rpartition("_")
    return (name, (key, UNITS[unit][0])) if unit in UNITS else (key, (key, None))


def seconds_of(row: Row, name: str) -> float | None:
    """A time out of a row, such as `time` or `first`, whatever unit the row has it in."""
    return next((row[f"{name}_{unit}"] / scale for unit, (scale, _) in UNITS.items() if row.get(f"{name}_{unit}")), None)


def shown(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str | int):
        return str(value)
    return format(value, UNITS.get(column.rpartition(" ")[2], (1.0, ".3g"))[1])


def write_json(path: Path, content: object) -> None:
    """All of it or nothing: whoever reads the file never sees half of it."""
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    draft.write_text(json.dumps(content, indent=1), encoding="utf-8")
    draft.replace(path)


def machine(clock: Clock) -> Row:
    """What the figures belong to."""
    name = torch.cuda.get_device_name(clock.device) if clock.is_cuda else f"CPU, {torch.get_num_threads()} threads"
    found: Row = {"device": name, "dtype": name_of(clock.dtype), "torch": torch.__version__}
    try:
        import triton

        found["triton"] = triton.__version__
    except ImportError:
        found["triton"] = None
    return found | {"cuda": torch.version.cuda}


def pyplot() -> Any:
    """matplotlib, drawing to files.  Raises UsageError where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UsageError("--plot: expected matplotlib to be installed: `pip install 'minisd[bench]'`") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot(tables: list[dict[str, Any]], path: Path) -> None:
    """Every table that holds times as horizontal bars, in its own unit."""
    draw = pyplot()
    timed = [(table, name) for table in tables for name in [first_time(table)] if name]
    if not timed:
        raise UsageError("--plot: expected a table of times, found none")
    heights = [1 + 0.3 * len(table["rows"]) for table, _ in timed]
    figure, axes = draw.subplots(len(timed), 1, figsize=(10, sum(heights)), squeeze=False, height_ratios=heights)
    for (table, name), (axis,) in zip(timed, axes, strict=True):
        key, unit = name.replace(" ", "_"), name.rpartition(" ")[2]
        rows = [row for row in table["rows"] if isinstance(row.get(key), float)]
        labels = [" ".join(str(part) for part in (row["label"], row.get("variant")) if part) for row in rows]
        ours = ["tab:blue" if "minisd" in label else "lightgrey" for label in labels]
        axis.barh(range(len(rows)), [row[key] for row in rows], color=ours)
        axis.set_yticks(range(len(rows)), labels, fontsize=7)
        axis.invert_yaxis()
        axis.set_title(table["title"], fontsize=8)
        axis.set_xlabel(unit, fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def first_time(table: dict[str, Any]) -> str | None:
    """The first column of times that has any."""
    for name in table["columns"]:
        key = name.replace(" ", "_")
        if name.rpartition(" ")[2] in UNITS and any(isinstance(row.get(key), float) for row in table["rows"]):
            return str(name)
    return None
