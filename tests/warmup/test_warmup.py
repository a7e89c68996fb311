"""minisd warm, and what a drawing compiles while it loads: exactly what it launches, into the cache that it looks in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import SMALL

import minisd
from minisd.cli.main import main
from minisd.files.checkpoint import open_checkpoint
from minisd.library.names import resolve
from minisd.library.places import tiny_checkpoint
from minisd.warmup import starting
from minisd.warmup.starting import begin, begin_early, compiling, is_compiled, job_of, of_checkpoint

pytest.importorskip("triton")
MORE = (("tiny", "plain"), ("tiny", "fp8"), ("sdxl", "plain"))
DRAWING = Path(__file__).with_name("drawing.py")


@pytest.fixture(autouse=True)
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's cache and ours, empty."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def drawn(path: Path, how: str) -> dict[str, list[str]]:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    root = Path(minisd.__file__).parents[1]
    environment["PYTHONPATH"] = os.pathsep.join([str(root), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", str(DRAWING), str(path), how]
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.parametrize(
    ("family", "how"),
    [("tiny", "masked"), *(pytest.param(*each, marks=pytest.mark.slow) for each in MORE)],
)
def test_what_is_foretold_is_what_a_drawing_launches(family, how, tmp_path):
    """From two sources: the networks on the meta device, and a drawing, whose launches are seen and not made."""
    path = tiny_checkpoint() if family == "tiny" else SMALL[family].write(tmp_path / "x.safetensors")
    seen = drawn(path, how)
    plain, masked = seen["foretold"]
    assert len(plain) > 10
    assert seen["launched"] == (masked if how == "masked" else plain)
    assert any("quantise_rows" in name for name in plain) == (how == "fp8")
    more = {name.split("_kernel")[0] for name in set(masked) - set(plain)}
    assert "linear_step" in more
    assert more <= {"linear_step", "whole", "partial", "apply"}  # the encoder's norms
    foretold, launched = seen["hashes"]
    assert foretold == launched  # the key of Triton's cache


@pytest.mark.slow
def test_warm_fills_the_cache_and_remembers_it(tmp_path, capsys):
    assert main(["warm", "tiny", "--target", "a100", "--size", "64x64", "--json", "--jobs", "2"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["target"] == "sm_80"
    assert len(found["variants"]) > 10
    for each in found["variants"]:
        assert Path(each["place"]).is_relative_to(tmp_path / "triton")
        assert any(file.suffix == ".cubin" for file in Path(each["place"]).iterdir())
    job = job_of([of_checkpoint(open_checkpoint(tiny_checkpoint()), (64, 64))], 80)
    assert is_compiled(job)
    assert not is_compiled(job | {"capability": 90})
    (tmp_path / "triton").rename(tmp_path / "gone")
    assert not is_compiled(job)


class Started:
    """In the place of the process that compiles."""

    def __init__(self, lines: list[dict[str, object]], fails: bool = False) -> None:
        self.lines, self.fails, self.jobs = lines, fails, []

    def __call__(self, module, job):
        self.jobs.append(job)
        code = "import sys, time\n" + "".join(f"print({json.dumps(json.dumps(line))})\n" for line in self.lines)
        code += "sys.exit('broken')" if self.fails else ""
        return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


GPU = torch.device("cuda", 0)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Started]:
    fake = Started([{"variants": 1}, {"kernel": "geglu", "place": str(tmp_path)}])
    monkeypatch.setattr(starting, "started", fake)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(starting, "capability_here", lambda index=0: 90)
    for name in ("MINISD_FAST", "MINISD_KERNELS"):
        monkeypatch.delenv(name, raising=False)
    yield fake
    starting.stop()


def test_loading_onto_a_gpu_compiles_meanwhile_and_once(started):
    file = open_checkpoint(tiny_checkpoint())
    for _ in range(2):
        with compiling(file, GPU, torch.float16, None):
            assert len(started.jobs) == 1
    assert not starting.RUNNING
    (job,) = started.jobs
    assert (job["capability"], job["models"][0]["dtype"], job["models"][0]["family"]) == (90, "float16", "sd1")


def test_a_command_begins_before_it_loads(started):
    begin_early("tiny", None, None, (128, 64), fp8=True)
    assert started.jobs[0]["models"][0]["latents"] == [16, 32]  # the tiny VAE halves twice
    assert started.jobs[0]["models"][0]["fp8"] is True
    named = open_checkpoint(resolve("tiny"))  # from a checkout, that is not the installed one
    with compiling(named, GPU, torch.float16, None, fp8=True):
        pass
    assert len(started.jobs) == 1


@pytest.mark.parametrize(
    ("model", "device", "variables"),
    [("tiny", "cpu", {}), ("tiny", None, {"MINISD_FAST": "0"}), ("tiny", None, {"MINISD_KERNELS": "torch"}), ("none", None, {})],
)
def test_where_nothing_is_launched_nothing_is_compiled(model, device, variables, started, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    begin_early(model, device, None)
    assert not started.jobs


def test_a_cpu_and_the_plain_way_wait_for_no_compiler(started):
    file = open_checkpoint(tiny_checkpoint())
    for device, fast in ((torch.device("cpu"), None), (GPU, False)):
        with compiling(file, device, torch.float32, fast):
            pass
    assert not started.jobs


def test_a_compiler_that_fails_stops_nobody(started):
    started.fails = True
    file = open_checkpoint(tiny_checkpoint())
    for _ in range(2):  # and is asked again: nothing is remembered of it
        with compiling(file, GPU, torch.float16, None):
            pass
    assert len(started.jobs) == 2


def test_what_is_under_way_ends_with_the_command(started):
    begin(open_checkpoint(tiny_checkpoint()), 90, (None, None), "float16")
    ((_, process),) = starting.RUNNING.values()
    starting.stop()
    assert process.poll() is not None
    assert not starting.RUNNING


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["tiny"], "--target: expected the name of a GPU, such as h100 or sm_90, where this machine has none"),
        (["tiny", "--target", "voodoo"], "--target: expected one of a100, "),
        (["tiny", "--target", "h100", "--dtype", "int8"], "--dtype: expected float32, bfloat16 or float16, found 'int8'"),
        (["tiny", "--target", "h100", "--size", "100x64"], "--size: expected multiples of 8 from 8 to 4096, found '100x64'"),
        (["tiny", "--target", "h100", "--jobs", "0"], "--jobs: expected a whole number from 1 to 256, found 0"),
        (["none.safetensors", "--target", "h100"], "none.safetensors: does not exist"),
    ],
)
def test_wrong_requests_are_named(arguments, said, capsys, monkeypatch):
    monkeypatch.setattr(starting, "capability_here", lambda index=0: None)
    assert main(["warm", *arguments]) in (2, 3)
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line
