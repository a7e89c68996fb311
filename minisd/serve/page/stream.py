"""A drawing while it is made, as server-sent events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping
from typing import Any

from PIL import Image

from ..errors import told
from ..guard import ClientGone
from ..jobs import Done, Job
from ..pictures import to_base64
from ..service import Service, aside
from ..shelf import public


class Watched:
    """Steps on their way from the worker's thread to the page."""

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.steps: asyncio.Queue[tuple[int, int, Image.Image | None] | None] = asyncio.Queue()

    def watch(self, job: Job, _: Any) -> None:
        picture, job.preview, job.preview_wanted = job.preview, None, True
        self.loop.call_soon_threadsafe(self.steps.put_nowait, (job.step, job.steps or job.step, picture))


async def events(job: Job, service: Service, watched: Watched) -> AsyncIterator[str]:
    """The job is given up at its next step where nobody listens any more."""
    task = asyncio.ensure_future(service.wait(job, None))
    task.add_done_callback(lambda _: watched.steps.put_nowait(None))
    try:
        yield said("queued", {"waiting": len(service.queue), "drawing": len(service.drawing_now)})
        while (step := await watched.steps.get()) is not None:
            index, total, picture = step
            seen = {"preview": await asyncio.to_thread(to_base64, picture, "png")} if picture is not None else {}
            yield said("step", {"step": index, "steps": total} | seen)
        done = task.result()
        for i in range(len(done.pictures)):
            yield said("picture", await aside(done.large, answer, job, done, i))
        yield said("done", {"seconds": round(done.seconds, 3), "warnings": done.warnings})
    except (ClientGone, asyncio.CancelledError):
        raise
    except Exception as error:
        refused = told(error, job.id)
        yield said("error", {"message": refused.message, "field": refused.field, "code": refused.code})
    finally:
        job.cancel()
        task.cancel()


def answer(job: Job, done: Done, i: int) -> dict[str, Any]:
    """seed: as a text, as JavaScript's numbers end at 2^53."""
    recipe = public(done.result.metadata[i], job.drawing)
    return {"png": to_base64(done.pictures[i], "png", recipe), "recipe": recipe, "seed": str(recipe["seed"])}


def said(event: str, fields: Mapping[str, Any]) -> str:
    return f"event: {event}\ndata: {json.dumps(fields)}\n\n"
