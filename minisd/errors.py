"""The few ways in which minisd says no.  Each class carries the exit code that the command line ends with."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from typing import Any

NO_THREAD = "can't start new thread"  # Python, where there is no room for its stack, or a limit of processes is reached
THREADLESS = "no thread can be started: there is not enough memory, or too many processes (ulimit -u)"
LACK_OF_MEMORY = (
    "out of memory",  # CUDA
    "alloc_failed",  # cuBLAS, cuDNN
    "allocate memory",  # torch on a CPU, the system's dynamic loader
    "bad_alloc",  # C++, as torch hands it on
    "failed to map",
    "cannot map",
    "without setting an exception",  # Python, where even that found no room; as is the next
    "without exception set",
    NO_THREAD,
)
# All that oneDNN says, of the code that it makes and of its buffers; what goes on ("… a primitive descriptor") has other reasons.
# And what is left of torch's "[enforce fail at alloc_cpu.cpp…" where only a C++ string's own 15 bytes find room.
WHOLE_MESSAGES = ("could not create a primitive", "could not create a memory object", "[enforce fail a")


class MinisdError(Exception):
    """Base of all errors that a user can do something about."""

    exit_code = 1
    result: Any = None  # the pictures that were finished before it, if any: a pipeline.Result


class UsageError(MinisdError, ValueError):
    """An argument is out of range or unknown: names the argument, what was expected and what was found."""

    exit_code = 2


class CheckpointError(MinisdError):
    """A file is not a checkpoint that minisd can use.

    path: the file; reason: what was expected and what was found; hint: what to do; key: the tensor it is about.
    """

    exit_code = 3

    def __init__(self, path: object, reason: str, hint: str = "", key: str | None = None) -> None:
        self.path, self.reason, self.hint, self.key = str(path), reason, hint, key
        where = f"{self.path}: " + (f"{key!r}: " if key else "")
        super().__init__(where + reason + (f" ({hint})" if hint else ""))


class ShapeError(ValueError):
    """A tensor has a shape that no network gives it; becomes a CheckpointError where the file is known.  key: its whole name."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(reason)
        self.key = key


@contextlib.contextmanager
def taken_apart(path: object) -> Iterator[None]:
    """Whatever goes wrong while a stranger's file is taken apart is a CheckpointError about that file, even what nobody
    thought of; --debug shows where it comes from.  Only a lack of memory is no fault of the file."""
    try:
        yield
    except MinisdError:
        raise
    except Exception as error:
        if is_lack_of_memory(error):
            raise
        found = shown(str(error) or "no reason given", 200)
        reason = f"is not put together as such a file is: {type(error).__name__}: {found}"
        raise CheckpointError(path, reason, "copy or download it again") from error


def is_lack_of_memory(error: BaseException) -> bool:
    """Whether this is one of the ways in which it is said: by Python, by the system, while a library is loaded, by torch."""
    if isinstance(error, ImportError | RuntimeError | SystemError):  # torch's own error for a GPU is a RuntimeError, too
        return str(error).strip() in WHOLE_MESSAGES or any(words in str(error).lower() for words in LACK_OF_MEMORY)
    return isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


class OutOfMemoryError(MinisdError):
    """The device has no room for the request."""

    exit_code = 4


class NonFiniteError(MinisdError):
    """The network produced NaN or infinity; no picture is made of it."""

    exit_code = 5


class OutputError(MinisdError, OSError):
    """A file could not be written; the one that stood there before is whole."""

    exit_code = 6


def shown(text: str, limit: int) -> str:
    """Printable characters only, and not too many of them."""
    if text.isprintable() and len(text) <= limit:
        return text
    safe = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text[: limit + 1])
    return safe if len(safe) <= limit else f"{safe[:limit]}… ({len(text):,} characters)"
