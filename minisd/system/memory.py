"""How much memory is free, and what is said when there is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ..errors import OutOfMemoryError, is_lack_of_memory


@contextmanager
def memory_errors() -> Iterator[None]:
    """Turns torch's ways of running out of memory into OutOfMemoryError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError, and so are a broken GPU's
        if not is_lack_of_memory(error):
            raise
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
