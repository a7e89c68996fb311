"""bench roofline: where a UNet step spends its time, what it would take at the machine's ceilings, and what is left to win.

Work is counted on the plain model, operation by operation: its floating-point operations, and every operand and result that it
reads or writes once.  Time is that of the fused form: on a GPU kernel by kernel, from the profiler, on a CPU operation by
operation.  Both are sorted into the same few classes.  What a known GPU was predicted to take stands beside what it takes, and
for one that is not there (--device h200) alone: see prediction.py.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ...errors import UsageError
from ...fast import choice
from ...fast.cpu import networks
from ...fast.cpu.engine import Cpu
from ...fast.unet import FusedUNet
from ...models import ops
from ..networks import MODELS, laid_out, random_unet, step_input
from ..report import Report
from . import launches, prediction
from .gpus import gpu_called, is_gpu
from .kinds import class_of


@dataclass(frozen=True)
class Operation:
    name: str
    kind: str
    flops: int
    bytes: int
    seconds: float  # on a CPU


class Watch(TorchDispatchMode):
    """Writes down every operation that computes or moves something: views and new memory do neither."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Operation] = []
        self.kind: str | None = None  # of all that comes, whatever its name says

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        result = func(*args, **(kwargs or {}))
        seconds = time.perf_counter() - start
        if not func.is_view and not re.search("empty|_unsafe_view|lift_fresh", func.name()):
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            count = flop_registry.get(func.overloadpacket)
            flops = count(*args, **(kwargs or {}), out_val=result) if count else 0
            moved = sum(x.numel() * x.element_size() for x in tensors)
            self.seen.append(Operation(func.name(), self.kind or class_of(func.name()), flops, moved, seconds))
        return result

    def as_attention(self, run: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Whatever it is made of: products and exponentials, which are named like any others, or code that PyTorch knows not."""

        @wraps(run)
        def attention(*given: Any, **more: Any) -> Tensor:
            self.kind, count, start = "attention", len(self.seen), time.perf_counter()
            try:
                return run(*given, **more)
            finally:
                self.kind = None
                if len(self.seen) == count:
                    self.seen.append(Operation("compiled attention", "attention", 0, 0, time.perf_counter() - start))

        return attention


@contextmanager
def replaced(names: dict[str, Any], name: str, value: Any) -> Iterator[None]:
    before = names[name]
    names[name] = value
    try:
        yield
    finally:
        names[name] = before


def of_pytorch() -> AbstractContextManager[None]:
    """Attention is PyTorch's own, one operation, while the arithmetic is counted."""
    return replaced(ops.REPLACEMENTS, "attention", lambda *given, **more: None)


Spent = dict[str, tuple[str, float, int]]  # by name: its kind, seconds in all, how many


def spent_on_cpu(run: Callable[[], Any]) -> Spent:
    """Of PyTorch's operations: its profiler would also list what they consist of, and every view."""
    run()
    watch = Watch()
    with ExitStack() as within:
        for module in (ops, networks):  # where modules as they stand ask for it, and the CPU's own form of them
            within.enter_context(replaced(vars(module), "attention", watch.as_attention(vars(module)["attention"])))
        within.enter_context(watch)
        run()
    spent: Spent = {}
    for each in watch.seen:
        name = each.name if each.kind == class_of(each.name) else f"{each.name}, {each.kind}"
        _, seconds, count = spent.get(name, ("", 0.0, 0))
        spent[name] = (each.kind, seconds + each.seconds, count + 1)
    return spent


def spent_on_gpu(run: Callable[[], Any]) -> Spent:
    """Of kernels, from the profiler."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or it tells of its own start and end
    run()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        run()
        torch.cuda.synchronize()
    events = [event for event in profiler.key_averages() if event.device_type.name == "CUDA"]
    timed = [(event.key, event.self_device_time_total / 1e6, event.count) for event in events]
    return {name: (class_of(name), seconds, count) for name, seconds, count in timed if seconds > 0}


def bench(report: Report, args: Any) -> None:
    if is_gpu(args.device):
        prediction.bench(report, args)
    elif args.fp8:
        fitting = ", ".join(prediction.with_float8())
        raise UsageError(f"--fp8: expected --device {fitting}, as it is predicted alone, found {args.device or 'none'}")
    else:
        measured(report, args)


@torch.no_grad()
def measured(report: Report, args: Any) -> None:
    clock, model = report.clock, MODELS[args.model]
    side = model.latents if args.full else model.latents // 2
    network, given = random_unet(model, clock.device, clock.dtype), step_input(model, side, clock.device, clock.dtype)
    with choice.using("torch"), of_pytorch(), Watch() as work:
        network(given.x, given.t, given.context, given.y)
    laid_out(network, clock.device)
    fused = FusedUNet(network) if clock.is_cuda else Cpu(network).fuse()
    shift, keys_values = fused.shifts(given.t[:1], given.y)[0], fused.keys_values(given.context)
    spent = (spent_on_gpu if clock.is_cuda else spent_on_cpu)(lambda: fused(given.x, shift, keys_values))
    where, calls = ("GPU", "launches") if clock.is_cuda else ("CPU", "operations")
    gpu = gpu_called(torch.cuda.get_device_name(clock.device)) if clock.is_cuda and clock.dtype.itemsize == 2 else None
    foretold = prediction.by_kind(launches.of_step(model, side, clock.dtype), gpu) if gpu else {}
    step = f"{model.name} UNet step, {side}x{side} latents"
    report.table(
        f"{step}: {where} time by kind of work, floor at the ceilings of this run",
        (calls, "time us", *(["predicted us"] if gpu else []), "floor us", "left us", "GFLOP", "MB"),
    )
    report.note(f"ceilings in this run: copy {clock.bandwidth / 1e12:.3g} TB/s, matmul {clock.matmul_rate / 1e12:.3g} TFLOP/s")
    by_kind(report, calls, work.seen, spent, foretold)
    report.note("the floor of all is that of its operations alone: fused perfectly, nothing else need be read or written")
    if not clock.is_cuda:
        report.note("operations are PyTorch's; views, which move nothing, are not among them")
    what = "kernel" if clock.is_cuda else "operation"
    report.table(f"the same step, {what} by {what}: the 30 that take longest", (calls, "time us"))
    for name, (_, seconds, count) in sorted(spent.items(), key=lambda item: -item[1][1])[:30]:
        report.add(name[:44], time=seconds, **{calls: count})


def by_kind(report: Report, calls: str, work: list[Operation], spent: Spent, foretold: Mapping[str, float]) -> None:
    """A row for each kind of work, the longest first, and one for all; foretold: the predicted seconds, if there are any."""
    clock = report.clock
    times: defaultdict[str, float] = defaultdict(float)
    counts, flops, moved = Counter[str](), Counter[str](), Counter[str]()
    for kind, seconds, count in spent.values():
        times[kind] += seconds
        counts[kind] += count
    for each in work:
        flops[each.kind] += each.flops
        moved[each.kind] += each.bytes
    for kind in sorted({*times, *moved}, key=lambda kind: -times[kind]):
        floor = clock.floor(flops[kind], moved[kind])
        values: dict[str, Any] = {calls: counts[kind], "time": times[kind], "floor": floor, "left": max(0.0, times[kind] - floor)}
        values |= {"predicted": foretold.get(kind, 0.0)} if foretold else {}
        report.add(kind, **values, GFLOP=flops[kind] / 1e9, MB=moved[kind] / 1e6)
    seconds, total = sum(times.values()), flops.total()
    more = {"predicted": sum(foretold.values()) - foretold.get("gaps", 0.0)} if foretold else {}  # kernels have no gaps either
    report.add("all", **{calls: counts.total()}, time=seconds, **more, floor=total / clock.matmul_rate, GFLOP=total / 1e9)
