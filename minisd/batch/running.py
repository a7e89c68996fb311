"""A run: what is missing goes out to those who draw, what comes back is counted, and a shard that is whole becomes a tar."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import MinisdError, shown
from ..files.checkpoint import open_checkpoint
from ..files.recognition import recognise
from ..library.names import resolve
from ..library.places import tiny_checkpoint
from .formats import pack
from .job import Job, begun, check_out, measured
from .manifest import count
from .progress import Errors, Progress, Tally, in_words
from .rows import Row, RowError
from .shards import Answer, Cut, Failed, Piece, Shard, Shards
from .store import Store
from .workers import Alone, Team, Workers, by_default

PIECE = 8  # rows, on a CPU: few enough that the last ones are spread over all workers
TRIED = 4  # kinds of rows that a forecast draws one of


def run(job: Job, source: str, mine: tuple[int, int] = (0, 1), workers: int | None = None, ray: str | None = None) -> Tally:
    """Draws what is missing.  workers: 1 is this process; None as many as the machine has room for.  ray: the address of a
    cluster whose actors draw, "local" for one that is begun here.

    Raises UsageError (the manifest as a whole, another job's output), CheckpointError (the job's own model), OutputError.
    """
    store, total = check_out(job.out), count(source)
    size = check_model(job)
    joined = joined_to(ray)
    job = begun(job, store)
    team = team_of(job, workers, size, joined)
    return Run(job, team, store, mine, total).draw(source)


def joined_to(ray: str | None) -> tuple[Any, bool] | None:
    if ray is None:
        return None
    from .on_ray import join

    return join(ray)


def team_of(job: Job, workers: int | None, size: int, joined: tuple[Any, bool] | None) -> Team:
    if joined is not None:
        from .on_ray import OnRay

        return OnRay(job, joined, workers)
    workers = workers or by_default(job, size)
    return Alone(job) if workers == 1 else Workers(job, workers)


def check_model(job: Job) -> int:
    """Looks at the headers of the job's own models, and says how large the first is.  Raises CheckpointError, UsageError."""
    for vae in job.loading.get("vae") or ():
        open_checkpoint(resolve(vae, "vae"))
    if job.defaults.get("refiner"):
        recognise(open_checkpoint(resolve(job.defaults["refiner"])))
    file = open_checkpoint(resolve(job.model) if job.model else tiny_checkpoint())
    recognise(file, vae_given=bool(job.loading.get("vae")))
    return file.size


class Run:
    """One going over a manifest.  mine: (i, n), see `shards.Shards`.  total: about how many rows there are."""

    def __init__(self, job: Job, team: Team, store: Store, mine: tuple[int, int] = (0, 1), total: int | None = None) -> None:
        self.job, self.team, self.store = job, team, store
        self.tally, self.errors = Tally(), Errors(store, mine)
        self.shards = Shards(job, store, mine, self.bad, self.ended, self.how)
        self.rows: dict[int, Row] = {}  # that are being drawn, by line
        self.open: dict[int, int] = {}  # how many of them each shard has
        self.read: dict[int, Shard] = {}  # shards whose lines have all been read, and that are no tar yet
        self.progress = Progress(self.tally, None if total is None else max(1, total // mine[1]))

    def draw(self, source: str) -> Tally:
        """Raises what ends a run: OutputError, UsageError (rows that have moved); all that is drawn by then is there."""
        done = False
        try:
            for piece in self.shards.pieces(source):
                if piece is not None:
                    self.take(piece)
                self.hear(0)
                while not self.team.hungry():
                    self.hear(1)
            while self.team.busy():
                self.hear(1)
            done = True
        finally:
            with contextlib.ExitStack() as ends:
                for end in (self.store.close, self.errors.flush, self.progress.close):
                    ends.callback(end)
                last = self.team.close(at_once=not done)
        self.count(last)
        return self.tally

    def how(self, row: Row) -> Cut:
        """Asks those who draw; on a GPU what was measured once holds for all who go on."""
        if self.team.ask("kind", row) == "cpu":
            return PIECE, False
        if self.job.together == 0:
            self.job = measured(self.job, self.store, self.team.ask("measured", row))
        return self.job.together, True

    def take(self, piece: Piece) -> None:
        for row in piece.missing:
            self.rows[row.line] = row
            self.open[row.shard] = self.open.get(row.shard, 0) + 1
        self.team.give(piece)

    def hear(self, patience: float) -> None:
        self.count(self.team.answers(patience))

    def count(self, answers: Iterable[Answer]) -> None:
        for answer in answers:
            row = self.rows.pop(answer.line)
            self.open[row.shard] -= 1
            if isinstance(answer, Failed):
                self.tally.failed += 1
                self.errors.add(answer, row.id)
            else:
                self.tally.drawn += 1
        self.pack_ready()
        self.progress.show(self.shards.already)

    def bad(self, bad: RowError) -> None:
        self.tally.failed += 1
        self.errors.add(bad)

    def ended(self, shard: Shard) -> None:
        if self.job.format == "wds":
            self.read[shard.number] = shard

    def pack_ready(self) -> None:
        """Makes tars of shards that are read to their end and have no row open."""
        for number in [number for number in self.read if not self.open.get(number)]:
            shard = self.read.pop(number)
            if self.store.names(self.job.folder(number)):
                pack(self.store, self.job, number, shard.ids)


@dataclass
class Forecast:
    """What a run would do.  seconds: of all of it, where a row could be tried."""

    missing: int
    already: int
    failed: int
    models: dict[str, int]  # how many pictures each draws
    workers: int
    seconds: float | None

    def __str__(self) -> str:
        models = ", ".join(f"{count:,} by {shown(name, 80)}" for name, count in self.models.items())
        time = f"; about {in_words(self.seconds)} with {self.workers} workers" if self.seconds else ""
        return f"to draw {self.missing:,} ({models or 'nothing'}), there already {self.already:,}, failed {self.failed:,}{time}"


def forecast(job: Job, source: str, mine: tuple[int, int], workers: int | None, tell: Callable[[RowError], None]) -> Forecast:
    """Reads and checks every row, opens every model, and draws one row of each kind to see how long it takes.  Writes nothing.

    tell: is told of every bad row.  Raises as `run`.
    """
    store = check_out(job.out)
    workers = workers or by_default(job, check_model(job))
    found, team = Forecast(0, 0, 0, {}, workers, 0.0), Alone(job)
    kinds: dict[tuple[str, int, str], tuple[Row, int]] = {}

    def bad(wrong: RowError) -> None:
        found.failed += 1
        tell(wrong)

    shards = Shards(job, store, mine, bad, lambda _: None, lambda _: (PIECE, False))
    for piece in shards.pieces(source):
        for row in piece.missing if piece else ():
            try:
                team.ask("checked", row)
            except MinisdError as error:
                bad(RowError(row.line, str(error), row.id))
                continue
            model = Path(row.fields.get("model", job.model) or "tiny").stem
            size = [row.fields.get(name, job.defaults.get(name)) for name in ("width", "height", "sampler")]
            steps = row.fields.get("steps", job.defaults.get("steps", 20))
            first, number = kinds.get((model, steps, str(size)), (row, 0))
            kinds[model, steps, str(size)] = first, number + 1
            found.models[model] = found.models.get(model, 0) + 1
    found.missing, found.already = sum(found.models.values()), shards.already
    found.seconds = sum(seconds_of(team, *each, steps) for (_, steps, _), each in list(kinds.items())[:TRIED]) / workers or None
    tried = sum(number for _, number in list(kinds.values())[:TRIED])
    if found.seconds:
        found.seconds *= found.missing / tried
    return found


def seconds_of(team: Alone, row: Row, number: int, steps: int) -> float:
    step, rest = team.ask("estimated", row)
    return number * (steps * step + rest)
