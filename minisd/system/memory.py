"""How much memory is free, and what is said when there is none."""

from __future__ import annotations

import ctypes
import math
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch

from ..errors import NO_THREAD, THREADLESS, OutOfMemoryError, is_lack_of_memory

# glibc's mallopt (malloc/malloc.h): blocks from how many bytes on are the system's own, and what is free at the end of the heap
# that is given back to it.  Kept: neither ever.  Usual: what glibc itself comes to after it has freed a block of 32 MB.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
KEPT = {TRIM_THRESHOLD: (1 << 31) - 1, MMAP_THRESHOLD: (1 << 31) - 1}
USUAL = {TRIM_THRESHOLD: 64 << 20, MMAP_THRESHOLD: 32 << 20}
keepers, keeping = [0], threading.Lock()


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns torch's ways of running out of memory into OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError, SystemError) as error:  # torch's own is a RuntimeError, and so are a broken GPU's
        if not is_lack_of_memory(error):
            raise
        if NO_THREAD in str(error):
            raise OutOfMemoryError(THREADLESS) from error
        raise OutOfMemoryError(
            f"out of memory: {first_line(error) or 'main memory is full'}; draw fewer or smaller pictures, or use dtype bfloat16"
        ) from error


def first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]


def free_memory(device: torch.device, enough: float = math.inf) -> int | None:
    """Bytes that can be had, or some number from `enough` on: on a GPU with what PyTorch keeps in reserve, on a CPU what Linux
    calls available."""
    if device.type == "cuda":
        free = torch.cuda.mem_get_info(device)[0]
        if free >= enough:
            return free
        # What belongs to a recorded CUDA graph is in reserve, too, but for that graph alone: other pools than (0, 0).
        segments = [each for each in torch.cuda.memory_snapshot() if tuple(each["segment_pool_id"]) == (0, 0)]
        return free + sum(each["total_size"] - each["allocated_size"] for each in segments if each["device"] == device.index)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024 if device.type == "cpu" else None
    except (OSError, KeyError, ValueError):
        return None


@contextmanager
def keeping_freed_memory() -> Iterator[None]:
    """What is freed in main memory stays with this process, for what is asked for next.

    PyTorch frees the maps of every layer.  The C library gives large ones back to the system, and has them anew page by page,
    each emptied and out of the caches: in a step of SD 1.5 at 64x64 up to 80,000 pages in bfloat16 and 110,000 in float32, 2 to
    14 % and 8 % of its time.  A C library that is not glibc goes on as before.
    """
    with keeping:
        keepers[0] += 1
        if keepers[0] == 1:
            tell_allocator(KEPT)
    try:
        yield
    finally:
        with keeping:
            keepers[0] -= 1
            if keepers[0] == 0:
                tell_allocator(USUAL)


def tell_allocator(settings: dict[int, int]) -> None:
    if mallopt := of_glibc("mallopt"):
        for name, value in settings.items():
            mallopt(name, value)


def give_back(device: torch.device) -> None:
    """Lets the system have memory that is free, where else it is kept for what is asked for next."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if malloc_trim := of_glibc("malloc_trim"):
        malloc_trim(0)


def let_go(error: BaseException, device: torch.device) -> None:
    """Of the tensors in the functions that an error has ended, which live as long as it does: the next picture may need them."""
    reason: BaseException | None = error
    while reason is not None:
        traceback.clear_frames(reason.__traceback__)
        reason = reason.__cause__ or reason.__context__
    give_back(device)


@cache
def of_glibc(name: str) -> Callable[..., int] | None:
    """A function of the C library's allocator; None in a library, or on a system, that has no such thing."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None
