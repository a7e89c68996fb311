"""CUDA graphs: a sequence of kernels, recorded once and then launched as one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from threading import RLock
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import OutOfMemoryError
from ..system.memory import first_line, memory_errors
from .choice import chosen
from .ways import address_of, lasting, version_of

KEPT = 4  # recordings of one function; each holds the memory of its intermediate results, in a pool that they share


def always(*given: Tensor | None) -> bool:
    return True


@cache
def capture_stream(device: int) -> Any:
    return torch.cuda.Stream(device)


LOCKS: dict[torch.device, Any] = {}


@contextmanager
def turn(device: torch.device) -> Iterator[None]:
    """This thread's turn on a device, which is the current one meanwhile: graphs are made and launched on that.

    The recordings of a device share a stream to record on, and memory for what they work in: two threads, as of a server, must
    not record or replay at once, nor one of them replay before the other has copied a result.
    """
    with LOCKS.setdefault(device, RLock()), torch.cuda.device(device.index if device.type == "cuda" else -1):
        yield


@contextmanager
def capture(graph: Any, pool: Any = None) -> Iterator[None]:
    """torch.cuda.graph on the current device, with three precautions, and without giving all cached memory back to the driver.

    cuBLAS keeps its workspace by stream: without clearing, the memory of one graph would become that of all later ones, and be
    gone with the first (as inductor's cudagraph_trees.py does it).  What other threads do, a second model that is loaded for
    instance, does not break the capture.  After an error the stream is again the one before.
    """
    stream = torch.cuda.current_stream()
    torch._C._cuda_clearCublasWorkspaces()
    try:
        torch.cuda.synchronize()
        with torch.cuda.stream(capture_stream(torch.cuda.current_device())):
            graph.capture_begin(*(() if pool is None else (pool,)), capture_error_mode="thread_local")
            try:
                yield
            finally:
                graph.capture_end()
    finally:
        torch._C._cuda_clearCublasWorkspaces()
        torch.cuda.set_stream(stream)


@dataclass(frozen=True)
class Recording:
    graph: Any  # a torch.cuda.CUDAGraph
    result: Tensor  # where the call leaves it each time

    def replay(self) -> Tensor:
        self.graph.replay()
        return self.result


def record(run: Callable[[], Tensor], others: Iterable[Recording | None]) -> Recording | None:
    """A call as a CUDA graph.  Making it runs nothing, and everything must have run before.  None if there is no memory for it.

    others: recordings that never run at the same time; the new one shares their memory, which lives as long as one of them.
    """
    pool = next((other.graph.pool() for other in others if other), None)
    for last in (False, True):
        graph = torch.cuda.CUDAGraph()
        try:
            with memory_errors(), capture(graph, pool):
                result = run()
            return Recording(graph, result)
        except OutOfMemoryError:
            if last:
                warnings.warn("no memory to record a CUDA graph: going on without, which is slower", stacklevel=2)
            else:
                torch.cuda.empty_cache()  # which the allocator does by itself, but not while something is recorded
        except RuntimeError as error:  # something that no graph takes, put there by somebody else
            warnings.warn(f"going on without a CUDA graph, which is slower: {first_line(error)}", stacklevel=2)
            break
    return None


class Recorder:
    """A function of tensors (or None), as one CUDA graph for each combination of their shapes.

    The first call runs kernel by kernel and brings all kernels to life, the second is recorded, those after it are replayed.
    graphs: whether to record at all, which only a GPU can.  roomy: asked before recording, whether there is memory for it.
    """

    def __init__(self, function: Callable[..., Tensor], graphs: bool, roomy: Callable[..., bool] = always) -> None:
        self.function, self.graphs, self.roomy = function, graphs, roomy
        self.seen: set[tuple[object, ...]] = set()
        self.refused: set[tuple[object, ...]] = set()  # for want of memory
        self.recordings: dict[tuple[object, ...], tuple[list[Tensor | None], Recording]] = {}

    def __call__(self, *given: Tensor | None) -> Tensor:
        """function(*given), in memory of its own."""
        with turn(next(x.device for x in given if x is not None)):
            return self.result(*given)

    def result(self, *given: Tensor | None) -> Tensor:
        key = (chosen(), *(None if x is None else (x.shape, x.dtype) for x in given))
        again = key in self.seen and key not in self.recordings and key not in self.refused
        if self.graphs and again and self.roomy(*given):
            self.record(key, given)
        self.seen.add(key)
        if key not in self.recordings:
            return self.function(*given)
        held, recording = self.recordings[key]
        for target, source in zip(held, given, strict=True):
            if target is not None and source is not None:
                target.copy_(source)
        return recording.replay().clone()

    def record(self, key: tuple[object, ...], given: tuple[Tensor | None, ...]) -> None:
        while len(self.recordings) >= KEPT:
            del self.recordings[next(iter(self.recordings))]
        with lasting():
            held, function = [None if x is None else x.clone() for x in given], self.function
        recording = record(lambda: function(*held), (other for _, other in self.recordings.values()))
        if recording is None:
            self.refused.add(key)
        else:
            self.recordings[key] = held, recording


class NetworkRecorder:
    """A function that belongs to a network, recorded.

    Made anew if the network's weights were replaced; if they were written to, what the function keeps of them is renewed.
    """

    def __init__(
        self, network: nn.Module, make: Callable[[], Callable[..., Tensor]], graphs: bool, roomy: Callable[..., bool] = always
    ) -> None:
        self.network, self.make, self.graphs, self.roomy = network, make, graphs, roomy
        self.calls: Recorder | None = None
        self.weights: tuple[object, object] = (None, None)

    def __call__(self, *given: Tensor | None) -> Tensor:
        if self.calls is None or self.weights[0] != addresses(self.network):
            with lasting():
                self.calls = Recorder(self.make(), self.graphs, self.roomy)
        elif self.weights[1] != versions(self.network):
            self.refresh()
        self.weights = addresses(self.network), versions(self.network)
        return self.calls(*given)

    def refresh(self) -> None:
        if self.calls is not None and hasattr(self.calls.function, "refresh"):
            self.calls.function.refresh()


def addresses(network: nn.Module) -> tuple[int, ...]:
    """Changes when a weight is replaced."""
    return tuple(address_of(weight) for weight in network.parameters())


def versions(network: nn.Module) -> tuple[int, ...]:
    """Changes when a weight is written to, other than through `.data`."""
    return tuple(version_of(weight) for weight in network.parameters())
