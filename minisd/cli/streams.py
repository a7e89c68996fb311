"""What the commands write to and are ended by: streams on which a stranger's text does no harm, and the system's signals."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from ..errors import shown

LONGEST = 2000  # characters of a line
ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has the first alone


class Shown:
    """A stream on which every line is printable, not too long, and written in what letters the stream has."""

    def __init__(self, stream: Any, limit: int | None, bars: bool = False) -> None:
        self.stream, self.limit, self.bars = stream, limit, bars

    def write(self, text: str) -> int:
        start = "\r" if self.bars and text.startswith("\r") else ""  # a bar begins its line anew
        lines = (shown(line, self.limit or len(line) * 10) for line in text[len(start) :].split("\n"))
        encoding = self.stream.encoding or "utf-8"
        self.stream.write(start + "\n".join(lines).encode(encoding, "backslashreplace").decode(encoding))
        return len(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


@contextlib.contextmanager
def careful_streams(data: bool) -> Iterator[bool]:
    """Has all that is written pass `shown`.  data: stdout is for a program, and not cut.  Gives whether stdout was closed."""
    closed, before = sys.stdout is None, (sys.stdout, sys.stderr)
    if closed or sys.stderr is None:  # >&-, 2>&-: the first file that is opened would take its place
        occupy()
    out, err = (each or open(os.devnull, "w") for each in before)  # noqa: SIM115  # the system's own are never closed either
    sys.stdout, sys.stderr = Shown(out, None if data else LONGEST), Shown(err, LONGEST, bars=True)  # type: ignore[assignment]
    try:
        yield closed
    finally:
        sys.stdout, sys.stderr = before


def occupy() -> None:
    """Puts something in the places of standard input, output and error that are empty."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(descriptor)


@contextlib.contextmanager
def ended_by_signals() -> Iterator[list[int]]:
    """Has SIGTERM and SIGHUP end a command as Ctrl-C does, so that nothing is left behind.  Gives what came, Ctrl-C, too."""
    came: list[int] = []

    def stop(number: int, _: object) -> None:
        came.append(number)
        raise KeyboardInterrupt

    main_thread = threading.current_thread() is threading.main_thread()
    usual = dict.fromkeys(ENDING, signal.SIG_DFL) | {signal.SIGINT: signal.default_int_handler}
    ours = {each: how for each, how in usual.items() if main_thread and signal.getsignal(each) == how}  # nohup ignores SIGHUP
    for each in ours:
        signal.signal(each, stop)
    try:
        yield came
    finally:
        for each, how in ours.items():
            signal.signal(each, how)


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C, and what else would end the command, waits until the block is done."""
    if threading.current_thread() is not threading.main_thread():  # which alone gets it
        yield
        return
    came: list[int] = []
    ours = [each for each in (signal.SIGINT, *ENDING) if signal.getsignal(each) not in (signal.SIG_IGN, None)]
    before = {each: signal.signal(each, lambda number, _: came.append(number)) for each in ours}
    try:
        yield
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
    if came:
        signal.raise_signal(came[0])
