"""The models that a mixture is made of: how the result was trained, by them, and their hashes, found out while they are read."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, UsageError
from ..files.checkpoint import Checkpoint, file_sha256, known_sha256, legacy_hash
from ..files.recognition import native_size, recognise
from ..files.training import overridden, said, title_of
from ..models.family import Recognition, Training

Shares = Sequence[float]  # of each model, and of the base as the last, in a weighted sum


def mixed(
    models: Sequence[Checkpoint], shares: Sequence[Shares], prediction: str | None, zero_snr: bool | None
) -> tuple[Recognition, Checkpoint]:
    """What the mixture is, and the model whose training it has.

    shares: of the UNet's tensors, as many as there are different ones.  The result was trained as the models that are left in the
    sum: A + 1 (B - A) is B's, and A + r (B - C) is A's, where B and C were trained alike.
    prediction, zero_snr: what the user says of it.  Raises UsageError where models that were trained differently are left.
    """
    said(models[0], prediction, zero_snr)  # raises
    found = [recognise(model) for model in models]
    left = [i for i, one in enumerate(found) if any(abs(total(one.training, found, each)) > 1e-6 for each in shares)]
    trainings = list(dict.fromkeys(found[i].training for i in left or [0]))
    fitting = [each for each in trainings if prediction in (None, each.prediction) and zero_snr in (None, each.zero_terminal)]
    if len(fitting) > 1 or (len(trainings) > 1 and prediction is None):
        names = ", ".join(f"{models[i].path} {title_of(found[i].training)}" for i in left)
        hint = "merge models that were trained alike, or say how the result was: prediction (and zero_snr)"
        raise UsageError(f"merge: {names}: what lies between them draws noise; {hint}")
    training, _ = overridden((fitting or trainings)[0], "", prediction, zero_snr)
    like = next((i for i in left if found[i].training == training), 0)
    alike = found[like].training == training
    size = found[like].size if alike else native_size(found[0].family, training, {}, models[0].path)
    return replace(found[0], training=training, size=size), models[like]


def total(training: Training, found: Sequence[Recognition], shares: Shares) -> float:
    """How much of a sum is of models that were trained so."""
    return sum(share for one, share in zip(found, shares, strict=True) if one.training == training)


@dataclass
class Hashes:
    """The sha256 of files: known, or a text that stands for it until it is."""

    texts: dict[Path, str] = field(default_factory=dict)
    later: dict[str, Future[str]] = field(default_factory=dict)


@contextlib.contextmanager
def hashing(paths: Sequence[Path]) -> Iterator[Hashes]:
    """Finds out in the background, while the same files are read for something else, what nobody has found out before."""
    hashes, stop = Hashes(), threading.Event()
    with ThreadPoolExecutor(1) as thread:
        try:
            for path in dict.fromkeys(paths):
                known = known_sha256(path)
                hashes.texts[path] = known or secrets.token_hex(32)
                if known is None:
                    hashes.later[hashes.texts[path]] = thread.submit(hashed, path, stop)
            yield hashes
        finally:
            stop.set()  # nobody waits for it any more
            thread.shutdown(cancel_futures=True)


def hashed(path: Path, stop: threading.Event) -> str:
    try:
        return file_sha256(path, stop.is_set)
    except OSError as error:
        raise CheckpointError(path, f"could not be read to its end: {error.strerror or error}") from error


def identity(model: Checkpoint, sha256: str | None = None) -> dict[str, Any]:
    """What tells a source from others."""
    return {"name": model.path.name, "bytes": model.size, "legacy_hash": legacy_hash(model.path), "sha256": sha256}
