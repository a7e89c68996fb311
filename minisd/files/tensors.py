"""Reading the tensors of an open checkpoint: from the file, piece by piece, into the memory that the model will use.

A tensor is bytes at a place that the header told.  They are read, not mapped: a file that shrinks while it is read is an
error, not a dead process.  What must change its dtype passes through a buffer that stays in the processor's cache, so the only
new memory is the result; touching that takes most of the time that loading takes, and is shared between a few threads.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor

from ..errors import CheckpointError
from .checkpoint import Checkpoint
from .entry import Entry

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TORCH |= {"F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
STORED = TORCH | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8}
STORED |= {"BOOL": torch.bool}
NUMBERS = 256 << 10  # of a piece that is computed with, so that it and its results stay in the processor's cache
READERS = min(4, os.cpu_count() or 1)  # threads: the new memory takes the processor's time; two took 0.6 of one's
PIECE = 2 << 20  # bytes; 0.5, 1 and 2 MiB measured the same, 4 MiB up to 1.4 times slower


def load_tensors(checkpoint: Checkpoint, keys: Iterable[str], dtype: torch.dtype) -> dict[str, Tensor]:
    """The named tensors in `dtype`, on the CPU, a convolution's weight with its channels last in memory.

    Raises CheckpointError if one is not stored in one of `TORCH`, or if the file changed since it was opened, or ends too early.
    """
    entries = {key: checkpoint.entries[key] for key in keys}
    check_floats(checkpoint, entries)
    with opened_again(checkpoint) as file, one_thread(), ThreadPoolExecutor(READERS) as pool:
        found: dict[str, Tensor] = {}
        for share in pool.map(partial(read_share, file, dtype), shares(entries, READERS)):
            found |= share
    return {key: found[key] for key in entries}


def shares(entries: Mapping[str, Entry], count: int) -> list[dict[str, Entry]]:
    """The tensors in `count` parts of about as many bytes, each one after the other in the file."""
    parts: list[dict[str, Entry]] = [{} for _ in range(count)]
    total, before = sum(entry.nbytes for entry in entries.values()), 0
    for key, entry in sorted(entries.items(), key=lambda item: item[1].offset):
        parts[min(before * count // max(total, 1), count - 1)][key] = entry
        before += entry.nbytes
    return parts


def read_share(file: int, dtype: torch.dtype, entries: Mapping[str, Entry]) -> dict[str, Tensor]:
    read = Reader(file, dtype)
    return {key: read(entry) for key, entry in entries.items()}


@contextmanager
def one_thread() -> Iterator[None]:
    """Has torch use one thread a call, where threads of our own do the work: its own wait for each other busily."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # also of threads that begin from now on
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_floats(checkpoint: Checkpoint, entries: Mapping[str, Entry]) -> None:
    for key, entry in entries.items():
        if entry.dtype not in TORCH:
            raise CheckpointError(checkpoint.path, f"expected {', '.join(TORCH)}, found {entry.dtype}", key=key)


@contextmanager
def opened_again(checkpoint: Checkpoint) -> Iterator[int]:
    """A file descriptor of the very file whose header was read."""
    try:
        with checkpoint.path.open("rb", buffering=0) as file:
            stat = os.fstat(file.fileno())
            if (stat.st_size, stat.st_mtime_ns) != (checkpoint.size, checkpoint.modified):
                raise CheckpointError(checkpoint.path, "changed while it was being opened", "open it again")
            yield file.fileno()
    except OSError as error:
        why = error.strerror or str(error)
        raise CheckpointError(checkpoint.path, f"could not be read to its end: {why}", "copy or download it again") from error


class Reader:
    """Reads tensors of an open file in `dtype`.  Its buffers are made once: new memory for every piece took a fifth more time
    and left holes in the heap, a fifth of the file in all."""

    def __init__(self, file: int, dtype: torch.dtype) -> None:
        self.file, self.dtype = file, dtype
        self.stored = torch.empty(PIECE, dtype=torch.uint8)
        self.wide = torch.empty(PIECE // 2, dtype=torch.float32)
        self.converted = torch.empty(NUMBERS, dtype=dtype)

    def __call__(self, entry: Entry) -> Tensor:
        if len(entry.shape) != 4:
            return self.in_order(entry)
        if entry.in_one_piece and 0 < entry.numel <= NUMBERS * entry.shape[0]:
            return self.channels_last(entry)
        return self.in_order(entry).contiguous(memory_format=torch.channels_last)

    def in_order(self, entry: Entry) -> Tensor:
        numbers = torch.empty(entry.numel, dtype=self.dtype)
        for part, offset in parts(numbers, entry):
            self.read(part, entry.dtype, offset)
        return shaped(numbers, entry)

    def channels_last(self, entry: Entry) -> Tensor:
        """A convolution's weight (C', C, h, w), some outputs at a time: a pass of its own would take half as long as reading."""
        weight = torch.empty(entry.shape, dtype=self.dtype, memory_format=torch.channels_last)
        offset = entry.offset
        for some in weight.split(NUMBERS // (entry.numel // len(weight))):
            numbers = self.converted[: some.numel()]
            self.read(numbers, entry.dtype, offset)
            some.copy_(numbers.view(some.shape))
            offset += some.numel() * TORCH[entry.dtype].itemsize
        return weight

    def read(self, numbers: Tensor, stored: str, offset: int) -> None:
        """Fills (N,) with what is stored in safetensors' dtype of that name from `offset` on."""
        if TORCH[stored] == self.dtype:
            read_exactly(self.file, numbers, offset)
        else:
            self.read_converted(numbers, TORCH[stored], offset)

    def read_converted(self, numbers: Tensor, dtype: torch.dtype, offset: int) -> None:
        """Fills (N,) with what is stored in `dtype` from `offset` on."""
        for piece in numbers.split(PIECE // dtype.itemsize):
            stored = self.stored[: piece.numel() * dtype.itemsize]
            read_exactly(self.file, stored, offset)
            convert(stored.view(dtype), piece, self.wide)
            offset += stored.numel()


def read_stored(checkpoint: Checkpoint, key: str) -> Tensor:
    """One tensor as the file holds it, of any kind of number.  Raises CheckpointError as `load_tensors`."""
    entry = checkpoint.entries[key]
    if entry.dtype not in STORED:
        raise CheckpointError(checkpoint.path, f"expected {', '.join(STORED)}, found {entry.dtype}", key=key)
    numbers = torch.empty(entry.numel, dtype=STORED[entry.dtype])
    with opened_again(checkpoint) as file:
        for part, offset in parts(numbers, entry):
            read_exactly(file, part, offset)
    return shaped(numbers, entry)


def stored_pieces(checkpoint: Checkpoint, key: str) -> Iterator[Tensor]:
    """The numbers of a tensor as the file holds them, in pieces of NUMBERS, (N,) each; of one that does not lie in one
    piece all at once."""
    entry = checkpoint.entries[key]
    if not entry.in_one_piece or entry.dtype not in STORED:
        yield read_stored(checkpoint, key).flatten()
        return
    dtype = STORED[entry.dtype]
    with opened_again(checkpoint) as file:
        for first in range(0, entry.numel, NUMBERS):
            piece = torch.empty(min(NUMBERS, entry.numel - first), dtype=dtype)
            read_exactly(file, piece, entry.offset + first * dtype.itemsize)
            yield piece


def broken(checkpoint: Checkpoint) -> list[str]:
    """The floating-point tensors that hold NaN or infinity.  Reads the whole file; raises CheckpointError as `load_tensors`."""
    found = []
    with opened_again(checkpoint) as file:
        buffer = torch.empty(PIECE, dtype=torch.uint8)
        for key, entry in checkpoint.entries.items():
            if entry.dtype in TORCH and any(not finite(piece) for piece in pieces(file, entry, buffer)):
                found.append(key)
    return found


def pieces(file: int, entry: Entry, buffer: Tensor) -> Iterator[Tensor]:
    """The numbers of a tensor as they lie in the file, a buffer full at a time: (N,) each, valid until the next."""
    dtype = TORCH[entry.dtype]
    for offset, count in entry.runs:
        for first in range(0, count * dtype.itemsize, len(buffer)):
            piece = buffer[: min(len(buffer), count * dtype.itemsize - first)]
            read_exactly(file, piece, offset + first)
            yield piece.view(dtype)


def finite(numbers: Tensor) -> bool:
    """Whether all are.  A finite sum says so at once; only where it is not does every number count."""
    if numbers.dtype.itemsize == 1:  # float8, which has no sum
        numbers = numbers.to(torch.float16)
    return bool(numbers.sum(dtype=torch.float64 if numbers.dtype == torch.float64 else torch.float32).isfinite()) or bool(
        numbers.isfinite().all()
    )


def parts(numbers: Tensor, entry: Entry) -> list[tuple[Tensor, int]]:
    """Numbers, (N,), in the parts that lie together in the file, and the offset of each."""
    runs = entry.runs
    return [(part, offset) for part, (offset, _) in zip(numbers.split(max(runs[0][1], 1)), runs, strict=True)]


def shaped(numbers: Tensor, entry: Entry) -> Tensor:
    """Numbers as they lie in the file, (N,), as a contiguous tensor of the entry's shape."""
    if entry.stride is None:
        return numbers.view(entry.shape)
    return numbers.as_strided(entry.shape, entry.stride).contiguous()


def read_exactly(file: int, target: Tensor, offset: int) -> None:
    """Fills `target` with the file's bytes from `offset` on.  One call of the system reads 2 GiB at most, hence the loop."""
    bytes_left = memoryview(target.view(torch.uint8).numpy())  # type: ignore[arg-type]
    while bytes_left:
        count = os.preadv(file, [bytes_left], offset)
        if count == 0:
            raise OSError(f"it ends at byte {offset:,}")
        bytes_left = bytes_left[count:]
        offset += count


def convert(source: Tensor, target: Tensor, wide: Tensor) -> None:
    """Copies (N,) to (N,) of another dtype.  From float16 to bfloat16 it goes through `wide` (float32, at least N), with the
    same result: torch's own conversion is a scalar loop, 9 times slower."""
    if (source.dtype, target.dtype) == (torch.float16, torch.bfloat16):
        source = wide[: source.numel()].copy_(source)
    target.copy_(source)
