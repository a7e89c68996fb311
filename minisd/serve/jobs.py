"""The queue, and the worker of a device: one thread that draws one request at a time, as add-ons change models in place."""

from __future__ import annotations

import math
import secrets
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from ..errors import OutOfMemoryError
from ..pipeline import Pipeline
from ..result import Result, Step
from ..system.memory import let_go
from .errors import RefusedError
from .shelf import Drawing, Shelf

LONGEST_WAIT = 30  # seconds: what OctoAI's client obeys in Retry-After
PREVIEW_EVERY = 0.25  # seconds
LARGE = 128 * 128  # pixels: a PNG of so many takes 2 ms


class Cancelled(Exception):  # noqa: N818  # no error: nobody wants the picture any more
    """Its client has gone, or has asked for an end."""


@dataclass(frozen=True)
class Done:
    result: Result
    pictures: list[Image.Image]  # as they leave the server
    seconds: float  # of drawing, models in memory
    warnings: list[str]

    @property
    def large(self) -> bool:
        """Whether it takes longer to make PNGs of them than to change to another thread and back."""
        return sum(each.width * each.height for each in self.pictures) > LARGE


@dataclass(eq=False)
class Job:
    """A drawing in the queue, or in the making.  watch: is called in the worker's thread, at every step."""

    drawing: Drawing
    door: str  # the dialect that it came by
    watch: Callable[[Job, Step], None] | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    future: Future[Done] = field(default_factory=lambda: begun())
    cancelled: threading.Event = field(default_factory=threading.Event)
    asked: float = field(default_factory=time.monotonic)
    started: float | None = None
    step: int = 0
    steps: int | None = None
    preview: Image.Image | None = None
    preview_wanted: bool = False
    previewed: float = 0.0
    warnings: list[str] = field(default_factory=list)

    @property
    def images(self) -> int:
        return int(self.drawing.options.get("num_images") or 1)

    @property
    def progress(self) -> float:
        return min(1.0, self.step / self.steps) if self.steps else 0.0

    def cancel(self) -> None:
        self.cancelled.set()


def begun() -> Future[Done]:
    """One that nobody can take back: what is drawn is always put into it."""
    future: Future[Done] = Future()
    future.set_running_or_notify_cancel()
    return future


class Queue:
    """At most `most` jobs that wait, first come, first drawn."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.waiting: deque[Job] = deque()
        self.ready = threading.Condition()
        self.open = True
        self.seconds = 1.0  # that a job takes, about

    def __len__(self) -> int:
        return sum(not job.cancelled.is_set() for job in list(self.waiting))

    def put(self, job: Job) -> None:
        """Raises RefusedError where there is no room, with when to ask again."""
        with self.ready:
            if not self.open:
                raise RefusedError(503, "the server is ending", code="ending", retry=5)
            self.waiting = deque(each for each in self.waiting if not each.cancelled.is_set())
            if len(self.waiting) >= self.most:
                wait = max(1, min(LONGEST_WAIT, math.ceil(self.seconds * len(self.waiting))))
                raise RefusedError(429, "too many requests wait already", code="rate_limit_exceeded", retry=wait)
            self.waiting.append(job)
            self.ready.notify()

    def take(self) -> Job | None:
        """The next job, as soon as there is one; None where there will be none."""
        with self.ready:
            while True:
                while self.waiting:
                    job = self.waiting.popleft()
                    if not job.cancelled.is_set():
                        return job
                    job.future.set_exception(Cancelled())
                if not self.open:
                    return None
                self.ready.wait()

    def close(self) -> None:
        """Takes no more, and sends away those that wait."""
        with self.ready:
            self.open = False
            for job in self.waiting:
                job.future.set_exception(RefusedError(503, "the server is ending", code="ending", retry=5))
            self.waiting.clear()
            self.ready.notify_all()

    def took(self, seconds: float) -> None:
        self.seconds += (seconds - self.seconds) / 4


class Worker(threading.Thread):
    """Draws what the queue holds.  begin: is called first, to open a model; tell: hears what every job has ended in."""

    def __init__(
        self,
        queue: Queue,
        shelf: Shelf,
        begin: Callable[[Shelf], None],
        tell: Callable[[Job, Done | BaseException, Worker], None],
    ) -> None:
        super().__init__(name=f"draws on {shelf.device}", daemon=True)
        self.queue, self.shelf, self.begin, self.tell = queue, shelf, lambda: begin(shelf), tell
        self.job: Job | None = None

    def run(self) -> None:
        self.begin()
        while (job := self.queue.take()) is not None:
            self.job = job
            outcome = self.outcome(job)
            self.job = None
            if isinstance(outcome, Done):
                self.queue.took(outcome.seconds)
            self.tell(job, outcome, self)
            if isinstance(outcome, Done):
                job.future.set_result(outcome)
            else:
                job.future.set_exception(outcome)
            del job, outcome  # or its pictures would be kept until the next one

    def outcome(self, job: Job) -> Done | BaseException:
        try:
            with self.shelf.ready(job.drawing) as (pipe, request):
                job.started = time.monotonic()
                result = self.drawn(job, pipe, pipe.stream(request))
                seconds = time.monotonic() - job.started
            finish = job.drawing.finish
            pictures = [finish(each) for each in result.images] if finish else result.images
            return Done(result, pictures, seconds, job.warnings)
        except BaseException as error:
            error.__traceback__ = error.__traceback__ if not isinstance(error, Cancelled) else None
            if isinstance(error, OutOfMemoryError):
                let_go(error, self.shelf.device)
            return error

    def drawn(self, job: Job, pipe: Pipeline, steps: Generator[Step, None, Result]) -> Result:
        try:
            while not job.cancelled.is_set():
                try:
                    step = next(steps)
                except StopIteration as stop:
                    return stop.value  # type: ignore[no-any-return]
                job.step, job.steps = step.index + 1, step.total
                if job.preview_wanted and time.monotonic() - job.previewed > PREVIEW_EVERY:
                    job.preview = pipe.preview(step.denoised)[0]
                    job.preview_wanted, job.previewed = False, time.monotonic()
                if job.watch:
                    job.watch(job, step)
        finally:
            steps.close()
        raise Cancelled

    def heard(self, message: Any) -> None:
        """A warning of the pipeline's, for the client whose picture it is about."""
        if self.job is not None and len(self.job.warnings) < 20:
            self.job.warnings.append(" ".join(str(message).split()))


def hear_warnings(workers: Callable[[], list[Worker]]) -> None:
    """Warnings of a worker's thread go to its client, who alone may know what is in the prompt; nobody hears the others."""

    def show(message: Any, *_: Any) -> None:
        for worker in workers():
            if worker.ident == threading.get_ident():
                worker.heard(message)

    warnings.showwarning = show  # type: ignore[assignment]
    warnings.simplefilter("always")
