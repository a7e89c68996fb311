"""`minisd doctor` tells what it can and fails at nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import minisd
from minisd.cli import main
from minisd.library import places
from minisd.workbench import doctor
from minisd.workbench.doctor import VARIABLES, as_text, examined

CODE = "import sys; from minisd.cli import main; sys.exit(main(sys.argv[1:]))"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(doctor, "PATIENCE", 20)  # on a machine that is busy


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_facts(home, monkeypatch):
    (home / "models").mkdir()
    for name in ("a.safetensors", "b.ckpt", "notes.txt"):
        (home / "models" / name).touch()
    (home / "cache" / "minisd").mkdir(parents=True)
    (home / "cache" / "minisd" / "library.json").write_bytes(bytes(1000))
    monkeypatch.setenv("MINISD_MODELS", str(home / "models"))
    found = examined()
    assert (found["minisd"], found["torch"]) == (minisd.__version__, torch.__version__)
    assert found["device"]["cores"] >= 1
    assert found["models"][0] == {"folder": "~/models", "files": 2}
    assert found["models"][-1]["files"] == 4  # the box
    assert found["caches"] == {"minisd_bytes": 1000, "Triton_bytes": 0}
    assert found["disk"]["cache"] == "~/cache/minisd"
    assert 0 < found["memory"]["free_bytes"] < found["memory"]["all_bytes"]
    assert found["environment"]["MINISD_MODELS"] == "~/models"
    assert not [name for name, each in found.items() if str(each).startswith("not known")]
    assert str(home) not in json.dumps(found)


def test_a_line_for_each_answer(home, monkeypatch, capsys):
    monkeypatch.setenv("MINISD_KERNELS", "torch")
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    lines = out.splitlines()
    assert [line.split()[0] for line in lines[:5]] == ["minisd", "python", "system", "torch", "triton"]
    assert any(re.fullmatch(r"memory +free [\d.]+ GB, all [\d.]+ GB", line) for line in lines)
    assert "MINISD_KERNELS=torch" in lines[-1]
    assert any(line.startswith("kernels      used none, why MINISD_KERNELS=torch, ") for line in lines)
    assert main(["doctor", "--json"]) == 0
    assert {line.split()[0] for line in lines} == set(json.loads(capsys.readouterr().out))


@pytest.mark.parametrize("package", ["torch", "triton", "numpy"])
def test_a_package_that_is_missing_or_broken_costs_its_lines_alone(package, tmp_path):
    missing = f"raise ModuleNotFoundError('no', name='{package}')"
    broken = "raise ImportError('no \\x1b[2J libgomp')"
    for content, said in ((missing, "not installed"), (broken, r"not known: ImportError: no \x1b[2J libgomp")):
        (tmp_path / package).mkdir(exist_ok=True)
        (tmp_path / package / "__init__.py").write_text(content)
        environment = os.environ | {"PYTHONPATH": str(tmp_path), "HOME": str(tmp_path)}
        done = subprocess.run([sys.executable, "-c", CODE, "doctor", "--json"], capture_output=True, env=environment, check=True)
        found = json.loads(done.stdout)
        assert found[package] == said
        assert done.stderr == b""
        assert (found["python"], found["models"][-1]["files"]) == (doctor.python(), 4)


def test_no_home_no_cache_a_wrong_variable(monkeypatch):
    monkeypatch.setenv("HOME", "~")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    monkeypatch.setenv("MINISD_KERNELS", "fast")
    monkeypatch.setenv("MINISD_KERNAL", "torch")
    monkeypatch.setenv("MINISD_MODELS", "/no/where")
    places.tell_missing.cache_clear()
    found = examined()
    assert found["disk"] == "not known: OSError: here is no place for a cache"
    assert found["kernels"].startswith("not known: UsageError: MINISD_KERNELS: expected auto, triton")
    assert found["environment"]["MINISD_KERNAL"] == "torch (which minisd does not know)"
    assert found["models"][-1] == "MINISD_MODELS: /no/where is not a folder"
    assert "caches       minisd not known: OSError: here is no place" in as_text(found)


def test_a_folder_that_does_not_answer(monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.01)
    monkeypatch.setattr(doctor, "searched", lambda: time.sleep(5))
    assert examined()["models"].startswith("not known: TimeoutError: no answer in 0.01 s")


def test_whatever_a_question_raises_is_told(monkeypatch):
    def fails():
        raise KeyError("x" * 1000)

    for name in ("python", "device", "kernels", "memory", "models", "disk", "caches"):
        monkeypatch.setattr(doctor, name, fails)
    found = examined()
    told = [each for each in found.values() if str(each).startswith("not known: KeyError: 'xxx")]
    assert len(told) == 7
    assert max(map(len, told)) < 350


def test_a_gpu(monkeypatch):
    class About:
        name, total_memory, major, minor = "NVIDIA H100", 80 << 30, 9, 0

    monkeypatch.setattr("minisd.system.device.to_device", lambda _: torch.device("cuda", 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: About)
    facts = doctor.device()
    assert (facts["GPU"], facts["compute_capability"], facts["draws_in"]) == ("NVIDIA H100", "9.0", "float16")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr("shutil.which", lambda _: None)
    assert doctor.kernels()["why"] == "Triton finds no C compiler"
    monkeypatch.setenv("CC", "cc")
    assert "group_norm" in doctor.kernels()["used"]
    monkeypatch.setattr("minisd.fast.choice.has_triton", lambda: False)
    assert doctor.kernels() == {"used": "none", "why": "Triton cannot be imported", "Triton": "missing"}
    monkeypatch.setenv("MINISD_KERNELS", "geglu")
    assert doctor.kernels()["why"].startswith("kernels: expected Triton to be installed, found none")


def test_every_variable_that_is_read_is_told():
    read = set()
    for folder in (Path(minisd.__file__).parent, Path(minisd.__file__).parents[1] / "kernels"):
        for path in folder.rglob("*.py"):
            read |= set(re.findall(r"environ(?:\.get|\.setdefault)?[\[(]\"(\w+)\"", path.read_text()))
    assert len(read) > 8
    assert read - {"KINETO_LOG_LEVEL"} <= set(VARIABLES)  # which bench sets for itself


def test_a_key_is_never_shown():
    assert doctor.environment({"MINISD_API_KEY": "correct-horse", "OTHER": "x"}) == {"MINISD_API_KEY": "(set)"}
