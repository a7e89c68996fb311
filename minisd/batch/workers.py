"""Who draws: this process, or several of their own.  Pieces go out, answers come back; a worker that dies loses no row.

Nothing here imports torch until something is drawn.
"""

from __future__ import annotations

import contextlib
import glob
import math
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, Protocol

from ..errors import MinisdError, OutOfMemoryError, is_lack_of_memory, shown
from .job import Job
from .rows import Row
from .shards import Answer, Failed, Piece

if TYPE_CHECKING:
    from .drawing import Drawer

AHEAD = 2  # pieces that a worker has at hand, so that it never waits for the next
TRIES = 3  # deaths while a row was drawn, after which the row is taken for the cause
BIRTHS = 5  # workers that end one after the other without a picture, after which nobody tries again
OWN_MEMORY = 600 << 20  # bytes that a worker takes beside its model
TOLD = 10  # warnings of a worker that are passed on


class Team(Protocol):
    """Those who draw."""

    def ask(self, what: str, row: Row) -> Any:
        """A question about a row, to one of them: the device's "kind", how many are "measured" together, what is "estimated"."""

    def hungry(self) -> bool:
        """Whether another piece should be given."""

    def give(self, piece: Piece) -> None: ...

    def busy(self) -> bool:
        """Whether there will be more answers."""

    def answers(self, patience: float) -> Iterable[Answer]:
        """What has come, waiting so many seconds for the first.  Raises what ends the whole run."""

    def close(self, at_once: bool) -> Iterable[Answer]:
        """The last answers; at once: without those."""


class Alone:
    """This process."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.pieces: deque[Piece] = deque()
        self.found: deque[Answer] = deque()
        self.made: Drawer | None = None
        self.threads = 0

    @property
    def drawer(self) -> Drawer:
        if self.made is None:
            import torch

            from .drawing import Drawer

            self.threads = torch.get_num_threads()
            torch.set_num_threads(self.job.threads)
            self.made = Drawer(self.job, self.found.append)
        return self.made

    def ask(self, what: str, row: Row) -> Any:
        return asked(self.drawer, what, row)

    def hungry(self) -> bool:
        return not self.pieces

    def give(self, piece: Piece) -> None:
        self.pieces.append(piece)

    def busy(self) -> bool:
        return bool(self.pieces)

    def answers(self, patience: float) -> Iterable[Answer]:
        if self.pieces:
            self.drawer.draw(self.pieces.popleft())
        return taken(self.found)

    def close(self, at_once: bool) -> Iterable[Answer]:
        if self.made is not None:
            import torch

            torch.set_num_threads(self.threads)
            try:
                self.made.finish()
            except MinisdError:
                if not at_once:  # else another error is on its way
                    raise
        return taken(self.found)


def taken(found: deque[Answer]) -> list[Answer]:
    return [found.popleft() for _ in range(len(found))]


def asked(drawer: Drawer, what: str, row: Row) -> Any:
    if what == "kind":
        return drawer.device.type
    return getattr(drawer, what)(row)


@dataclass
class Worker:
    process: Any
    pipe: Connection
    pieces: list[Piece] = field(default_factory=list)
    open: dict[int, Row] = field(default_factory=dict)  # rows without an answer, by line, in the order in which they are drawn
    model: str | None = None  # of the last piece that it was given
    begun: Sequence[int] = ()  # lines that it draws

    @property
    def hungry(self) -> bool:
        return len(self.open) == 0 or len(self.open) <= (AHEAD - 1) * max(len(piece.missing) for piece in self.pieces[-AHEAD:])


class Workers:
    """Processes of their own, on a machine with several GPUs one for each."""

    def __init__(self, job: Job, count: int) -> None:
        self.job, self.context = job, multiprocessing.get_context("spawn")
        self.pieces: deque[Piece] = deque()
        self.deaths: dict[int, int] = {}  # by line
        self.barren = 0  # deaths since the last picture
        self.all = [self.born(i) for i in range(count)]

    def born(self, number: int) -> Worker:
        ours, theirs = self.context.Pipe()
        process = self.context.Process(target=work, args=(theirs, self.job, number, os.getpid()), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)

    def ask(self, what: str, row: Row) -> Any:
        """Of one that has nothing to do, or of the one that takes its place where somebody ends it; raises what it raises."""
        number = next(i for i, each in enumerate(self.all) if not each.open)
        worker = self.all[number]
        try:
            worker.pipe.send((what, row))
            kind, found = worker.pipe.recv()
        except (EOFError, OSError):
            worker.process.join()
            if worker.process.exitcode >= 0:
                raise OutOfMemoryError(f"a worker {ended(worker.process)} before it drew anything") from None
            self.buried(number, worker)  # raises after too many
            return self.ask(what, row)
        if kind == "error":
            raise retold(found)
        return found

    def hungry(self) -> bool:
        return len(self.pieces) < 2 * len(self.all)  # some to choose from: a worker goes on with its model

    def give(self, piece: Piece) -> None:
        self.pieces.append(piece)
        self.feed()

    def busy(self) -> bool:
        return bool(self.pieces) or any(each.open for each in self.all)

    def feed(self) -> None:
        for worker in self.all:
            while self.pieces and worker.hungry:
                piece = next((each for each in self.pieces if each.model == worker.model), self.pieces[0])
                self.pieces.remove(piece)
                worker.pieces.append(piece)
                worker.open |= {row.line: row for row in piece.missing}
                worker.model = piece.model
                with contextlib.suppress(OSError):  # it is dead, which is seen next
                    worker.pipe.send(("draw", piece))

    def answers(self, patience: float) -> Iterable[Answer]:
        found: list[Answer] = []
        ready = wait([each.pipe for each in self.all], patience if any(each.open for each in self.all) else 0)
        for i, worker in enumerate(self.all):
            if worker.pipe in ready:
                found += self.heard(i, worker)
        self.feed()
        return found

    def heard(self, number: int, worker: Worker) -> list[Answer]:
        """All that a worker has said; another takes the place of one that is dead."""
        found: list[Answer] = []
        try:
            while worker.pipe.poll():
                kind, said = worker.pipe.recv()
                if kind == "error":
                    raise retold(said)
                if kind == "begun":
                    worker.begun = said
                    continue
                if worker.open.pop(said.line, None) is not None:
                    self.barren = 0
                    found.append(said)
                worker.pieces = [piece for piece in worker.pieces if any(row.line in worker.open for row in piece.missing)]
        except MinisdError:  # one of them is an OSError
            raise
        except (EOFError, OSError):
            found += self.buried(number, worker)
        return found

    def buried(self, number: int, worker: Worker) -> list[Answer]:
        """Its rows go to others.  Those that it drew when it died are taken for the cause, after so many times."""
        worker.process.join()
        how, self.barren = ended(worker.process), self.barren + 1
        if self.barren > BIRTHS * len(self.all):
            raise OutOfMemoryError(f"workers end before they draw anything: the last {how}")
        found: list[Answer] = []
        for line in worker.begun:
            self.deaths[line] = self.deaths.get(line, 0) + (line in worker.open)
            if self.deaths[line] >= TRIES and line in worker.open:
                del worker.open[line]
                found.append(Failed(line, f"the worker that drew it {how}, {TRIES} times"))
        left = []
        for piece in worker.pieces:
            there = piece.there | {row.id for row in piece.missing if row.line not in worker.open}
            if len(there) < len(piece.rows):
                left.append(Piece(piece.rows, there, apart=True))
        self.pieces.extendleft(reversed(left))
        self.all[number] = self.born(number)
        return found

    def close(self, at_once: bool) -> Iterable[Answer]:
        for worker in self.all:
            if at_once:
                worker.process.kill()
            else:
                with contextlib.suppress(OSError):
                    worker.pipe.send(("end", None))
        for worker in self.all:
            worker.process.join()
        return []


def ended(process: Any) -> str:
    code = process.exitcode
    if code is None or code >= 0:
        return f"ended with {code}"
    name = signal.Signals(-code).name
    return f"was ended by {name}" + (" (as the system does when memory is short)" if name == "SIGKILL" else "")


def work(pipe: Connection, job: Job, number: int, parent: int) -> None:
    """A worker: draws what it is given until it is told to end, or nobody is there any more who could."""
    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, signal.SIG_IGN if each == signal.SIGINT else signal.SIG_DFL)  # Ctrl-C is the parent's
    lock = threading.Lock()

    def say(kind: str, what: object) -> None:
        with lock, contextlib.suppress(OSError):
            pipe.send((kind, what))

    left = [TOLD]

    def tell(message: Warning | str, *_: object) -> None:
        left[0] -= 1
        if left[0] >= 0:
            print(f"minisd: warning: {shown(' '.join(str(message).split()), 1000)}", file=sys.stderr, flush=True)

    warnings.showwarning = tell  # type: ignore[assignment]
    threading.Thread(target=watch, args=(parent,), daemon=True).start()
    try:
        drawer = made(job, number, say)
        serve(pipe, drawer, say)
        drawer.finish()
    except MinisdError as error:
        say("error", (error.exit_code, str(error)))
    except EOFError:
        pass
    except Exception as error:  # in a library that could not be loaded, too
        if not is_lack_of_memory(error):
            raise
        say("error", (OutOfMemoryError.exit_code, "out of memory in a worker"))


def made(job: Job, number: int, say: Callable[[str, object], None]) -> Drawer:
    from dataclasses import replace

    import torch

    from .drawing import Drawer

    torch.set_num_threads(job.threads)
    if job.loading.get("device") in (None, "cuda") and torch.cuda.is_available():
        job = replace(job, loading={**job.loading, "device": f"cuda:{number % torch.cuda.device_count()}"})
    return Drawer(job, lambda answer: say("answer", answer), lambda rows: say("begun", [row.line for row in rows]))


def serve(pipe: Connection, drawer: Drawer, say: Callable[[str, object], None]) -> None:
    while True:
        what, given = pipe.recv()
        if what == "end":
            return
        if what == "draw":
            drawer.draw(given)
            continue
        try:
            say("found", asked(drawer, what, given))
        except MinisdError as error:
            say("error", (error.exit_code, str(error)))


def retold(said: tuple[int, str]) -> MinisdError:
    """What ended a worker, as an error of this process."""
    error = MinisdError(said[1])
    error.exit_code = said[0]
    return error


def watch(parent: int) -> None:
    """Ends this process where the one that began it is gone."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def by_default(job: Job, size: int) -> int:
    """How many workers: one for each GPU, or as many as there are cores and memory for; size: bytes of the model's file."""
    if gpus() and str(job.loading.get("device") or "cuda").startswith("cuda"):
        return gpus() if job.loading.get("device") in (None, "cuda") else 1
    if address_space() < 2 * (size + OWN_MEMORY):  # too little to load libraries with; this process says so in a line
        return 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 8 << 30
    return max(1, min(cores // job.threads, int(0.8 * memory) // (2 * size + OWN_MEMORY)))


def address_space() -> float:
    """Bytes that a process may take (ulimit -v)."""
    try:
        import resource
    except ImportError:  # Windows
        return math.inf
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    return math.inf if limit == resource.RLIM_INFINITY else limit


def gpus() -> int:
    """How many GPUs of NVIDIA this process may use, without asking torch."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    there = len(glob.glob("/dev/nvidia[0-9]*"))
    return there if named is None else min(there, len([each for each in named.split(",") if each.strip()]))
