"""The bench command: rows appear and reach the file, what fails costs its own row, wrong words are named."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import time

import pytest
import torch
from families import SMALL

import minisd
from minisd.bench import everything, networks, peers, steps
from minisd.bench.everything import summary
from minisd.bench.report import Report, seconds_of, write_json
from minisd.bench.roofline import class_of
from minisd.bench.timing import Clock
from minisd.cli.bench import bench as main
from minisd.models.family import UNET
from minisd.workbench import blueprint

CLOCK = Clock(torch.device("cpu"), torch.float32, 2)
CPU = ["--device", "cpu", "--dtype", "float32", "--repeats", "1"]


def rows(path, table=0):
    return json.loads(path.read_text())["tables"][table]["rows"]


@pytest.fixture
def little(monkeypatch: pytest.MonkeyPatch) -> None:
    """A UNet and a VAE that take no time, in the place of the published ones."""
    small = SMALL["sdxl"]
    published = networks.Published("small", small.shapes, small.family, 8, small.context, small.vector, 64)
    monkeypatch.setitem(networks.MODELS, "sd15", published)
    unet = {"block_out_channels": (64, 128, 256), "cross_attention_dim": 128, "attention_head_dim": [1, 2, 4]}
    unet |= {"transformer_layers_per_block": [1, 1, 2], "projection_class_embeddings_input_dim": small.vector}
    monkeypatch.setitem(peers.UNETS, "small", peers.UNETS["SDXL"] | unet)


def test_kernels(tmp_path, capsys):
    assert main(["kernels", "geglu", *CPU, "--json", str(tmp_path / "x.json")]) == 0
    assert "smaller shapes" in capsys.readouterr().out
    found = rows(tmp_path / "x.json")
    assert {row["variant"] for row in found} == {"minisd", "PyTorch"}
    assert all("error_text" not in row and row["error"] < 1e-6 for row in found)
    assert all((row["time_us"] is None) == (row["variant"] == "minisd") for row in found)  # an interpreter is not timed


QUARTER = {"s": 0.25, "ms": 250.0, "us": 250_000.0}


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything takes a quarter of a second."""

    def quarter(self: Clock, run):
        run()
        return 0.25

    for name in ("seconds", "once", "back_to_back", "replayed"):
        monkeypatch.setattr(Clock, name, quarter)


@pytest.mark.parametrize(
    ("part", "key"),
    [
        (["kernels", "geglu"], "time_us"),
        (["unet", "--peers", "eager"], "time_ms"),
        (["image", "--checkpoint", "tiny", "--peers", ""], "time_s"),
    ],
)
def test_a_key_names_the_unit_of_its_number(part, key, little, slow_clock, tmp_path):
    main([*part, *CPU, "--json", str(tmp_path / "x.json")])
    known = ("PyTorch", "minisd, whole step as drawn", "diffusers, eager", "minisd, prompt to uint8")
    found = [row for row in rows(tmp_path / "x.json") if row.get("variant", row["label"]) in known]
    assert found
    assert {row[key] for row in found} == {QUARTER[key[5:]]}


def test_a_roofline_is_in_the_units_that_it_says(little, slow_clock, tmp_path):
    start = time.perf_counter()
    main(["roofline", *CPU, "--json", str(tmp_path / "x.json")])
    took = time.perf_counter() - start
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    assert found["all"]["floor_us"] == pytest.approx(found["all"]["GFLOP"] * 1e9 / (2 * 1024**3 / 0.25) * 1e6)
    assert took * 1e6 / 1000 < found["all"]["time_us"] < took * 1e6
    assert found["convolution"]["left_us"] == pytest.approx(
        max(0.0, found["convolution"]["time_us"] - found["convolution"]["floor_us"])
    )


def test_times_are_given_in_seconds_and_read_in_seconds(tmp_path):
    report = Report(CLOCK, tmp_path / "x.json")
    report.table("title", ("time us", "first s", "floor ms", "GB/s", "to ours"))
    report.add("a", time=0.002, first=3.0, floor=0.004, to_ours=2.0, **{"GB/s": 5.0})
    wanted = {"label": "a", "time_us": 2000.0, "first_s": 3.0, "floor_ms": 4.0, "to_ours": 2.0, "GB/s": 5.0}
    assert rows(tmp_path / "x.json") == [wanted]
    assert [seconds_of(wanted, name) for name in ("time", "first", "floor", "to_ours")] == [0.002, 3.0, 0.004, None]
    with pytest.raises(ValueError, match="expected values for time, first, floor, GB/s, to_ours, found time_us"):
        report.add("b", time_us=0.002)


def test_unet_against_diffusers(little, tmp_path):
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    ours, theirs = found["minisd, fused"], found["diffusers, eager"]
    assert found["minisd, plain modules"]["difference"] <= 1e-5
    assert ours["difference"] <= 1e-5
    assert theirs["difference"] <= 1e-5
    assert theirs["to_ours"] == pytest.approx(theirs["time_ms"] / ours["time_ms"])
    assert found["minisd, whole step as drawn"]["time_ms"] > 0


def test_vae_against_diffusers(tmp_path, monkeypatch):
    monkeypatch.setattr(blueprint, "sd15", lambda: SMALL["sd1"].shapes())
    monkeypatch.setitem(peers.VAE, "block_out_channels", (32, 64, 64, 64))
    main(["vae", *CPU, "--json", str(tmp_path / "x.json")])
    found = [row["difference"] for row in rows(tmp_path / "x.json") if "difference" in row]
    assert len(found) == 3
    assert max(found) <= 1e-5


def test_roofline_counts_the_work_and_the_time(little, tmp_path):
    main(["roofline", *CPU, "--json", str(tmp_path / "x.json")])
    found = {row["label"]: row for row in rows(tmp_path / "x.json")}
    assert found["convolution"]["GFLOP"] > 0
    assert found["convolution"]["time_us"] > 0
    assert found["all"]["time_us"] == pytest.approx(sum(row["time_us"] for row in found.values()) / 2)


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("sm90_xmma_fprop_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc_tilesize128x128x64", "convolution"),
        ("nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_TNT", "linear"),
        ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x128x64", "attention"),
        ("linear_geglu_kernel", "GEGLU"),
        ("apply_kernel", "GroupNorm, SiLU"),
        ("layer_norm_kernel", "LayerNorm"),
        ("void at::native::elementwise_kernel<128, 4, at::native::CUDAFunctor_add<c10::Half>>", "sums and copies"),
    ],
)
def test_kernels_of_a_gpu_are_sorted_by_name(kernel, kind):
    assert class_of(kernel) == kind


def test_what_fails_is_a_row_and_the_rest_goes_on(tmp_path, capsys):
    report = Report(CLOCK, tmp_path / "x.json")
    report.table("title", ("time ms",))
    with report.attempt("bad"):
        raise RuntimeError("no\nsecond line")
    report.add("good", time=0.5)
    assert rows(tmp_path / "x.json") == [
        {"label": "bad", "error_text": "RuntimeError: no"},
        {"label": "good", "time_ms": 500.0},
    ]
    assert "500.000" in capsys.readouterr().out


def test_a_kernel_that_fails_does_not_end_the_peers(little, monkeypatch, tmp_path):
    def broken(*args, **more):
        raise RuntimeError("broken")

    monkeypatch.setattr(steps, "laid_out", broken)
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    found = rows(tmp_path / "x.json")
    assert found[0]["error_text"] == "RuntimeError: broken"
    assert found[-1]["time_ms"] > 0


def test_all_keeps_what_a_part_measured_before_it_stopped(tmp_path, monkeypatch, capsys):
    script = tmp_path / "part.py"
    script.write_text(
        "import json, sys, time\n"
        "json.dump({'tables': [{'title': sys.argv[-3], 'columns': [], 'rows': []}]}, open(sys.argv[-1], 'w'))\n"
        "if 'slow' in sys.argv: time.sleep(60)\n"
        "sys.exit(3 if 'bad' in sys.argv else 0)\n"
    )
    popen = subprocess.Popen
    monkeypatch.setattr(everything, "random_checkpoint", lambda model, path, device: path.write_bytes(b""))
    monkeypatch.setattr(everything, "parts", lambda with_files: [["good"], ["bad"], ["slow"]])
    monkeypatch.setattr(everything, "LONGEST", 2.0)
    monkeypatch.setattr(everything.subprocess, "Popen", lambda command: popen([sys.executable, str(script), *command[5:]]))
    main(["all", *CPU, "--json", str(tmp_path / "all.json")])
    tables = json.loads((tmp_path / "all.json").read_text())["tables"]
    assert [table.get("command") for table in tables] == ["good", "bad", None, "slow", None, None]
    assert tables[2]["rows"][0]["error_text"] == "ended with status 3"
    assert tables[4]["rows"][0]["error_text"] == "stopped after 2 s"


def test_summary_takes_the_best_of_what_was_measured():
    def table(title, *rows):
        return {"title": title, "columns": [], "rows": list(rows)}

    def row(label, **values):
        return {"label": label} | values

    name = "SD 1.5 UNet step, batch 2, 64x64 latents, float16, x"
    floor = row("the plain form's arithmetic alone", time_ms=2.0)
    ours = row("minisd, fused", time_ms=6.0), row("minisd, whole step as drawn", time_ms=5.0)
    eager, graph = row("diffusers, eager", time_ms=40.0), row("diffusers in a CUDA graph", time_ms=10.0)
    tables = [
        table(name, *ours, floor, eager, graph),
        table(name, row("minisd, fused", time_ms=4.0), row("diffusers, torch.compile", error_text="no")),
        table(name, row("minisd, fused", time_ms=4.0), floor, row("diffusers, torch.compile", time_ms=6.0)),
        table("attention, float16: x", row("SDXL self d=64 64x64", variant="minisd", time_us=200.0, of_ceiling=0.5),
              row("SDXL self d=64 64x64", variant="cuDNN", time_us=100.0),
              row("SDXL self d=64 64x64", variant="64x64x4x2", time_us=10.0)),
        table("opening a 2 GB file", row("minisd, float16", time_s=0.5, **{"GB/s": 4.0})),
    ]  # fmt: skip
    found = dict(summary(tables))  # in seconds
    step = found["SD 1.5 UNet step"]  # each peer against ours of its own run
    assert (step["time"], step["floor"], step["best_peer"]) == pytest.approx((0.004, 0.002, 0.006))
    assert (step["to_ours"], step["which_peer"]) == (pytest.approx(1.5), "diffusers, torch.compile")
    assert dict(summary(tables[:2]))["SD 1.5 UNet step"]["to_ours"] == pytest.approx(2.0)
    kernel = found["attention SDXL self d=64 64x64"]
    assert (kernel["floor"], kernel["which_peer"], kernel["to_ours"]) == (pytest.approx(1e-4), "cuDNN", pytest.approx(0.5))
    assert found["opening an SD 1.5 file at 4 GB/s"] == {"time": 0.5, "floor": None}
    assert len(found) == 3


def test_summary_finds_the_rows_that_bench_writes(little, tmp_path):
    """The labels are those of real tables."""
    main(["unet", *CPU, "--json", str(tmp_path / "x.json")])
    tables = json.loads((tmp_path / "x.json").read_text())["tables"]
    tables[0]["title"] = tables[0]["title"].replace("small", "SD 1.5")
    ((label, values),) = summary(tables)
    assert label == "SD 1.5 UNet step"
    assert values["which_peer"] == "diffusers, eager"
    assert 0 < values["floor"] < values["time"]
    from minisd.models.ops import kernels

    for kernel, shape in everything.SHAPES:
        assert any(each.label == shape for each in kernels().KERNELS[kernel].SHAPES), shape


def test_every_part_of_all_is_a_command():
    from minisd.cli.bench import parser
    from minisd.models.ops import kernels

    parts = [parser().parse_args(part) for part in everything.parts(with_files=True)]
    assert {part.what for part in parts} == {"unet", "vae", "kernels", "image", "load", "roofline"}
    assert {part.name for part in parts if part.name} == set(kernels().KERNELS)


def test_plot(tmp_path):
    pytest.importorskip("matplotlib")
    main(["kernels", "guided_step", *CPU, "--plot", str(tmp_path / "x.png")])
    assert (tmp_path / "x.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["kernels", "softmax"], r"bench kernels: expected one of group_norm, .* found 'softmax'"),
        (["all"], r"bench all: expected --json FILE"),
        (["unet", "--plot", "x.png"], r"--plot: expected matplotlib"),
    ],
)
def test_wrong_requests_are_named(arguments, message, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(minisd.UsageError, match=message):
        main([*arguments, *CPU])


def test_random_weights_keep_the_keys(tmp_path):
    small = SMALL["sd1"]
    model = networks.Published("small", small.shapes, small.family, 16, small.context)
    pipe = minisd.load(networks.random_checkpoint(model, tmp_path / "x.safetensors", torch.device("cpu")), device="cpu")
    assert set(pipe.model.state_dict()) == set(small.shapes())
    assert any(key.startswith(UNET) for key in small.shapes())


def test_write_json_leaves_no_draft(tmp_path):
    write_json(tmp_path / "x.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_a_clock_counts_the_median():
    assert dataclasses.replace(CLOCK, repeats=3).seconds(lambda: sum(range(1000))) > 0
