"""Opening files that somebody named: regular ones, of a size that makes sense."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO


def open_regular(path: str | os.PathLike[str], limit: int | None = None) -> BinaryIO:
    """Opens a regular file of at most `limit` bytes for reading.  Raises OSError, whose strerror says what it is else.

    A pipe or a terminal would keep us waiting for its first byte, a device could go on for ever; both are told without waiting.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    try:
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            raise IsADirectoryError(errno.EISDIR, "is a folder", str(path))
        if not stat.S_ISREG(found.st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        if limit is not None and found.st_size > limit:
            raise OSError(errno.EFBIG, f"has {found.st_size:,} bytes; at most {limit:,} were expected", str(path))
        return open(descriptor, "rb")  # os.fdopen would import
    except BaseException:
        os.close(descriptor)
        raise


def first_line_of(path: Path, limit: int = 4096) -> str:
    """The first line of a small text file; "" where there is none that can be read."""
    try:
        with open_regular(path, limit) as file:
            return file.read().decode().strip().partition("\n")[0]
    except (OSError, ValueError):
        return ""
