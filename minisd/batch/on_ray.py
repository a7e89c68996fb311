"""Batches on a Ray cluster: Ray Data hands the rows to actors, each of which keeps its models loaded (the extra `ray`).

`draw_rows` is for people's own pipelines of Ray Data, `OnRay` draws for `minisd batch --ray`.
Reference: Ray, python/ray/data/dataset.py, Dataset.map_batches with a callable class.
"""

from __future__ import annotations

import logging
import os
import pickle
import socket
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

from ..errors import MinisdError, UsageError, shown
from .formats import ids_in
from .job import Job
from .manifest import Record
from .rows import Row, RowError, mark, row_id, row_of
from .shards import Answer, Done, Failed, Piece, grouped, kin
from .workers import asked

FOLDERS = 256  # that pictures are spread over where rows have no lines
WINDOW = 4096  # pieces of a dataset: the driver has so many in memory
BLOCKS = 32  # of a dataset for each actor: what is done anew where an actor dies
SHARE = 0.5  # of a CPU that an actor asks for: Ray's own tasks must find room beside them (ray-project/ray#44687)
HERE = "local"  # the address of a Ray that is begun for the run
EXPECTED = "expected the address of a cluster, such as auto or ray://HOST:10001"
OBJECTS = 100 << 20  # bytes of memory for Ray's objects, which are rows and answers


class Actor:
    """What every actor has: a job's models."""

    def __init__(self, job: Job, kept: dict[int, Any] | None = None) -> None:
        """kept: takes the pictures, by line, where none are written."""
        import torch

        from .drawing import Drawer

        torch.set_num_threads(job.threads)
        self.job, self.answers = job, list[Answer]()
        self.drawer = Drawer(job, self.answers.append, keep=kept)

    def draw(self, piece: Piece) -> list[Answer]:
        """Of every row that is missing.  One that is there by now was drawn before a death, and is not drawn again."""
        shards = {row.shard for row in piece.rows} if self.drawer.keep is None else ()
        there = piece.there.union(*(ids_in(self.drawer.store, self.job, shard) for shard in shards))
        self.answers += [Done(row.line) for row in piece.missing if row.id in there]
        left = Piece(piece.rows, there)
        if left.missing:
            self.drawer.draw(left)
            self.drawer.flush()
        found, self.answers[:] = list(self.answers), []
        return found


class Pieces(Actor):
    """A batch of pieces -> a batch of answers."""

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        return {"answers": [pickle.dumps(self.answered(pickle.loads(piece))) for piece in batch["piece"]]}

    def answered(self, piece: Piece) -> list[Answer] | tuple[int, str]:
        try:
            return self.draw(piece)
        except MinisdError as error:  # nothing can be written: the driver ends the run
            return error.exit_code, str(error)


class draw_rows:  # noqa: N801  read as a verb: ds.map_batches(draw_rows, …)
    """For `ray.data.Dataset.map_batches`: draws the rows of a batch, {"id": …, "prompt": …, any option of a request: …}.

    out: a folder that all machines see, or a URL that fsspec opens: pictures go to OUT/FOLDER/ID.png, with their recipes, and
        what is there is not drawn again.  Without it they come back.
    model, format, seed, threads: as those of `minisd batch`.  options: of a request, for rows that do not say.
    The batch comes back with the columns "error" (None where there is none), "seed", and "path", or without `out` "image",
    uint8 (H, W, 3).  Raises OutputError.

        ds.map_batches(draw_rows, fn_constructor_kwargs={"out": "s3://bucket/pictures"}, batch_size=16, concurrency=4, num_gpus=1)
    """

    def __init__(
        self,
        out: str | None = None,
        model: str | None = None,
        format: str = "png",
        seed: int = 0,
        threads: int = 1,
        **options: Any,
    ) -> None:
        if format not in ("png", "jpeg", "webp", "latents"):
            raise UsageError(f"format: expected png, jpeg, webp or latents, found {format!r}")
        loading: dict[str, Any] = {name: options.pop(name) for name in ("device", "dtype", "vae") if name in options}
        self.out, self.kept = out, dict[int, Any]()
        self.actor = Actor(Job(out or "", seed, format, model, options, loading, threads), self.kept if out is None else None)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        count = len(batch["id"])
        records = [Record(i + 1, {name: plain(column[i]) for name, column in batch.items()}) for i in range(count)]
        rows: dict[int, Row] = {}  # by line, as all that follows
        errors: dict[int, str] = {}
        for record in records:
            try:
                rows[record.line] = self.row(record)
            except RowError as error:
                errors[record.line] = str(error)
        for alike in grouped(list(rows.values()), kin):
            answers = self.actor.draw(Piece(tuple(alike)))
            errors |= {answer.line: answer.reason for answer in answers if isinstance(answer, Failed)}
        lines = range(1, count + 1)
        given = {name: list(column) for name, column in batch.items()}
        made = [self.made(line, rows.get(line) if line not in errors else None) for line in lines]
        seeds = [rows[line].fields["seed"] if line in rows else None for line in lines]
        what = "image" if self.out is None else "path"
        return given | {what: made, "seed": seeds, "error": [errors.get(line) for line in lines]}

    def row(self, record: Record) -> Row:
        fields = {name: value for name, value in (record.fields or {}).items() if value is not None}
        id = row_id(Record(record.line, fields))
        return row_of(Record(record.line, fields), id, mark(id) % FOLDERS, self.actor.job.seed, os.getcwd())

    def made(self, line: int, row: Row | None) -> Any:
        """The path of a picture, or itself; None, or no pixels, where there is none."""
        import numpy as np

        job = self.actor.job
        if self.out is None:
            return np.asarray(self.kept.pop(line)) if row else np.zeros((0, 0, 3), np.uint8)
        return f"{job.out}/{job.folder(row.shard)}/{row.id}{job.suffix}" if row else None


def plain(value: Any) -> Any:
    """As Python has it; None for what tables have in the place of nothing."""
    value = value.tolist() if hasattr(value, "tolist") else value
    return None if value != value else value  # NaN


class OnRay:
    """A `workers.Team` of actors.  joined: see `join`.  count: of actors, by default one for each GPU, or CPU that a worker has
    threads for."""

    def __init__(self, job: Job, joined: tuple[Any, bool], count: int | None) -> None:
        self.ray, self.own = joined
        self.job = replace(job, out=job.out if "://" in job.out else os.path.abspath(job.out))
        there = self.ray.cluster_resources()
        self.gpu = bool(there.get("GPU")) and str(job.loading.get("device") or "cuda").startswith("cuda")
        self.count = count or max(1, int(there["GPU"] if self.gpu else there.get("CPU", 1) // job.threads))
        self.pieces: list[Piece] = []
        self.running: Iterator[Mapping[str, Any]] | None = None

    def ask(self, what: str, row: Row) -> Any:
        if what == "kind":
            return "cuda" if self.gpu else "cpu"
        task = self.ray.remote(num_gpus=int(self.gpu))(lambda: asked(Actor(self.job).drawer, what, row))
        return self.ray.get(task.remote())

    def hungry(self) -> bool:
        return self.running is None and len(self.pieces) < WINDOW

    def give(self, piece: Piece) -> None:
        self.pieces.append(piece)

    def busy(self) -> bool:
        return bool(self.pieces) or self.running is not None

    def answers(self, patience: float) -> Iterable[Answer]:
        """Begins with a window of rows when somebody waits for them."""
        if self.running is None:
            if not patience or not self.pieces:
                return []
            self.running, self.pieces = self.begin(self.pieces), []
        found = next(self.running, None)
        if found is None:
            self.running = None
            return []
        said = pickle.loads(found["answers"])
        if isinstance(said, tuple):
            error = MinisdError(said[1])
            error.exit_code = said[0]
            raise error
        return said  # type: ignore[no-any-return]

    def begin(self, pieces: list[Piece]) -> Iterator[Mapping[str, Any]]:
        from ray import data

        items = [{"piece": pickle.dumps(piece)} for piece in pieces]
        rows = data.from_items(items, override_num_blocks=min(len(items), BLOCKS * self.count))
        drawn = rows.map_batches(
            Pieces, fn_constructor_args=(self.job,), batch_size=1, num_cpus=SHARE, num_gpus=int(self.gpu) or None,
            compute=data.ActorPoolStrategy(min_size=1, max_size=min(self.count, len(items))),
        )  # fmt: skip
        return iter(drawn.iter_rows())

    def close(self, at_once: bool) -> Iterable[Answer]:
        self.running = None
        if self.own:
            self.ray.shutdown()
        return []


def join(address: str) -> tuple[Any, bool]:
    """Ray, and whether it was joined here: one that a caller has begun is taken as it is.  address: of a cluster, or HERE.

    Raises UsageError.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        from ray import data
    except ImportError:
        raise UsageError("ray: is not there; pip install 'minisd[ray]'") from None
    own = not ray.is_initialized()
    if own and address not in (HERE, "auto"):
        check_reached(address)
    local = {} if address != HERE else {"include_dashboard": False, "object_store_memory": OBJECTS}
    try:
        if own:
            ray.init(address, log_to_driver=False, logging_level="ERROR", **local)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise UsageError(f"ray: {EXPECTED}, found {shown(address, 100)!r}: {shown(str(error), 300)}") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    data.DataContext.get_current().enable_progress_bars = False
    return ray, own


def check_reached(address: str) -> None:
    """Raises UsageError at once where nobody listens: Ray itself goes on trying for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    try:
        if not (host and colon and port.isascii() and port.isdecimal() and len(port) <= 5):
            raise ValueError("it is no HOST:PORT")
        socket.create_connection((host, int(port)), timeout=10).close()
    except (OSError, ValueError, OverflowError) as error:
        raise UsageError(f"ray: {EXPECTED}, found {shown(address, 100)!r}: {error}") from None
