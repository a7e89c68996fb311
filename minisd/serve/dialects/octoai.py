"""OctoAI's Media Gen API, as its clients still speak it: POST /generate/sdxl and its like.

Source: octoml/fern-config, fern/apis/image-gen/openapi (fields, defaults, limits); the package octoai 1.11.0 (what is read)
"""

from __future__ import annotations

import asyncio
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from ...addons.controls.preprocess import ELSEWHERE, PREPROCESS
from ...library.names import Listed
from ...library.styles import styled, styles
from ..errors import RefusedError, told
from ..jobs import Done
from ..pictures import Region, from_base64, region_of, to_base64
from ..service import Service, aside
from ..shelf import Drawing, public

router = APIRouter()
ENGINES = {"sdxl": ("sdxl",), "ssd": ("sdxl",), "sd": ("sd1", "sd2"), "controlnet-sdxl": ("sdxl",), "controlnet-sd15": ("sd1",)}
ELSEWHERE_ENGINES = ("sd3", "flux-dev", "flux-schnell", "svd", "ip-adapter-sdxl")
NAMES = {
    "guidance_scale": "cfg_scale", "mask": "mask_image", "model": "checkpoint", "controls": "controlnet_image",
    "embeddings": "textual_inversions", "refiner": "use_refiner", "style": "style_preset",
}  # fmt: skip
HEAVY = ("init_image", "mask_image", "controlnet_image", "vae", "loras", "textual_inversions", "controlnet", "style_preset")
Base64 = Annotated[str, Field(max_length=40 << 20)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]


class Generate(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=False)

    prompt: Annotated[str, Field(max_length=10_000)]
    prompt_2: Annotated[str, Field(max_length=10_000)] | None = None
    negative_prompt: Annotated[str, Field(max_length=10_000)] | None = None
    negative_prompt_2: Annotated[str, Field(max_length=10_000)] | None = None
    checkpoint: str | None = None
    vae: str | None = None
    textual_inversions: dict[str, str | None] | None = None
    loras: dict[str, float] | None = None
    sampler: str | None = None
    height: int | None = None
    width: int | None = None
    cfg_scale: Annotated[float, Field(ge=0, le=50)] | None = None
    steps: Annotated[int, Field(ge=1)] | None = None
    num_images: Annotated[int, Field(ge=1)] | None = None
    seed: Seed | list[Seed] | None = None
    init_image: Base64 | None = None
    mask_image: Base64 | None = None
    strength: Annotated[float, Field(gt=0, le=1)] | None = None
    outpainting: bool | None = None
    inpaint_full_res: bool | None = None
    inpaint_full_res_padding: Annotated[int, Field(ge=0, le=4096)] | None = None
    clip_skip: Annotated[int, Field(ge=1, le=12)] | None = None
    style_preset: str | None = None
    use_refiner: bool | None = None
    high_noise_frac: Annotated[float, Field(ge=0, le=1)] | None = None
    image_encoding: Literal["jpeg", "png"] | None = None
    transfer_images: dict[str, list[Base64]] | None = None
    log_prompt: bool | None = None
    enable_safety: bool | None = None


class GenerateControlled(Generate):
    controlnet: str | None = None
    controlnet_image: Base64 | None = None
    controlnet_conditioning_scale: Annotated[float, Field(ge=0, le=100)] | None = None
    controlnet_early_stop: Annotated[float, Field(ge=0, le=1)] | None = None
    controlnet_preprocess: bool | None = None


def given(value: Any, default: Any) -> Any:
    return default if value is None else value


@router.post("/generate/sdxl")
async def sdxl(body: Generate, asked: Request) -> JSONResponse:
    return await generated(body, "sdxl", asked)


@router.post("/generate/ssd")
async def ssd(body: Generate, asked: Request) -> JSONResponse:
    return await generated(body, "ssd", asked)


@router.post("/generate/sd")
async def sd(body: Generate, asked: Request) -> JSONResponse:
    return await generated(body, "sd", asked)


@router.post("/generate/controlnet-sdxl")
async def controlnet_sdxl(body: GenerateControlled, asked: Request) -> JSONResponse:
    return await generated(body, "controlnet-sdxl", asked)


@router.post("/generate/controlnet-sd15")
async def controlnet_sd15(body: GenerateControlled, asked: Request) -> JSONResponse:
    return await generated(body, "controlnet-sd15", asked)


@router.post("/generate/{engine}")
async def elsewhere(engine: str) -> JSONResponse:
    known = "minisd draws with Stable Diffusion 1.x, 2.x and SDXL" if engine in ELSEWHERE_ENGINES else "there is no such engine"
    raise RefusedError(404, f"engine: {known}; expected one of {', '.join(ENGINES)}", code="not_found")


async def generated(body: Generate, engine: str, asked: Request) -> JSONResponse:
    """At once, or with X-OctoAI-Async: 1 by an address to ask again at."""
    service: Service = asked.app.state.service
    drawing = service.checked(await aside(not light(body, service), drawing_of, body, engine, service))
    kind = body.image_encoding or "jpeg"
    if asked.headers.get("x-octoai-async") != "1":
        return JSONResponse(await answered(service, drawing, kind, asked))

    async def later() -> dict[str, Any]:
        return await answered(service, drawing, kind, None)

    token = service.put_later(later)
    return JSONResponse({"response_id": token, "poll_url": f"{str(asked.base_url).rstrip('/')}/later/{token}"})


async def answered(service: Service, drawing: Drawing, kind: str, asked: Request | None) -> dict[str, Any]:
    done = await service.drawn(drawing, asked, "octoai")
    return await aside(done.large, answer, drawing, done, kind)


def answer(drawing: Drawing, done: Done, kind: str) -> dict[str, Any]:
    result = done.result
    images = [
        {
            "image_b64": to_base64(picture, kind, public(recipe, drawing)),
            "removed_for_safety": False,
            "safety_score": None,
            "seed": seed,
        }
        for picture, recipe, seed in zip(done.pictures, result.metadata, result.seeds, strict=True)
    ]
    return {"images": images, "prediction_time_ms": round(done.seconds * 1000, 3), "warnings": done.warnings}


@router.get("/later/{token}")
async def poll(token: str, asked: Request) -> dict[str, Any]:
    task = kept(asked.app.state.service, token)
    url = f"{str(asked.base_url).rstrip('/')}/later/{token}/response"
    return {"status": "completed", "response_url": url} if task.done() else {"status": "running"}


@router.get("/later/{token}/response")
async def response(token: str, asked: Request) -> JSONResponse:
    task = kept(asked.app.state.service, token)
    if not task.done():
        raise RefusedError(409, "the answer is not there yet", code="running")
    if task.cancelled():
        raise RefusedError(409, "the drawing was interrupted", code="interrupted")
    if (error := task.exception()) is not None:
        raise told(error, "later")
    return JSONResponse(task.result())


def kept(service: Service, token: str) -> asyncio.Task[Any]:
    found = service.later.get(token)
    if found is None:
        raise RefusedError(404, "there is no such answer, or no longer", code="not_found")
    return found[1]


def drawing_of(body: Generate, engine: str, service: Service) -> Drawing:
    """What a body wants.  Raises RefusedError, which names the field in minisd's words."""
    refuse_unsupported(body)
    index, most = service.index, service.settings.limits.sent_pixels
    model = model_of(body, engine, service)
    positive, negative = prompts_of(body)
    options: dict[str, Any] = {
        "prompt": positive, "negative_prompt": negative, "prompt_2": body.prompt_2, "negative_prompt_2": body.negative_prompt_2,
        "width": body.width, "height": body.height, "steps": given(body.steps, 30), "guidance_scale": given(body.cfg_scale, 12.0),
        "sampler": given(body.sampler, "DDIM"), "num_images": given(body.num_images, 1), "clip_skip": body.clip_skip,
        "seed": body.seed, "high_noise_frac": given(body.high_noise_frac, 0.8),
    }  # fmt: skip
    region = add_pictures(options, body, most)
    return Drawing(
        model, options,
        vae=index.find(body.vae, "vae", "vae") if body.vae else None,
        refiner=refiner_of(body, model, service),
        loras=tuple((index.find(name, "lora", "loras"), weight, None) for name, weight in (body.loras or {}).items()),
        embeddings=tuple(
            (index.find(name, "embedding", "embeddings"), word) for name, word in (body.textual_inversions or {}).items()
        ),
        controls=controls_of(body, service, most),
        finish=region.put_back if region else None,
    )  # fmt: skip


def light(body: Generate, service: Service) -> bool:
    """Whether it is known at once what a body wants: nothing to unpack, and no name that the library is looked through for."""
    heavy = any(getattr(body, name, None) for name in HEAVY)
    return not heavy and (not body.checkpoint or bool(service.index.hits(body.checkpoint, "checkpoint")))


def refuse_unsupported(body: Generate) -> None:
    for name in ("outpainting", "transfer_images"):
        if getattr(body, name):
            raise RefusedError(422, f"{name}: minisd has no such thing; leave it out", name, "not_supported")


def prompts_of(body: Generate) -> tuple[str, str]:
    if not body.style_preset:
        return body.prompt, body.negative_prompt or ""
    found = styles().get(body.style_preset)
    if found is None:
        raise RefusedError(422, "style_preset: there is no such style; GET /sdapi/v1/prompt-styles lists them", "style_preset")
    return styled(found, body.prompt, body.negative_prompt or "")


def model_of(body: Generate, engine: str, service: Service) -> Listed:
    """The checkpoint that is named, which must be of the engine's family; else one that is."""
    families, index = ENGINES[engine], service.index
    if body.checkpoint:
        found = index.find(body.checkpoint, "checkpoint", "model")
        if found.family not in families:
            raise RefusedError(422, f"model: expected one for {engine}, found {found.what}", "model", "wrong_family")
        return found
    fitting = [each for each in (index.default(), *index.all("checkpoint")) if each.family in families]
    if not fitting:
        raise RefusedError(422, f"model: the library has none for {engine}; name one in checkpoint", "model", "model_not_found")
    return fitting[0]


def refiner_of(body: Generate, model: Listed, service: Service) -> Listed | None:
    """That of the server, where SDXL draws and nobody says no; by use_refiner also the one that the library has."""
    if body.use_refiner is False or model.family != "sdxl":
        if body.use_refiner and model.family != "sdxl":
            raise RefusedError(422, "refiner: only SDXL has one", "refiner")
        return None
    if service.refiner is not None or not body.use_refiner:
        return service.refiner
    found = [each for each in service.index.all("checkpoint") if each.family == "sdxl-refiner"]
    if not found:
        raise RefusedError(422, "refiner: the library has none; leave use_refiner out, or false", "refiner", "model_not_found")
    return found[0]


def add_pictures(options: dict[str, Any], body: Generate, most: int) -> Region | None:
    """Puts init image and mask into the options; gives what puts the part around the mask back, if only that is painted."""
    if body.init_image is None:
        if body.mask_image is not None:
            raise RefusedError(422, "mask: expected an init_image to go with it, found none", "mask")
        return None
    image = from_base64(body.init_image, "init_image", most)
    options |= {"init_image": image, "strength": given(body.strength, 0.8)}
    if body.mask_image is None:
        return None
    mask = from_base64(body.mask_image, "mask", most)
    width, height = body.width or image.width // 8 * 8, body.height or image.height // 8 * 8
    region = None
    if body.inpaint_full_res and width >= 8 and height >= 8:
        region = region_of(image, mask, given(body.inpaint_full_res_padding, 32), (width, height))
    if region is not None:
        image, mask = region.crop(width, height)
        options |= {"init_image": image, "width": width, "height": height}
    options["mask"] = mask
    return region


def controls_of(body: Generate, service: Service, most: int) -> tuple[Any, ...]:
    if not isinstance(body, GenerateControlled) or (body.controlnet is None and body.controlnet_image is None):
        return ()
    if body.controlnet is None or body.controlnet_image is None:
        lacks = "controlnet" if body.controlnet is None else "controlnet_image"
        raise RefusedError(422, f"{lacks}: expected one beside the other", lacks)
    found = service.index.find(body.controlnet, "controlnet", "controlnet")
    fields = {
        "image": from_base64(body.controlnet_image, "controls", most),
        "strength": given(body.controlnet_conditioning_scale, 1.0),
        "end": given(body.controlnet_early_stop, 1.0),
        "preprocess": preprocess_of(found.name) if given(body.controlnet_preprocess, True) else "none",
    }
    return ((found, fields),)


def preprocess_of(name: str) -> str:
    """What a ControlNet's name says that its hint is.  Raises RefusedError for what is not made here."""
    low = name.casefold()
    if (elsewhere := next((each for each in ELSEWHERE if each in low), None)) is not None:
        what = f"{elsewhere} is not made here: {ELSEWHERE[elsewhere]}; send it, with controlnet_preprocess false"
        raise RefusedError(422, f"controlnet_preprocess: {what}", "controlnet_preprocess", "not_supported")
    return next((each for each in PREPROCESS if each in low), "none")
