"""An installation beside PyTorch's CPU build has no Triton: everything but the kernels works, and what needs them says so."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

RUN = """
import io, json, sys
from contextlib import redirect_stderr, redirect_stdout
from minisd.cli import main
done = []
for argv in json.loads(sys.argv[1]):
    with redirect_stdout(io.StringIO()) as out, redirect_stderr(io.StringIO()) as err:
        status = main(argv)
    done.append([status, out.getvalue(), err.getvalue()])
print(json.dumps(done))
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Runs commands, one after the other, in a process that finds a Triton which cannot be imported, for this reason."""
    (tmp_path / "site" / "triton").mkdir(parents=True)
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")

    def run(reason: str, *commands: list[str], **variables: str) -> list[tuple[int, str, str]]:
        (tmp_path / "site" / "triton" / "__init__.py").write_text(f"raise {reason}")
        environment = os.environ | {"PYTHONPATH": str(tmp_path / "site"), "TRITON_INTERPRET": "0"} | variables
        command = [sys.executable, "-c", RUN, json.dumps(commands)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return [tuple(each) for each in json.loads(done.stdout)]

    return run


MISSING = "ModuleNotFoundError('no', name='triton')"
DRAW = ["a red circle", "--steps", "1", "--device", "cpu", "--size", "32x32"]
MEASURE = ["--repeats", "1", "--device", "cpu"]


def test_without_triton(run):
    drawn, inspected, doctor, kernels, compiled = run(
        MISSING, DRAW, ["inspect", "tiny"], ["doctor"], ["bench", "kernels", "geglu", "--shapes-of", "tiny", *MEASURE],
        ["bench", "compile", "geglu"],
    )  # fmt: skip
    assert drawn == (0, "out.png\n", "")
    assert inspected[::2] == (0, "")
    assert doctor[::2] == (0, "")
    assert "triton       not installed\n" in doctor[1]
    assert ", Triton missing\n" in doctor[1]
    assert kernels[::2] == (0, "")
    assert "left out: they need Triton, which is not installed: `pip install triton` (on Linux)" in kernels[1]
    assert "PyTorch" in kernels[1]
    assert compiled[0] == 2
    needs = "minisd: error: bench compile: expected Triton to be installed, found none: `pip install triton` (on Linux)\n"
    assert compiled[2] == needs


def test_a_triton_that_is_broken(run):
    drawn, doctor = run("RuntimeError('half of it is missing')", DRAW, ["doctor"], MINISD_KERNELS="torch")
    assert drawn == (0, "out.png\n", "")
    assert "triton       not known: RuntimeError: half of it is missing\n" in doctor[1]
    assert ", Triton missing\n" in doctor[1]


def test_kernels_that_are_asked_for(run):
    ((status, _, said),) = run(MISSING, DRAW, MINISD_KERNELS="triton")
    assert status == 2
    assert said == (
        "minisd: error: kernels: expected Triton to be installed, found none: `pip install triton`, or MINISD_KERNELS=torch\n"
    )


def test_only_an_extra_asks_for_triton():
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not [each for each in project["dependencies"] if "triton" in each]
    assert extras["kernels"] == ["triton>=3.6; sys_platform == 'linux'"]
    assert "minisd[kernels,control,server,parquet,ray]" in extras["test"]
