"""A manifest cut into shards, and what is missing of each into pieces that are drawn together.  Nothing here imports torch.

A shard is some hundreds of lines that follow one another: one folder or tar, given to one machine.  Where a row belongs, and
what it is drawn with on a GPU, depends on its line alone, not on who draws it, or when.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from ..addons.wanted import TAG
from ..errors import UsageError, shown
from ..options import OPTIONS
from .formats import ids_in
from .job import Job
from .manifest import STREAM, Record, records
from .rows import Models, Row, RowError, mark, row_id, row_of
from .store import Store

APART = {"prompt", "seed", *(option.name for option in OPTIONS.values() if option.by_picture)}  # by picture, in one call


@dataclass(frozen=True)
class Piece:
    """Rows that one worker draws, with one model; those whose pictures are there already stand among them on a GPU, where the
    last digits of a picture depend on how many are drawn with it."""

    rows: tuple[Row, ...]
    there: frozenset[str] = frozenset()  # ids
    apart: bool = False  # a worker died of one of them: on a CPU they are drawn one by one, and it shows of which

    @property
    def model(self) -> str:
        return json.dumps([self.rows[0].fields.get(name) for name in ("model", "vae", "refiner", "loras")])

    @property
    def missing(self) -> list[Row]:
        return [row for row in self.rows if row.id not in self.there]


@dataclass(frozen=True)
class Done:
    """The picture of a line stands in its place."""

    line: int


@dataclass(frozen=True)
class Failed:
    """The picture of a line cannot be drawn."""

    line: int
    reason: str


Answer = Done | Failed


@dataclass
class Shard:
    """What was read of a shard so far."""

    number: int
    there: set[str]
    ids: list[str] = field(default_factory=list)  # of all its rows
    rows: list[Row] = field(default_factory=list)  # that are missing, and not in a piece yet
    rest: list[Record] = field(default_factory=list)  # of those whose pictures are there


# How pieces are cut: how many rows they have at most, and whether these are drawn in one call, as on a GPU.
Cut = tuple[int, bool]


class Shards:
    """The pieces of a manifest.

    mine: (i, n): of n machines the i-th, from 0, which draws every n-th shard.  tell: is told of every bad row of these.
    ended: is told of every shard when all of its pieces are given.  how: is asked once, with the first row that is missing.
    """

    def __init__(
        self, job: Job, store: Store, mine: tuple[int, int],
        tell: Callable[[RowError], None], ended: Callable[[Shard], None], how: Callable[[Row], Cut],
    ) -> None:  # fmt: skip
        self.job, self.store, self.mine, self.tell, self.ended, self.how = job, store, mine, tell, ended, how
        self.seen: set[int] = set()  # marks of ids
        self.models = Models()
        self.already = 0
        self.cutting: Cut | None = None

    def pieces(self, source: str) -> Iterator[Piece | None]:
        """None where a stream is silent.  Raises UsageError where rows have moved since their pictures were drawn."""
        self.folder = os.getcwd() if source == STREAM or "://" in source else os.path.dirname(os.path.abspath(source))
        shard: Shard | None = None
        for record in records(source):
            if record is None:
                yield from self.cut(shard) if shard else ()
                yield None
                continue
            number = (record.line - 1) // self.job.shard_rows
            if shard is None or number != shard.number:
                yield from self.finish(shard) if shard else ()
                shard = Shard(number, ids_in(self.store, self.job, number) if self.is_mine(number) else set())
            if record.fields is not None or record.wrong:
                self.look(record, shard)
        yield from self.finish(shard) if shard else ()

    def is_mine(self, shard: int) -> bool:
        return shard % self.mine[1] == self.mine[0]

    def look(self, record: Record, shard: Shard) -> None:
        """Takes a row in, if it is to be drawn here."""
        id = None
        try:
            id = row_id(record)
            self.check_own(record, id)
            if self.is_mine(shard.number):
                shard.ids.append(id)
                if id in shard.there:
                    self.already += 1
                    shard.rest.append(record)
                else:
                    shard.rows.append(self.row(record, id, shard))
        except RowError as bad:
            if self.is_mine(shard.number):
                self.tell(bad)

    def check_own(self, record: Record, id: str) -> None:
        """Raises RowError where an earlier line has this id."""
        known = mark(id)
        if known in self.seen:
            found = f"found {shown(id, 60)!r}, which an earlier line has (upper and lower case count as the same)"
            raise RowError(record.line, f"id: expected one of its own, {found}", id)
        self.seen.add(known)

    def row(self, record: Record, id: str, shard: Shard) -> Row:
        if self.job.format == "wds" and "." in id:
            raise RowError(
                record.line, f"id: expected no dot, where WebDataset ends names of samples, found {shown(id, 60)!r}", id
            )
        return self.models.checked(row_of(record, id, shard.number, self.job.seed, self.folder))

    def finish(self, shard: Shard) -> Iterator[Piece]:
        if not self.is_mine(shard.number):
            return
        if strangers := shard.there - set(shard.ids):
            first = shard.number * self.job.shard_rows + 1
            what = f"expected pictures of lines {first} to {first + self.job.shard_rows - 1} alone"
            found = f"found {shown(min(strangers), 80)!r}"
            hint = "leave lines where they are (empty those that are not wanted), or choose another -o"
            raise UsageError(f"output {shown(self.job.out, 300)}, shard {shard.number}: {what}, {found}; {hint}")
        yield from self.cut(shard)
        self.ended(shard)

    def cut(self, shard: Shard) -> Iterator[Piece]:
        """The rows that are in no piece yet: those with one model one after the other, and in one call what can be."""
        if not shard.rows:
            return
        self.cutting = self.cutting or self.how(shard.rows[0])
        size, together = self.cutting
        rows = sorted([*shard.rows, *self.others(shard)], key=lambda row: row.line) if together else shard.rows
        shard.rows, groups = [], dict[str, list[Row]]()
        for row in rows:
            groups.setdefault(kin(row) if together else Piece((row,)).model, []).append(row)
        for group in groups.values():
            for first in range(0, len(group), size):
                part = tuple(group[first : first + size])
                piece = Piece(part, frozenset(row.id for row in part if row.id in shard.there))
                if piece.missing:
                    yield piece

    def others(self, shard: Shard) -> Iterator[Row]:
        """The rows whose pictures are there."""
        for record in shard.rest:
            with contextlib.suppress(RowError):  # its line was changed since
                yield self.row(record, row_id(record), shard)


def kin(row: Row) -> str:
    """What rows must have in common to be drawn in one call: all that is not by picture, and the LoRAs that a prompt names."""
    common = {name: value for name, value in row.fields.items() if name not in APART}
    return json.dumps([common, sorted(row.fields.keys() & APART), TAG.findall(row.fields["prompt"])], sort_keys=True)


def grouped(rows: Sequence[Row], by: Callable[[Row], object]) -> list[list[Row]]:
    found: dict[object, list[Row]] = {}
    for row in rows:
        found.setdefault(by(row), []).append(row)
    return list(found.values())
