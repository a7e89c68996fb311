"""Many inputs, one after the other: each ends well or in one of minisd's errors, in little time and memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peak import memory, reset

from minisd.errors import MinisdError

HANG = 2.0  # seconds: what an input may take at most, however busy the machine is; the slowest is printed


@dataclass
class Storm:
    good: int = 0
    bad: int = 0
    unsaid: int = 0  # errors without a reason
    slowest: float = 0.0
    grown: int = 0  # MB, of all inputs together

    def run(self, inputs: Iterable[Any], take: Callable[[Any], object], megabytes: int = 64) -> Storm:
        """megabytes: how much memory all inputs together may take at most, their files included."""
        reset()
        before = memory()
        for i, each in enumerate(inputs):
            started = time.process_time()
            try:
                take(each)
                self.good += 1
            except MinisdError as error:
                self.bad += 1
                self.unsaid += not str(error)
            except BaseException as error:
                raise AssertionError(f"input {i}: {type(error).__name__} {error}: {each!r:.2000}") from error
            self.slowest = max(self.slowest, time.process_time() - started)
        self.grown = memory() - before >> 20
        print(f"{self.good:,} went well, {self.bad:,} were refused; slowest {self.slowest * 1000:.0f} ms, {self.grown} MB more")
        assert self.slowest < HANG
        assert self.grown < megabytes
        assert not self.unsaid
        return self


class InMemory:
    """A file that lies in memory, for contents that a test has thousands of."""

    def __init__(self) -> None:
        self.descriptor = os.memfd_create("storm")
        self.path = Path(f"/proc/self/fd/{self.descriptor}")

    def holding(self, content: bytes) -> Path:
        os.ftruncate(self.descriptor, 0)
        os.pwrite(self.descriptor, content, 0)
        return self.path
