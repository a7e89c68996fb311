"""OpenVINO and onnxruntime beside minisd: the plain modules with the same weights, converted once, as their users do."""

from __future__ import annotations

import copy
import importlib.util
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...system.device import name_of
from ...system.memory import keeping_freed_memory
from ..report import Report
from ..timing import Run
from ..whole.with_openvino import HINTS, options


class Called(nn.Module):
    """A function of a network as a module, for what can convert only modules."""

    def __init__(self, network: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.call = network, call

    def forward(self, *given: Tensor) -> Tensor:
        return self.call(self.network, *given)


def bench(report: Report, kinds: list[str], module: Called, given: Sequence[Tensor], ours: Run, wanted: Tensor) -> None:
    """A row for each of them that is asked for and installed, on a CPU, in turns with our own form.

    module: what is measured; ours: minisd's own, and its result as wanted.  `first` counts the conversion.
    """
    clock = report.clock
    for kind in kinds:
        if kind not in RUNTIMES or clock.is_cuda or not all(map(importlib.util.find_spec, PACKAGES[kind])):
            continue
        label, prepare = RUNTIMES[kind]
        with report.attempt(label), torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that become constants in a trace, as they are meant to
            start = time.perf_counter()
            wide = copy.deepcopy(module).float().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
            number_format, run = prepare(wide.eval(), [x.float() for x in given], name_of(clock.dtype))
            converted = time.perf_counter() - start
            result = run()
            first = time.perf_counter() - start
            error = float((result - wanted.float()).norm() / wanted.float().norm())
            with keeping_freed_memory():  # for all of the turns, as while a picture is drawn
                seconds, own = clock.in_turns(run, ours)
            report.add(f"{label}, {number_format}", time=seconds, first=first, difference=error, to_ours=seconds / own)
            report.add(f"minisd, fused, in turns with {label}", time=own, to_ours=1.0)
            report.note(f"{label}: converting and compiling took {converted:.1f} s")


def openvino_run(module: nn.Module, given: Sequence[Tensor], dtype: str) -> tuple[str, Run]:
    """A network in float32, converted and compiled for these inputs, to compute in another format where the CPU can."""
    import openvino

    shapes = [openvino.PartialShape(list(x.shape)) for x in given]
    model = openvino.convert_model(module, example_input=tuple(given), input=shapes)
    told = options(dtype, torch.get_num_threads())
    request: Any = openvino.Core().compile_model(model, "CPU", told).create_infer_request()
    arrays = [x.numpy() for x in given]

    def run() -> Tensor:
        request.infer(arrays)
        return torch.from_numpy(request.get_output_tensor().data)

    return HINTS[dtype], run


def onnxruntime_run(module: nn.Module, given: Sequence[Tensor], dtype: str) -> tuple[str, Run]:
    """Always in float32: on a CPU it has no other format for these networks that is faster."""
    import onnxruntime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        torch.onnx.export(module, tuple(given), str(path), dynamo=False)  # the form by torch.export takes ten times as long
        module.to("meta")  # its memory is wanted for the session
        told = onnxruntime.SessionOptions()
        told.intra_op_num_threads = torch.get_num_threads()
        session: Any = onnxruntime.InferenceSession(str(path), told, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]
    arrays = {name: x.numpy() for name, x in zip(names, given, strict=True)}
    return "f32", lambda: torch.from_numpy(session.run(None, arrays)[0])


PACKAGES = {"openvino": ("openvino",), "onnxruntime": ("onnxruntime", "onnx")}  # onnx: what PyTorch exports by
RUNTIMES = {"openvino": ("OpenVINO", openvino_run), "onnxruntime": ("onnxruntime", onnxruntime_run)}
