"""Opening checkpoint files: header first, lazily, and never believing what the file says about itself.

A .safetensors header is checked by the safetensors library; this file adds what it leaves to its callers (caps, dtypes,
names) and says what a file is that is none.  ckpt/ does the same for .ckpt.  From there on the two are one: a tensor is
a type, a shape and a place in the file, which tensors.py reads.  Nothing here imports torch.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

import safetensors

from ..errors import CheckpointError, shown, taken_apart
from ..models.shapes import Shapes
from ..system.cache import keep, recall
from ..system.regular import open_regular
from .ckpt.torch_file import read_torch_file
from .entry import MAX_TENSORS, Entry
from .writers import usual_names

MAX_NAME = 500  # characters of a tensor's name; the longest in SDXL has 92
JSON_TEXT = re.compile(r'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_HEADER = 8 << 20  # bytes; SDXL's 2,500 tensors take a few hundred KB

TORCH_SAVE = (b"PK\x03\x04", b"\x80")  # how a .ckpt begins: a zip archive or, before PyTorch 1.6, a pickle

# How other files begin, and what they are.
MAGIC = [
    (b"PK", "a zip archive, but not one of torch.save", "unpack it, and give the model in it"),
    (b"7z\xbc\xaf", "a 7z archive", "unpack it, and give the model in it"),
    (b"\x1f\x8b", "a gzip archive", "unpack it, and give the model in it"),
    (b"version https://git-lfs", "a Git LFS pointer, not the file itself", "fetch the file with: git lfs pull"),
    (b"<", "an HTML or XML page, probably an error page saved in place of the file", "download the file again"),
    (b"GGUF", "a GGUF file", "minisd opens .safetensors and .ckpt"),
    (b"\x89PNG", "a PNG picture", "minisd again takes pictures; -m takes checkpoints"),
    (b"{", "a JSON text", "give the .safetensors file itself"),
]


@dataclass(frozen=True)
class Checkpoint:
    """An open file: what its header says.  tensors.py reads the tensors."""

    path: Path
    entries: Mapping[str, Entry]
    metadata: Mapping[str, str]
    size: int  # bytes
    modified: int  # time of the last change when it was opened, in ns
    ema: bool = False  # whether the UNet's entries are those of its moving average, see `averaged` in model.py
    renamed: Mapping[str, str] = field(default_factory=dict)  # of those whose writer has other names: by the usual name its own
    prediction: str | None = None  # "epsilon" or "v", and whether zero terminal SNR: what the user says of its training, …
    zero_snr: bool | None = None  # … which counts more than what the file says

    @property
    def shapes(self) -> Shapes:
        return Shapes({key: entry.shape for key, entry in self.entries.items()})

    def sha256(self) -> str | None:
        """The hash of the file; None if it is gone or no longer the one that was opened, which is no reason to lose a picture."""
        try:
            return file_sha256(self.path) if self.is_still_there() else None
        except OSError:
            return None

    def is_still_there(self) -> bool:
        """Whether the file is the one that was opened."""
        try:
            stat = self.path.stat()
        except OSError:
            return False
        return (stat.st_size, stat.st_mtime_ns) == (self.size, self.modified)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Reads the header of a .safetensors file, or what stands for one in a .ckpt (by content, whatever the file's name).

    Raises CheckpointError if it is missing, empty, cut short, too large to be honest, or something else altogether.
    """
    path = Path(path)
    head, size, modified = first_bytes(path)
    length = int.from_bytes(head[:8], "little")
    with taken_apart(path):
        if size >= 10 and head[8:9] == b"{" and length <= size - 8:
            entries, metadata = read_safetensors(path, length)
        elif head.startswith(TORCH_SAVE):
            entries, metadata = read_torch_file(path)
        else:
            raise CheckpointError(path, *what_else(head, size, length))
        named = usual_names(entries)
    for key in {*entries, *named}:
        plain = key.isprintable() and not re.search(r"(^|[/\\])\.\.", key) and not key.startswith("/") and len(key) <= MAX_NAME
        if not plain or (not key.isascii() and strange_digits(key)):
            raise CheckpointError(path, "is not an honest tensor name", key=ascii(key[:MAX_NAME])[1:-1])
    renamed = {name: own for name, (own, _) in named.items() if name != own}
    return Checkpoint(path, {name: entry for name, (_, entry) in named.items()}, metadata, size, modified, renamed=renamed)


def strange_digits(key: str) -> bool:
    """Whether a name has digits that are none of 0 to 9 ("²"): they would be taken for the number of a layer."""
    return any(letter.isdigit() and not letter.isascii() for letter in key)


def first_bytes(path: Path) -> tuple[bytes, int, int]:
    """(the first 64 bytes, size, time of the last change) of a file; CheckpointError if there are none."""
    try:
        if path.is_dir():
            theirs = (path / "model_index.json").exists()
            hint = f"convert it first: minisd convert {path} -o NAME.safetensors" if theirs else "name the file in it"
            raise CheckpointError(path, "is a folder, expected a .safetensors or .ckpt file", hint)
        with open_regular(path) as file:
            stat = os.fstat(file.fileno())
            head = file.read(64)
    except FileNotFoundError:
        raise CheckpointError(path, "does not exist", "check the path") from None
    except OSError as error:
        if error.errno == errno.EINVAL:
            raise CheckpointError(
                path, f"{error.strerror}, expected a .safetensors or .ckpt file", "name the file itself"
            ) from None
        raise CheckpointError(path, f"cannot be opened: {error.strerror}") from error
    except ValueError as error:  # a name with a NUL in it
        raise CheckpointError(path, f"cannot be opened: {error}", "check the path") from error
    if not head:
        raise CheckpointError(path, "is empty", "download it again")
    return head, stat.st_size, stat.st_mtime_ns


def what_else(head: bytes, size: int, length: int) -> tuple[str, str]:
    """What a file is that is no checkpoint, and what to do; length is its header's, if it begins with one."""
    for magic, what, hint in MAGIC:
        if head.startswith(magic):
            return f"is {what}; expected a .safetensors or .ckpt file", hint
    if size >= 10 and head[8:9] == b"{" and length <= MAX_HEADER:
        return f"ends at byte {size:,}, inside its header of {length:,} bytes", "download it again"
    if head.isascii():
        return "is a text; expected a .safetensors or .ckpt file", "-m takes the model file itself"
    return "is not a .safetensors or .ckpt file", "minisd opens single-file Stable Diffusion checkpoints"


def read_safetensors(path: Path, length: int) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors and the metadata of a .safetensors file whose header has `length` bytes."""
    if length > MAX_HEADER:
        raise CheckpointError(path, f"has a header of {length:,} bytes; at most {MAX_HEADER:,} were expected")
    try:
        header = parsed(path, length)
        # The library checks the header against the file.  It reads it: a file that shrinks while it is mapped ends the process.
        with safetensors.safe_open(path, framework="np", backend="pread") as file:
            metadata = dict(file.metadata() or {})
    except (safetensors.SafetensorError, OSError, ValueError, RecursionError) as error:
        why = shown(str(error), 200)
        raise CheckpointError(path, f"is not a whole .safetensors file: {why}", "copy or download it again") from error
    header.pop("__metadata__", None)
    return {key: entry_of(path, key, facts, 8 + length) for key, facts in sorted(header.items())}, metadata


def parsed(path: Path, length: int) -> dict[str, Any]:
    """The JSON of a header, once it is known that it lists no more tensors than are expected: listing a million takes seconds."""
    with path.open("rb") as file:
        text = file.read(8 + length)[8:].decode()
    most = 2 * MAX_TENSORS + 2  # brackets: two a tensor
    if text.count("[") > most or text.count("{") > most:
        structure = JSON_TEXT.sub("", text)  # metadata, which is text, may hold any number of them
        if structure.count("[") > most or structure.count("{") > most:
            raise CheckpointError(path, f"has more than {MAX_TENSORS:,} tensors, which is the most that was expected")
    header: dict[str, Any] = json.loads(text, object_pairs_hook=once_each)
    if len(header) - ("__metadata__" in header) > MAX_TENSORS:
        raise CheckpointError(path, f"has more than {MAX_TENSORS:,} tensors, which is the most that was expected")
    return header


def once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name occurs twice in its header")
    return found


def entry_of(path: Path, key: str, facts: Any, start: int) -> Entry:
    """A tensor of a header whose numbers the library has checked; it also takes spellings of the rest that nobody writes."""
    if type(facts) is dict and type(facts["dtype"]) is str:
        return Entry(facts["dtype"], tuple(facts["shape"]), start + facts["data_offsets"][0])
    expected = 'expected {"dtype": …, "shape": […], "data_offsets": […]}'
    raise CheckpointError(path, f"{expected}, found {shown(json.dumps(facts), 100)}", "save it again", key[:MAX_NAME])


FORMATS = {"F64": "d", "F32": "f", "F16": "e", "BF16": "H"}  # of struct; a bfloat16 is the upper half of a float32


def read_floats(checkpoint: Checkpoint, key: str, count: int | None = None) -> list[float]:
    """The numbers of a small tensor (2 to 10,000 of them, or exactly `count`), without torch.  Raises CheckpointError."""
    entry = checkpoint.entries[key]
    expected = f"{count}" if count else "2 to 10,000"
    if entry.dtype not in FORMATS or not (entry.numel == count if count else 2 <= entry.numel <= 10_000):
        found = f"{entry.numel:,} of {entry.dtype}"
        raise CheckpointError(checkpoint.path, f"expected {expected} floating-point numbers, found {found}", key=key)
    with taken_apart(checkpoint.path), checkpoint.path.open("rb") as file:
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


def file_sha256(path: Path, stopped: Callable[[], bool] = bool) -> str:
    """The sha256 of a whole file; its first 10 digits are what A1111 and Civitai call the model hash (AutoV2).

    Remembered by path, size and time of change, because a large file takes seconds.  stopped: whether nobody wants to know any
    more, which ends it with an InterruptedError.
    """
    ahead = AHEAD.get(state_of(path))
    if ahead is None:
        return known_sha256(path) or hashed(path, stopped)
    while not wait([ahead], 0.2).done:
        if stopped():
            raise InterruptedError
    return ahead.result()


def hashed(path: Path, stopped: Callable[[], bool] = bool) -> str:
    """The sha256 of a file that nobody has found out before, kept for the next unless another takes its place meanwhile."""
    found, name = hashlib.sha256(), state_of(path)
    with open_regular(path) as file:
        while piece := file.read(1 << 22):
            if stopped():
                raise InterruptedError
            found.update(piece)
    if state_of(path) == name:
        keep("sha256", known_hashes() | {name: found.hexdigest()})
    return found.hexdigest()


AHEAD: dict[str, Future[str]] = {}  # hashes that a thread of this process finds out, or has found out, by state


def hashed_ahead(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint itself, whose hash a thread begins to find out: the recipe of a picture is what waits for it.

    A file of 2 GB takes a second, for which the first picture would wait; hashlib lets go of the interpreter meanwhile.
    """

    def run() -> None:
        try:
            found.set_result(known_sha256(checkpoint.path) or hashed(checkpoint.path))
        except Exception as error:  # told to whoever waits; who asks later tries again
            AHEAD.pop(state, None)
            found.set_exception(error)

    found = Future[str]()
    with suppress(OSError):  # the file is gone: then nobody is told its hash
        state = state_of(checkpoint.path)
        if AHEAD.setdefault(state, found) is found:
            thread = Thread(target=run, name="hashes a checkpoint", daemon=True)  # for which the end of the process does not wait
            try:
                thread.start()
            except RuntimeError:  # no memory for one more
                run()
    return checkpoint


def known_sha256(path: Path) -> str | None:
    """The same if it has been found out before."""
    return known_hashes().get(state_of(path))


def known_hashes() -> dict[str, str]:
    """The hashes that are remembered, by state; without what is no hash, because anybody may have written there."""
    here = {state: each.result() for state, each in [*AHEAD.items()] if each.done() and not each.exception()}
    found = recall("sha256") | here
    return {name: value for name, value in found.items() if isinstance(value, str) and SHA256.fullmatch(value)}


def data_sha256(path: Path) -> str | None:
    """The sha256 of what follows the header of a .safetensors file (AutoV3, ModelSpec's hash); None for other files."""
    with path.open("rb") as file:
        head = file.read(9)
        if head[8:] != b"{":
            return None
        file.seek(8 + int.from_bytes(head[:8], "little"))
        return hashlib.file_digest(file, "sha256").hexdigest()


def legacy_hash(path: Path) -> str:
    """A1111's first model hash, which old pictures carry: of 64 KiB, 1 MiB into the file (modules/hashes.py); smaller files all
    have that of nothing."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def state_of(path: Path) -> str:
    """Tells a file and what is in it from all others, without reading it.  Raises OSError."""
    stat = path.stat()
    return f"{path.resolve()}|{stat.st_size}|{stat.st_mtime_ns}"
