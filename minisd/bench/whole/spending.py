"""What a process takes: time, processor time, memory, and how long until it is ready to draw."""

from __future__ import annotations

import contextlib
import os
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

# What a process says on standard error once its weights are there: minisd with --debug, and the scripts of the peers.
READY = ("minisd: attention by", "ready to draw")
PAUSE = 0.02  # seconds between two looks at its memory


@dataclass(frozen=True)
class Spent:
    """What one process took."""

    seconds: float  # by the clock
    processor: float  # seconds of processors
    peak: int | None  # bytes resident at the most; None where the system does not tell
    ready: float | None  # seconds from the start; None if it never said so


def spent(command: Sequence[str], environment: dict[str, str]) -> Spent:
    """Runs a command to its end.  Raises RuntimeError, with its last word, where it fails."""
    ready, last, before, start = None, "the process failed", of_children(), time.perf_counter()
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment,
    )  # fmt: skip
    with process, Watch(process.pid) as watch:
        assert process.stderr is not None
        for line in process.stderr:
            if ready is None and line.startswith(READY):
                ready = time.perf_counter() - start
            last = line.strip() or last
        process.wait()
    seconds = time.perf_counter() - start
    if process.returncode:
        raise RuntimeError(last)
    return Spent(seconds, of_children() - before, watch.peak or None, ready)


def of_children() -> float:
    """Processor seconds of the processes that have ended."""
    times = os.times()
    return times.children_user + times.children_system


class Watch(threading.Thread):
    """Asks for the largest resident size of a process, as long as it runs.

    The kernel forgets it with the process, and ru_maxrss knows of the process that this one was forked from.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.path, self.peak, self.ended = Path(f"/proc/{process}/status"), 0, threading.Event()

    def run(self) -> None:
        while not self.ended.wait(PAUSE):
            with contextlib.suppress(OSError, StopIteration):  # elsewhere than on Linux, and when it has just ended
                line = next(line for line in self.path.read_text().splitlines() if line.startswith("VmHWM"))
                self.peak = int(line.split()[1]) << 10

    def __enter__(self) -> Watch:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self.join()
