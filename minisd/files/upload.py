"""Weights from a file straight to a GPU: a few readers, each with memory that the GPU fetches from by itself.

A piece is read into pinned memory, sent as it is, and takes its dtype there, where conversion costs nothing.  While one piece is
on its way its reader fills the next; several readers, because copying out of the page cache keeps one core busy.  No tensor
exists on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from queue import Empty, SimpleQueue
from typing import NamedTuple

import torch
from torch import Tensor

from .checkpoint import Checkpoint
from .tensors import TORCH, check_floats, opened_again, parts, read_exactly, shaped

READERS = 4
PIECE = 8 << 20  # bytes; a reader holds two of them, pinned, which is slow to ask for


class Piece(NamedTuple):
    offset: int  # of its first byte in the file
    stored: torch.dtype
    target: Tensor  # (N,), on the device


def upload_tensors(checkpoint: Checkpoint, keys: Iterable[str], dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """The named tensors in `dtype` on `device`.  Raises CheckpointError as `load_tensors`, and torch's OutOfMemoryError."""
    entries = {key: checkpoint.entries[key] for key in keys}
    check_floats(checkpoint, entries)
    numbers = {key: torch.empty(entry.numel, dtype=dtype, device=device) for key, entry in entries.items()}
    pieces: SimpleQueue[Piece] = SimpleQueue()
    for key, entry in entries.items():
        stored = TORCH[entry.dtype]
        for part, offset in parts(numbers[key], entry):
            for i, target in enumerate(part.split(PIECE // stored.itemsize)):
                pieces.put(Piece(offset + i * PIECE, stored, target))
    with opened_again(checkpoint) as file, ThreadPoolExecutor(READERS) as pool:
        for reader in [pool.submit(carry, file, pieces, device) for _ in range(READERS)]:
            reader.result()
    return {key: shaped(numbers[key], entry) for key, entry in entries.items()}


class Slot:
    """Room for a piece on both sides, and the moment when it may be filled again."""

    def __init__(self, device: torch.device) -> None:
        on_gpu = device.type == "cuda"
        self.here = torch.empty(PIECE, dtype=torch.uint8, pin_memory=on_gpu)
        self.there = torch.empty(PIECE, dtype=torch.uint8, device=device)
        self.sent = torch.cuda.Event() if on_gpu else None

    def wait(self) -> None:
        if self.sent:
            self.sent.synchronize()

    def send(self, piece: Piece) -> None:
        size = len(piece.target) * piece.stored.itemsize
        self.there[:size].copy_(self.here[:size], non_blocking=True)
        if self.sent:
            self.sent.record()
        piece.target.copy_(self.there[:size].view(piece.stored))


def carry(file: int, pieces: SimpleQueue[Piece], device: torch.device) -> None:
    """One reader: takes pieces until none is left, and returns when all of its own have arrived."""
    stream = torch.cuda.Stream(device) if device.type == "cuda" else None
    try:
        with torch.cuda.stream(stream):  # type: ignore[arg-type]  # None: nothing changes
            if stream:
                torch.cuda.synchronize(device)  # other streams may still work in the memory that became the targets
            for slot in cycle([Slot(device), Slot(device)]):
                try:
                    piece = pieces.get_nowait()
                except Empty:
                    break
                slot.wait()
                read_exactly(file, slot.here[: len(piece.target) * piece.stored.itemsize], piece.offset)
                slot.send(piece)
    finally:
        if stream:
            stream.synchronize()  # before the memory of either side is let go, after an error too
