"""bench image and bench load: from a file to a picture, in a running process and in fresh ones."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..files.checkpoint import open_checkpoint
from ..library.names import resolve
from ..system.memory import free_memory
from . import peers
from .networks import MODELS, random_checkpoint
from .report import Report
from .whole import table

PROMPT = "a photograph of an astronaut riding a horse"
DIFFUSERS = """
from diffusers import {pipeline} as Pipeline
def run():
    pipe = Pipeline.from_single_file({path!r}, config={config!r}, local_files_only=True, torch_dtype={dtype})
    return pipe.to({device!r})
"""
MEASURE = """
import time, torch, numpy, safetensors.torch, tokenizers
{setup}
torch.empty(1, device={device!r})
def peak(): return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) * 1024
before, start = peak(), time.perf_counter()
pipe = run()
if {device!r} != "cpu": torch.cuda.synchronize()
print(time.perf_counter() - start, peak() - before)
"""


@contextlib.contextmanager
def checkpoint(report: Report, args: Any) -> Iterator[Path]:
    """The file that was given, or one with random weights for as long as it is needed."""
    if args.checkpoint:
        yield open_checkpoint(resolve(args.checkpoint)).path
    else:
        with tempfile.TemporaryDirectory() as folder:
            yield random_checkpoint(MODELS[args.model], Path(folder) / f"{args.model}.safetensors", report.clock.device)


# -P keeps the working directory off the path: in a checkout, diffusers would take kernels/ for another package.
def python(code: str, environment: dict[str, str] | None = None) -> str:
    """What a fresh process prints."""
    quiet = os.environ | {"HF_HUB_OFFLINE": "1"} | (environment or {})
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=quiet, check=False)
    if run.returncode:
        raise RuntimeError((run.stderr.strip().splitlines() or ["the process failed"])[-1])
    return run.stdout


def bench_load(report: Report, args: Any) -> None:
    """Fresh processes, in turn, with the file in the page cache; imports and the start of CUDA are not counted."""
    device, dtype = str(report.clock.device), str(report.clock.dtype)
    with checkpoint(report, args) as path, tempfile.TemporaryDirectory() as folder:
        size = path.stat().st_size
        report.table(
            f"opening a {size / 1e9:.2f} GB file to ready modules on {device}; peak is host memory",
            ("time s", "GB/s", "peak GB", "to ours"),
        )
        setups = {f"minisd, {dtype}": "import minisd.pipeline\nrun = lambda: minisd.load({path!r}, {device!r}, {dtype})"}
        if peers.INSTALLED and args.peers:
            peers.write_configs(path, Path(folder))
            setups[f"diffusers, {dtype}"] = DIFFUSERS
            needed, free = 3.3 * path.stat().st_size, free_memory(torch.device("cpu"))  # 3.0 measured
            if free is None or needed < free:
                setups["diffusers, torch.float32 (its default)"] = DIFFUSERS.replace("{dtype}", "None")
            else:
                report.note(f"diffusers in float32, its default, is left out: it needs {needed / 1e9:.0f} GB of memory")
        setups["as much new memory, zeroed"] = "run = lambda: torch.zeros({size} // 2, dtype={dtype}, device={device!r})"
        runs: dict[str, list[tuple[float, float]]] = {name: [] for name in setups}
        for _ in range(min(args.repeats, 5) + 1):  # the first brings the file into the page cache
            for name, setup in setups.items():
                values = {"path": str(path), "config": folder, "size": size, "dtype": dtype, "device": device}
                values["pipeline"] = "StableDiffusionXLPipeline" if args.model == "sdxl" else "StableDiffusionPipeline"
                with report.attempt(name):
                    out = python(MEASURE.format(setup=setup.format(**values), device=device))
                    seconds, peak = map(float, out.splitlines()[-1].split())
                    runs[name].append((seconds, peak))
        ours = None
        for name, measured in runs.items():
            if len(measured) > 1:
                seconds = statistics.median(seconds for seconds, _ in measured[1:])
                ours = ours or seconds
                peak = max(peak for _, peak in measured[1:]) / 1e9
                report.add(name, time=seconds, **{"GB/s": size / seconds / 1e9}, peak_GB=peak, to_ours=seconds / ours)


@torch.no_grad()
def bench_image(report: Report, args: Any) -> None:
    """Whole processes, from a command to the file on disk; then prompt to pixels in a running one, and where its time goes."""
    with checkpoint(report, args) as path:
        steps = args.steps or (20 if args.full else 4)
        model = MODELS[args.model]
        side = 8 * (model.latents if args.full else model.latents // 4)
        width, height = args.size or (side, side)
        drawn = model.name if path.stem == args.model else path.stem
        asked: dict[str, Any] = {"prompt": PROMPT, "width": width, "height": height, "steps": steps}
        table.bench(report, args.peers, drawn, path=str(path), **asked)
        if args.processes:
            return
        report.table(f"{drawn} picture, {width}x{height}, {steps} steps, guidance, euler", ("time s", "first s", "to ours"))
        ours = None
        with report.attempt("minisd"):
            ours = running_process(report, args, path, asked)
        if peers.INSTALLED and "eager" in args.peers and args.model == "sd15":
            with report.attempt("diffusers, eager"):
                diffusers_picture(report, path, asked, ours)


def running_process(report: Report, args: Any, path: Path, asked: dict[str, Any]) -> float:
    from ..pipeline import load
    from ..request import Request

    clock = report.clock
    pipe = load(path, str(clock.device), clock.dtype)
    pipe.checkpoint.sha256()  # of the whole file, once: not what a picture takes
    marks: list[float] = []

    def draw() -> None:
        stream = pipe.stream(Request(**asked, seed=0))
        marks[:] = [time.perf_counter()]
        for _ in stream:
            marks.append(time.perf_counter())
        clock.synchronise()
        marks.append(time.perf_counter())

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # random weights overflow where trained ones do not
        first = clock.once(draw)
        times, parts = [], []
        for _ in range(max(3, args.repeats // 4)):
            times.append(clock.once(draw))
            parts.append((marks[1] - marks[0], marks[-2] - marks[1], marks[-1] - marks[-2]))
    ours = statistics.median(times)
    report.add("minisd, prompt to uint8", time=ours, first=first, to_ours=1.0)
    names = ("to the end of the first step", "further steps, as the host sees them", "the rest: decoding, waiting")
    for name, values in zip(names, zip(*parts, strict=True), strict=True):
        report.add(f"  {name}", time=statistics.median(values))
    return ours


def diffusers_picture(report: Report, path: Path, asked: dict[str, Any], ours: float | None) -> None:
    from diffusers import StableDiffusionPipeline

    clock = report.clock
    with tempfile.TemporaryDirectory() as folder:
        peers.write_configs(path, Path(folder))
        options: dict[str, Any] = {"local_files_only": True, "torch_dtype": clock.dtype}
        pipe = StableDiffusionPipeline.from_single_file(str(path), config=folder, **options).to(clock.device)
    pipe.set_progress_bar_config(disable=True)
    size = {"width": asked["width"], "height": asked["height"]}
    draw: Callable[[], Any] = partial(pipe, asked["prompt"], num_inference_steps=asked["steps"], **size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        first = clock.once(draw)
        seconds = statistics.median(clock.once(draw) for _ in range(3))
    report.add("diffusers, eager", time=seconds, first=first, to_ours=seconds / ours if ours else None)
