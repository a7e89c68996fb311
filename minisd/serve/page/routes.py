"""What the page is, and what it asks for: choices, a drawing, the recipe of a picture."""

from __future__ import annotations

import asyncio
from importlib.resources import files
from typing import Annotated, Any

from fastapi import APIRouter, Request
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field

from ... import __version__
from ...diffusion.samplers import SAMPLERS
from ...diffusion.spacings import SPACINGS
from ...errors import UsageError
from ...library.styles import named as style_named
from ...library.styles import styled, styles
from ..dialects.a1111 import PlainDict, Seed, Text
from ..errors import RefusedError, told
from ..pictures import from_base64, grey
from ..service import Service
from ..shelf import Drawing
from .recovered import MORE, recovered
from .stream import Watched, events

router = APIRouter()
KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
FILES = ("style.css", "page.js", "wire.js", "form.js", "start.js", "gallery.js", "icon.svg")
# Its own files and answers alone; blob: pictures that came in an answer, or that the user has chosen.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'"
)
MOST_LORAS = 8


class Draw(BaseModel):
    """more: options of `minisd.Request` that the page has no field for, of a recipe."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)

    prompt: Text
    negative_prompt: Text = ""
    model: str | None = None
    style: str | None = None
    loras: Annotated[dict[str, float], Field(max_length=MOST_LORAS)] = {}
    sampler: str | None = None
    spacing: str | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    seed: Seed | None = None
    num_images: int | None = None
    init_image: str | None = None
    mask: str | None = None
    strength: float | None = None
    more: PlainDict = {}


class Sent(BaseModel):
    image: str


def file(name: str) -> Response:
    data = files(__package__).joinpath(name).read_bytes()
    kind = KINDS[name.rpartition(".")[2]]
    return Response(data, media_type=f"{kind}; charset=utf-8", headers={"Content-Security-Policy": POLICY})


@router.get("/", include_in_schema=False)
async def page() -> Response:
    return file("index.html")


@router.get("/minisd/page/{name}", include_in_schema=False)
async def part(name: str) -> Response:
    if name not in FILES:
        raise RefusedError(404, "there is nothing at this path", code="not_found")
    return file(name)


@router.get("/minisd/choices")
async def choices(asked: Request) -> dict[str, Any]:
    """What there is to choose from, by the names that a drawing takes."""
    service: Service = asked.app.state.service
    await asyncio.to_thread(service.index.refresh)
    limits = service.settings.limits
    return {
        "version": __version__,
        "model": service.index.default().name,
        "models": [{"name": each.name, "family": each.family} for each in service.index.all("checkpoint")],
        "loras": [{"name": each.name, "family": each.family} for each in service.index.all("lora")],
        "styles": list(await asyncio.to_thread(styles)),
        "samplers": [{"name": name, "label": each.label} for name, each in SAMPLERS.items()],
        "spacings": [{"name": name, "label": each.label or name} for name, each in SPACINGS.items()],
        "limits": {"steps": limits.steps, "images": limits.images, "loras": MOST_LORAS},
    }


@router.post("/minisd/draw")
async def draw(body: Draw, asked: Request) -> StreamingResponse:
    """Server-sent events: queued, step (some with a preview), picture, done; or error.  Who closes the connection cancels it."""
    service: Service = asked.app.state.service
    drawing = service.checked(await asyncio.to_thread(drawing_of, body, service))
    watched = Watched()
    job = service.put(drawing, "page", watched.watch)
    job.preview_wanted = True
    return StreamingResponse(events(job, service, watched), media_type="text/event-stream")


@router.post("/minisd/recipe")
async def recipe(body: Sent, asked: Request) -> dict[str, Any]:
    """What a picture says of how it was made, as the fields of a drawing; `notes` has what they cannot say."""
    service: Service = asked.app.state.service
    most = service.settings.limits.sent_pixels
    picture = await asyncio.to_thread(from_base64, body.image, "image", most)
    return await asyncio.to_thread(recovered, picture, service.index)


def drawing_of(body: Draw, service: Service) -> Drawing:
    """Raises RefusedError."""
    if unknown := [name for name in body.more if name not in MORE]:
        raise RefusedError(422, f"more: expected some of {', '.join(MORE)}, found {unknown[0][:60]!a}", "more")
    prompt, negative = body.prompt, body.negative_prompt
    if body.style:
        try:
            prompt, negative = styled(style_named(body.style), prompt, negative)
        except UsageError as error:
            raise told(error, "") from None
    plain = ("sampler", "spacing", "steps", "guidance_scale", "width", "height", "seed", "num_images", "strength")
    given = {name: value for name in plain if (value := getattr(body, name)) is not None}
    options = body.more | given | {"prompt": prompt, "negative_prompt": negative} | pictures(body, service)
    loras = tuple((service.index.find(name, "lora", "loras"), strength, None) for name, strength in body.loras.items())
    return Drawing(service.model_of(body.model), options, loras=loras)


def pictures(body: Draw, service: Service) -> dict[str, Any]:
    """The picture to start from, and where to paint on it."""
    most = service.settings.limits.sent_pixels
    if body.init_image is None:
        return {}
    image = from_base64(body.init_image, "init_image", most)
    if body.mask is None:
        return {"init_image": image}
    return {"init_image": image, "mask": grey(from_base64(body.mask, "mask", most), image.size)}
