"""A picture as the bytes of a file, and a shard as a tar of WebDataset: files of one sample have one name."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from .job import Job
from .store import Store

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

QUALITY = {"jpeg": 95, "webp": 95}


def encoded(kind: str, image: Image.Image, latents: Tensor, recipe: Mapping[str, Any]) -> bytes:
    """A file of one of job.FORMATS; latents (C, h, w) of unit variance, float32, as "latents" in a .safetensors."""
    if kind == "latents":
        from safetensors.torch import save

        return save({"latents": latents.contiguous()})
    buffer = io.BytesIO()
    if kind in ("png", "wds"):
        from ..pictures.image import chunks_of

        image.save(buffer, "PNG", pnginfo=chunks_of(recipe))
    else:
        image.save(buffer, kind.upper(), quality=QUALITY[kind])
    return buffer.getvalue()


def as_json(recipe: Mapping[str, Any]) -> bytes:
    return (json.dumps(recipe, ensure_ascii=True) + "\n").encode()


def ids_in(store: Store, job: Job, shard: int) -> set[str]:
    """The ids of a shard whose pictures are there."""
    names = store.names(job.folder(shard))
    found = {name.removesuffix(job.suffix) for name in names if name.endswith(job.suffix) and not name.startswith(".")}
    return found | samples(store, job, shard) if job.format == "wds" else found


def samples(store: Store, job: Job, shard: int) -> set[str]:
    """The ids in a shard's tar.  Raises UsageError where it is none of ours."""
    file = store.open(job.tar(shard))
    if file is None:
        return set()
    try:
        with file, tarfile.open(fileobj=file, mode="r:") as tar:
            names = [member.name for member in tar if member.name.endswith(job.suffix)]
    except (tarfile.TarError, ValueError) as error:
        raise UsageError(
            f"output {job.tar(shard)}: is no tar that can be read: {error}; remove it, or choose another -o"
        ) from None
    return {name.removesuffix(job.suffix) for name in names}


def pack(store: Store, job: Job, shard: int, ids: list[str]) -> None:
    """Puts the parts of a shard into its tar, with what is in there already, in the order of these ids; the parts go then.

    The bytes depend on the samples alone: no times, no owners.  Raises OutputError.
    """
    names = [name for id in ids for name in (f"{id}.json", f"{id}{job.suffix}")]
    old = store.open(job.tar(shard))
    with store.place(job.tar(shard)) as draft, tarfile.open(draft, "w", format=tarfile.PAX_FORMAT) as tar:
        before = tarfile.open(fileobj=old, mode="r:") if old else None  # noqa: SIM115  closed below
        known = {member.name: member for member in before} if before else {}
        for name in names:
            data = part(store, f"{job.folder(shard)}/{name}")
            if data is None and before and name in known:
                file = before.extractfile(known[name])
                data = file.read() if file else None
            if data is not None:
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        if before and old:
            before.close()
            old.close()
    store.remove(job.folder(shard))


def part(store: Store, name: str) -> bytes | None:
    file = store.open(name)
    if file is None:
        return None
    with file:
        return file.read()
