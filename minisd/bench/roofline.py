"""bench roofline: where a UNet step spends its time, what it would take at the machine's ceilings, and what is left to win.

Work is counted on the plain model, operation by operation: its floating-point operations, and every operand and result that it
reads or writes once.  Time is that of the fused form, from the profiler, kernel by kernel on a GPU.  Both are sorted into the
same few classes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from ..fast.unet import FusedUNet
from ..models import ops
from .networks import MODELS, laid_out, random_unet, step_input
from .report import Report

# By the name of a kernel, or of PyTorch's operation; the first that matches counts.
CLASSES = {
    "attention": r"attention|attend|flash|fmha|sdpa|softmax|exponentials_kernel",
    "GEGLU": r"geglu|gelu",
    "convolution": r"interleave_kernel|conv|fprop|dgrad",
    "GroupNorm, SiLU": r"partial_kernel|apply_kernel|group_?norm|rowwisemoments|silu",
    "LayerNorm": r"layer_?norm",
    "linear": r"nvjet|gemm|gemv|cutlass|cublas|linear|\bmm\b|addmm|bmm|splitk",
    "sampler, guidance": r"guided_step",
    "concatenation": r"cat",
}
OTHERS = "sums and copies"


def class_of(name: str) -> str:
    found = (label for label, pattern in CLASSES.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, OTHERS)


class Work(TorchDispatchMode):
    """Counts the operations (flops) and the bytes of every call, by class."""

    def __init__(self) -> None:
        super().__init__()
        self.flops: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "empty" not in func.name():
            kind = class_of(func.name())
            tensors = [x for x in tree_leaves((args, kwargs, result)) if isinstance(x, Tensor)]
            self.bytes[kind] += sum(x.numel() * x.element_size() for x in tensors)
            count = flop_registry.get(func.overloadpacket)
            if count is not None:
                self.flops[kind] += count(*args, **(kwargs or {}), out_val=result)
        return result


def measured(run: Callable[[], Any], is_cuda: bool) -> tuple[dict[str, float], dict[str, int], dict[str, tuple[float, int]]]:
    """Seconds and launches of one run by class, and by name."""
    run()
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if is_cuda else [])]
    with profile(activities=activities) as profiler:
        run()
        if is_cuda:
            torch.cuda.synchronize()
    seconds: defaultdict[str, float] = defaultdict(float)
    launches: Counter[str] = Counter()
    names: dict[str, tuple[float, int]] = {}
    for event in profiler.key_averages():
        on_gpu = event.device_type.name == "CUDA"
        time = event.self_device_time_total if is_cuda else event.self_cpu_time_total
        if on_gpu is is_cuda and time > 0:
            seconds[class_of(event.key)] += time / 1e6
            launches[class_of(event.key)] += event.count
            names[event.key] = (time / 1e6, event.count)
    return seconds, launches, names


@torch.no_grad()
def bench(report: Report, args: Any) -> None:
    clock, model = report.clock, MODELS[args.model]
    side = model.latents if args.full else model.latents // 2
    network, given = random_unet(model, clock.device, clock.dtype), step_input(model, side, clock.device, clock.dtype)
    inputs = (given.x, given.t, given.context, given.y)
    with ops.using("torch"), Work() as work:
        network(*inputs)
    laid_out(network, clock.device)
    fused = FusedUNet(network)
    shift, keys_values = fused.shifts(given.t[:1], given.y)[0], fused.keys_values(given.context)
    seconds, launches, names = measured(lambda: fused(given.x, shift, keys_values), clock.is_cuda)
    where = "GPU" if clock.is_cuda else "CPU"
    report.table(
        f"{model.name} UNet step, {side}x{side} latents: {where} time by kind of work, floor at the ceilings of this run",
        ("launches", "time us", "floor us", "left us", "GFLOP", "MB"),
    )
    report.note(f"ceilings in this run: copy {clock.bandwidth / 1e12:.3g} TB/s, matmul {clock.matmul_rate / 1e12:.3g} TFLOP/s")
    kinds = sorted({*seconds, *work.bytes}, key=lambda kind: -seconds.get(kind, 0.0))
    floors = {kind: clock.floor(work.flops[kind], work.bytes[kind]) for kind in kinds}
    for kind in kinds:
        time, floor = seconds.get(kind, 0.0), floors[kind]
        counts = {"GFLOP": work.flops[kind] / 1e9, "MB": work.bytes[kind] / 1e6}
        report.add(kind, launches=launches.get(kind, 0), time=time, floor=floor, left=max(0.0, time - floor), **counts)
    total = sum(seconds.values())
    flops = sum(work.flops.values())
    report.add("all", launches=sum(launches.values()), time=total, floor=flops / clock.matmul_rate, GFLOP=flops / 1e9)
    report.note("the floor of all is that of its operations alone: fused perfectly, nothing else need be read or written")
    report.table("the same step, kernel by kernel: the 30 that take longest", ("launches", "time us"))
    for name, (time, count) in sorted(names.items(), key=lambda item: -item[1][0])[:30]:
        report.add(name[:44], launches=count, time=time)
