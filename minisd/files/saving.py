"""Writing checkpoints: whole or not at all, piece by piece, so that a file of any size takes almost no memory.

The new file grows beside its target under another name, is read back, and takes the target's place in one step; until then what
stood there is untouched.  Metadata by ModelSpec 1.0.1 (Stability-AI/ModelSpec), with a hash over all tensor content.  While the
next piece is computed, one thread hashes the last and another brings what is written to the disk.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import math
import os
import struct
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError, UsageError
from ..system.atomic import check_place, check_room, counted, drafting, placed, replacing
from .checkpoint import Checkpoint, open_checkpoint
from .entry import PLAIN, Entry
from .recognition import recognise
from .tensors import STORED, one_thread, read_stored
from .writers import MARKERS

NAMES = {dtype: name for name, dtype in STORED.items()}
AHEAD = 16  # pieces that may wait for their hash
FLUSH = 32 << 20  # bytes that are brought to the disk together: when the last is written, little is left to wait for
NO_HASH = "0x" + "0" * 64
ARCHITECTURES = {  # ModelSpec's identifiers, by family and task
    ("sd1", "draw"): "stable-diffusion-v1",
    ("sd1", "inpaint"): "stable-diffusion-v1-inpainting",
    ("sd2", "draw"): "stable-diffusion-v2-512",
    ("sd2", "inpaint"): "stable-diffusion-v2-inpainting",
    ("sdxl", "draw"): "stable-diffusion-xl-v1-base",
    ("sdxl", "edit"): "stable-diffusion-xl-v1-edit",
    ("sdxl-refiner", "draw"): "stable-diffusion-xl-v1-refiner",
}


Planned = Mapping[str, tuple[str, tuple[int, ...]]]  # (dtype by safetensors' name, shape) by key
Progress = Callable[[int, int], None]


def save_model(model: nn.Module, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Path:
    """Writes a model that was loaded from a checkpoint, and perhaps changed since, with the file's metadata and markers.

    Raises NonFiniteError if it holds NaN or infinity by now, and OutputError.
    """
    for key, value in model.state_dict().items():
        if not value.isfinite().all():
            raise NonFiniteError(f"save: {key} holds NaN or infinity; what changed it?")
    tensors = dict(model.state_dict())
    tensors |= {key: read_stored(checkpoint, key) for key in MARKERS if key in checkpoint.entries}
    planned = {key: (NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    return write_checkpoint(path, planned, lambda key: [tensors[key].cpu()], described(checkpoint))


def described(checkpoint: Checkpoint) -> dict[str, str]:
    """The source's metadata, completed to what ModelSpec asks for; of a file that is no checkpoint only its own."""
    metadata = {"format": "pt"} | dict(checkpoint.metadata)
    try:
        found = recognise(checkpoint)
    except CheckpointError:
        return metadata
    architecture = ARCHITECTURES.get((found.family.name, found.task), found.family.name)
    if (found.family.name, found.training.prediction) == ("sd2", "v"):
        architecture = "stable-diffusion-v2-768-v"
    defaults = {
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": checkpoint.path.stem,
        "modelspec.resolution": "{}x{}".format(*found.size),
        "modelspec.prediction_type": found.training.prediction,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ours = {"modelspec.sai_model_spec": "1.0.1", "modelspec.date": now, "modelspec.hash_sha256": NO_HASH}
    return defaults | metadata | ours


def write_checkpoint(
    path: str | os.PathLike[str],
    planned: Planned,
    read: Callable[[str], Iterable[Tensor]],
    metadata: Mapping[str, str],
    progress: Progress | None = None,
    by_number: bool = False,
) -> Path:
    """Writes a .safetensors file; returns its path.

    read: gives the numbers of a tensor in their order, in pieces of any size.  progress: is told (bytes done, bytes in all).
    by_number: puts the next free number behind the name, so that nothing is replaced.
    Raises UsageError (the name), OutputError, and what `read` raises; the target is then what it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"output {path}: expected a name that ends in .safetensors")
    check_place(path)
    head = header(planned, metadata)
    total = sum(Entry(*facts, 0).nbytes for facts in planned.values())
    check_room(path, len(head) + total)
    with one_thread(), drafting(path) if by_number else replacing(path) as draft:
        with draft.open("wb") as file:
            file.write(head)
            pieces = (bytes_of(piece) for key in sorted(planned) for piece in checked(read(key), key, planned[key]))
            content = write_hashed(file, pieces, lambda done: progress(done, total) if progress else None)
            if NO_HASH.encode() in head:  # its place was kept free in the header
                file.seek(head.index(NO_HASH.encode()))
                file.write(f"0x{content}".encode())
        read_back(draft, planned)
        return placed(draft, counted(path)) if by_number else path


def checked(pieces: Iterable[Tensor], key: str, planned: tuple[str, tuple[int, ...]]) -> Iterator[Tensor]:
    """The pieces; an assertion if they are not what the header says."""
    dtype, shape = planned
    count = 0
    for piece in pieces:
        assert piece.element_size() == PLAIN[dtype], (key, piece.dtype, dtype)
        count += piece.numel()
        yield piece
    assert count == math.prod(shape), (key, count, shape)


def write_hashed(file: BinaryIO, pieces: Iterable[memoryview], tell: Callable[[int], None]) -> str:
    """Writes the pieces and returns the sha256 of them all.  A disk that fails in the background fails here."""
    content = hashlib.sha256()
    waiting: deque[Future[None]] = deque()
    flushed: Future[None] | None = None
    done = unflushed = 0
    with ThreadPoolExecutor(1) as hashing, ThreadPoolExecutor(1) as flushing:
        for piece in pieces:
            waiting.append(hashing.submit(content.update, piece))
            if len(waiting) > AHEAD:
                waiting.popleft().result()
            file.write(piece)
            done, unflushed = done + len(piece), unflushed + len(piece)
            if unflushed >= FLUSH and (flushed is None or flushed.done()):
                if flushed:
                    flushed.result()
                flushed, unflushed = flushing.submit(os.fsync, file.fileno()), 0
            tell(done)
    if flushed:
        flushed.result()
    return content.hexdigest()


def header(planned: Planned, metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, tensors in alphabetical order without gaps, filled up to a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in sorted(planned):
        dtype, shape = planned[key]
        size = Entry(dtype, shape, 0).nbytes
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(numbers: Tensor) -> memoryview:
    """As the file holds them: little-endian, the last dimension contiguous."""
    return memoryview(numbers.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_back(draft: Path, planned: Planned) -> None:
    written = {key: (entry.dtype, entry.shape) for key, entry in open_checkpoint(draft).entries.items()}
    if written != dict(planned):
        raise OSError("what was written is not what was read back")
