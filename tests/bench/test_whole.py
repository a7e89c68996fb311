"""bench image: whole processes with what they take, the peers that are there and those that are not."""

from __future__ import annotations

import copy
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from families import SMALL
from PIL import Image

from minisd.bench.networks import Published, random_checkpoint
from minisd.bench.report import Report
from minisd.bench.timing import Clock
from minisd.bench.whole import conversion, table, with_openvino, with_sdcpp
from minisd.bench.whole.spending import spent
from minisd.by_hand import draw
from minisd.cli import main
from minisd.cli.bench import parsed
from minisd.library.places import tiny_checkpoint

PROMPT = "a red circle on a blue background"
CPU = torch.device("cpu")
ASKED = {"prompt": PROMPT, "width": 64, "height": 64, "steps": 2}


def run(text: str):
    return spent([sys.executable, "-c", text], {})


@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux alone")
def test_what_a_process_takes():
    found = run(
        "import sys, time\n"
        "print('a warning', file=sys.stderr)\n"
        "held = b'1' * 200_000_000\n"
        "print('ready to draw', file=sys.stderr, flush=True)\n"
        "end = time.process_time() + 0.2\n"
        "while time.process_time() < end: pass\n"
        "del held; time.sleep(0.1)"
    )
    assert 200e6 < found.peak < 260e6  # also when it is given back, and not that of this process
    assert found.processor >= 0.2
    assert found.ready + 0.3 <= found.seconds
    assert run("pass").ready is None


def test_the_last_word_of_a_process_that_fails():
    with pytest.raises(RuntimeError, match="ValueError: no"):
        run("raise ValueError('no')")


def measured(tmp_path, kinds: list[str]) -> tuple[dict[str, dict], list[str]]:
    report = Report(Clock(CPU, torch.float32, 1), tmp_path / "x.json")
    table.bench(report, kinds, "tiny", path=str(tiny_checkpoint()), **ASKED)
    report.write()
    (found,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    return {row["label"]: row for row in found["rows"]}, found.get("notes", [])


def test_rows_of_what_is_installed_and_a_line_for_what_is_not(tmp_path, monkeypatch):
    """By processes that take no time: those of the peers are scripts with the same last line."""
    good = tmp_path / "good.py"
    good.write_text("import json, sys; json.loads(sys.argv[1])['steps']; print('ready to draw', file=sys.stderr)")
    bad = tmp_path / "bad.py"
    bad.write_text("raise SystemExit('broken')")
    monkeypatch.setattr(table.Job, "command", lambda job: job.asked_of((str(good),)))
    monkeypatch.setitem(table.PEERS, "openvino", table.Peer("two", "json", (str(bad),)))
    monkeypatch.setitem(table.PEERS, "sdcpp", table.Peer("three", "no_such_package", ()))
    rows, notes = measured(tmp_path, ["openvino", "sdcpp", "onnxruntime"])
    assert set(rows) == {table.FIRST, table.AGAIN, "two"}
    assert rows["two"]["error_text"] == "RuntimeError: broken"
    assert rows[table.AGAIN]["to_ours"] == 1
    assert 0 < rows[table.AGAIN]["ready_s"] <= rows[table.AGAIN]["time_s"]
    assert notes[-1] == "not installed: three"


def test_the_command_is_one_that_draws():
    """Every option of it is known; what it draws is tried below."""
    from minisd.cli.draw import parser

    job = table.Job(str(tiny_checkpoint()), device="cpu", dtype="float32", folder="x", **ASKED)
    told = job.command()
    args = parser().parse_args(told[told.index("minisd") + 1 :])
    assert (args.prompt, args.size, args.steps, args.seed, args.debug) == (PROMPT, (64, 64), 2, 0, True)


def test_sizes_and_steps_are_of_pictures():
    args = parsed(["image", "-m", "tiny", "--size", "64x128", "--steps", "3", "--processes", "--peers", "sdcpp,openvino"])
    assert (args.checkpoint, args.size, args.steps, args.processes) == ("tiny", (64, 128), 3, True)


def openvino() -> types.SimpleNamespace:
    """In its place: copies of the modules, by the names that they would have on disk."""
    networks: dict[str, torch.nn.Module] = {}

    def compile_model(path, device, options):
        assert (device, options["INFERENCE_PRECISION_HINT"]) == ("CPU", "f32")
        network = networks[Path(path).stem]

        def call(arrays):
            return [network(*map(torch.from_numpy, arrays)).detach().numpy()]

        call.input = lambda number: types.SimpleNamespace(shape=(1, 4, 16, 16))  # of the decoder
        return call

    return types.SimpleNamespace(
        PartialShape=tuple,
        convert_model=lambda module, example_input, input: copy.deepcopy(module),
        save_model=lambda model, path, compress_to_fp16: networks.update({path.stem: model}),
        Core=lambda: types.SimpleNamespace(compile_model=compile_model),
    )


def test_openvino_draws_the_picture_of_by_hand(tmp_path, monkeypatch):
    """Its loop, with the networks that it is given to convert, and the noise of by_hand.py."""
    job = vars(table.Job(str(tiny_checkpoint()), device="cpu", dtype="float32", folder=str(tmp_path), **ASKED))
    monkeypatch.setitem(sys.modules, "openvino", openvino())
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    monkeypatch.setattr(np.random, "default_rng", lambda seed: types.SimpleNamespace(standard_normal=lambda *_: noise))
    conversion.main(job)
    with_openvino.main(job)
    wanted = np.asarray(draw(PROMPT, steps=2, guidance=7.5)).astype(int)
    assert np.abs(np.asarray(Image.open(tmp_path / "openvino.png")) - wanted).max() <= 1


def test_what_stable_diffusion_cpp_is_asked(tmp_path, monkeypatch):
    """By the names that its Python package has for these (stable_diffusion_cpp 0.4.7)."""
    told = {}

    class StableDiffusion:
        def __init__(self, *, model_path, n_threads, wtype, vae_decode_only, verbose):
            told.update(path=model_path, weights=wtype)

        def generate_image(self, prompt, *, width, height, seed, cfg_scale, sample_steps, sample_method):
            told.update(size=(width, height), steps=sample_steps, sampler=sample_method)
            return [Image.new("RGB", (width, height))]

    monkeypatch.setitem(sys.modules, "stable_diffusion_cpp", types.SimpleNamespace(StableDiffusion=StableDiffusion))
    with_sdcpp.main(vars(table.Job("x.safetensors", device="cpu", dtype="bfloat16", folder=str(tmp_path), **ASKED)))
    assert told == {"path": "x.safetensors", "weights": "bf16", "size": (64, 64), "steps": 2, "sampler": "euler"}
    assert (tmp_path / "sdcpp.png").exists()


@pytest.mark.slow
def test_whole_processes(tmp_path):
    """minisd's command line and, where they are installed, diffusers and OpenVINO, by a small checkpoint."""
    small = SMALL["sd1"]
    path = random_checkpoint(Published("small", small.shapes, small.family, 16, small.context), tmp_path / "x.safetensors", CPU)
    argv = ["bench", "image", "-m", str(path), "--size", "64x64", "--steps", "2", "--device", "cpu", "--dtype", "float32"]
    assert main([*argv, "--processes", "--peers", "eager,openvino", "--json", str(tmp_path / "x.json")]) == 0
    (found,) = json.loads((tmp_path / "x.json").read_text())["tables"]
    assert [row["label"] for row in found["rows"][:3]] == [table.FIRST, table.AGAIN, "diffusers"]
    for row in found["rows"]:
        assert "error_text" not in row
        assert (row["ready_s"] or 0) < row["time_s"]
        assert row["CPU_s"] > 0.1
        assert row["peak_GB"] > 0.1
