"""What is said of a run while it goes on, and of the rows that went wrong.  Nothing here imports torch."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import dataclass
from typing import Any

from ..errors import shown
from .job import Job
from .rows import RowError
from .shards import Failed
from .store import Folder, Store

TOLD = 10  # bad rows that are also said on stderr
EVERY = 30.0  # seconds between two lines, where stderr is no terminal


@dataclass
class Tally:
    """What a run did: rows whose pictures were drawn, were there already, and could not be drawn."""

    drawn: int = 0
    already: int = 0
    failed: int = 0
    seconds: float = 0.0

    def facts(self) -> dict[str, Any]:
        rate = self.drawn / self.seconds if self.seconds else 0.0
        return vars(self) | {"seconds": round(self.seconds, 2), "pictures_per_second": round(rate, 3)}

    def __str__(self) -> str:
        rate = f", {self.drawn / self.seconds:.2f} a second" if self.drawn and self.seconds else ""
        return f"drawn {self.drawn:,}{rate}, there already {self.already:,}, failed {self.failed:,}"


class Errors:
    """OUT/errors.jsonl: a line for every row that could not be drawn.  Made anew by every run."""

    def __init__(self, store: Store, mine: tuple[int, int]) -> None:
        own = f"-{mine[0] + 1}-of-{mine[1]}" if mine[1] > 1 else ""
        self.store, self.name, self.count = store, f"errors{own}.jsonl", 0
        self.lines: list[bytes] = []
        store.remove(self.name)

    def add(self, found: RowError | Failed, id: str | None = None) -> None:
        reason = found.reason if isinstance(found, Failed) else str(found)
        self.count += 1
        line = {"line": found.line, "id": found.id if isinstance(found, RowError) else id, "error": reason}
        self.lines.append((json.dumps(line) + "\n").encode())
        if self.count <= TOLD:
            more = f"; the others are in {self.name}" if self.count == TOLD else ""
            print(f"minisd: line {found.line}: {shown(reason, 500)}{more}", file=sys.stderr)
        if isinstance(self.store, Folder):
            self.flush()

    def flush(self) -> None:
        """At the end, where a store cannot go on with a file."""
        if not self.lines:
            return
        if isinstance(self.store, Folder):
            with self.store.errors(self.name):
                self.store.make(self.store.path)
                with open(self.store.path / self.name, "ab", buffering=0) as file:
                    file.write(b"".join(self.lines))
            self.lines = []
        else:
            self.store.write(self.name, b"".join(self.lines))


class Progress:
    """How far a run is: a bar on a terminal, else a line now and then.  total: rows, where that is known."""

    def __init__(self, tally: Tally, total: int | None) -> None:
        from tqdm import tqdm

        self.tally, self.total = tally, total
        self.start = self.told = time.monotonic()
        form = "{desc} {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}]"
        self.bar = tqdm(desc="drawing", total=total, unit="picture", disable=None, bar_format=form if total else None)

    def show(self, already: int) -> None:
        self.tally.already = already
        self.tally.seconds = time.monotonic() - self.start
        done = already + self.tally.drawn + self.tally.failed
        if not self.bar.disable:
            self.bar.initial = already  # of which nobody waits for
            self.bar.update(done - self.bar.n)
        elif time.monotonic() - self.told > EVERY:
            self.told = time.monotonic()
            of = f" of {self.total:,}" if self.total else ""
            print(f"minisd: {done:,}{of} rows: {self.tally}{self.left(done)}", file=sys.stderr, flush=True)

    def left(self, done: int) -> str:
        """How long it takes at the present speed."""
        if not self.total or not self.tally.drawn:
            return ""
        seconds = max(0, self.total - done) / self.tally.drawn * self.tally.seconds
        return f", {in_words(seconds)} left"

    def close(self) -> None:
        self.bar.close()


def in_words(seconds: float) -> str:
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if not hours else f"{hours:,} h {minutes} min"


def summary(job: Job, tally: Tally) -> str:
    return f"{shown(job.out, 300)}: {tally}"
