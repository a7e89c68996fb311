"""How long something takes, on a GPU or a CPU, and how fast this machine can be at all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula, sdpa_flop_count

from ..fast.graphs import capture

Run = Callable[[], Any]

# PyTorch counts the operations of every fused attention but that of a CPU.
CPU_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
if CPU_ATTENTION not in flop_registry:

    @register_flop_formula(CPU_ATTENTION)
    def attention_flops(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...], *_: Any, **more: Any) -> int:
        return sdpa_flop_count(q, k, v)


@dataclass(frozen=True)
class Clock:
    """Measures on one device; `repeats` measurements make a median."""

    device: torch.device
    dtype: torch.dtype
    repeats: int = 20

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    def synchronise(self) -> None:
        if self.is_cuda:
            torch.cuda.synchronize(self.device)

    def once(self, run: Run) -> float:
        """Seconds of a single call, from the host's point of view."""
        self.synchronise()
        start = time.perf_counter()
        run()
        self.synchronise()
        return time.perf_counter() - start

    def seconds(self, run: Run) -> float:
        """Median seconds of a call: on a GPU as part of a CUDA graph, so that the host counts for nothing.

        An event costs as much as a small kernel, so a graph holds so many calls that they take a millisecond, 20 at most.  What
        they read may be in the L2 cache, as it often is between the layers of a network.
        """
        run()
        first = self.once(run)
        if not self.is_cuda:
            return statistics.median([first, *(self.once(run) for _ in range(max(0, self.repeats - 1)))])
        calls = min(20, max(1, round(1e-3 / first * 10)))  # eager calls of small operations take up to ten times as long
        return self.replayed(captured(run, calls)) / calls

    def in_turns(self, *runs: Run) -> list[float]:
        """Median seconds of each on a CPU, one after the other and again: a machine is not as fast in every minute."""
        times = [[self.once(run) for run in runs] for _ in range(1 + self.repeats)][1:]
        return [statistics.median(column) for column in zip(*times, strict=True)]

    def replayed(self, run: Run) -> float:
        """Median seconds of a call between two CUDA events: for a graph, or what makes its own."""
        run()
        pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(self.repeats)]
        for start, end in pairs:
            start.record()
            run()
            end.record()
        self.synchronise()
        return statistics.median(start.elapsed_time(end) for start, end in pairs) / 1e3

    def back_to_back(self, run: Run) -> float:
        """Mean seconds of a call among many, the host running ahead as far as it can: for what no graph can hold."""
        run()
        if not self.is_cuda:
            return self.seconds(run)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for _ in range(self.repeats):
            run()
        end.record()
        self.synchronise()
        return start.elapsed_time(end) / 1e3 / self.repeats

    @cached_property
    def bandwidth(self) -> float:
        """Bytes a second of a large copy, each byte read and written."""
        count = 1 << (29 if self.is_cuda else 25)
        source = torch.ones(count, dtype=torch.float16, device=self.device)
        target = torch.empty_like(source)
        return 4 * count / self.seconds(lambda: target.copy_(source))

    @cached_property
    def matmul_rate(self) -> float:
        """Operations a second of a large matrix product in `dtype`."""
        n = 8192 if self.is_cuda else 256 if self.dtype == torch.float16 else 1024  # float16 takes a CPU 2 s for 1024
        a, b = (torch.randn(n, n, device=self.device).to(self.dtype) for _ in range(2))
        return 2 * n**3 / self.seconds(lambda: a @ b)

    def floor(self, flops: float, traffic: float) -> float:
        """Seconds that so much work takes at these two ceilings, overlapping perfectly."""
        return max(flops / self.matmul_rate, traffic / self.bandwidth)


def captured(run: Run, calls: int = 1) -> Run:
    """`calls` calls as one CUDA graph, after three outside of it; returns its replay, which returns the last result."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with capture(graph):
        for _ in range(calls):
            result = run()

    def replay() -> Any:
        graph.replay()
        return result

    return replay
