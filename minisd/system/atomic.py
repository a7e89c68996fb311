"""Files that are written whole or not at all: another name beside the target first, then its place in one step."""

from __future__ import annotations

import contextlib
import glob
import os
import shutil
import stat
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path

from ..errors import OutputError

LONGEST = 200  # bytes of a name; file systems have 255, and a draft's is longer


def check_place(path: Path) -> None:
    """Raises OutputError now rather than after minutes of work: for what is no regular file, or where nothing can be written."""
    try:
        if len(os.fsencode(path.name)) > LONGEST:
            raise OutputError(f"output {path}: expected a name of at most {LONGEST} bytes; choose another")
        if path.exists() and not path.is_file():
            raise OutputError(f"output {path}: is not a regular file; choose another name")
        folder = path.resolve().parent
    except OutputError:
        raise
    except (OSError, RuntimeError) as error:  # links that lead in a circle, folders that may not be searched
        raise OutputError(f"output {path}: leads nowhere: {error}; choose another name") from error
    if not folder.is_dir():
        raise OutputError(f"output {path}: the folder {folder} does not exist; make it first")
    if not os.access(folder, os.W_OK):
        raise OutputError(f"output {path}: cannot be written; choose another place")


def check_room(path: Path, size: int) -> None:
    """Raises OutputError unless so many bytes, and a few more, are free where this file is to stand."""
    free = shutil.disk_usage(path.resolve().parent).free
    if free < size * 1.05:
        raise OutputError(f"output {path}: needs {size:,} bytes, {free:,} are free; make room or choose another disk")


@contextlib.contextmanager
def folder_of(path: Path) -> Iterator[None]:
    """Makes the folders that a file needs; where it is not written after all, they go again.  Raises OutputError."""
    made = [folder for folder in path.parents if not os.path.lexists(folder)]  # the innermost first
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"output {path}: its folder cannot be made: {error.strerror}") from error
    try:
        yield
    except BaseException:
        for folder in made:
            with contextlib.suppress(OSError):  # it is not empty: somebody else's file
                folder.rmdir()
        raise


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives the name to write to.  After that the file takes the place of `path`, if nothing went wrong; a link stays a link.

    The new file has the mode of the old one, or that of any new file.  Raises OutputError; what stood there is then whole.
    """
    with drafting(path) as draft:
        yield draft
        target = path.resolve()
        sync(draft)
        if target.exists():
            draft.chmod(stat.S_IMODE(target.stat().st_mode))
        draft.replace(target)
        sync(target.parent)


@contextlib.contextmanager
def drafting(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """An empty file beside `path` for what is not finished yet, gone in the end.  Turns OSError into OutputError.

    Nobody can foretell its name, and it is new: a link that waits there for us would lead to another file.
    """
    target = path.resolve()
    draft = draft_of(target)
    try:
        for stray in strays(target):
            with contextlib.suppress(OSError):  # another user's, or a folder, which are in nobody's way
                stray.unlink()
        os.close(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode))
        yield draft
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output {path}: could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()


def placed(draft: Path, names: Iterable[Path]) -> Path:
    """Gives a finished draft the first of these names that is free; two at once get two.  FileExistsError if there is none."""
    sync(draft)
    for target in names:
        try:
            os.link(draft, target)
        except FileExistsError:
            continue
        except OSError:  # a file system without links
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL))
            except FileExistsError:
                continue
            try:
                draft.replace(target)
            except OSError:
                target.unlink()
                raise
        sync(target.parent)
        return target
    raise FileExistsError("its name has just been taken")


def free_names(path: Path) -> Iterator[Path]:
    """The path itself, path-2, path-3, …, those that nothing has now."""
    names = (path if number == 1 else path.with_stem(f"{path.stem}-{number}") for number in count(1))
    return (name for name in names if not os.path.lexists(name))


def counted(path: Path) -> Iterator[Path]:
    """For "mix.safetensors" mix_00001_.safetensors, or the number after the highest there is, each time anew.

    ComfyUI's names (folder_paths.py, get_save_image_path).
    """
    while True:
        taken = [name.stem[len(path.stem) + 1 :].split("_")[0] for name in path.parent.glob(f"{glob.escape(path.stem)}_*")]
        number = max((int(each) for each in taken if each.isdecimal()), default=0) + 1
        yield path.with_name(f"{path.stem}_{number:05}_{path.suffix}")


def draft_of(target: Path) -> Path:
    """A name for a draft of ours: whose it is, and what nobody can foretell."""
    return target.with_name(f".{target.name}.minisd-tmp-{os.getpid()}-{os.urandom(8).hex()}")


def strays(target: Path) -> Iterator[Path]:
    """What processes that are gone have left unfinished beside a target."""
    start = f".{target.name}.minisd-tmp-"
    for name in os.listdir(target.parent):
        pid = name.removeprefix(start).split("-")[0]
        if name.startswith(start) and pid.isascii() and pid.isdecimal() and not running(int(pid[:20])):
            yield target.parent / name


def running(pid: int) -> bool:
    try:
        os.kill(pid, 0)  # asks, and sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        return True
    return True


def sync(path: Path) -> None:
    """Waits until a file, or the names in a folder, would survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
