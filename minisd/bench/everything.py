"""bench all: every figure of the project in one go, the most wanted first, each part in a process of its own.

A part that fails or takes too long costs its own rows and no others, and what is measured is in the file at once.  Last come the
figures that matter most, each beside its floor and the best of its peers.  Peers count where they were measured in the same run
as ours.  The floor of a network is the arithmetic of its plain form at the matrix rate of the run: a form with less of it, as of
the upsampling convolutions, may go below.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..fast.choice import kernels
from .networks import MODELS, random_checkpoint
from .report import Report, Row, seconds_of, write_json
from .steps import FLOOR
from .whole.table import AGAIN, FIRST

NEVER_COMPILED = ["--peers", "eager,graph"]
COMPILED = ["--peers", "compiled"]  # a minute or two of compilation each, so they come last
LONGEST = 200.0  # seconds for a part

# Of the summary.
FIGURES = ("time ms", "floor ms", "best peer ms", "to ours", "which peer")

# Rows of `bench kernels`: kernel, shape.
SHAPES = [
    ("group_norm", "SD 1.5 320@64x64"),
    ("group_norm", "VAE 128@1024x1024"),
    ("attention", "SD 1.5 self d=40 64x64"),
    ("attention", "SDXL self d=64 64x64"),
    ("wide_attention", "VAE d=512 128x128"),
]
NETWORKS = ["SD 1.5 UNet step", "SD 2.1-768 UNet step", "SDXL UNet step", "VAE decoding 512x512", "VAE decoding 1024x1024"]
OURS = ("minisd, whole step as drawn", "minisd, fused")  # of a network: the first that there is


def parts(with_files: bool) -> list[list[str]]:
    """The commands, in the order of their weight."""
    known = kernels().KERNELS
    tiled = [name for name, module in known.items() if hasattr(module, "tiles")]
    first = [["unet", "--model", name, *NEVER_COMPILED] for name in ("sd15", "sdxl")]
    first += [["vae", *NEVER_COMPILED]]
    first += [["kernels", name] for name in known]
    first += [["image", "--model", "sd15", "--peers", "eager"], ["load", "--model", "sd15"]] if with_files else []
    first += [["unet", "--model", name, "--ablate", "--fp8", "--peers", ""] for name in ("sd15", "sdxl")]
    first += [["roofline", "--model", name] for name in ("sd15", "sdxl")]
    first += [["vae", "--ablate", "--peers", ""], ["unet", "--model", "sd21", *NEVER_COMPILED]]
    return [*first, *(["unet", "--model", name, *COMPILED] for name in ("sd15", "sdxl")), ["vae", *COMPILED],
            ["unet", "--model", "sd21", *COMPILED], *(["kernels", name, "--tiles"] for name in tiled)]  # fmt: skip


def bench(report: Report, args: Any) -> None:
    if args.json is None:
        raise UsageError("bench all: expected --json FILE, where the figures go as they come")
    clock, end = report.clock, time.monotonic() + 60 * args.minutes
    common = ["--device", str(clock.device), "--repeats", str(args.repeats), *(["--full"] if args.full else [])]
    common += ["--dtype", args.dtype] if args.dtype else []  # the default is not the same for all parts
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
    report.table("summary: to ours is the time of the best peer over that of minisd", FIGURES)
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


def summary(tables: list[dict[str, Any]]) -> Iterator[tuple[str, Row]]:
    """(label, values) for each figure that was measured."""
    for name in NETWORKS:
        yield from hardest(name, [network(rows) for rows in tables_of(tables, name)])
    for kernel, shape in SHAPES:
        found = [[row for row in rows if row["label"].startswith(shape)] for rows in tables_of(tables, f"{kernel}, ")]
        yield from hardest(f"{kernel} {shape}", [one_kernel(rows) for rows in found])
    for rows in tables_of(tables, "SD 1.5 picture"):
        for label in ("minisd, prompt to uint8", FIRST, AGAIN):
            times = times_of(rows)
            peers = theirs(times) if label != FIRST else {}
            yield from hardest(f"SD 1.5: {label}", [compared(times.get(label), None, peers)])
    for rows in tables_of(tables, "opening a "):
        ours = next((row for row in rows if row["label"].startswith("minisd") and seconds_of(row, "time")), None)
        if ours:
            values = compared(seconds_of(ours, "time"), None, theirs(times_of(rows)))
            yield from hardest(f"opening an SD 1.5 file at {ours['GB/s']:.3g} GB/s", [values])


def tables_of(tables: list[dict[str, Any]], title: str) -> list[list[Row]]:
    """The rows, without those that failed, of each table whose title begins so."""
    return [[row for row in table["rows"] if "error_text" not in row] for table in tables if table["title"].startswith(title)]


def times_of(rows: list[Row], name: str = "label") -> dict[str, float]:
    """The seconds of each row that has a time, by its label or another of its values."""
    return {row[name]: seconds for row in rows if (seconds := seconds_of(row, "time"))}


def theirs(times: dict[str, float]) -> dict[str, float]:
    return {label: time for label, time in times.items() if label.startswith("diffusers")}


def network(rows: list[Row]) -> Row:
    times = times_of(rows)
    ours = next((times[label] for label in OURS if label in times), None)
    return compared(ours, times.get(FLOOR), theirs(times))


def one_kernel(rows: list[Row]) -> Row:
    times = times_of(rows, "variant")
    ours = times.pop("minisd", None)
    share = next((row.get("of_ceiling") for row in rows if row["variant"] == "minisd"), None)
    library = {variant: time for variant, time in times.items() if not variant[0].isdigit()}  # without other tiles of ours
    return compared(ours, ours * share if ours and share else None, library)


def compared(ours: float | None, floor: float | None, peers: dict[str, float]) -> Row:
    """A row of the summary, from seconds; nothing in it where ours was not measured."""
    if ours is None:
        return {}
    values: Row = {"time": ours, "floor": floor}
    if peers:
        best = min(peers, key=lambda name: peers[name])
        values |= {"best_peer": peers[best], "to_ours": peers[best] / ours, "which_peer": best}
    return values


def hardest(label: str, runs: list[Row]) -> Iterator[tuple[str, Row]]:
    """Of several runs the one in which the best peer comes closest to ours, or is furthest ahead."""
    measured = [run for run in runs if run]
    if measured:
        yield label, min(measured, key=lambda run: run.get("to_ours", float("inf")))
