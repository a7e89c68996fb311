"""What all rows of a run have in common.  What decides over the bytes is kept in OUT/job.json, and holds for whoever goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import OutputError, UsageError, shown
from .store import Folder, Store

FORMATS = {"png": ".png", "jpeg": ".jpg", "webp": ".webp", "latents": ".safetensors", "wds": ".png"}
KEPT = "job.json"
SHARD_ROWS = 256
PARTS = ".parts"  # with wds: the folder of what is not in a tar yet


@dataclass(frozen=True)
class Job:
    """out: a folder or a URL.  seed: of the job, from which rows without one have theirs.  defaults: of a request, where a row
    says nothing.  loading: options of `pipeline.load`.  threads: of a worker on a CPU: another number may give other last digits.
    shard_rows: lines of the manifest that make a shard, which is a folder or a tar, and what is given to machines as a whole.
    together: pictures of a call on a GPU; 0 until it is measured.
    """

    out: str
    seed: int = 0
    format: str = "png"
    model: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    loading: Mapping[str, Any] = field(default_factory=dict)
    threads: int = 1
    shard_rows: int = SHARD_ROWS
    together: int = 0

    @property
    def suffix(self) -> str:
        """Of pictures."""
        return FORMATS[self.format]

    def folder(self, shard: int) -> str:
        """Where the pictures of a shard are written to, first of all."""
        return f"{PARTS}/{shard:05}" if self.format == "wds" else f"{shard:05}"

    def tar(self, shard: int) -> str:
        return f"{shard:05}.tar"

    def decides(self) -> dict[str, Any]:
        """What another value of would give other bytes, or other places."""
        loading = {name: value for name, value in self.loading.items() if name not in ("device", "offload", "strict")}
        said = {name: getattr(self, name) for name in ("seed", "format", "model", "threads", "shard_rows", "together")}
        return json.loads(json.dumps(said | {"defaults": dict(self.defaults), "loading": loading}))  # type: ignore[no-any-return]


def begun(job: Job, store: Store) -> Job:
    """The job as it was begun here, or as it is begun now.  Raises UsageError where it was begun as another, OutputError."""
    with_places = job.decides()
    if (file := store.open(KEPT)) is None:
        store.write(KEPT, (json.dumps(with_places, indent=1) + "\n").encode())
        return job
    with file:
        try:
            known = json.load(file)
            before = {name: known[name] for name in with_places}
        except (ValueError, KeyError, TypeError):
            what = shown(f"{job.out}/{KEPT}", 500)
            raise UsageError(f"output {what}: expected what minisd batch has written there, found something else") from None
    together = before["together"] if job.together == 0 else job.together
    for name, value in (with_places | {"together": together}).items():
        if before[name] != value:
            was, now = (shown(json.dumps(each), 200) for each in (before[name], value))
            flag = name.replace("_", "-")
            raise UsageError(
                f"{flag}: the pictures in {shown(job.out, 300)} were begun with {was}, found {now}; choose another -o"
            )
    return replace(job, together=together)


def measured(job: Job, store: Store, together: int) -> Job:
    """The job with a measured number of pictures a call, or that which somebody else has kept meanwhile."""
    found = begun(job, store)
    if found.together == 0:
        found = replace(found, together=together)
        store.write(KEPT, (json.dumps(found.decides(), indent=1) + "\n").encode())
    return found


def check_out(out: str) -> Store:
    """The store of an output, once it is found that it can be written to.  Raises UsageError, OutputError."""
    from .store import store_of

    if "\0" in out or not out:
        raise UsageError("output: expected a folder or a URL, found none")
    store = store_of(out)
    if isinstance(store, Folder):
        path = Path(out)
        name = shown(out, 500)
        try:
            if path.exists() and not path.is_dir():
                raise OutputError(f"output {name}: is no folder; choose another name")
            if path.resolve() == path.resolve().parent:
                raise OutputError(f"output {name}: is the root of all folders; choose one of them")
            there = next(each for each in (path, *path.absolute().parents) if each.exists())
        except OutputError:
            raise
        except (OSError, RuntimeError, StopIteration) as error:
            raise OutputError(f"output {name}: leads nowhere: {error}; choose another name") from error
        if not os.access(there, os.W_OK | os.X_OK) or not there.is_dir():
            raise OutputError(f"output {name}: cannot be written; choose another place")
        if os.path.lexists(path) and not path.exists():
            raise OutputError(f"output {name}: is a link that leads nowhere; choose another name")
        store.sweep()
    return store
