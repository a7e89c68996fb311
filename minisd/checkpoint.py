"""Opening checkpoint files: header first, lazily, and never believing what the file says about itself.

The format is read by the safetensors library; this file adds what it leaves to its callers (caps, dtypes, names) and says
what a file is that is none.  Nothing here imports torch before a tensor is asked for.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors

from .errors import CheckpointError
from .shapes import Shapes

if TYPE_CHECKING:
    import torch

MAX_HEADER = 8 << 20  # bytes; SDXL's 2,500 tensors take a few hundred KB
MAX_TENSORS = 10_000  # SDXL has 2,500; a million empty ones would take 5 s and 0.9 GB to list
FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
PLAIN = FLOATS | {"I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1}

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

    @property
    def numel(self) -> int:
        n = 1
        for length in self.shape:
            n *= length
        return n

    @property
    def nbytes(self) -> int:
        return self.numel * PLAIN.get(self.dtype, 0)


@dataclass(frozen=True)
class Checkpoint:
    """An open file: what its header says.  No tensor is read before `tensors` is called."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # bytes
    modified: int  # time of the last change when it was opened, in ns

    @property
    def shapes(self) -> Shapes:
        return Shapes({key: entry.shape for key, entry in self.entries.items()})

    @contextmanager
    def tensors(self) -> Iterator[Any]:
        """Gives `get_tensor(key)`, which reads one tensor from the disk.

        Reads instead of mapping the file: a file that shrinks while it is read is an error, not a dead process, and the
        pages of a file that is converted on the way do not count as this process's memory.
        """
        try:
            with safetensors.safe_open(self.path, framework="pt", backend="pread") as file:
                yield file
        except (safetensors.SafetensorError, OSError) as error:
            raise CheckpointError(self.path, f"could not be read to its end: {error}", "copy or download it again") from error

    def sha256(self) -> str | None:
        """The hash of the file; None if it is gone or no longer the one that was opened, which is no reason to lose a picture."""
        try:
            stat = self.path.stat()
            same = (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)
            return file_sha256(self.path) if same else None
        except OSError:
            return None

    def require_floats(self, keys: Mapping[str, object]) -> None:
        """Raises CheckpointError for a weight that is not stored as a floating-point number minisd knows."""
        for key in keys:
            if self.entries[key].dtype not in FLOATS:
                raise CheckpointError(self.path, f"expected {', '.join(FLOATS)}, found {self.entries[key].dtype}", key=key)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the header of a .safetensors file.

    Raises CheckpointError if it is missing, empty, cut short, too large to be honest, or something else altogether.
    """
    path = Path(path)
    size, modified = check_head(path)
    try:
        with safetensors.safe_open(path, framework="np") as file:
            entries = {key: entry(path, key, file.get_slice(key)) for key in sorted(file.keys())}
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError) as error:
        raise CheckpointError(path, f"is not a whole .safetensors file: {error}", "copy or download it again") from error
    if len(entries) > MAX_TENSORS:
        raise CheckpointError(path, f"has {len(entries):,} tensors; at most {MAX_TENSORS:,} were expected")
    return Checkpoint(path, entries, metadata, size, modified)


def check_head(path: Path) -> tuple[int, int]:
    """Size and time of change of a file whose first bytes may be a safetensors header; else CheckpointError says what it is."""
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
        return size, stat.st_mtime_ns
    for magic, what, hint in MAGIC:
        if head.startswith(magic):
            raise CheckpointError(path, f"is {what}; expected a .safetensors file", hint)
    if size >= 10 and head[8:9] == b"{" and length <= MAX_HEADER:
        raise CheckpointError(path, f"ends at byte {size:,}, inside its header of {length:,} bytes", "download it again")
    if head.isascii():
        raise CheckpointError(path, "is a text; expected a .safetensors file", "-m takes the model file itself")
    raise CheckpointError(path, "is not a .safetensors file", "minisd opens single-file Stable Diffusion checkpoints")


def entry(path: Path, key: str, view: Any) -> Entry:
    if any(ord(letter) < 32 for letter in key) or ".." in key or key.startswith("/"):
        raise CheckpointError(path, "is not an honest tensor name", key=ascii(key))
    return Entry(view.get_dtype(), tuple(view.get_shape()))


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


def load_tensors(checkpoint: Checkpoint, keys: Mapping[str, object], dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The named tensors in `dtype`, one at a time, so that no more than one is in memory twice."""
    with checkpoint.tensors() as file:
        return {key: cast(file.get_tensor(key), dtype) for key in keys}


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """tensor.to(dtype).  From float16 to bfloat16 it goes through float32 in pieces that stay in the cache, with the same
    result: torch's own conversion is a scalar loop, 9 times slower."""
    import torch

    if (tensor.dtype, dtype) != (torch.float16, torch.bfloat16):
        return tensor.to(dtype)
    result = torch.empty_like(tensor, dtype=dtype)
    for source, target in zip(tensor.view(-1).split(1 << 20), result.view(-1).split(1 << 20), strict=True):
        target.copy_(source.float())
    return result
