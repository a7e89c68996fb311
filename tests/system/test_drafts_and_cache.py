"""Drafts that nobody can foretell, a cache that costs nothing but time, and files that are no regular files."""

from __future__ import annotations

import errno
import importlib
import json
import os
import pwd
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from minisd.batch.store import Folder
from minisd.errors import THREADLESS, OutOfMemoryError, OutputError, is_lack_of_memory, taken_apart
from minisd.files.checkpoint import file_sha256, known_sha256, state_of
from minisd.system import atomic, cache
from minisd.system.atomic import drafting, replacing, running, strays
from minisd.system.cache import keep, place, recall
from minisd.system.memory import memory_errors
from minisd.system.regular import open_regular

HASH = "0123456789abcdef" * 4


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_a_link_that_waits_under_a_drafts_name_is_not_followed(tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("precious")
    monkeypatch.setattr("os.urandom", lambda count: bytes(count))  # as if it could be foretold
    (tmp_path / f".x.minisd-tmp-{os.getpid()}-{'00' * 8}").symlink_to(tmp_path / "precious")
    with pytest.raises(OutputError, match="File exists"), replacing(tmp_path / "x") as draft:
        draft.write_text("over it")
    assert (tmp_path / "precious").read_text() == "precious"
    assert not (tmp_path / "x").exists()


def test_drafts_are_new_files_with_names_of_their_own(tmp_path):
    with drafting(tmp_path / "x") as first, drafting(tmp_path / "x") as second:
        assert first != second
        assert first.stat().st_size == 0
        assert str(os.getpid()) in first.name
    assert list(tmp_path.iterdir()) == []


def test_strays_of_the_dead_are_removed_and_of_nobody_else(tmp_path, monkeypatch):
    monkeypatch.setattr(atomic, "running", lambda pid: pid == 7)
    start = ".x.minisd-tmp-"
    gone = [f"{start}123-abc", f"{start}123", f"{start}{'9' * 30}-a"]
    kept = [f"{start}7-abc", f"{start}²-abc", f"{start}name", ".y.minisd-tmp-123-abc", "x"]
    for name in gone + kept:
        (tmp_path / name).touch()
    (tmp_path / f"{start}5-folder").mkdir()  # in nobody's way
    assert {path.name for path in strays(tmp_path / "x")} == {*gone, f"{start}5-folder"}
    with replacing(tmp_path / "x") as draft:
        draft.write_text("new")
    assert {path.name for path in tmp_path.iterdir()} == {*kept, f"{start}5-folder"}


def test_no_process_has_a_number_beyond_the_systems(monkeypatch):
    assert running(os.getpid())
    assert not running(10**19)


def test_a_cache_is_for_its_user_alone(tmp_path):
    keep("sha256", {"a": HASH})
    assert stat.S_IMODE(place("sha256").stat().st_mode) == 0o600
    assert recall("sha256") == {"a": HASH}
    assert [path.name for path in place("sha256").parent.iterdir()] == ["sha256.json"]


WRITES_AND_ENDS = """
import time
from pathlib import Path
from threading import Event, Thread
from minisd.system import cache

begun, write = Event(), Path.write_text
def slow(path, text):
    begun.set()
    time.sleep(0.2)
    write(path, text)
Path.write_text = slow
Thread(target=cache.keep, args=("sha256", {"a": "b"}), daemon=True).start()
begun.wait()
"""


def test_a_process_that_ends_leaves_no_draft_of_what_a_thread_keeps():
    subprocess.run([sys.executable, "-c", WRITES_AND_ENDS], check=True)
    assert [path.name for path in place("sha256").parent.iterdir()] == ["sha256.json"]
    assert recall("sha256") == {"a": "b"}


@pytest.mark.parametrize("poison", ["\x1b[2Jhello", HASH[:-1], HASH.upper(), HASH + "\n", 7, None, [HASH], {"a": HASH}])
def test_what_is_no_hash_is_ignored(poison, tmp_path):
    path = tmp_path / "model"
    path.write_bytes(b"model")
    keep("sha256", {state_of(path): poison})
    assert known_sha256(path) is None
    wanted = file_sha256(path)
    assert len(wanted) == 64
    kept = json.loads(place("sha256").read_text())  # with those that this process has found out for other tests
    assert kept[state_of(path)] == wanted
    assert poison not in kept.values()


def test_a_user_without_a_home_loses_time_only(tmp_path, monkeypatch):
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", lambda uid: {}[uid])
    monkeypatch.chdir(tmp_path)
    Path("model").write_bytes(b"model")
    assert file_sha256(Path("model")) == file_sha256(Path("model"))
    assert recall("sha256") == {}
    assert os.listdir() == ["model"]


def test_a_cache_that_is_a_pipe_is_not_waited_for():
    place("sha256").parent.mkdir(parents=True)
    os.mkfifo(place("sha256"))
    assert recall("sha256") == {}


def test_what_is_no_regular_file_is_told_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "large").write_bytes(bytes(11))
    leader, terminal = os.openpty()
    cases = {
        str(tmp_path / "pipe"): errno.EINVAL,
        os.ttyname(terminal): errno.EINVAL,
        "/dev/zero": errno.EINVAL,
        str(tmp_path): errno.EISDIR,
        str(tmp_path / "large"): errno.EFBIG,
        str(tmp_path / "none"): errno.ENOENT,
    }
    begin = time.monotonic()
    before = len(os.listdir("/proc/self/fd"))
    for path, code in cases.items():
        with pytest.raises(OSError) as caught:  # noqa: PT011  # its number is looked at
            open_regular(path, 10)
        assert caught.value.errno == code, path
    assert time.monotonic() - begin < 1
    assert len(os.listdir("/proc/self/fd")) == before
    with open_regular(tmp_path / "large", 11) as file:
        assert file.read() == bytes(11)
    os.close(leader)
    os.close(terminal)


def test_threads_get_a_draft_each(tmp_path):
    found, together = [], threading.Barrier(2)

    def run() -> None:
        with drafting(tmp_path / "x") as draft:
            together.wait(10)
            found.append(draft)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(found)) == 2


def test_no_memory_has_a_reason():
    with pytest.raises(OutOfMemoryError, match="out of memory: main memory is full; draw"), memory_errors():
        raise MemoryError


def raising(error):
    def call(*_):
        raise error

    return call


LACKING = [
    MemoryError(),
    RuntimeError("std::bad_alloc"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried ..."),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    RuntimeError("could not create a primitive"),
    RuntimeError("[enforce fail a"),
    RuntimeError("can't start new thread"),
    SystemError("<function _find_and_load at 0x7fd2> returned NULL without setting an exception"),
    SystemError("error return without exception set"),
]


@pytest.mark.parametrize("error", LACKING, ids=lambda error: type(error).__name__)
def test_every_way_of_saying_that_memory_lacks(error, capfd, monkeypatch):
    """Never a fault of the file that was read when it happened, and one line with exit code 4 at the end."""
    with pytest.raises(type(error)), taken_apart("a.ckpt"):
        raise error
    command_line = importlib.import_module("minisd.cli.main")
    monkeypatch.setattr(command_line, "run", raising(error))
    assert command_line.main([]) == 4
    reason = THREADLESS if "thread" in str(error) else "there is not enough memory for this"
    assert capfd.readouterr().err == f"minisd: error: {reason}\n"
    of_torch = isinstance(error, MemoryError | RuntimeError | SystemError)
    with pytest.raises(OutOfMemoryError if of_torch else type(error)), memory_errors():
        raise error


def test_where_another_thread_does_not_end_its_writing_nothing_is_kept(monkeypatch):
    """It holds the lock for good, as one does whose process was forked meanwhile, or the end of the process."""
    monkeypatch.setattr(cache, "WRITING", threading.Lock())
    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    with cache.writing():
        keep("sha256", {"a": "b"})
    assert recall("sha256") == {}
    keep("sha256", {"a": "b"})
    assert recall("sha256") == {"a": "b"}


def test_a_batch_whose_drafts_cannot_be_listed_in_the_end_says_only_what_was_wrong_before(tmp_path, monkeypatch):
    store = Folder(tmp_path)
    store.write("a", b"a")
    monkeypatch.setattr(os, "listdir", raising(OSError(errno.ENOMEM, "Cannot allocate memory")))
    with pytest.raises(OutputError):
        store.names("")
    store.close()


def test_other_errors_are_no_lack_of_memory():
    strange = RuntimeError("could not create a primitive descriptor for a matmul primitive")
    for error in (
        strange,
        RuntimeError("shape mismatch"),
        OSError(errno.ENOENT, "No such file"),
        ImportError("No module named x"),
    ):
        assert not is_lack_of_memory(error)
