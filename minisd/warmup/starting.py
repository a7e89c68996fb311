"""Starts the process that compiles, and remembers what it has compiled.  Nothing here imports torch.

Drawing starts it as soon as it knows the file: torch, the driver and the weights take as long to come as the compiler takes, and
whoever launches a kernel first finds it in Triton's cache.  What goes wrong here costs time, and nothing else.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from .. import __path__ as package_path
from .. import __version__
from ..errors import CheckpointError, MinisdError
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.recognition import recognise
from ..library.names import resolve
from ..library.places import tiny_checkpoint
from ..models.shapes import Shapes
from ..system.cache import keep, recall

if TYPE_CHECKING:
    import torch

MOST = 8  # processes: there are about 25 variants for a model, the longest of which takes a fifth of the time of all
HALVES = re.compile(r"first_stage_model\.encoder\.down\.\d+\.downsample\.conv\.weight")
DOWNSCALE = 8  # pixels for a number of the latents, of the published VAEs
NAME, KEPT = "compiled", 64  # of what is remembered (system/cache.py), and how many jobs are
MAJOR, MINOR = 75, 76  # cuda.h, CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR


def of_shapes(
    shapes: Shapes, family: str, size: tuple[int, int], dtype: str = "float16", fp8: bool = False,
    masked: Sequence[bool] = (False, True),
) -> dict[str, Any]:  # fmt: skip
    """A model of a job: what its networks are, the width and height that it draws, and the number format of its UNet."""
    halves = sum(bool(HALVES.fullmatch(key)) for key in shapes)
    latents = [side // (2**halves if halves else DOWNSCALE) for side in reversed(size)]
    how = {"latents": latents, "dtype": dtype, "fp8": fp8, "masked": list(masked)}
    return {"shapes": dict(shapes), "family": family} | how


def of_checkpoint(
    checkpoint: Checkpoint, size: tuple[int | None, int | None] = (None, None), dtype: str = "float16", fp8: bool = False
) -> Any:
    """`of_shapes` of a file, from its header; size: by default its own.  Raises CheckpointError."""
    with warnings.catch_warnings():  # who draws with it is told
        warnings.simplefilter("ignore")
        found = recognise(checkpoint, vae_given=True)
    width, height = (side or own for side, own in zip(size, found.size, strict=True))
    return of_shapes(checkpoint.shapes, found.family.name, (width, height), dtype, fp8)


def job_of(models: Iterable[dict[str, Any]], capability: int, processes: int | None = None) -> dict[str, Any]:
    free = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = processes or max(1, min(MOST, free - 1))
    return {"capability": capability, "processes": count, "models": list(models)}


def started(module: str, job: Any, caches: Mapping[str, Path] = MappingProxyType({})) -> subprocess.Popen[str]:
    """A module of ours in a process of its own, with a job on its standard input; caches: other places, by their variables."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment |= {name: str(folder) for name, folder in caches.items()}
    with tempfile.TemporaryFile("w+") as given:  # a pipe would be full before the other side has imported torch
        json.dump(job, given)
        given.seek(0)
        command = [sys.executable, "-P", "-m", module]
        return subprocess.Popen(command, stdin=given, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def said(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    """What it says, line by line.  Raises RuntimeError, with its own last word, where it fails; ends it in any case."""
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        for line in process.stdout:
            yield json.loads(line)
        if process.wait():
            raise RuntimeError((process.stderr.read().strip().splitlines() or ["the process failed"])[-1])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


def warm(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Compiles what the models of a job launch: first how many variants there are, then what became of each, as it comes."""
    places = []
    for each in said(started(f"{__package__}.worker", job)):
        places.append(each.get("place", ""))
        yield each
    remember(job, places[1:])


def fingerprint(job: dict[str, Any]) -> str:
    """Of all that decides what is compiled, and where to: networks, GPU, kernels, Triton, and what the environment says."""
    kernels = next(folder for folder in (Path(place, "kernels") for place in package_path) if folder.is_dir())
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(kernels.glob("*.py"))]
    try:
        triton = version("triton")
    except PackageNotFoundError:
        triton = ""
    told = {name: value for name, value in os.environ.items() if name.startswith(("TRITON_", "MINISD_KERNELS"))}
    facts = [__version__, triton, files, sorted(told.items()), job["capability"], job["models"]]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def remember(job: dict[str, Any], places: Sequence[str]) -> None:
    """That all of a job lies in these folders of Triton's cache; "" stands for what did not compile."""
    if places and all(places):
        known = list((recall(NAME) | {fingerprint(job): list(places)}).items())
        keep(NAME, dict(known[-KEPT:]))


def is_compiled(job: dict[str, Any]) -> bool:
    places = recall(NAME).get(fingerprint(job))
    return isinstance(places, list) and all(isinstance(each, str) and os.path.isdir(each) for each in places)


def capability_here(index: int = 0) -> int | None:
    """The compute capability of a GPU of this machine, from its driver; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        device, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        failed = driver.cuInit(0) or driver.cuDeviceGet(ctypes.byref(device), index)
        for number, attribute in ((major, MAJOR), (minor, MINOR)):
            failed = failed or driver.cuDeviceGetAttribute(ctypes.byref(number), attribute, device)
    except (OSError, AttributeError):
        return None
    return None if failed else 10 * major.value + minor.value


RUNNING: dict[Path, tuple[dict[str, Any], subprocess.Popen[str]]] = {}  # by the checkpoint


def begin(checkpoint: Checkpoint, capability: int, size: tuple[int | None, int | None], dtype: str, fp8: bool = False) -> None:
    """Starts to compile what a file's networks launch, unless that is done or under way."""
    path = checkpoint.path.resolve()
    told = os.environ.get("MINISD_KERNELS") or "auto"
    if path in RUNNING or told == "torch" or importlib.util.find_spec("triton") is None:
        return
    job = job_of([of_checkpoint(checkpoint, size, dtype, fp8)], capability)
    if not is_compiled(job):
        RUNNING[path] = job, started(f"{__package__}.worker", job)
        if len(RUNNING) == 1:
            atexit.register(stop)


def begin_early(
    model: str | None, device: str | None, dtype: str | None, size: tuple[int | None, int | None] = (None, None),
    fp8: bool = False,
) -> None:  # fmt: skip
    """For a command, before it imports torch: `begin` for the file and GPU that these name; what is wrong is told later."""
    name, _, index = (device or "cuda").partition(":")
    if name != "cuda" or os.environ.get("MINISD_FAST") == "0" or not (index or "0").isdecimal():
        return
    with contextlib.suppress(MinisdError, OSError, ValueError):
        capability = capability_here(int(index or 0))
        if capability is not None:
            file = open_checkpoint(resolve(model) if model is not None else tiny_checkpoint())
            begin(file, capability, size, dtype or "float16", fp8)


@contextlib.contextmanager
def compiling(
    checkpoint: Checkpoint, device: torch.device, dtype: torch.dtype, fast: bool | None, fp8: bool = False
) -> Iterator[None]:
    """While a file is loaded onto a GPU, the kernels that it will launch are compiled; they are there at the end."""
    plain = fast is False or (fast is None and os.environ.get("MINISD_FAST") == "0")
    if device.type == "cuda" and not plain:
        import torch

        major, minor = torch.cuda.get_device_capability(device)
        with contextlib.suppress(CheckpointError, OSError):  # what is wrong with the file is told by who loads it
            begin(checkpoint, 10 * major + minor, (None, None), str(dtype).removeprefix("torch."), fp8)
    try:
        yield
    except BaseException:  # nothing will be drawn with it
        stop()
        raise
    finish(checkpoint)


def finish(checkpoint: Checkpoint) -> None:
    """Waits for what was begun for a file."""
    job, process = RUNNING.pop(checkpoint.path.resolve(), (None, None))
    if job is not None and process is not None:
        with contextlib.suppress(RuntimeError, OSError, ValueError):
            remember(job, [each.get("place", "") for each in said(process)][1:])


def stop() -> None:
    """Ends what is under way."""
    for _, process in RUNNING.values():
        process.kill()
        process.wait()
    RUNNING.clear()
