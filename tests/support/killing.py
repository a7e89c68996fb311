"""Ends commands at random moments, and looks at what they have left: `python killing.py FOLDER COUNT SEED` prints the figures.

Each trial is a fork of one process that has imported and drawn already, so that the moments fall into the work and not into the
start of Python.  Run with OMP_NUM_THREADS=1: a fork has none of its parent's threads.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from helpers import write_checkpoint
from PIL import Image

from minisd.cli import main
from minisd.files.checkpoint import open_checkpoint
from minisd.files.tensors import load_tensors
from minisd.library.places import tiny_checkpoint

SIGNALS = {"SIGKILL": signal.SIGKILL, "SIGTERM": signal.SIGTERM, "SIGINT": signal.SIGINT}
ENDS = {0, 130, 143}  # how a command may end by itself, with what it was asked for or because of a signal
SMALL = ["--size", "32x32", "--device", "cpu"]
FAST = [*SMALL, "--steps", "2", "--seed", "1"]
TINY, LIT = str(tiny_checkpoint()), str(tiny_checkpoint().with_name("tiny-lit.safetensors"))
# By name: the arguments, in a folder that has old.png, old.safetensors, recipe.png and reduced.safetensors.
COMMANDS = {
    "draw": ["a star", *FAST, "-o", "old.png"],
    "draw several": ["a star", *FAST, "--num-images", "2", "--grid", "old.png"],
    "again": ["again", "recipe.png", "-o", "old.png"],
    "compare": ["compare", "a star", *SMALL, "--seeds", "1", "-m", TINY, "--x", "steps=1,2", "-o", "old.png"],
    "diff": ["diff", TINY, LIT, "--plot", "old.png"],
    "merge": ["merge", TINY, LIT, "-o", "old.safetensors"],
    "merge in place": ["merge", "old.safetensors", LIT, "-o", "old.safetensors"],
    "convert": ["convert", TINY, "-o", "old.safetensors", "--dtype", "float32"],
    "convert to a folder": ["convert", "reduced.safetensors", "-o", "folder", "--diffusers"],
    "save": ["save", "-m", TINY, "--filename-prefix", "old"],
    "models add": ["models", "add", TINY, "--folder", ".", "--name", "imported"],
    "bench": ["bench", "kernels", "geglu", "--repeats", "1", "--device", "cpu", "--json", "old.json"],
}


def prepare(folder: Path) -> None:
    folder.mkdir()
    write_checkpoint(folder / "reduced.safetensors")
    shutil.copy(TINY, folder / "old.safetensors")
    os.chdir(folder)
    quiet(["a star", *FAST, "-o", "recipe.png"])
    shutil.copy("recipe.png", "old.png")
    Path("old.json").write_text('{"old": true}')


def quiet(arguments: list[str]) -> int:
    """Runs a command with its streams closed to the world."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        return main(arguments)


def start(arguments: list[str]) -> int:
    """A fork that runs a command, and ends as the command `minisd` would; returns its id."""
    child = os.fork()
    if child == 0:
        status = 70
        try:
            status = quiet(arguments)
        except KeyboardInterrupt:  # before the command, or after it
            status = 130
        finally:
            os._exit(status)
    return child


def trial(folder: Path, arguments: list[str], number: int, after: float) -> tuple[int, list[str]]:
    """Ends a command `after` seconds; returns how it ended and what is wrong with the folder."""
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")}
    child = start(arguments)
    time.sleep(after)
    with contextlib.suppress(ProcessLookupError):
        os.kill(child, number)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    wrong = [] if status in (*ENDS, -number) else [f"ended with {status}"]
    for path in folder.iterdir():
        if path.name.startswith("."):
            wrong += [f"left {path.name}"] if number != signal.SIGKILL else []
        elif path.is_dir() or before.get(path.name) != path.read_bytes():
            wrong += torn(path)
    wrong += [f"{name} is lost" for name in before if not (folder / name).exists()]
    return status, wrong


def torn(path: Path) -> list[str]:
    """What is wrong with a file that has come or changed: it must be a whole one."""
    try:
        if path.is_dir():
            return [each for inner in path.rglob("*") if inner.is_file() for each in torn(inner)] or lacking(path)
        if path.suffix == ".png":
            with Image.open(path) as picture:
                picture.load()
        elif path.suffix == ".safetensors":
            checkpoint = open_checkpoint(path)
            load_tensors(checkpoint, checkpoint.entries, torch.float32)
        elif path.suffix == ".json":
            json.loads(path.read_text())
    except Exception as error:
        return [f"{path.name}: {type(error).__name__} {error}"]
    return []


def lacking(folder: Path) -> list[str]:
    parts = (
        "model_index.json",
        "unet/diffusion_pytorch_model.safetensors",
        "text_encoder/model.safetensors",
        "minisd.safetensors",
    )
    return [f"{folder.name} lacks {part}" for part in parts if not (folder / part).exists()]


def reset(folder: Path, whole: dict[str, bytes]) -> None:
    """The folder as it was, without what a killed command may have left."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in whole:
            path.unlink()
    for name, content in whole.items():
        if (folder / name).stat().st_size != len(content) or (folder / name).read_bytes() != content:
            (folder / name).write_bytes(content)


def strays_go(folder: Path, arguments: list[str]) -> list[str]:
    """What is still there of killed commands when the same one has ended well."""
    shutil.rmtree(folder / "folder", ignore_errors=True)
    os.waitpid(start(arguments), 0)
    return [f"{path.name} is still there" for path in folder.iterdir() if path.name.startswith(".")]


def trials(folder: Path, count: int, rng: random.Random) -> Iterator[dict[str, object]]:
    whole = {path.name: path.read_bytes() for path in folder.iterdir()}
    for name, arguments in COMMANDS.items():
        quiet(arguments)  # imports what it needs; the forks have it
        reset(folder, whole)
        started = time.monotonic()
        assert os.waitstatus_to_exitcode(os.waitpid(start(arguments), 0)[1]) == 0, name
        took = time.monotonic() - started
        for title, number in SIGNALS.items():
            faults, ends = [], []
            for _ in range(count):
                if number != signal.SIGKILL:  # strays of a killed one are for the next to clean up
                    reset(folder, whole)
                shutil.rmtree(folder / "folder", ignore_errors=True)  # a whole one would be in the way
                status, wrong = trial(folder, arguments, number, rng.uniform(0, took * 1.1))
                ends.append(status)
                faults += wrong
            if number == signal.SIGKILL:
                faults += strays_go(folder, arguments)
            reset(folder, whole)
            stopped = sum(status != 0 for status in ends)
            yield {"command": name, "signal": title, "trials": count, "stopped": stopped, "seconds": took, "faults": faults}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a run in the background has ignored
    torch.set_num_threads(1)
    home = Path(sys.argv[1])
    prepare(home)
    for row in trials(home, int(sys.argv[2]), random.Random(int(sys.argv[3]))):
        print(json.dumps(row), flush=True)
