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
import secrets
import struct
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor, nn

from ..errors import CheckpointError, NonFiniteError, OutputError, UsageError
from ..models.family import VAE, Recognition, Training
from ..models.shapes import below
from ..system.atomic import check_place, check_room, counted, drafting, placed, replacing
from .checkpoint import Checkpoint, open_checkpoint
from .entry import PLAIN, Entry
from .model import build
from .recognition import recognise
from .tensors import STORED, one_thread, read_stored
from .training import STATED, markers, metadata_of
from .training import title_of as training_title
from .writers_table import MARKERS

NAMES = {dtype: name for name, dtype in STORED.items()}
AHEAD = 16  # pieces that may wait for their hash
FLUSH = 32 << 20  # bytes that are brought to the disk together: when the last is written, little is left to wait for
HASH = "modelspec.hash_sha256"  # the hash over all tensors is written there, when it is known, whatever stood there
HASHES = {HASH: "0x", "sshs_model_hash": ""}  # and, of a LoRA, there (kohya-ss/sd-scripts train_util.py); what stands before it
ARCHITECTURES = {  # ModelSpec's identifiers, by family and task
    ("sd1", "draw"): "stable-diffusion-v1",
    ("sd1", "inpaint"): "stable-diffusion-v1-inpainting",
    ("sd2", "draw"): "stable-diffusion-v2-512",
    ("sd2", "inpaint"): "stable-diffusion-v2-inpainting",
    ("sdxl", "draw"): "stable-diffusion-xl-v1-base",
    ("sdxl", "edit"): "stable-diffusion-xl-v1-edit",
    ("sdxl-refiner", "draw"): "stable-diffusion-xl-v1-refiner",
}


Facts = tuple[str, tuple[int, ...]]  # of a tensor: dtype by safetensors' name, shape
Planned = Mapping[str, Facts]
Read = Callable[[str], Iterable[Tensor]]  # gives the numbers of a tensor in their order, in pieces of any size
Progress = Callable[[int, int], None]
NOTHING: Mapping[str, Future[str]] = {}


def save_model(model: nn.Module, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Path:
    """Writes a model that was loaded from a checkpoint, and perhaps changed since, with the file's metadata and markers.

    Raises NonFiniteError if it holds NaN or infinity by now, UsageError if it was rounded to float8 (--fp8), and OutputError.
    """
    if any(hasattr(module, "weight_scale") for module in model.modules()):
        raise UsageError("save: expected weights as the file has them, found float8 with scales; load it without fp8")
    tensors = model.state_dict()
    for key, value in tensors.items():
        if not value.isfinite().all():
            raise NonFiniteError(f"save: {key} holds NaN or infinity; what changed it?")
    found = recognise(checkpoint, vae_given=True)
    planned = {key: (NAMES[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    planned, read = with_markers(planned, lambda key: [tensors[key].cpu()], found.training, checkpoint)
    return write_checkpoint(path, planned, read, described(checkpoint, found), found)


def with_markers(planned: Planned, read: Read, training: Training, source: Checkpoint | None) -> tuple[dict[str, Facts], Read]:
    """The same with the markers of this training, as `source` has them or new, and with no others."""
    wanted = markers(training)
    known = {key: source.entries[key] for key in wanted if key in source.entries} if source else {}
    facts = {key: (known[key].dtype, known[key].shape) if key in known else ("F32", (len(wanted[key]),)) for key in wanted}

    def read_marker(key: str) -> Iterable[Tensor]:
        return [read_stored(source, key) if source and key in known else torch.tensor(wanted[key])]

    kept = {key: each for key, each in planned.items() if key not in MARKERS}
    return kept | facts, lambda key: read_marker(key) if key in wanted else read(key)


def described(checkpoint: Checkpoint, found: Recognition | None) -> dict[str, str]:
    """The source's metadata, completed to what ModelSpec asks for; of a file that is no checkpoint only its own."""
    metadata = {"format": "pt"} | dict(checkpoint.metadata)
    if found is None:
        return metadata
    architecture = ARCHITECTURES.get((found.family.name, found.task), found.family.name)
    if (found.family.name, found.training.prediction) == ("sd2", "v"):
        architecture = "stable-diffusion-v2-768-v"
    defaults = {
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": checkpoint.path.stem,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ours = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.date": now,
        HASH: "",
        "modelspec.resolution": "{}x{}".format(*found.size),
    }
    ours |= metadata_of(found.training)
    return defaults | {key: value for key, value in metadata.items() if key not in STATED} | ours


def write_checkpoint(
    path: str | os.PathLike[str],
    planned: Planned,
    read: Read,
    metadata: Mapping[str, str],
    meant: Recognition | None = None,
    progress: Progress | None = None,
    by_number: bool = False,
    later: Mapping[str, Future[str]] = NOTHING,
) -> Path:
    """Writes a .safetensors file; returns its path.

    metadata: the fields of HASHES get the hash of the content.  meant: what the result is, where it is a checkpoint.
    progress: is told (bytes done, bytes in all).  by_number: puts the next free number behind the name: nothing is replaced.
    later: what takes the place of these texts in the metadata once it is known: 64 hexadecimal digits each.
    Raises UsageError (the name), OutputError, and what `read` raises; the target is then what it was.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise UsageError(f"output {path}: expected a name that ends in .safetensors")
    check_place(path)
    unknown = secrets.token_hex(32)  # stands where the hash will be; no stranger's metadata can hold it
    head = header(planned, {key: f"{HASHES[key]}{unknown}" if key in HASHES else value for key, value in metadata.items()})
    total = sum(Entry(*facts, 0).nbytes for facts in planned.values())
    check_room(path, len(head) + total)
    with one_thread(), drafting(path) if by_number else replacing(path) as draft:
        with draft.open("wb") as file:
            file.write(head)
            pieces = (bytes_of(piece) for key in sorted(planned) for piece in checked(read(key), key, planned[key]))
            content = write_hashed(file, pieces, lambda done: progress(done, total) if progress else None)
            for text, digits in {unknown: content, **{text: each.result() for text, each in later.items()}}.items():
                head = head.replace(text.encode(), digits.encode())
            file.seek(0)
            file.write(head)
        read_back(draft, planned, meant)
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


def read_back(draft: Path, planned: Planned, meant: Recognition | None) -> None:
    """What was written is read as anybody will read it: its header and, where it is to be a checkpoint, the model.

    Raises OutputError if it is not what was meant.
    """
    written = open_checkpoint(draft)
    names = {written.renamed.get(key, key): (entry.dtype, entry.numel) for key, entry in written.entries.items()}
    if names != {key: (dtype, math.prod(shape)) for key, (dtype, shape) in planned.items()}:
        raise OSError("what was written is not what was read back")
    if meant is None:
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is odd about the source was told when it was opened
            found = recognise(written, vae_given=not below(written.shapes, VAE))
            build(written, found.family)
    except CheckpointError as error:
        why = f"{error.key}: {error.reason}" if error.key else error.reason
        raise OutputError(f"the result would be no checkpoint that minisd opens, and was not kept: {why}") from error
    expected, came = (title_of(each) for each in (meant, found))
    if expected != came:
        raise OutputError(f"the result would be taken for something else, and was not kept: expected {expected}, found {came}")


def title_of(what: Recognition) -> str:
    return f"{what.family.title}, task {what.task}, {training_title(what.training)}, {'x'.join(map(str, what.size))}"
