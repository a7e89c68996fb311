"""bench all: every figure of the project in one go, the most wanted first, each part in a process of its own.

A part that fails or takes too long costs its own rows and no others, and what is measured is in the file at once.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..fast.choice import kernels
from ..system.device import name_of
from .networks import MODELS, random_checkpoint
from .report import Report, write_json
from .summary import COLUMNS, summary

NEVER_COMPILED = ["--peers", "eager,graph"]
COMPILED = ["--peers", "compiled"]  # a minute or two of compilation each, so they come last
LONGEST = 200.0  # seconds for a part


def parts(with_files: bool) -> list[list[str]]:
    """The commands, in the order of their weight."""
    known = kernels().KERNELS
    tiled = [name for name, module in known.items() if hasattr(module, "tiles")]
    first = [["unet", "--model", name, *NEVER_COMPILED] for name in ("sd15", "sdxl")]
    first += [["vae", *NEVER_COMPILED]]
    first += [["kernels", name] for name in known]
    first += [["image", "--model", "sd15"], ["load", "--model", "sd15"]] if with_files else []
    first += [["unet", "--model", name, "--ablate", "--peers", ""] for name in ("sd15", "sdxl")]
    first += [["roofline", "--model", name] for name in ("sd15", "sdxl")]
    first += [["vae", "--ablate", "--peers", ""], ["unet", "--model", "sd21", *NEVER_COMPILED]]
    return [*first, *(["unet", "--model", name, *COMPILED] for name in ("sd15", "sdxl")), ["vae", *COMPILED],
            ["unet", "--model", "sd21", *COMPILED], *(["kernels", name, "--tiles"] for name in tiled)]  # fmt: skip


def bench(report: Report, args: Any) -> None:
    if args.json is None:
        raise UsageError("bench all: expected --json FILE, where the figures go as they come")
    clock, end = report.clock, time.monotonic() + 60 * args.minutes
    common = ["--device", str(clock.device), "--dtype", name_of(clock.dtype), "--repeats", str(args.repeats)]
    common += ["--full"] if args.full else []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sd15.safetensors"
        try:
            random_checkpoint(MODELS["sd15"], path, clock.device)
        except Exception as error:  # no room for it: the parts that need no file go on
            report.skip("a checkpoint with random weights", str(error))
            path.unlink(missing_ok=True)
        if clock.is_cuda:
            torch.cuda.empty_cache()
        for number, part in enumerate(parts(path.exists())):
            left = end - time.monotonic()
            name = " ".join(part)
            if left < 5:
                report.skip(name, "no time left: raise --minutes")
                continue
            out = Path(folder) / f"{number}.json"
            file = ["--checkpoint", str(path)] if part[0] in ("image", "load") else []
            command = [sys.executable, "-P", "-m", "minisd", "bench", *part, *common, *file, "--json", str(out)]
            print(f"\n$ minisd bench {name}", flush=True)
            start = time.monotonic()
            process = subprocess.Popen(command)
            merge(report, args.json, watched(process, min(left, LONGEST)), name, out, time.monotonic() - start)
    figures = list(summary(report.tables))
    report.table("summary: to ours is the time of the best peer over that of minisd", COLUMNS)
    for label, values in figures:
        report.add(label, **values)


def watched(process: subprocess.Popen[bytes], seconds: float) -> str | None:
    """Waits; what went wrong, or None."""
    try:
        status = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return f"stopped after {seconds:.0f} s"
    return f"ended with status {status}" if status else None


def merge(report: Report, path: Path, failure: str | None, name: str, out: Path, seconds: float) -> None:
    """Adds what a part has measured, all of it or up to where it stopped, and writes the file."""
    if out.exists():
        report.tables += [table | {"command": name} for table in json.loads(out.read_text(encoding="utf-8"))["tables"]]
    if failure:
        report.skip(name, failure)
    print(f"  ({seconds:.0f} s)", flush=True)
    write_json(path, report.as_json())
