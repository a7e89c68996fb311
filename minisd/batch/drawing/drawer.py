"""Rows to pictures: models stay loaded, what a text encoder has said is kept, and files are written while the next is drawn."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace

import torch
from PIL.Image import Image

from ...errors import MinisdError, OutOfMemoryError, OutputError, is_lack_of_memory, shown
from ...pipeline import Pipeline, load
from ...request import Request
from ...result import Result
from ...system.device import to_device
from ...system.memory import let_go
from ...workbench.teaching import teach
from ..formats import as_json, encoded
from ..job import Job
from ..rows import FILES, Row
from ..shards import Answer, Done, Failed, Piece
from ..store import store_of
from .texts import Remembered
from .together import FEW, Together

KEPT_MODELS = 2  # on a CPU; on a GPU one, with a refiner two
WAITING = 8  # pictures that are drawn and not written
FULL = 0.85  # of a GPU's memory: what is left is for larger pictures than the measured one
GAIN = 1.05  # times as fast a picture must be for a larger batch to be worth its memory
MOST_TOGETHER = 64


class Drawer:
    """Draws pieces of a job, on one device.

    answer: is told of every row, from another thread.  begin: is told of rows before they are drawn.  keep: takes the pictures
    by line, in the place of files.
    """

    def __init__(
        self,
        job: Job,
        answer: Callable[[Answer], None],
        begin: Callable[[Sequence[Row]], None] = lambda _: None,
        keep: dict[int, Image] | None = None,
    ) -> None:
        self.job, self.answer, self.begin, self.keep, self.store = job, answer, begin, keep, store_of(job.out)
        self.device = to_device(job.loading.get("device"))
        self.models: OrderedDict[tuple[str | None, str | None], Pipeline | MinisdError] = OrderedDict()
        self.writer = ThreadPoolExecutor(1)
        self.together = Together(self)
        self.room = threading.Semaphore(WAITING)
        self.broken: OutputError | None = None  # nothing can be written any more

    def draw(self, piece: Piece) -> None:
        """Raises OutputError where files cannot be written, which no other row could be, either."""
        for rows in self.together.calls(piece):
            if missing := {row.id for row in rows} - piece.there:
                self.draw_rows(rows, missing)

    def draw_rows(self, rows: Sequence[Row], missing: set[str]) -> None:
        """In one call, or where there is no memory for that, half by half."""
        self.begin(rows)
        try:
            results = self.together.drawn(rows, self.drawn) if self.device.type == "cpu" else [self.drawn(rows)]
        except OutOfMemoryError as error:
            let_go(error, self.device)
            if len(rows) == 1:
                self.failed(rows, missing, error)
                return
            half = len(rows) // 2
            for part in (rows[:half], rows[half:]):
                self.draw_rows(part, missing & {row.id for row in part})
            return
        except Exception as error:  # whatever it is, it is this row's, and the others are drawn
            if is_lack_of_memory(error):
                error = OutOfMemoryError("out of memory")
            if len(rows) > 1:
                for row in rows:
                    self.draw_rows([row], missing & {row.id})
                return
            self.failed(rows, missing, error)
            return
        of_each = [(result, i) for result in results for i in range(len(result.images))]
        for row, (result, i) in zip(rows, of_each, strict=True):
            if row.id in missing:
                self.room.acquire()
                self.check()
                self.writer.submit(self.write, row, result, i).add_done_callback(self.written)

    def failed(self, rows: Sequence[Row], missing: set[str], error: Exception) -> None:
        text = " ".join(str(error).split())
        reason = text if isinstance(error, MinisdError) else f"{type(error).__name__}: {text}"
        for row in rows:
            if row.id in missing:
                self.answer(Failed(row.line, shown(reason, 1000)))

    def drawn(self, rows: Sequence[Row]) -> Result:
        first = rows[0].fields
        pipe = self.model_of(rows[0])
        second = first.get("refiner", self.job.defaults.get("refiner"))
        refiner = self.model(second, None) if second else None
        for row in rows:
            teach([pipe, *([refiner] if refiner else [])], self.request([row], None))
        return pipe(self.request(rows, refiner))

    def request(self, rows: Sequence[Row], refiner: Pipeline | None) -> Request:
        """Of several rows one, with lists of what is by picture."""
        every = [{**self.job.defaults, **row.fields} for row in rows]
        given = {name: value for name, value in every[0].items() if name not in FILES}
        if len(rows) > 1:
            apart = {name for each in every for name in each if each[name] != every[0].get(name)} | {"prompt", "seed"}
            given |= {name: [each[name] for each in every] for name in apart}
        return Request(**given, refiner=refiner)

    def model_of(self, row: Row) -> Pipeline:
        return self.model(row.fields.get("model", self.job.model), row.fields.get("vae"))

    def model(self, name: str | None, vae: str | None) -> Pipeline:
        """Loaded once, and kept beside the last one.  Raises CheckpointError, each time anew, and OutOfMemoryError."""
        key = (name, vae)
        if key not in self.models:
            while len(self.models) >= (KEPT_MODELS if self.device.type == "cpu" or self.job.defaults.get("refiner") else 1):
                self.models.popitem(last=False)
            loading = dict(self.job.loading) | ({"vae": vae} if vae else {})
            try:
                pipe = load(name, **loading)
                pipe.conditioner = replace(pipe.conditioner, run=Remembered(pipe))
                pipe.batch_size = FEW
                self.models[key] = pipe
            except MinisdError as error:
                error.__traceback__ = error.__context__ = error.__cause__ = None
                self.models[key] = error
        self.models.move_to_end(key)
        found = self.models[key]
        if isinstance(found, MinisdError):
            raise found
        return found

    def write(self, row: Row, result: Result, i: int) -> None:
        """The recipe first: where there is a picture, there is its recipe."""
        if self.keep is not None:
            self.keep[row.line] = result.images[i]
            return self.answer(Done(row.line))
        place, recipe = f"{self.job.folder(row.shard)}/{row.id}", {"id": row.id} | result.metadata[i]
        data = encoded(self.job.format, result.images[i], result.latents[i], result.metadata[i])
        self.store.write(f"{place}.json", as_json(recipe))
        self.store.write(f"{place}{self.job.suffix}", data)
        self.answer(Done(row.line))

    def written(self, future: Future[None]) -> None:
        self.room.release()
        if isinstance(error := future.exception(), Exception):
            known = isinstance(error, OutputError)
            self.broken = error if known else OutputError(f"output: {type(error).__name__}: {error}")  # type: ignore[assignment]

    def check(self) -> None:
        if self.broken is not None:
            raise self.broken

    def flush(self) -> None:
        """Waits until what is drawn is written.  Raises OutputError."""
        self.writer.submit(bool).result()
        self.check()

    def finish(self) -> None:
        """Waits until all is written.  Raises OutputError."""
        self.writer.shutdown()
        self.store.close()
        self.check()

    def checked(self, row: Row) -> None:
        """All that is found out about a row before it is drawn.  Raises MinisdError."""
        second = row.fields.get("refiner", self.job.defaults.get("refiner"))
        refiner = self.model(second, None) if second else None
        pipe = self.model_of(row)
        request = self.request([row], refiner)
        teach([pipe, *([refiner] if refiner else [])], request)
        pipe.stream(request).close()

    def measured(self, row: Row) -> int:
        """How many pictures like this one are drawn in one call: as long as each costs less time, and memory lasts."""
        best, before, count = 1, math.inf, 1
        if self.device.type == "cpu":
            return best
        total = torch.cuda.get_device_properties(self.device).total_memory
        with contextlib.suppress(MinisdError):  # of memory; what else is wrong with the row is told when it is drawn
            self.drawn([row])  # what happens once only
            while count <= MOST_TOGETHER:
                start = time.monotonic()
                self.drawn([row] * count)
                each = (time.monotonic() - start) / count
                if each * GAIN > before or torch.cuda.max_memory_reserved(self.device) > FULL * total:
                    break
                best, before, count = count, each, 2 * count
        return best

    def estimated(self, row: Row) -> tuple[float, float]:
        """Seconds of a step of such a picture, and of all else about it."""
        self.drawn([row])
        times = []
        for steps in (2, 4):
            start = time.monotonic()
            self.drawn([replace(row, fields={**row.fields, "steps": steps})])
            times.append(time.monotonic() - start)
        step = max(0.0, times[1] - times[0]) / 2
        return step, max(0.0, times[0] - 2 * step)
