"""bench roofline --device h200: how long a step would take on a GPU that is not there, from its launches, bytes and rates.

A kernel that moves memory takes a launch, and its bytes over what the L2 cache or the memory gives.  A product is waves of tiles
over the SMs, at the rate that tiles of their size reach, or its bytes where those take longer.  Attention
reaches a share of the matrix rate that depends on the channels of a head.  Between two launches of a graph there is a gap.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from math import ceil
from typing import Any

from ...errors import UsageError
from ...fast.choice import kernels
from ...system.device import name_of
from ...warmup.absent import capability_of
from ..networks import MODELS
from ..report import Report
from .gpus import COPY, GAP, GPUS, LAUNCH, OF_COPY, PRODUCT, Gpu, gpu_named
from .launches import FLOAT8, Launch, of_decoding, of_step

# Of a product: rows, columns, and the share of PRODUCT that such tiles reach.
TILES = ((128, 256, 1.0), (128, 128, 0.9), (64, 128, 0.7), (64, 64, 0.5))
SPLITS = (1, 2, 4, 8)
STARTED = 2.5e-6  # seconds until the first tile of a product has come, and until its last is written
# Of the matrix rate, by channels of a head, for fused attention of a library; between them it is drawn straight.
OF_ATTENTION = ((40, 0.28), (64, 0.47), (80, 0.43), (128, 0.55), (160, 0.40))
ATTENTION_STARTED = 5.0e-6
MORE = {"group_norm, statistics": 1.0e-6, "group_norm, apply": 1.2e-6, "layer_norm": 0.8e-6, "linear_step": 1.5e-6}  # seconds
RANGE = 0.12  # of the whole: how far it may be off on the GPU that it was fitted to
COLUMNS = ("launches", "predicted us", "GFLOP", "MB")


def moving(count: float, gpu: Gpu) -> float:
    """Seconds for so many bytes."""
    share = next(share for limit, share in OF_COPY if count <= limit * gpu.l2)
    return count / (gpu.bandwidth * COPY * share)


def multiplying(launch: Launch, gpu: Gpu) -> float:
    """By the best of the tiles, and of the ways to split a long sum among SMs that had nothing to do."""
    batch, m, n, k = launch.sizes
    rate = gpu.half / gpu.sms * PRODUCT * (2 if launch.name == FLOAT8 else 1)  # as data sheets say, of faster sums than float32's
    best = float("inf")
    for rows, columns, share in TILES:
        tiles, one = batch * ceil(m / rows) * ceil(n / columns), 2 * rows * columns * k / (rate * share)
        for parts in SPLITS:
            waves = max(1.0, tiles * parts / gpu.sms)  # libraries choose tiles so that the last wave is nearly full
            together = 0.0 if parts == 1 else LAUNCH + moving(8 * batch * m * n * parts, gpu)
            best = min(best, waves * one / parts + together)
    return STARTED + max(best, moving(launch.bytes, gpu))


def attending(launch: Launch, gpu: Gpu) -> float:
    (dim,) = launch.sizes
    below = max((point for point in OF_ATTENTION if point[0] <= dim), default=OF_ATTENTION[0])
    above = min((point for point in OF_ATTENTION if point[0] >= dim), default=OF_ATTENTION[-1])
    between = (dim - below[0]) / (above[0] - below[0]) if above[0] > below[0] else 0.0
    share = below[1] + between * (above[1] - below[1])
    return ATTENTION_STARTED + max(launch.flops / (gpu.half * share), moving(launch.bytes, gpu))


def seconds_of(launch: Launch, gpu: Gpu) -> float:
    """Without the gap to the next."""
    if len(launch.sizes) == 4:
        return multiplying(launch, gpu)
    if len(launch.sizes) == 1:
        return attending(launch, gpu)
    return LAUNCH + MORE.get(launch.name, 0.0) + moving(launch.bytes, gpu)


def by_kind(launches: Iterable[Launch], gpu: Gpu) -> dict[str, float]:
    """Seconds of each kind of work, and of the gaps."""
    found: defaultdict[str, float] = defaultdict(float)
    for launch in launches:
        found[launch.kind] += seconds_of(launch, gpu)
        found["gaps"] += GAP
    return dict(found)


def with_float8() -> dict[str, Gpu]:
    return {name: gpu for name, gpu in GPUS.items() if capability_of(name) >= kernels().float8.SINCE}


def bench(report: Report, args: Any) -> None:
    """Predictions, and nothing else: what this machine can do has no part in them."""
    gpu, model, dtype = gpu_named(args.device), MODELS[args.model], report.clock.dtype
    if dtype.itemsize != 2:
        raise UsageError(f"--dtype: expected float16 or bfloat16 for a GPU that is not there, found {name_of(dtype)}")
    if args.fp8 and gpu not in with_float8().values():
        raise UsageError(f"--fp8: expected --device {', '.join(with_float8())}, which have float8, found {args.device}")
    side = model.latents
    where = f"predicted for {gpu.name}, {name_of(dtype)}"
    title = f"{model.name} UNet step{', --fp8' if args.fp8 else ''}, {side}x{side} latents, {where}"
    step = table(report, title, of_step(model, side, dtype, args.fp8), gpu)
    decoding = table(report, f"VAE decoding {8 * side}x{8 * side}, {where}", of_decoding(model, side, dtype), gpu)
    report.table(f"{model.name} picture, {where}", ("predicted ms",))
    report.add("20 steps and decoding, kernels compiled", predicted=20 * step + decoding)
    report.note(f"predictions from data sheets and one fit, no measurement: off by {RANGE:.0%} or more")


def table(report: Report, title: str, launches: list[Launch], gpu: Gpu) -> float:
    """Rows by kind, the longest first; returns the seconds of all."""
    report.table(title, COLUMNS)
    times = by_kind(launches, gpu)
    counts, flops, moved = Counter[str](), Counter[str](), Counter[str]()
    for launch in launches:
        counts[launch.kind] += 1
        flops[launch.kind] += launch.flops
        moved[launch.kind] += launch.bytes
    for kind in sorted(times, key=lambda kind: -times[kind]):
        values = {"launches": counts[kind], "GFLOP": flops[kind] / 1e9, "MB": moved[kind] / 1e6} if counts[kind] else {}
        report.add(kind, predicted=times[kind], **values)
    total = sum(times.values())
    report.add("all", launches=len(launches), predicted=total, GFLOP=flops.total() / 1e9, MB=moved.total() / 1e6)
    return total
