"""Recordings of several threads and devices, and where there is little memory, without a GPU: what is asked of PyTorch."""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress

import pytest
import torch
from torch import Tensor

from minisd import kernels
from minisd.fast import graphs
from minisd.fast.graphs import Recorder, record, turn


class Shared:
    """As recordings are: all leave their result in the same memory."""

    memory = torch.zeros(4)
    graph = type("Graph", (), {"pool": staticmethod(lambda: None)})

    def __init__(self, run):
        self.run = run

    def replay(self) -> Tensor:
        self.memory.copy_(self.run())
        time.sleep(0.001)  # so that another thread has its chance
        return self.memory


def test_threads_that_draw_at_once_keep_their_results_apart(monkeypatch):
    monkeypatch.setattr(graphs, "record", lambda run, others: Shared(run))

    def draws(number: int) -> bool:
        calls = Recorder(lambda x: x + number, graphs=True)
        return all(torch.equal(calls(torch.full((4,), float(i))), torch.full((4,), float(i + number))) for i in range(30))

    with ThreadPoolExecutor(3) as pool:
        assert all(pool.map(draws, (100, 200, 300)))


def test_a_turn_is_one_threads_and_may_be_taken_within_itself():
    device, seen = torch.device("cpu"), []

    def other():
        with turn(device):
            seen.append("other")

    with turn(device), turn(device):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join(0.05)
        seen.append("first")
    thread.join(60)
    assert seen == ["first", "other"]


@pytest.mark.parametrize("failures", [0, 1, 2])
def test_the_cache_is_emptied_only_where_recording_finds_no_memory(failures, monkeypatch):
    left, emptied = [None] * failures, []

    @contextmanager
    def capture(graph, pool):
        if left:
            left.pop()
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        yield

    monkeypatch.setattr("torch.cuda.CUDAGraph", object)
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: emptied.append(True))
    monkeypatch.setattr(graphs, "capture", capture)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        recording = record(lambda: torch.zeros(1), ())
    assert (recording is None) == (failures == 2) == bool(said)
    assert len(emptied) == min(failures, 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has the real ones")
@pytest.mark.parametrize(("pool", "fails"), [(None, False), ((1, 2), False), (None, True)])
def test_what_a_capture_asks_of_pytorch(pool, fails, monkeypatch):
    """It begins and ends, after an error too, and gives no cached memory back."""
    said: list[object] = []

    class Graph:
        def capture_begin(self, *pool, capture_error_mode):
            said.append(("begin", pool, capture_error_mode))

        def capture_end(self):
            said.append("end")

    monkeypatch.setattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: said.append("clear"), raising=False)
    monkeypatch.setattr(graphs, "capture_stream", lambda device: "another")
    monkeypatch.setattr("torch.cuda.current_stream", lambda: "usual")
    monkeypatch.setattr("torch.cuda.current_device", lambda: 0)
    monkeypatch.setattr("torch.cuda.synchronize", lambda: None)
    monkeypatch.setattr("torch.cuda.set_stream", said.append)
    monkeypatch.setattr("torch.cuda.stream", lambda stream: said.append(stream) or nullcontext())
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: pytest.fail("emptied"))
    with pytest.raises(RuntimeError) if fails else nullcontext(), graphs.capture(Graph(), pool):
        said.append("run")
        if fails:
            raise RuntimeError
    begun = ("begin", () if pool is None else (pool,), "thread_local")
    assert said == ["clear", "another", begun, "run", "end", "clear", "usual"]


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch):
    """Two pipelines on two GPUs: whichever was loaded last."""
    seen: list[Tensor] = []

    @contextmanager
    def device_of(tensor):
        seen.append(tensor)
        yield

    monkeypatch.setattr("torch.cuda.device_of", device_of)
    x = torch.zeros(2, 4)
    for name in kernels.KERNELS:
        with suppress(ValueError, TypeError):  # all but one want more arguments
            getattr(kernels, name)(x)
    assert len(seen) == len(kernels.KERNELS)
    assert all(each is x for each in seen)
