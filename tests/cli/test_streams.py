"""A stranger's text on the terminal, streams that are closed or know few letters, and signals."""

from __future__ import annotations

import json
import os
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import save_file as save_numpy

from minisd.cli import main
from minisd.cli.options import undisturbed
from minisd.cli.streams import ended_by_signals
from minisd.errors import shown
from minisd.system.atomic import replacing

FAST = ["--steps", "1", "--device", "cpu", "--seed", "1"]
COMMAND = [sys.executable, "-m", "minisd"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def raw_file(path: str, header: object) -> None:
    text = json.dumps(header).encode()
    Path(path).write_bytes(struct.pack("<Q", len(text)) + text)


def test_shown():
    assert shown("plain ü", 10) == "plain ü"
    assert shown("\x1b[2J\udcff\u202e", 30) == r"\x1b[2J\udcff\u202e"
    assert shown("x" * 11, 10) == "x" * 10 + "… (11 characters)"
    assert shown("\0" * 10, 10) == r"\x00\x00\x" + "… (10 characters)"


@pytest.mark.parametrize("where", ["dtype", "name"])
def test_a_strangers_text_is_escaped_and_cut(where, capsys):
    evil = "\x1b[2J\x9b31m" + "x" * 1_000_000
    facts = {"dtype": evil if where == "dtype" else "F32", "shape": [0], "data_offsets": [0, 0]}
    raw_file("x.safetensors", {evil if where == "name" else "w": facts})
    assert main(["inspect", "x.safetensors"]) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err[:-1].isprintable()
    assert len(err) < 2100


def test_a_text_where_a_tensor_is_expected_is_cut(capsys):
    raw_file("x.safetensors", {"w": "y" * 4_000_000})
    assert main(["inspect", "x.safetensors"]) == 3
    assert len(capsys.readouterr().err) < 2100


def test_json_is_not_cut(capsys):
    save_numpy({}, "x.safetensors", {"a": "\x1b" * 3000})
    assert main(["inspect", "x.safetensors", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["metadata"]["a"] == "\x1b" * 3000


def test_warnings_and_usage_errors_are_one_line(capsys, monkeypatch):
    monkeypatch.setenv("MINISD_MODELS", "/no\x1b[2J\nwhere")
    assert main(["models"]) == 0
    assert r"minisd: warning: MINISD_MODELS: /no\x1b[2J where is not a folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["a star", "--steps", "1\n\x1b[2J2"])
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "\x1b" not in err


def test_the_streams_are_given_back(monkeypatch):
    before = sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)
    assert main(["--version"]) == 0
    assert (sys.stdout, sys.stderr, signal.getsignal(signal.SIGTERM)) == before


@pytest.mark.parametrize("encoding", ["utf-8:strict", "ascii:strict", "latin-1"])
def test_names_that_are_not_in_the_streams_letters(encoding):
    environment = os.environ | {"PYTHONIOENCODING": encoding}
    name = b"a\xff\xe2\x98\x83.png"
    done = subprocess.run([*COMMAND, "a star", "-o", name, *FAST], capture_output=True, env=environment, check=True)
    assert os.listdir(b".") == [name]
    assert done.stdout == (b"a\\udcff\xe2\x98\x83.png\n" if encoding.startswith("utf") else b"a\\udcff\\u2603.png\n")


def test_help_on_a_stream_of_ascii():
    done = subprocess.run([*COMMAND, "--help"], capture_output=True, env=os.environ | {"PYTHONIOENCODING": "ascii"}, check=True)
    assert done.stdout.isascii()
    assert b"commands:" in done.stdout


@pytest.mark.parametrize("arguments", [["inspect", "tiny"], ["a star", "-o", "x.png", *FAST]])
def test_a_closed_stdout(arguments):
    done = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *COMMAND, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (141, "")
    if "-o" in arguments:
        assert Path("x.png").read_bytes().startswith(b"\x89PNG")


def test_a_file_that_cannot_be_used_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(
        "minisd.library.names.list_models", lambda _: (_ for _ in ()).throw(PermissionError(13, "Permission denied", "a\x1b"))
    )
    assert main(["models"]) == 1
    assert capsys.readouterr().err == "minisd: error: a\\x1b cannot be used: Permission denied\n"


def test_no_memory_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr("minisd.library.names.list_models", lambda _: (_ for _ in ()).throw(MemoryError()))
    assert main(["models"]) == 4
    assert capsys.readouterr().err == "minisd: error: there is not enough memory for this\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_draft_is_gone_after_a_signal(number, tmp_path):
    before = signal.signal(number, signal.SIG_DFL)  # under nohup, SIGHUP is ignored, and minisd leaves it so
    try:
        end_with(number, tmp_path)
    finally:
        signal.signal(number, before)


def end_with(number, tmp_path):
    with pytest.raises(KeyboardInterrupt), ended_by_signals() as came, replacing(tmp_path / "x") as draft:  # noqa: PT012
        draft.write_text("half")
        signal.raise_signal(number)
    assert came == [number]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_is_drawn_is_written_before_a_signal_has_its_way(number):
    done = []
    with pytest.raises(KeyboardInterrupt), ended_by_signals(), undisturbed():  # noqa: PT012  # the block goes on
        signal.raise_signal(number)
        done.append(True)
    assert done


def test_sigterm_ends_as_ctrl_c_does():
    arguments = ["a star", "--steps", "999", "--num-images", "1000", "--preview", "look.png", "-o", "x.png", "--device", "cpu"]
    process = subprocess.Popen([*COMMAND, *arguments], stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 60
    while not Path("look.png").exists() and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 143, err
    assert err.splitlines()[-1] == "minisd: interrupted"
    assert "Traceback" not in err
    assert [name for name in os.listdir() if "tmp" in name] == []


@pytest.mark.parametrize("module", ["minisd.cli", "minisd.cli.main", "minisd.cli.bench"])
def test_ctrl_c_during_the_first_imports_is_one_word(module):
    code = """
import runpy, sys
class Interrupting:
    def find_spec(self, name, *_):
        if name == sys.argv[1]:
            raise KeyboardInterrupt
sys.meta_path.insert(0, Interrupting())
runpy.run_module("minisd", run_name="__main__", alter_sys=True)
"""
    done = subprocess.run([sys.executable, "-c", code, module], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "minisd: interrupted\n")
