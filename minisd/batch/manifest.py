"""Manifests: files with one row a picture, as JSON lines, CSV or Parquet, or a stream of JSON lines.  Nothing here imports torch.

A record is what stands on a line before anybody has looked at what it means: its line, and its fields or what is wrong with it.
"""

from __future__ import annotations

import csv
import io
import json
import os
import select
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UsageError, shown
from ..system.regular import open_regular

LONGEST = 1 << 20  # bytes of a line
STREAM = "-"  # standard input
PATIENCE = 0.5  # seconds that a stream may be silent before what came so far is drawn
KINDS = {".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}


@dataclass(frozen=True)
class Record:
    """A line of a manifest: its number, from 1, and its fields, or what is wrong with it.  An empty line has neither."""

    line: int
    fields: dict[str, Any] | None = None
    wrong: str | None = None


def records(source: str) -> Iterator[Record | None]:
    """The lines of a manifest, in order; None where a stream is silent.  Raises UsageError for what is none.

    source: a path, a URL that fsspec opens, or "-" for JSON lines on standard input.
    """
    if source == STREAM:
        return json_records(stream_lines(sys.stdin.fileno()))
    kind = kind_of(source)
    if kind == "parquet":
        return parquet_records(opened(source))
    return (json_records if kind == "json" else delimited(source))(lines_of(opened(source)))


def kind_of(source: str) -> str:
    suffix = Path(source).suffix.lower()
    if suffix not in KINDS:
        raise UsageError(f"manifest {shown(source, 500)}: expected a name that ends in {', '.join(KINDS)}, or - for a stream")
    return KINDS[suffix]


def opened(source: str) -> BinaryIO:
    """Raises UsageError."""
    name = shown(source, 500)
    try:
        if "://" in source:
            from .store import file_system

            system, path = file_system(source)
            return system.open(path, "rb")  # type: ignore[no-any-return]
        return open_regular(source)
    except FileNotFoundError:
        raise UsageError(f"manifest {name}: does not exist") from None
    except (OSError, ValueError) as error:  # a NUL in its name
        raise UsageError(f"manifest {name}: cannot be read: {getattr(error, 'strerror', None) or error}") from None


def count(source: str) -> int | None:
    """About how many rows there are, without looking at them; None for a stream."""
    if source == STREAM:
        return None
    with opened(source) as file:
        if kind_of(source) == "parquet":
            return int(parquet_file(file).metadata.num_rows)
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))


def lines_of(file: BinaryIO) -> Iterator[bytes]:
    """Lines with their ends; of one that is too long the first bytes, without an end."""
    with file:
        while line := file.readline(LONGEST + 1):
            yield line
            rest = line
            while len(rest) > LONGEST and not rest.endswith(b"\n"):
                rest = file.readline(LONGEST + 1)


def stream_lines(descriptor: int) -> Iterator[bytes | None]:
    """Lines as they come; None where for a while there comes none."""
    buffer = bytearray()
    while True:
        if not select.select([descriptor], [], [], PATIENCE)[0]:
            yield None
            continue
        block = os.read(descriptor, 1 << 16)
        buffer += block
        *whole, rest = buffer.split(b"\n")
        yield from (bytes(line) + b"\n" for line in whole)
        buffer = rest[: LONGEST + 1]
        if not block:
            break
    if buffer:
        yield bytes(buffer)


def json_records(lines: Iterable[bytes | None]) -> Iterator[Record | None]:
    number = 0
    for line in lines:
        if line is None:
            yield None
            continue
        number += 1
        if len(line) > LONGEST:
            yield Record(number, wrong=f"expected a line of at most {LONGEST:,} bytes, found a longer one")
        elif not line.strip():
            yield Record(number)
        else:
            yield json_record(number, line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line)


def json_record(number: int, line: bytes) -> Record:
    try:
        fields = json.loads(line.decode(), object_pairs_hook=without_repeats, parse_constant=no_number)
    except UnicodeDecodeError:
        return Record(number, wrong="expected text in UTF-8, found bytes that are not")
    except (ValueError, RecursionError) as error:
        return Record(number, wrong=f"expected a JSON object: {error or 'it is nested too deep'}")
    if not isinstance(fields, dict):
        return Record(number, wrong=f"expected a JSON object, found {shown(repr(fields), 60)}")
    return Record(number, fields)


def without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{shown(twice, 60)!r} is there twice")
    return found


def no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number of JSON")


def delimited(source: str) -> Callable[[Iterable[bytes]], Iterator[Record]]:
    delimiter = "\t" if source.lower().endswith(".tsv") else ","
    return lambda lines: csv_records(lines, source, delimiter)


def csv_records(lines: Iterable[bytes], source: str, delimiter: str) -> Iterator[Record]:
    """Rows below a first one with the names of the fields; an empty cell is a field that is not given."""
    texts = (line.decode("utf-8-sig" if i == 0 else "utf-8", "surrogateescape") for i, line in enumerate(lines))
    reader = csv.reader(texts, delimiter=delimiter, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
    except csv.Error as error:
        raise UsageError(f"manifest {shown(source, 500)}: expected the names of its fields on the first line: {error}") from None
    if "id" not in names or len(set(names)) < len(names):
        found = shown(", ".join(names), 200) or "none"
        raise UsageError(
            f"manifest {shown(source, 500)}: expected different names on the first line, among them id, found {found}"
        )
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield Record(line, wrong=f"expected a row of CSV: {error}")
            continue
        if not cells:
            yield Record(line)
        elif len(cells) != len(names):
            yield Record(line, wrong=f"expected {len(names)} cells, found {len(cells)}")
        elif any("\udc80" <= letter <= "\udcff" for cell in cells for letter in cell):
            yield Record(line, wrong="expected text in UTF-8, found bytes that are not")
        else:
            yield Record(line, {name: Cell(cell) for name, cell in zip(names, cells, strict=True) if cell != ""})


class Cell(str):
    """A text that may stand for a number or a list, as on the command line."""

    __slots__ = ()


def parquet_records(file: BinaryIO) -> Iterator[Record]:
    """The rows of a Parquet file; "line" is the number of the row, from 1.  Needs pyarrow (the extra `parquet`)."""
    with file:
        number = 0
        for batch in parquet_file(file).iter_batches(batch_size=1024):
            for fields in batch.to_pylist():
                number += 1
                yield Record(number, {name: value for name, value in fields.items() if value is not None})


def parquet_file(file: BinaryIO) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise UsageError("manifest: Parquet needs pyarrow, which is not there; pip install 'minisd[parquet]'") from None
    try:
        return pyarrow.parquet.ParquetFile(io.BufferedReader(file) if isinstance(file, io.RawIOBase) else file)
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UsageError(f"manifest: is no Parquet file that can be read: {shown(str(error), 200)}") from None
