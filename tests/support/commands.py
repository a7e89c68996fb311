"""Every command and option of the command line, found by walking its own parsers, and what must hold however they are called."""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import importlib
import io
import os
import pkgutil
import re
import shutil
import signal
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import peak

import minisd.cli
from minisd.cli.options import Parser

DOCUMENTED = {0, 1, 2, 3, 4, 5, 6, 129, 130, 141, 143}  # minisd/cli/main.py
LONGEST = 2100  # characters of a line: 2,000 and how many there were
PATIENCE = 60  # seconds; what hangs is ended then
MEMORY = 1 << 30  # bytes that a refusal may take at most

# What makes an honest call quick, where a command has the option.
QUICKLY = {"--steps": "1", "--size": "8x8", "--seed": "1", "--seeds": "1", "--device": "cpu", "--dtype": "float32",
           "--workers": "1", "--repeats": "1", "--minutes": "0.001"}  # fmt: skip
FINISHED = ("out.png",)  # a picture that is drawn stays, whatever fails after it
OUTPUTS = ("-o", "--output", "--grid", "--preview", "--plot", "--json", "--folder", "--filename-prefix")


@dataclass(frozen=True)
class Command:
    """A command, or one of the choices of its first argument ("bench kernels"), and its parser's actions."""

    words: tuple[str, ...]
    actions: tuple[argparse.Action, ...]

    def __str__(self) -> str:
        return " ".join(self.words)

    @property
    def flags(self) -> set[str]:
        return {flag for action in self.actions for flag in action.option_strings}


def commands() -> list[Command]:
    """Those of every parser that a module of minisd.cli makes: one that is added is among them without a word here."""
    found = {}
    for module in pkgutil.walk_packages(minisd.cli.__path__, "minisd.cli."):
        for name, make in vars(importlib.import_module(module.name)).items():
            if re.fullmatch(r"(\w+_)?parser", name) and getattr(make, "__module__", "") == module.name:
                found |= {each.words: each for each in below(make())}
    return list(found.values())


def below(parser: Parser) -> Iterator[Command]:
    words, actions = tuple(parser.prog.split()[1:]), tuple(parser._actions)
    first = next((action for action in actions if not action.option_strings), None)
    if first is None or not first.choices or first.nargs == "?" or first.metavar:
        yield Command(words, actions)
        return
    rest = tuple(action for action in actions if action is not first)
    yield from (Command((*words, str(choice)), rest) for choice in first.choices)


def is_file(action: argparse.Action) -> bool:
    """Whether a path, or the name of a model, is expected.  By what the help calls it; what is not known may be one."""
    named = f"{action.metavar or action.dest}"
    return (
        action.type is Path or re.search(r"FILE|MANIFEST|PICTURE|PNG|MODEL|CHECKPOINT|FOLDER|PREFIX|^[A-C]$", named) is not None
    )


def is_output(action: argparse.Action) -> bool:
    return any(flag in OUTPUTS for flag in action.option_strings) and action.nargs != 0


def takes_value(action: argparse.Action) -> bool:
    return action.nargs != 0


def name_of(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else action.dest


def honest(action: argparse.Action, files: dict[str, str]) -> list[str]:
    """What may stand for a required argument."""
    if action.choices:
        return [str(next(iter(action.choices)))]
    if is_output(action):
        return ["made.safetensors"]
    if is_file(action):
        kinds = {"PICTURE": "picture", "PNG": "picture", "MANIFEST": "manifest"}
        kind = next((kind for word, kind in kinds.items() if word in str(action.metavar)), "model")
        return [files[kind]] * (2 if action.nargs == "*" else 1)
    return ["a star"]


def call(command: Command, files: dict[str, str], changed: argparse.Action | None = None, value: str = "") -> list[str]:
    """A quick, honest call of a command but for one argument, which has this value."""
    line, last = list(command.words), []
    for action in command.actions:
        given = [value] if action is changed else None
        if not action.option_strings:
            if given or action.nargs != "?":
                last += given or honest(action, files)
        elif given:
            line += [f"{name_of(action)}={value}"] if name_of(action).startswith("--") else [name_of(action), value]
        elif action.required:
            line += [name_of(action), *honest(action, files)]
        elif (quick := next((flag for flag in action.option_strings if flag in QUICKLY), None)) and takes_value(action):
            line += [quick, QUICKLY[quick]]
    return [*line, *(["--"] if any(each.startswith("-") for each in last) else []), *last]


class Hang(BaseException):
    """Not an Exception: nobody may take it for a fault of a file."""


def stop(*_: object) -> None:
    raise Hang(f"took more than {PATIENCE} s")


def state(folder: Path) -> dict[str, tuple[int, int, int]]:
    """Every entry below a folder, with what changes when it is written."""
    found = {}
    for parent, names, others in os.walk(folder):
        for name in (*names, *others):
            facts = os.lstat(os.path.join(parent, name))
            found[os.path.relpath(os.path.join(parent, name), folder)] = (facts.st_size, facts.st_mtime_ns, facts.st_mode)
    return {name: facts if not is_folder(facts[2]) else (0, 0, facts[2]) for name, facts in found.items()}


def is_folder(mode: int) -> bool:
    return mode & 0o170000 == 0o040000


class Streams(io.StringIO):
    encoding = "utf-8"  # type: ignore[assignment]


def run(argv: Sequence[str], here: Path, watched: Sequence[Path] = ()) -> list[str]:
    """Calls the command line in this process and folder; gives what is wrong with how it went, nothing if nothing is."""
    before = [state(folder) for folder in (here, *watched)]
    out, err = Streams(), Streams()
    peak.reset()
    start = peak.memory()
    kept = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    faulthandler.dump_traceback_later(2 * PATIENCE, exit=True)
    try:
        with contextlib.chdir(here), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                code = minisd.cli.main(argv)
            except SystemExit as end:  # argparse
                code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    except (Exception, Hang, KeyboardInterrupt) as error:
        return [f"raised {type(error).__name__}: {str(error)[:300]}"]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, kept)
        faulthandler.cancel_dump_traceback_later()
    wrong = judged(code, out.getvalue(), err.getvalue(), "--json" in argv or argv[:1] == ["completion"])
    if code and peak.memory() - start > MEMORY:
        wrong.append(f"took {(peak.memory() - start) / 1e9:.1f} GB")
    return wrong + left_behind(code, before, [state(folder) for folder in (here, *watched)])


def judged(code: int, out: str, err: str, data: bool = False) -> list[str]:
    """What is wrong with an exit code and the lines on both streams."""
    wrong = [f"exit code {code}"] if code not in DOCUMENTED else []
    lines = err.split("\n")[:-1] if err else []
    errors = [line for line in lines if line.startswith("minisd: error: ")]
    if err and not err.endswith("\n"):
        wrong.append("the last line of stderr does not end")
    wrong += [f"stderr has {line[:200]!r}" for line in lines if not line.startswith("minisd: ")]
    wrong += [f"stderr is not printable: {line[:200]!r}" for line in lines if not line.isprintable()]
    wrong += [f"a line of {len(line):,} characters" for line in lines if len(line) > LONGEST]
    if (len(errors) != 1 and 0 < code <= 6) or (errors and code == 0):
        wrong.append(f"exit code {code} with {len(errors)} errors")
    if any(error.endswith(": ") or ": ;" in error or "standard output" in error for error in errors):
        wrong.append(f"no reason, or none of its own: {errors[0]}")
    if not data:
        wrong += [f"stdout: {line[:200]!r}" for line in out.split("\n") if not line.isprintable() or len(line) > LONGEST]
    return wrong


def ended_by_others(code: int, err: str) -> bool:
    """Whether C++ in PyTorch, or glibc, ended the process for want of memory: neither asks anybody."""
    return (code == -signal.SIGABRT and "terminate called" in err) or (code == 127 and "thread-local data: ABORT" in err)


def begun(names: Iterable[str]) -> set[str]:
    """Of batches: what they go on from when they are started again."""
    folders = [name.removesuffix("/job.json") for name in names if name.endswith("/job.json")]
    return {f"{folder}{end}" for folder in folders for end in ("", "/job.json", "/errors.jsonl")}


def left_behind(code: int, before: list[dict], after: list[dict]) -> list[str]:
    """Files that an error made, changed or removed, and drafts that anything left."""
    wrong = []
    for old, new in zip(before, after, strict=True):
        made = sorted(set(new) - set(old) - {*FINISHED} - begun(new))
        wrong += [f"left {name!r}" for name in made if code or "minisd-tmp" in name]
        if code:
            wrong += [f"changed {name!r}" for name, facts in old.items() if new.get(name) != facts]
    return wrong


@contextlib.contextmanager
def alone(root: Path) -> Iterator[tuple[Path, list[Path]]]:
    """A working folder, and the others that must stay as they are, of temporary files and home.  Gone afterwards."""
    for name in ("work", "tmp", "home"):
        (root / name).mkdir(parents=True, exist_ok=True)
    (root / "work" / "loop").symlink_to("loop")
    temporary, tempfile.tempdir = tempfile.tempdir, str(root / "tmp")
    given = {name: os.environ.get(name) for name in ("HOME", "TMPDIR")}
    os.environ |= {"HOME": str(root / "home"), "TMPDIR": str(root / "tmp")}
    try:
        yield root / "work", [root / "tmp", root / "home"]
    finally:
        shutil.rmtree(root)
        tempfile.tempdir = temporary
        for name, value in given.items():
            os.environ.pop(name, None) if value is None else os.environ.__setitem__(name, value)
