"""OpenVINO and onnxruntime beside minisd: by what stands in for them, and by themselves where they are installed."""

from __future__ import annotations

import importlib.util
import sys
import types
from pathlib import Path

import pytest
import torch
from torch import nn

from minisd.bench.lab import runtimes
from minisd.bench.report import Report
from minisd.bench.timing import Clock

CLOCK = Clock(torch.device("cpu"), torch.float32, 2)


class Request:
    def __init__(self, module):
        self.module = module

    def infer(self, arrays):
        self.answer = self.module(*(torch.from_numpy(array) for array in arrays))

    def get_output_tensor(self):
        return types.SimpleNamespace(data=self.answer.numpy())


def standing_in(told: list) -> types.SimpleNamespace:
    def compile_model(model, device, options):
        told.append((device, options["INFERENCE_PRECISION_HINT"]))
        return types.SimpleNamespace(create_infer_request=lambda: Request(model))

    return types.SimpleNamespace(
        PartialShape=tuple,
        convert_model=lambda module, example_input, input: module,
        Core=lambda: types.SimpleNamespace(compile_model=compile_model),
    )


def measured(kind: str, path: Path, dtype: torch.dtype = torch.float32) -> tuple[list[dict], nn.Linear]:
    import json

    network = nn.Linear(8, 4).to(dtype)
    report = Report(Clock(torch.device("cpu"), dtype, 2), path)
    report.table("title", ("time ms", "first s", "difference", "to ours"))
    x = torch.randn(2, 8).to(dtype)
    called = runtimes.Called(network, lambda network, x: network(x))
    runtimes.bench(report, [kind], called, [x], lambda: network(x).detach(), network(x).detach())
    return json.loads(path.read_text())["tables"][0]["rows"], network


@pytest.mark.parametrize(("dtype", "hint"), [(torch.float32, "f32"), (torch.bfloat16, "bf16")])
def test_a_row_for_openvino_with_its_conversion(dtype, hint, tmp_path, monkeypatch, capsys):
    told: list = []
    monkeypatch.setitem(runtimes.PACKAGES, "openvino", ("json",))  # is there
    monkeypatch.setitem(sys.modules, "openvino", standing_in(told))
    (row, own), network = measured("openvino", tmp_path / "x.json", dtype)
    assert own["label"] == "minisd, fused, in turns with OpenVINO"
    assert row["to_ours"] == pytest.approx(row["time_ms"] / own["time_ms"])
    assert told == [("CPU", hint)]
    assert row["label"] == f"OpenVINO, {hint}"
    assert row["difference"] <= (1e-6 if dtype == torch.float32 else 1e-2)
    assert 0 < row["time_ms"] / 1e3 <= row["first_s"]
    assert network.weight.dtype == dtype  # a copy was converted
    assert "converting and compiling took" in capsys.readouterr().out


def test_none_where_it_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(runtimes.PACKAGES, "openvino", ("no_such_package",))
    report = Report(CLOCK, tmp_path / "x.json")
    module = runtimes.Called(nn.Linear(1, 1), nn.Module.__call__)
    runtimes.bench(report, ["openvino", "eager"], module, [torch.zeros(1, 1)], lambda: torch.zeros(1, 1), torch.zeros(1, 1))
    assert not (tmp_path / "x.json").exists()


@pytest.mark.parametrize("kind", runtimes.PACKAGES)
def test_themselves(kind, tmp_path):
    if not all(map(importlib.util.find_spec, runtimes.PACKAGES[kind])):
        pytest.skip(f"{kind} is not installed")
    (row, _), _ = measured(kind, tmp_path / "x.json")
    assert row["difference"] <= 1e-5
