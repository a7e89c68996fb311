"""Every command where the machine is against it: streams that are closed or full, no home, no memory, no room, and signals."""

from __future__ import annotations

import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import DOCUMENTED, Command, call, commands, ended_by_others, judged, left_behind, state
from hostile import TEXTS, with_recipe

import minisd
from minisd.library.places import tiny_checkpoint
from minisd.workbench.doctor import VARIABLES

# A frame of minisd's own code, once it has begun: before that an interruption is Python's to tell.
BEGUN = re.escape(str(Path(minisd.__file__).parent)).encode() + rb"/(?!__init__|__main__|errors)"

CODE = "import sys; from minisd.__main__ import run; sys.exit(run())"  # what the installed command is
NOBODY = "import pwd\ndef fails(_): raise KeyError('no entry')\npwd.getpwuid = fails\n"
RECIPE = {"prompt": "a star", "steps": 1, "width": 8, "height": 8, "seed": 1, "device": "cpu"}
LIGHT = ("inspect", "models", "completion")  # these start in a moment: they are tried by default
# Of the parts of bench, which measure for long, those that end at once as they are called here; a server ends by itself never.
CALLED = [each for each in commands() if each.words[0] not in ("bench", "serve") or each.words[1:] in (("kernels",), ("all",))]


def chosen(light: bool) -> list:
    return [pytest.param(each, id=str(each)) for each in CALLED if (each.words[0] in LIGHT) == light]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folders of its own for everything that a command may write, and an honest picture and model."""
    for name in ("work", "tmp", "home", "cache"):
        (tmp_path / name).mkdir()
    for name, folder in {"HOME": "home", "TMPDIR": "tmp", "XDG_CACHE_HOME": "cache"}.items():
        monkeypatch.setenv(name, str(tmp_path / folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with_recipe(tmp_path / "x.png", RECIPE | {"model_path": str(tiny_checkpoint())})
    (tmp_path / "x.jsonl").write_text('{"id": "a", "prompt": "a star"}\n')
    return tmp_path


def files_in(place: Path) -> dict[str, str]:
    return {"model": str(tiny_checkpoint()), "picture": str(place / "x.png"), "manifest": str(place / "x.jsonl")}


def started(command: Command, place: Path, code: str = CODE, **options) -> subprocess.Popen:
    argv = [sys.executable, "-c", code, *call(command, files_in(place))]
    options = {"cwd": place / "work", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(argv, **options)


def check(process: subprocess.Popen, place: Path, codes: set[int] = DOCUMENTED) -> None:
    """Ends as it is documented, with one line at most, and leaves no draft."""
    out, err = (each and each.decode("utf-8", "surrogateescape") for each in process.communicate(timeout=300))
    code = process.returncode
    if ended_by_others(code, err or ""):
        return
    assert code in codes, (code, err)
    lines = [line for line in (err or "").split("\n") if not line.startswith("minisd: of ")]
    data = process.args[3] == "completion"
    assert judged(code, out or "", "\n".join(lines), data) == [] or (code in (129, 130, 141, 143) and "Traceback" not in str(err))
    assert "Traceback" not in (err or "")
    assert "Exception ignored" not in (err or "")
    left = [str(path) for path in place.rglob("*") if "minisd-tmp" in path.name or path.parent == place / "tmp"]
    assert left == []
    assert left_behind(code if code <= 6 else 0, [{}], [state(place / "work")]) == []


# ---- streams ----

CLOSINGS = {"stdout": ">&-", "stderr": "2>&-", "stdin": "<&-", "all": "<&- >&- 2>&-", "stdout and stderr": ">&- 2>&-"}
FULL = {"stdout": ">/dev/full", "stderr": "2>/dev/full", "both": ">/dev/full 2>/dev/full", "a reader": "</dev/full"}
REDIRECTIONS = {f"closed: {name}": text for name, text in CLOSINGS.items()}
REDIRECTIONS |= {f"full: {name}": text for name, text in FULL.items()}


def redirected(command: Command, place: Path, how: str) -> None:
    script = f'"$@" {REDIRECTIONS[how]}; code=$?; exit $code'
    argv = [sys.executable, "-c", CODE, *call(command, files_in(place))]
    done = subprocess.run(["sh", "-c", script, "sh", *argv], cwd=place / "work", capture_output=True, timeout=300, check=False)
    err = done.stderr.decode()
    assert done.returncode in DOCUMENTED, (done.returncode, err)
    assert not [line for line in err.splitlines() if not line.startswith("minisd: ")]
    assert not [path for path in place.rglob("*") if "minisd-tmp" in path.name]


@pytest.mark.parametrize("how", REDIRECTIONS)
@pytest.mark.parametrize("command", chosen(light=True))
def test_streams(command, how, place):
    redirected(command, place, how)


@pytest.mark.slow
@pytest.mark.parametrize("how", REDIRECTIONS)
@pytest.mark.parametrize("command", chosen(light=False))
def test_streams_of_all(command, how, place):
    redirected(command, place, how)


def unread(command: Command, place: Path) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    process = started(command, place, stdout=writing)
    os.close(writing)
    check(process, place)


@pytest.mark.parametrize("command", chosen(light=True))
def test_nobody_reads(command, place):
    unread(command, place)


@pytest.mark.slow
@pytest.mark.parametrize("command", chosen(light=False))
def test_nobody_reads_any(command, place):
    unread(command, place)


# ---- surroundings ----


def limited(what: int, to: int) -> Callable[[], None]:
    return lambda: resource.setrlimit(what, (to, to))


def gone(place: Path) -> Path:
    """A working folder that is removed while the command starts in it."""
    folder = place / "gone"
    folder.mkdir(exist_ok=True)
    return folder


def homeless() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("HOME", "XDG_CACHE_HOME")}


SURROUNDINGS: dict[str, Callable[[Path], dict]] = {
    "no home": lambda place: {"env": homeless()},
    "nobody": lambda place: {"env": homeless(), "code": NOBODY + CODE},
    "no variables": lambda place: {"env": {}},
    "a working folder that is for reading": lambda place: {"cwd": "/proc"},
    "a working folder that is gone": lambda place: {"cwd": gone(place), "preexec_fn": lambda: os.rmdir(place / "gone")},
    "a cache that is for reading": lambda place: {"env": os.environ | {"XDG_CACHE_HOME": "/proc"}},
    "a cache below a file": lambda place: {"env": os.environ | {"XDG_CACHE_HOME": str(place / "x.png")}},
    "no folder for temporary files": lambda place: {"env": os.environ | {"TMPDIR": "/proc/none"}},
    "ASCII": lambda place: {"env": os.environ | {"PYTHONIOENCODING": "ascii:strict", "LC_ALL": "C", "PYTHONUTF8": "0"}},
    "files of 64 KiB": lambda place: {"preexec_fn": limited(resource.RLIMIT_FSIZE, 64 << 10)},
    "16 open files": lambda place: {"preexec_fn": limited(resource.RLIMIT_NOFILE, 16)},
    **{
        f"{size} MB": lambda place, size=size: {"preexec_fn": limited(resource.RLIMIT_AS, size << 20)}
        for size in (250, 400, 700, 1100, 1600, 2500)
    },
}  # fmt: skip


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("command", chosen(light=True))
def test_surroundings(command, name, place):
    check(started(command, place, **SURROUNDINGS[name](place)), place)


@pytest.mark.slow
@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("command", chosen(light=False))
def test_surroundings_of_all(command, name, place):
    check(started(command, place, **SURROUNDINGS[name](place)), place)


OWN = [name for name in VARIABLES if name.startswith(("MINISD", "XDG", "HF", "TMPDIR"))]


@pytest.mark.parametrize("variable", OWN)
@pytest.mark.parametrize("name", ["empty", "no letters", "5,000 digits", "escape sequences", "nobody's home", "outside"])
def test_variables(variable, name, place):
    for command in (each for each in CALLED if each.words in (("models",), ("inspect",))):
        check(started(command, place, env=os.environ | {variable: TEXTS[name]}), place)


@pytest.mark.slow
@pytest.mark.parametrize("variable", OWN)
@pytest.mark.parametrize("name", ["empty", "no letters", "escape sequences", "outside"])
def test_variables_of_a_drawing(variable, name, place):
    command = next(each for each in CALLED if each.words == ("draw",))
    check(started(command, place, env=os.environ | {variable: TEXTS[name]}), place)


BROKEN = "libgomp.so.1: cannot open shared object file: No such file or directory"


@pytest.mark.parametrize(("reason", "code", "told"), [
    ("libtorch_cpu.so: failed to map segment from shared object", 4, "there is not enough memory for this"),
    (BROKEN, 1, f"a library cannot be loaded: {BROKEN} (see minisd doctor)"),
])  # fmt: skip
def test_a_library_that_cannot_be_loaded(reason, code, told, place):
    (place / "torch").mkdir()
    (place / "torch" / "__init__.py").write_text(f"raise ImportError({reason!r})")
    draw = next(each for each in CALLED if each.words == ("draw",))
    process = started(draw, place, env=os.environ | {"PYTHONPATH": str(place)})
    _, err = process.communicate(timeout=300)
    assert err.decode() == f"minisd: error: {told}\n"
    assert process.returncode == code


# ---- signals ----

WRITING = [each for each in CALLED if each.words[0] in ("draw", "again", "merge", "convert", "save", "compare", "diff")]
WRITING += [each for each in CALLED if each.words == ("models", "add")]


def interrupted(command: Command, place: Path, moments: int) -> None:
    """Sends signals at moments that are spread over a whole run; the target is what it was, or what it should be."""
    begun = time.monotonic()
    check(started(command, place), place)
    whole, wanted = time.monotonic() - begun, set(state(place / "work"))
    rng = random.Random(str(command))
    for moment in range(moments):
        for number in (signal.SIGINT, signal.SIGTERM):
            shutil.rmtree(place / "work")
            (place / "work").mkdir()
            process = started(command, place)
            time.sleep(whole * (moment + rng.random()) / moments)
            process.send_signal(number)
            codes = {0, 128 + number, -number}  # the last: before minisd has begun
            _, err = process.communicate(timeout=300)
            assert process.returncode in codes, (process.returncode, err)
            assert b"Traceback" not in err or not re.search(BEGUN, err), err
            assert set(state(place / "work")) <= wanted
            assert list((place / "tmp").iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING, ids=str)
def test_signals(command, place):
    interrupted(command, place, 5)
