"""Opening checkpoint files: header first, lazily, and never believing what the file says about itself.

The format is read by the safetensors library; this file adds what it leaves to its callers (caps, dtypes, names) and says
what a file is that is none.  Nothing here imports torch.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from .errors import CheckpointError
from .shapes import Shapes

MAX_HEADER = 8 << 20  # bytes; SDXL's 2,500 tensors take a few hundred KB
MAX_TENSORS = 10_000  # SDXL has 2,500; a million empty ones would take 5 s and 0.9 GB to list
BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "U32": 4, "I32": 4, "U64": 8, "I64": 8, "C64": 8}  # of a number
BYTES |= {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}

# How other files begin, and what they are.
MAGIC = [
    (b"PK\x03\x04", "a zip archive, as torch writes .ckpt and .pt files", "minisd opens .safetensors only, so far"),
    (b"\x80", "a Python pickle (an old .ckpt or .pt file)", "minisd opens .safetensors only, so far"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with: git lfs pull"),
    (b"<", "an HTML or XML page, probably an error page saved in place of the file", "download the file again"),
    (b"GGUF", "a GGUF file", "minisd opens .safetensors only"),
    (b"\x89PNG", "a PNG picture", "minisd again takes pictures; -m takes checkpoints"),
    (b"{", "a JSON text", "give the .safetensors file itself"),
]


@dataclass(frozen=True)
class Entry:
    """A tensor as the header describes it."""

    dtype: str  # safetensors' name: F16, BF16, F32, …
    shape: tuple[int, ...]
    offset: int  # where its bytes begin in the file; little-endian, the last dimension contiguous

    @property
    def numel(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * BYTES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """An open file: what its header says.  tensors.py reads the tensors."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # bytes
    modified: int  # time of the last change when it was opened, in ns

    @property
    def shapes(self) -> Shapes:
        return Shapes({key: entry.shape for key, entry in self.entries.items()})

    def sha256(self) -> str | None:
        """The hash of the file; None if it is gone or no longer the one that was opened, which is no reason to lose a picture."""
        try:
            stat = self.path.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)
            return file_sha256(self.path) if same else None
        except OSError:
            return None


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the header of a .safetensors file.

    Raises CheckpointError if it is missing, empty, cut short, too large to be honest, or something else altogether.
    """
    path = Path(path)
    size, modified, offset = check_head(path)
    entries = {}
    try:
        with safetensors.safe_open(path, framework="np") as file:
            for key in file.offset_keys():  # the library has checked that they follow each other without a gap
                entries[key] = entry(path, key, file.get_slice(key), offset)
                offset += entries[key].nbytes
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(path, f"is not a whole .safetensors file: {error}", "copy or download it again") from error
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(path, f"has {len(entries):,} tensors; at most {MAX_TENSORS:,} were expected")
    return Checkpoint(path, dict(sorted(entries.items())), metadata, size, modified)


def check_head(path: Path) -> tuple[int, int, int]:
    """Size, time of change and end of header of a file that may be of the safetensors format; else CheckpointError says what
    it is."""
    try:
        if path.is_dir():
            raise CheckpointError(path, "is a folder, expected a .safetensors file", "name the file in it")
        with path.open("rb") as file:
            stat = os.fstat(file.fileno())
            size = stat.st_size
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist", "check the path") from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    if size == 0:
        raise CheckpointError(path, "is empty", "download it again")
    length = int.from_bytes(head[:8], "little")
    if size >= 10 and head[8:9] == b"{" and length <= size - 8:
        if length > MAX_HEADER:
            raise CheckpointError(path, f"has a header of {length:,} bytes; at most {MAX_HEADER:,} were expected")
        return size, stat.st_mtime_ns, 8 + length
    for magic, what, hint in MAGIC:
        if head.startswith(magic):
            raise CheckpointError(path, f"is {what}; expected a .safetensors file", hint)
    if size >= 10 and head[8:9] == b"{" and length <= MAX_HEADER:
        raise CheckpointError(path, f"ends at byte {size:,}, inside its header of {length:,} bytes", "download it again")
    if head.isascii():
        raise CheckpointError(path, "is a text; expected a .safetensors file", "-m takes the model file itself")
    raise CheckpointError(path, "is not a .safetensors file", "minisd opens single-file Stable Diffusion checkpoints")


def entry(path: Path, key: str, view: Any, offset: int) -> Entry:
    if any(ord(letter) < 32 for letter in key) or ".." in key or key.startswith("/"):
        raise CheckpointError(path, "is not an honest tensor name", key=ascii(key))
    if view.get_dtype() not in BYTES:
        raise CheckpointError(path, f"expected {', '.join(BYTES)}, found {view.get_dtype()}", key=key)
    return Entry(view.get_dtype(), tuple(view.get_shape()), offset)


FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}  # of struct; a bfloat16 is the upper half of a float32


def read_floats(checkpoint: Checkpoint, key: str, count: int | None = None) -> list[float]:
    """The numbers of a small tensor (2 to 10,000 of them, or exactly `count`), without torch.  Raises CheckpointError."""
    entry = checkpoint.entries[key]
    expected = f"{count}" if count else "2 to 10,000"
    if entry.dtype not in FORMATS or not (entry.numel == count if count else 2 <= entry.numel <= 10_000):
        found = f"{entry.numel:,} of {entry.dtype}"
        raise CheckpointError(checkpoint.path, f"expected {expected} floating-point numbers, found {found}", key=key)
    with checkpoint.path.open("rb") as file:
        file.seek(entry.offset)
        data = file.read(entry.nbytes)
    if len(data) != entry.nbytes:
        raise CheckpointError(checkpoint.path, "could not be read to its end", "copy or download it again", key)
    values = struct.unpack(f"<{entry.numel}{FORMATS[entry.dtype]}", data)
    if entry.dtype == "BF16":
        values = struct.unpack(f"<{entry.numel}f", b"".join(b"\0\0" + half.to_bytes(2, "little") for half in values))
    if not all(math.isfinite(value) for value in values):
        raise CheckpointError(checkpoint.path, "holds NaN or infinity", "the file is broken; get another copy", key)
    return list(values)


def file_sha256(path: Path) -> str:
    """The sha256 of a whole file; its first 10 digits are what A1111 and Civitai call the model hash (AutoV2).

    Remembered by path, size and time of change under $XDG_CACHE_HOME/minisd, because a large file takes seconds.
    """
    stat = path.stat()
    name = f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minisd" / "sha256.json"
    try:
        known = json.loads(cache.read_text())
    except (OSError, ValueError):
        known = {}
    if not isinstance(known, dict):
        known = {}
    if name not in known:
        with path.open("rb") as file:
            known[name] = hashlib.file_digest(file, "sha256").hexdigest()
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            draft = cache.with_suffix(f".{os.getpid()}")
            draft.write_text(json.dumps(known))
            draft.replace(cache)
        except OSError:
            pass  # a cache that cannot be written costs time, nothing else
    return str(known[name])
