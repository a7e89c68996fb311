"""Every kernel over the shapes that Stable Diffusion really uses, against the library's alternatives, on the GPU at hand.

    python scripts/bench_kernels.py                       all kernels, float16
    python scripts/bench_kernels.py attention --dtype bfloat16 --json attention.json

For each: time (median of CUDA graph replays, several calls in a graph, because launching one takes longer than a small kernel
runs), bandwidth and arithmetic rate, their share of a copy and of a matrix product measured in the same run, and the relative L2
error against float64.  A row that fails says why, and the next one runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from minisd.kernels import KERNELS

DEVICE = "cuda"
CALLS = 10  # in a graph: one call in a graph would read 10 us too long (fixed costs of launch and events)
REPLAYS = 20


def microseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU alone."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):  # compiles, and lets libraries choose
            call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(CALLS):
            call()
    times = []
    for _ in range(REPLAYS):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / CALLS)
    return statistics.median(times)


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What the GPU reaches at best in this run: bytes/s of a copy of 1 GB, operations/s of a product of 8192 x 8192 matrices."""
    source, target = (torch.empty(1 << 29, device="cuda", dtype=torch.float16) for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=dtype) for _ in range(2))
    copied = 2 * source.nbytes / microseconds(lambda: target.copy_(source)) * 1e6
    return {"bytes/s": copied, "flop/s": 2 * 8192**3 / microseconds(lambda: a @ b) * 1e6}


def wide(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def copies(arguments: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in arguments.items()}


def error(found: Any, wanted: Any) -> float:
    """Relative L2 error of the first result."""
    found, wanted = (each[0] if isinstance(each, tuple) else each for each in (found, wanted))
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


def rows(name: str, dtype: torch.dtype, ceiling: dict[str, float]) -> list[dict[str, Any]]:
    """Ours and the alternatives, for every shape of a kernel."""
    module, found = KERNELS[name], []
    for shape in module.SHAPES:
        arguments = module.make(shape, DEVICE, dtype)
        moved, operations = module.traffic(shape, dtype.itemsize), module.flops(shape)
        candidates: dict[str, Callable[[], Any]] = {"minisd": partial(getattr(module, name), **arguments)}
        candidates |= module.library(**arguments)
        for who, call in candidates.items():
            row: dict[str, Any] = {"kernel": name, "shape": shape.label, "who": who}
            try:
                if who == "minisd":
                    wanted = module.reference(**{key: wide(value) for key, value in copies(arguments).items()})
                    row["error"] = error(getattr(module, name)(**copies(arguments)), wanted)
                    del wanted
                time = microseconds(call)
                row |= {"us": time, "TB/s": moved / time / 1e6, "TFLOP/s": operations / time / 1e6}
                row["share"] = max(moved / time * 1e6 / ceiling["bytes/s"], operations / time * 1e6 / ceiling["flop/s"])
            except Exception as reason:  # of whatever kind: this row alone is lost
                row["failed"] = f"{type(reason).__name__}: {str(reason).splitlines()[0][:150]}"
            found.append(row)
            show(row)
    return found


def show(row: dict[str, Any]) -> None:
    head = f"{row['kernel']:<14}{row['shape']:<34}{row['who']:<22}"
    if "failed" in row:
        print(f"{head}{row['failed']}", flush=True)
        return
    off = f"  error {row['error']:.1e}" if "error" in row else ""
    print(
        f"{head}{row['us']:>10.1f} us {row['TB/s']:>6.2f} TB/s {row['TFLOP/s']:>7.1f} TFLOP/s {row['share']:>5.0%}{off}",
        flush=True,
    )


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="KERNEL", help=f"of {', '.join(KERNELS)} (default: all)")
    parser.add_argument("--dtype", choices=["float16", "bfloat16"], default="float16")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows to this file, too, after each kernel")
    args = parser.parse_args()
    for name in args.names:
        if name not in KERNELS:
            parser.error(f"expected some of {', '.join(KERNELS)}, found {name!r}")
    if not torch.cuda.is_available():
        parser.error("kernels are timed on a GPU; this machine has none (pytest tests/test_kernels.py checks their numbers)")
    dtype = getattr(torch, args.dtype)
    ceiling = ceilings(dtype)
    print(f"{torch.cuda.get_device_name()}, {args.dtype}: copy {ceiling['bytes/s'] / 1e12:.2f} TB/s, ", end="")
    print(f"8192^3 matrix product {ceiling['flop/s'] / 1e12:.0f} TFLOP/s; shares are of the nearer of the two")
    found: list[dict[str, Any]] = []
    for name in args.names or KERNELS:
        found += rows(name, dtype, ceiling)
        if args.json:
            args.json.write_text(json.dumps({"gpu": torch.cuda.get_device_name(), "ceilings": ceiling, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
