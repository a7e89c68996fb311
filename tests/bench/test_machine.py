"""What a machine makes of the work: launches and predictions for a GPU that is not there, the ledger of a start."""

from __future__ import annotations

import json
import time
from dataclasses import replace

import pytest
import torch

import minisd
from minisd.bench.machine import prediction
from minisd.bench.machine.gpus import GPUS, gpu_called, is_gpu
from minisd.bench.machine.launches import Launch, of_decoding, of_step
from minisd.bench.machine.ledger import ENTRIES, Ledger
from minisd.bench.machine.resources import matrix, occupancy, programs_per_sm
from minisd.bench.networks import MODELS
from minisd.cli.bench import bench, parsed
from minisd.fast.operations import ops


@pytest.fixture(scope="module")
def sd15() -> list[Launch]:
    return of_step(MODELS["sd15"], 64, torch.float16)


def count(launches, name):
    return sum(launch.name == name for launch in launches)


def test_launches_of_a_step_are_those_that_were_counted_otherwise(sd15):
    """By hand and by the profiles of a prototype."""
    assert len(sd15) == 416
    assert count(sd15, "convolution") + count(sd15, "convolution of an upsampling") == 52
    assert count(sd15, "product") == 154
    assert count(sd15, "attention") == 32
    norms = [count(sd15, f"group_norm, {part}") for part in ("whole", "statistics", "apply")]
    assert norms == [30, 21, 31]  # 61 norms: small maps in one launch, ten statistics by who wrote the map
    assert (count(sd15, "layer_norm"), count(sd15, "geglu"), count(sd15, "add_")) == (48, 16, 0)
    # 1,607 GFLOP of the plain network, less what phases save of upsampling, less time embedding and keys and values.
    assert 1.50e12 < sum(launch.flops for launch in sd15) < 1.56e12


@pytest.mark.slow
def test_launches_of_sdxl_and_of_decoding():
    assert len(of_step(MODELS["sdxl"], 128, torch.float16)) == 1028
    decoding = of_decoding(MODELS["sd15"], 64, torch.float16)
    assert count(decoding, "convolution") + count(decoding, "convolution of an upsampling") == 34
    assert count(decoding, "group_norm, apply") == 30


def test_a_step_in_float8_has_launches_of_its_own():
    step = of_step(MODELS["sd15"], 64, torch.bfloat16, fp8=True)
    assert len(step) == 579
    largest = max(launch.bytes for launch in step if launch.name == "layer_norm")
    # The stream is read and written, what is added to it is read, and rows in float8 are written.
    assert largest == pytest.approx(8192 * 320 * (2 + 2 + 2 + 1), rel=0.01)
    # Each of 16 transformers adds its last product by itself, and what leaves it; each ResBlock with a skip has an addition, too.
    assert count(step, "add_") == 32
    assert count(step, "product in float8") == 128  # of 16 transformers: 6 in each block, and in and out of each
    assert count(step, "quantise_rows") == 64  # what both attentions made, and the maps that enter and leave
    assert (count(step, "layer_norm"), count(step, "geglu"), count(step, "dequantise")) == (48, 16, 64)
    half, float8 = (sum(each.flops for each in step if each.name == name) for name in ("product", "product in float8"))
    assert float8 > 10 * half
    gpu = GPUS["h200"]
    (large,) = {each for each in step if each.name == "product in float8" and each.sizes == (1, 8192, 2560, 320)}
    assert prediction.seconds_of(large, gpu) < prediction.seconds_of(replace(large, name="product"), gpu)


@pytest.mark.parametrize(
    ("device", "said"),
    [
        (["--device", "a100"], r"--fp8: expected --device l4, .*, which have float8, found a100"),
        ([], r"--fp8: expected --device l4, .*, found none"),
        (["--device", "cpu"], r"--fp8: expected --device l4, .*, found cpu"),
    ],
)
def test_where_float8_cannot_be_predicted_it_is_said(device, said):
    with pytest.raises(minisd.UsageError, match=said):
        bench(parsed(["roofline", "--fp8", *device]))


def test_watching_launches_leaves_the_operations_as_they_were(sd15):
    from minisd.fast import choice, operations

    assert ops.REPLACEMENTS["attention"] is operations.kernel_attention
    assert choice.kernels().__name__ == "minisd.kernels"


def test_predictions_fall_with_the_machine(sd15):
    seconds = {name: sum(prediction.by_kind(sd15, gpu).values()) for name, gpu in GPUS.items()}
    assert [*sorted(seconds, key=seconds.__getitem__)][:4] == ["b200", "h200", "h100", "a100"]
    assert seconds["rtx5090"] < seconds["rtx4090"] < seconds["rtx3090"]
    assert 4.5e-3 < seconds["h200"] < 6.0e-3  # what the model was fitted to: 5.0 to 5.9 ms were estimated apart from it
    for gpu in GPUS.values():  # never below what the data sheet allows
        for launch in sd15:
            assert prediction.seconds_of(launch, gpu) > launch.flops / gpu.half


def test_a_gpu_that_is_not_there(tmp_path, monkeypatch, sd15, capsys):
    monkeypatch.setattr(prediction, "of_step", lambda *_: sd15)
    monkeypatch.setattr(prediction, "of_decoding", lambda *_: sd15[:9])
    assert bench(parsed(["roofline", "--device", "RTX 4090", "--json", str(tmp_path / "x.json")])) == 0
    step, decoding, picture = json.loads((tmp_path / "x.json").read_text())["tables"]
    for table in (step, decoding, picture):
        assert "predicted for GeForce RTX 4090, float16" in table["title"]
        assert not any(key.startswith("time") for row in table["rows"] for key in row)
    rows = {row["label"]: row for row in step["rows"]}
    assert rows["all"]["launches"] == 416
    assert rows["all"]["predicted_us"] == pytest.approx(sum(row["predicted_us"] for row in step["rows"]) / 2)
    whole = 20 * rows["all"]["predicted_us"] + decoding["rows"][-1]["predicted_us"]
    assert picture["rows"][0]["predicted_ms"] == pytest.approx(whole / 1e3)
    assert "no measurement" in capsys.readouterr().out
    with pytest.raises(minisd.UsageError, match="--dtype: expected float16 or bfloat16"):
        bench(parsed(["roofline", "--device", "h200", "--dtype", "float32"]))


def test_gpus_by_what_torch_calls_them():
    for name, key in {
        "NVIDIA H200": "h200", "NVIDIA H100 80GB HBM3": "h100", "NVIDIA A100-SXM4-80GB": "a100", "NVIDIA L4": "l4",
        "NVIDIA L40S": "l40s", "NVIDIA GeForce RTX 4090": "rtx4090",
    }.items():  # fmt: skip
        assert gpu_called(name) is GPUS[key], name
    assert gpu_called("Tesla T4") is None
    assert is_gpu("H200")
    assert not is_gpu("cuda")
    assert not is_gpu(None)


def test_a_ledger_adds_up():
    kept = Ledger()
    start = time.perf_counter()
    with kept.entry("load"):
        time.sleep(0.02)
        kept.within("compile", time.sleep)(0.03)
    whole = time.perf_counter() - start
    assert kept.seconds["compile"] >= 0.03
    assert sum(kept.seconds.values()) == pytest.approx(whole, abs=2e-3)
    assert 0.02 <= kept.seconds["load"] <= whole - 0.03


@pytest.mark.slow
def test_a_start_entry_by_entry(tmp_path):
    command = ["start", "--checkpoint", "tiny", "--device", "cpu", "--dtype", "float32", "--json", str(tmp_path / "x.json")]
    assert bench(parsed(command)) == 0
    (table,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    rows = {row["label"]: row for row in table["rows"]}
    assert [*rows] == [*ENTRIES.values(), "all of it"]
    assert rows["the hash of the file"]["cold_s"] >= 0  # what is left to wait for: a thread has begun with it
    assert rows["the steps"]["cold_s"] > 0
    assert rows["all of it"]["cold_s"] == pytest.approx(sum(rows[label]["cold_s"] for label in ENTRIES.values()))


def test_instructions_are_counted_by_kind():
    from collections import Counter

    assert matrix(Counter({"HGMMA.64x128x16.F32": 36, "FADD": 2})) == "36 wgmma"
    assert matrix(Counter({"FADD": 2})) == ""
    variant = {"registers": 40, "warps": 4, "shared": 0}
    assert programs_per_sm(variant, 90) == 12
    assert occupancy(variant, 90) == 0.75


def test_accuracy_counts_decibels_and_arithmetic(tiny, monkeypatch):
    import numpy as np

    from minisd.bench.lab import accuracy
    from minisd.request import Request

    white = np.full((4, 4, 3), 255.0)
    assert accuracy.psnr(white, white) == 99
    assert accuracy.psnr(white, white - 255) == pytest.approx(0)
    assert accuracy.psnr(white, white - 2.55) == pytest.approx(40)
    small = {"width": 32, "height": 32, "steps": 2, "seed": 1}
    whole, half = (accuracy.work(tiny, Request("a", **small, guidance_scale=scale)) for scale in (4.0, 1.0))
    assert half < 0.6 * whole  # half the UNet's, and all of the text encoder's


@pytest.mark.slow
def test_accuracy_of_a_kernel_is_of_that_kernel(tiny, monkeypatch):
    """In the interpreter: of one that only the fused form asks for, too."""
    from minisd.bench.lab import accuracy
    from minisd.bench.report import Report
    from minisd.bench.timing import Clock
    from minisd.request import Request

    report = Report(Clock(torch.device("cpu"), torch.bfloat16, 1))
    report.table("kernels", ("PSNR dB", "worst dB", "latents", "UNet MB", "work", "time s", "to float32"))
    requests = [Request("a star", width=32, height=32, steps=1, seed=1)]
    monkeypatch.setattr(accuracy, "runs_here", lambda device: True)
    monkeypatch.setattr(accuracy.choice, "ALL", frozenset({"upsample_conv", "linear_step"}))
    accuracy.kernels(report, None, "cpu", requests, accuracy.drawn(tiny, requests))
    without, by_kernel = report.tables[-1]["rows"]
    assert without["label"] == "bfloat16, fused, no kernel"
    assert by_kernel["label"] == "bfloat16, fused, kernel upsample_conv"
    assert without["latents"] != by_kernel["latents"]


@pytest.mark.slow
def test_accuracy_of_the_tiny_checkpoint(tmp_path, monkeypatch):
    from minisd.bench.lab import accuracy

    one = accuracy.requests_for
    monkeypatch.setattr(accuracy, "requests_for", lambda pipe, full: one(pipe, full)[:1])
    monkeypatch.setattr(accuracy, "runs_here", lambda device: False)  # kernels in the interpreter: half an hour
    bench(parsed(["accuracy", "--device", "cpu", "--json", str(tmp_path / "x.json")]))
    formats, shortcuts, layers = json.loads((tmp_path / "x.json").read_text())["tables"]
    found = {row["label"]: row for row in (*formats["rows"], *shortcuts["rows"])}
    assert found["bfloat16"]["PSNR_dB"] > found["--fp8 in bfloat16"]["PSNR_dB"] > 35
    assert found["float16, emulated"]["PSNR_dB"] > 55
    assert found["--fp8 in bfloat16"]["UNet_MB"] < 0.52 * found["bfloat16"]["UNet_MB"]
    assert found["--cfg-until 0.5"]["work"] < found["--cfg-until 0.7"]["work"] < 1
    assert found["--cache 3"]["work"] < found["--cache 2"]["work"] < 0.7
    worst = {row["label"]: row for row in layers["rows"]}
    assert worst["Linear"]["float16"] < worst["Linear"]["bfloat16"] < worst["Linear"]["fp8"] < 0.1
    assert worst["Conv2d"]["float16"] < worst["Conv2d"]["fp8"] < 0.1
