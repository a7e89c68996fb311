"""Where pictures go: files of a folder, or objects below a URL that fsspec opens.  Each is written whole or not at all.

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from ..errors import OutputError, UsageError, shown
from ..system.atomic import running, sync

DRAFTS = ".minisd-drafts"  # the folder of what is not finished yet, with one for each process


class Store(Protocol):
    """Names are relative to the store, with slashes.  All methods raise OutputError."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing where there is none."""

    def open(self, name: str) -> BinaryIO | None:
        """For reading; None where there is nothing."""

    def write(self, name: str, data: bytes) -> None:
        """Over what is there.  A reader sees all of it or nothing, also after a crash."""

    def place(self, name: str) -> contextlib.AbstractContextManager[Path]:
        """Gives the path of a local file to write to, which is then put there likewise."""

    def remove(self, name: str) -> None:
        """A file, or a folder with all that is in it; nothing where there is none."""

    def close(self) -> None: ...


def store_of(out: str) -> Store:
    """Raises UsageError for a URL that nothing opens."""
    return Objects(out) if "://" in out else Folder(Path(out))


class Folder:
    """A folder of this machine, or one that several share."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.made: set[Path] = set()
        self.drafts: Path | None = None
        self.count = 0

    def names(self, folder: str) -> list[str]:
        with self.errors(folder):
            try:
                return os.listdir(self.path / folder)
            except FileNotFoundError:
                return []

    def open(self, name: str) -> BinaryIO | None:
        with self.errors(name):
            try:
                return open(self.path / name, "rb")
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with self.place(name) as draft, open(draft, "wb") as file:
            file.write(data)

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Path]:
        target = self.path / name
        with self.errors(name):
            self.make(target.parent)
            self.count += 1
            draft = self.own_drafts() / f"{self.count}"
            try:
                yield draft
                sync(draft)
                draft.replace(target)
                sync(target.parent)
            finally:
                draft.unlink(missing_ok=True)

    def make(self, folder: Path) -> None:
        if folder not in self.made:
            folder.mkdir(parents=True, exist_ok=True)
            self.made.add(folder)

    def own_drafts(self) -> Path:
        """A folder that nobody else writes to; its name says whose it is."""
        if self.drafts is None:
            self.drafts = self.path / DRAFTS / f"{socket.gethostname()}-{os.getpid()}-{os.urandom(4).hex()}"
            while not self.drafts.exists():
                with contextlib.suppress(FileNotFoundError):  # another has just removed the empty folder around it
                    self.drafts.mkdir(parents=True)
        return self.drafts

    def sweep(self) -> None:
        """Removes what processes of this machine that are gone have left unfinished."""
        start = f"{socket.gethostname()}-"
        for name in self.names(DRAFTS):
            pid = name.removeprefix(start).split("-")[0]
            if name.startswith(start) and pid.isdecimal() and not running(int(pid)):
                shutil.rmtree(self.path / DRAFTS / name, ignore_errors=True)
        with contextlib.suppress(OSError):  # others have theirs in it, or there is none
            (self.path / DRAFTS).rmdir()

    def remove(self, name: str) -> None:
        with self.errors(name), contextlib.suppress(FileNotFoundError):
            if (path := self.path / name).is_dir():
                shutil.rmtree(path)
                self.made.discard(path)
            else:
                path.unlink()

    def close(self) -> None:
        if self.drafts is not None:
            shutil.rmtree(self.drafts, ignore_errors=True)
            self.drafts = None
        with contextlib.suppress(OutputError):  # what is not swept now is swept by the next job, and says nothing of this one
            self.sweep()

    @contextlib.contextmanager
    def errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except OSError as error:
            where = shown(str(self.path / name), 500)
            raise OutputError(f"output {where}: could not be written: {error.strerror or error}") from error


class Objects:
    """What is below a URL such as s3://bucket/folder.  Object stores show an object when all of it is there."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.system, self.root = file_system(url)

    def names(self, folder: str) -> list[str]:
        with self.errors(folder):
            self.system.invalidate_cache()
            try:
                return [path.rsplit("/", 1)[-1] for path in self.system.ls(self.at(folder), detail=False)]
            except FileNotFoundError:
                return []

    def open(self, name: str) -> BinaryIO | None:
        with self.errors(name):
            try:
                return self.system.open(self.at(name), "rb")  # type: ignore[no-any-return]
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with self.errors(name), self.whole(name) as path:
            self.system.pipe_file(path, data)

    @contextlib.contextmanager
    def place(self, name: str) -> Iterator[Path]:
        import tempfile

        with self.errors(name), tempfile.TemporaryDirectory() as folder:
            draft = Path(folder) / "draft"
            yield draft
            with self.whole(name) as path:
                self.system.put_file(str(draft), path)

    @contextlib.contextmanager
    def whole(self, name: str) -> Iterator[str]:
        """The path to write to.  Where files can be moved (a folder, SFTP, HDFS) that is a draft, which then takes its place."""
        self.system.makedirs(self.at(name).rsplit("/", 1)[0], exist_ok=True)
        if "s3" in self.system.protocol or "gs" in self.system.protocol or "abfs" in self.system.protocol:
            yield self.at(name)
            return
        folder, _, last = self.at(name).rpartition("/")
        draft = f"{folder}/.{last}.minisd-tmp-{os.urandom(8).hex()}"
        yield draft
        self.system.mv(draft, self.at(name))

    def remove(self, name: str) -> None:
        with self.errors(name), contextlib.suppress(FileNotFoundError):
            self.system.rm(self.at(name), recursive=True)

    def at(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def close(self) -> None:
        pass

    @contextlib.contextmanager
    def errors(self, name: str) -> Iterator[None]:
        try:
            yield
        except OutputError:
            raise
        except Exception as error:  # every package that serves a store has errors of its own
            raise OutputError(f"output {shown(self.url, 300)}: {shown(name, 200)}: {shown(str(error), 200)}") from error


def file_system(url: str) -> tuple[Any, str]:
    """What opens a URL, and the path there.  Raises UsageError."""
    try:
        import fsspec
    except ImportError:
        raise UsageError(f"{shown(url, 300)}: needs fsspec, which is not there; pip install fsspec") from None
    try:
        return fsspec.core.url_to_fs(url)  # type: ignore[no-any-return]
    except (ImportError, ValueError) as error:  # fsspec names the package that serves it
        raise UsageError(f"{shown(url, 300)}: cannot be opened: {shown(str(error), 200)}") from None
