"""OpenVINO beside minisd: the plain modules with the same weights, converted once, as its users do."""

from __future__ import annotations

import copy
import importlib.util
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..report import Report
from ..timing import Run

INSTALLED = importlib.util.find_spec("openvino") is not None
HINTS = {torch.float32: "f32", torch.bfloat16: "bf16"}


class Called(nn.Module):
    """A function of a network as a module, for what can convert only modules."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *given: Tensor) -> Tensor:
        return self.call(self.network, *given)


def bench(
    report: Report, network: nn.Module, call: Callable[..., Tensor], given: Sequence[Tensor], ours: float, wanted: Tensor
) -> None:
    """A row for OpenVINO, on a CPU, where it is installed.

    call: (network, *given) -> what is measured; ours: seconds, wanted: result of minisd's own.  `first` counts the conversion.
    """
    clock = report.clock
    if not INSTALLED or clock.is_cuda:
        return
    with report.attempt("OpenVINO"), torch.no_grad():
        start = time.perf_counter()
        wide = copy.deepcopy(network).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        run = compiled(Called(wide, call), [x.float() for x in given], HINTS[clock.dtype])
        converted = time.perf_counter() - start
        result = run()
        first = time.perf_counter() - start
        error = float((result - wanted.float()).norm() / wanted.float().norm())
        seconds = clock.seconds(run)
        report.add(f"OpenVINO, {HINTS[clock.dtype]}", time=seconds, first=first, difference=error, to_ours=seconds / ours)
        report.note(f"OpenVINO: converting and compiling took {converted:.1f} s")


def compiled(module: nn.Module, given: Sequence[Tensor], hint: str) -> Run:
    """A network in float32, converted and compiled for these inputs, to compute in another format where the CPU can."""
    import openvino

    shapes = [openvino.PartialShape(list(x.shape)) for x in given]
    model = openvino.convert_model(module.eval(), example_input=tuple(given), input=shapes)
    options = {"INFERENCE_PRECISION_HINT": hint, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    request: Any = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    arrays = [x.numpy() for x in given]

    def run() -> Tensor:
        request.infer(arrays)
        return torch.from_numpy(request.get_output_tensor().data)

    return run
