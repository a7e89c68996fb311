"""OpenAI's pictures: /v1/images/generations, edits, and /v1/models.  seed, steps and the like come as fields of minisd's names.

Source: the package openai 3.57.0 (what is sent, and read).  In a mask, what is transparent is painted: elsewhere it is the white.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from PIL import Image, ImageOps
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile

from ...library.names import Listed
from ...library.styles import named as style_named
from ...library.styles import styled
from ...options import OPTIONS
from ..errors import RefusedError, told
from ..jobs import Done, Job
from ..pictures import from_bytes, grey, to_base64
from ..service import Service, aside
from ..shelf import Drawing, public

router = APIRouter(prefix="/v1")
NAMES = {"num_images": "n", "width": "size", "height": "size", "init_image": "image"}
# What may be said beside OpenAI's own fields, by minisd's names.
OWN = (
    "seed", "steps", "negative_prompt", "guidance_scale", "sampler", "spacing", "clip_skip", "eta", "strength", "prompt_2",
    "negative_prompt_2", "guidance_rescale", "emphasis", "rng",
)  # fmt: skip
STYLES = ("vivid", "natural")  # OpenAI's own, which say nothing here
PARTIALS = 3


class Generation(BaseModel):
    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=32_000)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    size: Annotated[str, Field(max_length=20)] | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Field(ge=0, le=PARTIALS)] | None = None
    style: str | None = None
    quality: str | None = None
    background: str | None = None
    moderation: str | None = None
    user: str | None = None
    input_fidelity: str | None = None


@router.get("/models")
async def models(asked: Request) -> dict[str, Any]:
    return {"object": "list", "data": [described(each) for each in asked.app.state.service.index.all("checkpoint")]}


@router.get("/models/{name:path}")
async def model(name: str, asked: Request) -> dict[str, Any]:
    return described(asked.app.state.service.index.find(name, "checkpoint", "model"))


def described(found: Listed) -> dict[str, Any]:
    try:
        created = int(found.path.stat().st_mtime)
    except OSError:
        created = 0
    return {"id": found.name, "object": "model", "created": created, "owned_by": "minisd", "description": found.what}


@router.post("/images/generations")
async def generations(body: Generation, asked: Request) -> Response:
    service: Service = asked.app.state.service
    return await answered(body, service.checked(drawing_of(body, service)), asked, "image_generation")


@router.post("/images/edits")
async def edits(asked: Request) -> Response:
    """multipart/form-data: the fields of a generation, and pictures."""
    service: Service = asked.app.state.service
    body, files = await form_of(asked)
    if len(files.get("image", [])) != 1:
        raise RefusedError(422, f"image: expected one picture, found {len(files.get('image', []))}", "image")
    drawing = await asyncio.to_thread(edit_of, body, files, service)
    return await answered(body, service.checked(drawing), asked, "image_edit")


@router.post("/images/variations")
async def variations() -> Response:
    raise RefusedError(404, "image: minisd makes no variations; edit the picture with a prompt", code="not_supported")


async def form_of(asked: Request) -> tuple[Generation, dict[str, list[bytes]]]:
    """The texts of a form as a body, and the bytes of its pictures.  Raises RefusedError."""
    if not asked.headers.get("content-type", "").startswith("multipart/form-data"):
        raise RefusedError(422, "body: expected multipart/form-data")
    texts: dict[str, Any] = {}
    files: dict[str, list[bytes]] = {}
    try:
        form = await asked.form(max_files=8, max_fields=64)
    except Exception:
        raise RefusedError(422, "body: expected multipart/form-data that can be read") from None
    for name, value in form.multi_items():
        if isinstance(value, UploadFile):
            files.setdefault(name.removesuffix("[]"), []).append(await value.read())
        else:
            texts[name] = as_number(value) if name in OWN else value
    await form.close()
    try:
        return Generation.model_validate(texts), files
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else "body"
        raise RefusedError(422, f"{field}: {first['msg']}"[:300], field) from None


def as_number(text: str) -> Any:
    """Of a form's field; what is none stays a text."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return found if isinstance(found, int | float | bool) else text


def drawing_of(body: Generation, service: Service) -> Drawing:
    extra = dict(body.__pydantic_extra__ or {})
    if unknown := [name for name in extra if name not in OWN]:
        raise RefusedError(
            422, f"{unknown[0][:60]!a}: unknown; beside OpenAI's fields: {', '.join(OWN)}", None, "unknown_parameter"
        )
    prompt, negative = body.prompt, extra.pop("negative_prompt", None) or ""
    if not isinstance(negative, str):
        raise RefusedError(422, "negative_prompt: expected a text", "negative_prompt")
    if body.style and body.style not in STYLES:
        try:
            prompt, negative = styled(style_named(body.style), prompt, negative)
        except ValueError as error:
            raise RefusedError(422, str(error), "style") from None
    if body.background == "transparent":
        raise RefusedError(422, "background: minisd draws no transparent pictures", "background", "not_supported")
    width, height = size_of(body.size)
    options = {"prompt": prompt, "negative_prompt": negative, "width": width, "height": height, "num_images": body.n or 1}
    given = {name: value for name, value in extra.items() if value is not None}
    return Drawing(service.model_of(body.model), options | given)


def size_of(text: str | None) -> tuple[int | None, int | None]:
    if text in (None, "auto"):
        return None, None
    try:
        width, height = OPTIONS["original_size"].kind.parse(str(text))
    except ValueError:
        raise RefusedError(422, "size: expected WIDTHxHEIGHT such as 512x512, or auto", "size") from None
    return width, height


def edit_of(body: Generation, files: Mapping[str, list[bytes]], service: Service) -> Drawing:
    drawing = drawing_of(body, service)
    most = service.settings.limits.sent_pixels
    image = from_bytes(files["image"][0], "image", most)
    options = {**drawing.options, "init_image": image}
    mask = mask_of(image, from_bytes(files["mask"][0], "mask", most) if files.get("mask") else None)
    if mask is not None:
        options["mask"] = mask
    return Drawing(drawing.model, options)


def mask_of(image: Image.Image, mask: Image.Image | None) -> Image.Image | None:
    """White where to paint, of a mask that is transparent there; without one, of the picture's own transparency."""
    source = mask if mask is not None else image
    if "A" not in source.getbands() and "transparency" not in source.info:
        if mask is not None:
            raise RefusedError(422, "mask: expected a picture that is transparent where to paint, found none", "mask")
        return None
    alpha = source.convert("RGBA").getchannel("A")
    if mask is None and alpha.getextrema()[0] == 255:
        return None
    return ImageOps.invert(grey(alpha, image.size))


async def answered(body: Generation, drawing: Drawing, asked: Request, event: str) -> Response:
    service: Service = asked.app.state.service
    if body.stream:
        making = Making(body.partial_images or 0)
        making.job = service.put(drawing, "openai", making.watch)
        return StreamingResponse(events(body, drawing, service, making, event), media_type="text/event-stream")
    done = await service.drawn(drawing, asked, "openai")
    return JSONResponse(await aside(done.large, answer, body, drawing, done))


def answer(body: Generation, drawing: Drawing, done: Done) -> dict[str, Any]:
    kind = body.output_format or "png"
    quality = 95 if body.output_compression is None else body.output_compression
    pairs = zip(done.pictures, done.result.metadata, strict=True)
    data = [
        {"b64_json": to_base64(picture, kind, public(recipe, drawing), quality), "seed": recipe["seed"]}
        for picture, recipe in pairs
    ]
    size = "x".join(map(str, done.pictures[0].size))
    return {"created": int(time.time()), "data": data, "output_format": kind, "size": size, "warnings": done.warnings}


class Making:
    """Pictures in the making, on their way from the worker's thread to a client; as many as it wants, evenly over the steps."""

    def __init__(self, wanted: int) -> None:
        self.wanted, self.sent = wanted, 0
        self.loop = asyncio.get_running_loop()
        self.pictures: asyncio.Queue[tuple[int, Image.Image] | None] = asyncio.Queue()
        self.job: Job | None = None

    def watch(self, job: Job, _: Any) -> None:
        if job.preview is not None:
            self.loop.call_soon_threadsafe(self.pictures.put_nowait, (self.sent, job.preview))
            job.preview, self.sent = None, self.sent + 1
        job.preview_wanted = self.sent < self.wanted and job.progress >= (self.sent + 1) / (self.wanted + 1)


async def events(body: Generation, drawing: Drawing, service: Service, making: Making, event: str) -> AsyncIterator[str]:
    """Server-sent: pictures in the making, if they are wanted, and then each finished one."""
    assert making.job is not None
    task = asyncio.ensure_future(service.wait(making.job, None))
    task.add_done_callback(lambda _: making.pictures.put_nowait(None))
    try:
        while (partial := await making.pictures.get()) is not None:
            index, picture = partial
            fields = {"partial_image_index": index, "b64_json": await asyncio.to_thread(to_base64, picture, "png")}
            yield said(f"{event}.partial_image", fields | {"created_at": int(time.time())})
        done = task.result()
        found = await aside(done.large, answer, body, drawing, done)
        for each in found["data"]:
            fields = each | {"created_at": found["created"], "output_format": found["output_format"], "size": found["size"]}
            yield said(f"{event}.completed", fields)
    except Exception as error:
        refused = told(error, making.job.id)
        problem = {"message": refused.message, "type": "invalid_request_error", "param": refused.field, "code": refused.code}
        yield said("error", {"error": problem})
    finally:
        making.job.cancel()
        task.cancel()


def said(name: str, fields: Mapping[str, Any]) -> str:
    return f"event: {name}\ndata: {json.dumps({'type': name} | dict(fields))}\n\n"
