"""AUTOMATIC1111's API but for drawing: what there is to choose from, options, progress, and what a picture says of itself."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel

from ...addons.controls.preprocess import PREPROCESS
from ...diffusion.samplers import SAMPLERS
from ...diffusion.spacings import SPACINGS
from ...library.names import Listed
from ...library.styles import styles
from ...pictures.foreign import parameters_of
from ...pictures.infotext import parsed
from ..errors import RefusedError, clean
from ..jobs import Job
from ..pictures import from_base64, to_base64
from ..service import Service
from .a1111 import NO_VAE, SETTINGS, PlainDict, text_of

router = APIRouter(prefix="/sdapi/v1")
controlnet = APIRouter(prefix="/controlnet")


class Sent(BaseModel):
    image: str


def service_of(asked: Request) -> Service:
    return asked.app.state.service  # type: ignore[no-any-return]


def title(model: Listed) -> str:
    return f"{model.name}{model.path.suffix}" + (f" [{model.model_hash}]" if model.model_hash else "")


@router.get("/sd-models")
async def sd_models(asked: Request) -> list[dict[str, Any]]:
    return [
        {
            "title": title(each),
            "model_name": each.name,
            "hash": each.model_hash,
            "sha256": None,
            "filename": f"{each.name}{each.path.suffix}",
            "config": None,
        }
        for each in service_of(asked).index.all("checkpoint")
    ]


@router.get("/sd-vae")
async def sd_vae(asked: Request) -> list[dict[str, str]]:
    found = service_of(asked).index.all("vae")
    return [{"model_name": each.name, "filename": f"{each.name}{each.path.suffix}"} for each in found]


@router.get("/loras")
async def loras(asked: Request) -> list[dict[str, Any]]:
    found = service_of(asked).index.all("lora")
    return [{"name": each.name, "alias": each.name, "path": f"{each.name}{each.path.suffix}", "metadata": {}} for each in found]


@router.get("/embeddings")
async def embeddings(asked: Request) -> dict[str, Any]:
    loaded = {
        each.name: {"step": None, "sd_checkpoint": None, "sd_checkpoint_name": None, "shape": None, "vectors": None}
        for each in service_of(asked).index.all("embedding")
    }
    return {"loaded": loaded, "skipped": {}}


@router.get("/samplers")
async def samplers() -> list[dict[str, Any]]:
    return [{"name": each.label, "aliases": [name, *each.names], "options": {}} for name, each in SAMPLERS.items()]


@router.get("/schedulers")
async def schedulers() -> list[dict[str, Any]]:
    own = {"name": "automatic", "label": "Automatic", "aliases": None, "default_rho": -1, "need_inner_model": False}
    return [own, *(own | {"name": name, "label": each.label or name} for name, each in SPACINGS.items())]


@router.get("/prompt-styles")
async def prompt_styles() -> list[dict[str, str]]:
    known = await asyncio.to_thread(styles)
    return [{"name": each.name, "prompt": each.prompt, "negative_prompt": each.negative_prompt} for each in known.values()]


@router.get("/upscalers")
@router.get("/latent-upscale-modes")
@router.get("/hypernetworks")
@router.get("/face-restorers")
@router.get("/realesrgan-models")
@router.get("/extensions")
@router.get("/script-info")
async def nothing() -> list[Any]:
    """Of which minisd has none."""
    return []


@router.get("/scripts")
async def scripts() -> dict[str, list[str]]:
    return {"txt2img": ["controlnet"], "img2img": ["controlnet"]}


@router.get("/cmd-flags")
async def cmd_flags() -> dict[str, Any]:
    return {"api": True}


@router.post("/refresh-checkpoints")
@router.post("/refresh-loras")
@router.post("/refresh-vae")
@router.post("/refresh-embeddings")
async def refresh(asked: Request) -> None:
    await asyncio.to_thread(service_of(asked).index.refresh)


@router.get("/options")
async def options(asked: Request) -> dict[str, Any]:
    service = service_of(asked)
    chosen = service.options.get("sd_model_checkpoint")
    model = service.model_of(chosen)
    known = {"sd_vae": "Automatic", "CLIP_stop_at_last_layers": None, "eta_noise_seed_delta": 0, "randn_source": "CPU"}
    return known | service.options | {"sd_model_checkpoint": title(model), "samples_format": "png"}


@router.post("/options")
async def set_options(body: PlainDict, asked: Request) -> None:
    """For all requests of this dialect that come; raises RefusedError for what there is not, and changes nothing then."""
    service = service_of(asked)
    if unknown := [name for name in body if name not in SETTINGS]:
        raise RefusedError(422, f"{clean(unknown[0])}: expected some of {', '.join(SETTINGS)}", "options", "not_supported")
    if name := text_of(body, "sd_model_checkpoint"):
        service.index.find(name, "checkpoint", "sd_model_checkpoint")
    vae = text_of(body, "sd_vae") or ""
    if vae.casefold() not in NO_VAE:
        service.index.find(vae, "vae", "sd_vae")
    service.options = {name: value for name, value in (service.options | body).items() if value is not None}


@router.get("/progress")
async def progress(asked: Request, skip_current_image: bool = False) -> dict[str, Any]:
    """Of what is being drawn, by whomever; while nothing is, exactly 0.0 and no job, for which clients wait."""
    service = service_of(asked)
    jobs = service.drawing_now
    job = jobs[0] if jobs else None
    state = {
        "skipped": False, "interrupted": bool(job and job.cancelled.is_set()), "job": job.id if job else "",
        "job_count": len(jobs) + len(service.queue), "job_timestamp": "0", "job_no": 0,
        "sampling_step": job.step if job else 0, "sampling_steps": (job.steps or 0) if job else 0,
    }  # fmt: skip
    image = await preview(job) if job and not skip_current_image else None
    share = job.progress if job else 0.0
    elapsed = time.monotonic() - job.started if job and job.started else 0.0
    left = elapsed * (1 - share) / share if share else 0.0
    return {"progress": share, "eta_relative": left, "state": state, "current_image": image, "textinfo": None}


async def preview(job: Job) -> str | None:
    """The picture in the making, as it was last seen; the worker makes the next one for who asks again."""
    job.preview_wanted = True
    found = job.preview
    return await asyncio.to_thread(to_base64, found, "png") if found else None


@router.post("/interrupt")
@router.post("/skip")
async def interrupt(asked: Request) -> None:
    for job in service_of(asked).drawing_now:
        if job.door == "a1111":
            job.cancel()


@router.post("/png-info")
async def png_info(body: Sent, asked: Request) -> dict[str, Any]:
    most = service_of(asked).settings.limits.sent_pixels
    picture = await asyncio.to_thread(from_base64, body.image, "image", most)
    text = clean_text(parameters_of(picture) or "")
    prompt, negative, fields = parsed(text) if text else ("", "", {})
    items = {"parameters": text} if text else {}
    found = {"Prompt": prompt, "Negative prompt": negative, **fields} if text else {}
    return {"info": text, "items": items, "parameters": found}


def clean_text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()[:100_000]


@router.get("/memory")
async def memory() -> dict[str, Any]:
    return {"ram": await asyncio.to_thread(main_memory), "cuda": {"error": "see /metrics"}}


def main_memory() -> dict[str, Any]:
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        total, free = (int(lines[name].split()[0]) * 1024 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return {"error": "unknown"}
    return {"free": free, "used": total - free, "total": total}


@controlnet.get("/version")
async def version() -> dict[str, int]:
    return {"version": 2}


@controlnet.get("/model_list")
async def model_list(asked: Request) -> dict[str, list[str]]:
    return {"model_list": [each.name for each in service_of(asked).index.all("controlnet")]}


@controlnet.get("/module_list")
async def module_list() -> dict[str, list[str]]:
    return {"module_list": list(PREPROCESS)}
