"""OctoAI's Asset Library over the library of this machine: /v1/assets.

Source: octoml/fern-config, fern/apis/asset (fields, states); the package octoai 1.11.0 (what is sent, and read).  A file that is
uploaded is checked as `minisd models add` does, and never executed.  Only what came this way is deleted this way.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Query, Request
from pydantic import BaseModel, ConfigDict, Field

from ...errors import CheckpointError, MinisdError, shown
from ...files.checkpoint import state_of
from ...library.importing import add, checked_name
from ...library.names import Listed, identify
from ...system.cache import keep, recall
from ..errors import RefusedError, without_paths
from ..index import Index, id_of, plain
from ..service import Service

router = APIRouter()
KINDS = {"checkpoint": "checkpoint", "lora": "lora", "vae": "vae", "embedding": "textual_inversion", "controlnet": "checkpoint"}
ENGINES = {"sd1": "image/stable-diffusion-v1-5", "sd2": "image/stable-diffusion-v2-1", "sdxl": "image/stable-diffusion-xl-v1-0"}
OWNER = "minisd"
WAITING = 16  # uploads at once
PATIENCE = 3600.0  # seconds for one


class Data(BaseModel):
    model_config = ConfigDict(extra="allow")

    asset_type: str | None = None
    engine: str | None = None
    file_format: str | None = None
    data_type: str | None = None


class Create(BaseModel):
    model_config = ConfigDict(extra="ignore")

    asset_type: Literal["checkpoint", "lora", "vae", "textual_inversion"]
    data: Data
    name: Annotated[str, Field(min_length=1, max_length=100)]
    description: Annotated[str, Field(max_length=10_000)] | None = None
    is_public: bool | None = None
    url: str | None = None
    hf_repo: str | None = None
    transfer_api_type: str | None = None


@dataclass
class Upload:
    """An asset that is not in the library yet, or never will be."""

    id: str
    name: str
    kind: str  # asset_type
    engine: str | None
    description: str
    secret: str = field(default_factory=lambda: secrets.token_urlsafe(24))
    began: float = field(default_factory=time.monotonic)
    created: str = field(default_factory=lambda: stamp(time.time()))
    file: Path | None = None
    size: int = 0
    status: str = "ready_to_upload"
    details: str = ""


def uploads(service: Service) -> dict[str, Upload]:
    """By their ids."""
    return service.uploads


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")


def described(service: Service, model: Listed) -> dict[str, Any]:
    """A model of the library, as an asset."""
    changed = 0.0
    with contextlib.suppress(OSError):
        changed = model.path.stat().st_mtime
    found = service.asset_ids.get(model.name, id_of(model))
    return asset(found, model.name, KINDS[model.kind], model.family, model.bytes, stamp(changed)) | {
        "description": model.what,
        "status": "ready",
    }


def asset(id_: str, name: str, kind: str, family: str | None, size: int, created: str) -> dict[str, Any]:
    data = {"asset_type": kind, "engine": ENGINES.get(family or "", family or "unknown"), "file_format": "safetensors"}
    return {
        "id": id_, "name": name, "asset_type": kind, "created_at": created, "size_bytes": size, "status_details": "",
        "tenant_uuid": OWNER, "data": data, "file_structure": "single_file", "is_public": False,
    }  # fmt: skip


def pending(upload: Upload) -> dict[str, Any]:
    facts = asset(upload.id, upload.name, upload.kind, None, upload.size, upload.created)
    facts["data"]["engine"] = upload.engine or "unknown"
    return facts | {"description": upload.description, "status": upload.status, "status_details": upload.details}


@router.get("/v1/assets")
async def listed(
    asked: Request,
    name: str | None = None,
    asset_type: Annotated[list[str] | None, Query()] = None,
    engine: Annotated[list[str] | None, Query()] = None,
    owner: str | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=10**9)] = 0,
) -> dict[str, Any]:
    service: Service = asked.app.state.service
    found = [described(service, each) for kind in KINDS for each in service.index.all(kind)]
    found += [pending(each) for each in uploads(service).values() if each.status != "ready"]
    chosen = [
        each
        for each in found
        if (name is None or name.casefold() in each["name"].casefold())
        and (not asset_type or each["asset_type"] in asset_type)
        and (not engine or each["data"]["engine"] in engine)
        and owner in (None, OWNER)
    ]
    page = chosen[offset : offset + limit]
    return {"data": page, "has_more": offset + limit < len(chosen), "total": len(chosen)}


@router.get("/v1/assets/{name:path}")
async def got(name: str, asked: Request) -> dict[str, Any]:
    service: Service = asked.app.state.service
    upload = uploads(service).get(name)
    if upload is not None and upload.status != "ready":
        return {"asset": pending(upload), "transfer_api": {"type": "none"}}
    return {"asset": described(service, find(service, name)), "transfer_api": {"type": "none"}}


def find(service: Service, name: str) -> Listed:
    """By id, owner/name or name.  Raises RefusedError."""
    index: Index = service.index
    bare = name.removeprefix(f"{OWNER}/")
    for kind in KINDS:
        for each in index.all(kind):
            if name in (id_of(each), service.asset_ids.get(each.name)) or plain(each.name) == plain(bare):
                return each
    raise RefusedError(404, "asset: there is none of this id or name", "asset", "not_found")


@router.post("/v1/assets")
async def created(body: Create, asked: Request) -> dict[str, Any]:
    service: Service = asked.app.state.service
    check_uploads(service)
    if body.url or body.hf_repo:
        raise RefusedError(422, "url: minisd fetches nothing from elsewhere; upload the file", "url", "not_supported")
    if body.transfer_api_type not in (None, "presigned-url"):
        raise RefusedError(
            422, "transfer_api_type: expected presigned-url, the one way there is here", "transfer_api_type", "not_supported"
        )
    try:
        name = checked_name(body.name)
    except MinisdError as error:
        raise RefusedError(422, without_paths(str(error)), "name") from None
    taken = {plain(each.name) for kind in KINDS for each in service.index.all(kind)}
    if plain(name) in taken or any(each.name == name and each.status != "rejected" for each in uploads(service).values()):
        raise RefusedError(409, "name: another model has this name already", "name", "name_taken")
    upload = Upload(f"asset_{secrets.token_hex(12)}", name, body.asset_type, body.data.engine, body.description or "")
    uploads(service)[upload.id] = upload
    url = f"{str(asked.base_url).rstrip('/')}/uploads/{upload.secret}"
    return {"asset": pending(upload), "transfer_api": {"type": "presigned-url", "get_url": url, "put_url": url}}


def check_uploads(service: Service) -> None:
    """Raises RefusedError where there may be none, or no more; forgets those that nobody has finished."""
    if not service.settings.uploads:
        raise RefusedError(403, "this server takes no uploads", code="forbidden")
    for upload in list(uploads(service).values()):
        if time.monotonic() - upload.began > PATIENCE or (upload.status in ("ready", "rejected") and len(uploads(service)) > 100):
            discard(upload)
            del uploads(service)[upload.id]
    if sum(each.status in ("ready_to_upload", "uploading", "uploaded") for each in uploads(service).values()) >= WAITING:
        raise RefusedError(429, "too many uploads at once", code="rate_limit_exceeded", retry=30)


@router.put("/uploads/{secret}")
async def sent(secret: str, asked: Request) -> dict[str, str]:
    """The bytes of the file, whose address is the secret."""
    service: Service = asked.app.state.service
    upload = next((each for each in uploads(service).values() if secrets.compare_digest(each.secret, ascii_of(secret))), None)
    if upload is None or upload.status not in ("ready_to_upload", "uploaded"):
        raise RefusedError(404, "there is no such upload, or no longer", code="not_found")
    discard(upload)
    upload.status, upload.size = "uploading", 0
    descriptor, path = tempfile.mkstemp(prefix="minisd-upload-")
    upload.file = Path(path)
    try:
        with os.fdopen(descriptor, "wb") as file:
            async for part in asked.stream():
                upload.size += len(part)
                if upload.size > service.settings.limits.upload:
                    raise RefusedError(413, "body: the file is larger than uploads may be", code="too_large")
                await asyncio.to_thread(file.write, part)
    except BaseException as error:
        discard(upload)
        upload.status = "ready_to_upload"
        if isinstance(error, OSError):
            raise RefusedError(507, "there is no room for this file here", code="no_room") from None
        raise
    upload.status = "uploaded"
    return {"status": "uploaded"}


def ascii_of(text: str) -> str:
    return text if text.isascii() else ""


def discard(upload: Upload) -> None:
    if upload.file is not None:
        upload.file.unlink(missing_ok=True)
        upload.file = None


@router.post("/v1/assets/{asset_id}/complete-upload")
async def completed(asset_id: str, asked: Request) -> dict[str, Any]:
    service: Service = asked.app.state.service
    upload = uploads(service).get(asset_id)
    if upload is None or upload.status != "uploaded":
        raise RefusedError(404, "asset: expected one whose file has been sent", "asset", "not_found")
    await asyncio.to_thread(imported, service, upload)
    return {"error": upload.details or None}


def imported(service: Service, upload: Upload) -> None:
    """Puts the file into the library, or says in the asset why not."""
    assert upload.file is not None
    try:
        facts = identify(upload.file)
        if KINDS.get(facts.kind) != upload.kind:
            raise CheckpointError(upload.name, f"expected a {upload.kind}, found {facts.what}")
        if facts.family and upload.engine and ENGINES.get(facts.family) != upload.engine and "controlnet" not in upload.engine:
            raise CheckpointError(upload.name, f"expected one for {upload.engine}, found {facts.family}")
        path = add(upload.file, upload.name)
        upload.status = "ready"
    except (MinisdError, OSError) as error:
        reason = error.reason if isinstance(error, CheckpointError) else str(error)
        upload.status, upload.details = "rejected", shown(without_paths(reason), 300)
        return
    finally:
        discard(upload)
    keep("assets", dict(list((recall("assets") | {os.path.realpath(path): state_of(path)}).items())[-10_000:]))
    service.index.refresh()
    for each in (each for kind in KINDS for each in service.index.all(kind)):
        if os.path.realpath(each.path) == os.path.realpath(path):
            service.asset_ids[each.name] = upload.id


@router.delete("/v1/assets/{asset_id}")
async def deleted(asset_id: str, asked: Request) -> dict[str, str]:
    service: Service = asked.app.state.service
    if not service.settings.uploads:
        raise RefusedError(403, "this server deletes nothing", code="forbidden")
    now = stamp(time.time())
    upload = uploads(service).get(asset_id)
    if upload is not None and upload.status != "ready":
        discard(upload)
        del uploads(service)[asset_id]
        return {"id": asset_id, "deleted_at": now}
    model = find(service, asset_id)
    path = os.path.realpath(model.path)
    if recall("assets").get(path) != state_of(model.path):
        raise RefusedError(
            403, "asset: only what was uploaded here is deleted here; delete its file yourself", "asset", "forbidden"
        )
    await asyncio.to_thread(os.unlink, path)
    uploads(service).pop(asset_id, None)
    service.asset_ids.pop(model.name, None)
    service.index.refresh()
    return {"id": asset_id, "deleted_at": now}
