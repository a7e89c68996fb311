"""What the dialects share: the library, the queue, the workers, and the way from a drawing to its pictures."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from starlette.requests import Request as Asked

from ..addons.wanted import OTHER, TAG, Lora, of_tag
from ..diffusion.samplers import named
from ..diffusion.spacings import spacing_named
from ..errors import MinisdError, UsageError
from ..library.names import Listed
from ..options import OPTIONS, checked
from ..result import Step
from ..text.added import MARK
from .errors import RefusedError, told
from .guard import ClientGone
from .index import Index
from .jobs import Cancelled, Done, Job, Queue, Worker, hear_warnings
from .metrics import Log, Metrics
from .settings import Settings, check_limits
from .shelf import Drawing, Shelf

Outcome = TypeVar("Outcome")
KEPT = 64  # answers that wait to be fetched
KEPT_SECONDS = 600.0
TEXTS = ("prompt", "negative_prompt", "prompt_2", "negative_prompt_2")


class Service:
    def __init__(self, settings: Settings) -> None:
        self.settings, self.metrics, self.log = settings, Metrics(), Log(settings.log_prompts)
        self.index = Index(settings.models)
        self.refiner = self.index.find(settings.refiner, "checkpoint", "refiner") if settings.refiner else None
        self.queue = Queue(settings.queue)
        self.metrics.queue.set_function(lambda: len(self.queue))
        self.workers = [self.worker(device) for device in settings.devices]
        self.options: dict[str, Any] = {}  # of the A1111 dialect, which its clients set for all that comes
        self.uploads: dict[str, Any] = {}  # files that are on their way into the library: dialects/assets.py
        self.asset_ids: dict[str, str] = {}  # of models that came so, by their names
        self.later: dict[str, tuple[float, asyncio.Task[Any]]] = {}

    def worker(self, device: str | None) -> Worker:
        shelf = Shelf(device, self.settings.dtype, self.settings.memory, self.embedding, self.settings.fp8)
        self.metrics.memory.labels(str(shelf.device)).set_function(lambda: shelf.used)
        self.metrics.opened.labels(str(shelf.device)).set_function(lambda: shelf.opened)
        return Worker(self.queue, shelf, self.begin, self.ended)

    def embedding(self, name: str) -> Path:
        """By the index alone: no name in a prompt is a path."""
        return self.index.find(name, "embedding", "prompt").path

    def begin(self, shelf: Shelf) -> None:
        """Opens the model that most requests are for; what is wrong with it, they will hear."""
        with contextlib.suppress(MinisdError):
            shelf.pipeline(self.index.default().path, None, set())

    def start(self) -> None:
        hear_warnings(lambda: self.workers)
        for worker in self.workers:
            worker.start()

    def close(self) -> None:
        """Sends away who waits; what is being drawn may be finished."""
        self.queue.close()

    def stop(self) -> None:
        """Gives up what is still being drawn, and waits until nobody draws: Python cannot end in the middle of torch."""
        self.close()
        self.cancel_all()
        for worker in self.workers:
            if worker.is_alive():
                worker.join()

    @property
    def drawing_now(self) -> list[Job]:
        return [job for worker in self.workers if (job := worker.job) is not None]

    def cancel_all(self) -> None:
        for job in self.drawing_now:
            job.cancel()

    def ended(self, job: Job, outcome: Done | BaseException, worker: Worker) -> None:
        """Puts into figures and log what became of a job."""
        options, model = job.drawing.options, job.drawing.model.name
        cancelled, failed = isinstance(outcome, Cancelled), isinstance(outcome, BaseException)
        how = "cancelled" if cancelled else "refused" if isinstance(outcome, MinisdError) else "failed" if failed else "drawn"
        self.metrics.jobs.labels(job.door, how).inc()
        facts: dict[str, Any] = {"job": job.id, "door": job.door, "how": how, "model": model, "device": str(worker.shelf.device)}
        facts |= {"steps": job.step, "waited": round((job.started or time.monotonic()) - job.asked, 4)}
        if isinstance(outcome, Done):
            self.metrics.pictures.labels(model).inc(len(outcome.pictures))
            self.metrics.drawing.labels(model).observe(outcome.seconds)
            size = "x".join(map(str, outcome.pictures[0].size))
            facts |= {"seconds": round(outcome.seconds, 4), "pictures": len(outcome.pictures), "size": size}
        elif not cancelled:
            facts["error"] = type(outcome).__name__
        if how == "failed":
            facts["traceback"] = "".join(traceback.format_exception(outcome))[-4000:]  # type: ignore[arg-type]
        if self.settings.log_prompts:
            facts |= {name: options[name] for name in TEXTS if options.get(name)}
        self.log("job", **facts)

    def checked(self, drawing: Drawing) -> Drawing:
        """A drawing within the limits, whose prompts name models of the library alone.  Raises RefusedError."""
        check_limits(self.settings.limits, drawing.options)
        self.check_options(drawing.options)
        loras = list(drawing.loras)
        options = dict(drawing.options)
        for name in TEXTS:
            for mark in MARK.findall(options.get(name) or ""):
                self.index.find(mark.rstrip(","), "embedding", name)
        prompt = options["prompt"]
        if (found := TAG.findall(prompt)) or OTHER.search(prompt):
            if not self.settings.prompt_loras or OTHER.search(prompt):
                raise RefusedError(422, "prompt: <lora:…> and the like name no files here; see --prompt-loras", "prompt")
            options["prompt"] = prompt = TAG.sub("", prompt).strip()
            if TAG.search(prompt):
                raise RefusedError(422, "prompt: expected <lora:…> side by side", "prompt")
            for lora in self.tagged(found):
                loras.append((self.index.find(str(lora.source), "lora", "prompt"), lora.strength, lora.text_strength))
        return replace(drawing, options=options, loras=tuple(loras))

    def tagged(self, tags: list[tuple[str, str]]) -> list[Lora]:
        try:
            return [of_tag(*tag) for tag in tags]
        except UsageError as error:
            raise told(error, "") from None

    def check_options(self, options: Mapping[str, Any]) -> None:
        """What can be said of them without a model.  Raises RefusedError."""
        try:
            for name, value in options.items():
                if name in OPTIONS:
                    checked(name, value)
            named(options.get("sampler", "euler"))
            if options.get("spacing") not in (None, "automatic", "Automatic"):
                spacing_named(options["spacing"])
        except UsageError as error:
            raise told(error, "") from None

    def put(self, drawing: Drawing, door: str, watch: Callable[[Job, Step], None] | None = None) -> Job:
        """Into the queue.  Raises RefusedError where there is no room."""
        job = Job(drawing, door, watch)
        self.queue.put(job)
        return job

    async def drawn(self, drawing: Drawing, asked: Asked | None, door: str) -> Done:
        return await self.wait(self.put(drawing, door), asked)

    async def wait(self, job: Job, asked: Asked | None) -> Done:
        """For a job; one whose client goes away, or whose task is ended, is given up at its next step.

        Raises RefusedError, ClientGone.
        """
        done = asyncio.wrap_future(job.future)
        gone = asyncio.ensure_future(disconnected(asked)) if asked is not None else None
        try:
            await asyncio.wait([each for each in (done, gone) if each], return_when=asyncio.FIRST_COMPLETED)
            if not done.done():
                raise ClientGone
            return done.result()
        except Cancelled:
            raise RefusedError(409, "the drawing was interrupted", code="interrupted") from None
        except (RefusedError, ClientGone):
            raise
        except Exception as error:
            raise told(error, job.id) from None
        finally:
            job.cancel()
            done.add_done_callback(forgotten)
            if gone is not None:
                gone.cancel()

    def put_later(self, answer: Callable[[], Any]) -> str:
        """Begins to make an answer that is fetched later; returns the secret that it is fetched by.  Raises RefusedError."""
        now = time.monotonic()
        for token in [token for token, (until, _) in self.later.items() if until < now]:
            self.later.pop(token)[1].cancel()
        if len(self.later) >= KEPT:
            raise RefusedError(429, "too many answers wait to be fetched", code="rate_limit_exceeded", retry=30)
        token = secrets.token_urlsafe(24)
        self.later[token] = (now + KEPT_SECONDS, asyncio.ensure_future(answer()))
        return token

    def model_of(self, name: str | None, field: str = "model") -> Listed:
        return self.index.find(name, "checkpoint", field) if name else self.index.default()


async def aside(long: bool, work: Callable[..., Outcome], *args: Any) -> Outcome:
    """In a thread where it takes long, so that others are answered meanwhile; else here: a busy machine wakes a thread late."""
    return await asyncio.to_thread(work, *args) if long else work(*args)


def forgotten(future: asyncio.Future[Any]) -> None:
    """Looks at what nobody waits for any more, so that asyncio does not complain of it."""
    if not future.cancelled():
        future.exception()


async def disconnected(asked: Asked) -> None:
    while (await asked.receive())["type"] != "http.disconnect":
        pass
