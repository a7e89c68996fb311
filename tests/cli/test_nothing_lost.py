"""What must not happen to files: two runs with one name, an output that is an input, Ctrl-C after half of the pictures."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from minisd.cli import main
from minisd.errors import NonFiniteError, OutputError
from minisd.library.places import tiny_checkpoint
from minisd.pictures.image import save_png
from minisd.request import Request
from minisd.result import Interrupted, finish, with_bar
from minisd.workbench.converting import convert

FAST = ["--steps", "1", "--size", "32x32", "--seed", "1", "--device", "cpu"]


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_two_runs_without_a_name_take_two():
    code = "import sys; from minisd.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "a star", *FAST]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    names = sorted(run.communicate()[0].strip() for run in runs)
    assert names == ["out-2.png", "out-3.png", "out.png"]
    assert sorted(path.name for path in Path().iterdir()) == names


def test_pictures_that_nobody_named_replace_none(capsys):
    Path("out-2.png").write_text("mine")
    assert main(["a star", *FAST, "--num-images", "2"]) == 0
    assert capsys.readouterr().out.split() == ["out.png", "out-3.png"]
    assert Path("out-2.png").read_text() == "mine"


def test_threads_that_save_at_once_get_a_name_each(tmp_path):
    pictures = [Image.new("RGB", (16, 16), (i, 0, 0)) for i in range(24)]
    with ThreadPoolExecutor(8) as pool:
        paths = list(pool.map(lambda picture: save_png(picture, "x.png", None, replace=False), pictures))
    assert len(set(paths)) == 24
    for picture, path in zip(pictures, paths, strict=True):
        with Image.open(path) as found:
            assert np.array_equal(found, picture)
    assert len(list(tmp_path.iterdir())) == 24


def test_a_default_name_that_is_a_link_elsewhere_is_passed_over(tmp_path):
    (tmp_path / "far").mkdir()
    Path("x.png").symlink_to(tmp_path / "far" / "real.png")  # which does not exist
    assert save_png(Image.new("RGB", (8, 8)), "x.png", None, replace=False) == Path("x-2.png")
    assert not list((tmp_path / "far").iterdir())


def test_a_claimed_name_is_given_back_where_the_file_cannot_follow(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr("os.link", fails)
    monkeypatch.setattr(type(tmp_path), "replace", fails)
    with pytest.raises(OutputError, match="Invalid cross-device link"):
        save_png(Image.new("RGB", (8, 8)), "x.png", None, replace=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["out.png", "./out-2.png"])
def test_a_grid_does_not_take_the_name_of_a_picture(name, tmp_path, capsys):
    assert main(["a star", *FAST, "--num-images", "2", "--grid", name]) == 2
    assert "is a name that pictures take when nobody names them" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_pictures_are_there_where_their_grid_fails(monkeypatch, capsys):
    def fails(*_):
        raise OutputError("output g.png: no room")

    monkeypatch.setattr("minisd.pictures.image.save_png", fails)
    assert main(["a star", *FAST, "--num-images", "2", "--grid", "g.png"]) == 6
    assert capsys.readouterr().out.split() == ["out.png", "out-2.png"]


def test_every_name_is_checked_before_drawing(capsys):
    Path("x-2.png").mkdir()
    assert main(["a star", *FAST, "--num-images", "2", "-o", "x.png"]) == 6
    assert "x-2.png: is not a regular file" in capsys.readouterr().err
    Path("loop.png").symlink_to("loop.png")
    assert main(["a star", *FAST, "-o", "loop.png"]) == 6
    assert "loop.png: leads nowhere" in capsys.readouterr().err
    assert main(["a star", *FAST, "-o", f"{'n' * 201}.png"]) == 6
    assert "expected a name of at most 200 bytes" in capsys.readouterr().err


def test_ctrl_c_waits_for_what_is_drawn_to_be_written(monkeypatch, capsys):
    save = save_png

    def interrupting(*given):
        os.kill(os.getpid(), signal.SIGINT)
        return save(*given)

    monkeypatch.setattr("minisd.result.save_png", interrupting)
    assert main(["a star", *FAST, "--num-images", "3"]) == 130
    assert capsys.readouterr().out.split() == ["out.png", "out-2.png", "out-3.png"]


def test_previews_that_fail_do_not_end_the_drawing(tiny, monkeypatch, capsys):
    monkeypatch.setattr("time.monotonic", count(0.0, 1.0).__next__)

    def fails(self, denoised):
        raise NonFiniteError("broken")

    monkeypatch.setattr(type(tiny), "preview", fails)
    assert main(["a star", *FAST, "--preview", "p.png"]) == 0
    assert capsys.readouterr().err == "minisd: warning: no previews: broken\n"


def test_standard_output_that_is_full_is_told():
    code = "import sys; from minisd.cli import main; sys.exit(main(['inspect', 'tiny']))"
    with open("/dev/full", "w") as full:
        run = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True)
    assert run.returncode == 6
    assert run.stderr == "minisd: error: standard output could not be written: No space left on device\n"


@pytest.mark.parametrize("other", [["--grid", "x.png"], ["--grid", "x-2.png"], ["--preview", "./x.png"], ["--init", "x.png"]])
def test_one_name_for_two_pictures_is_refused(other, capsys):
    Image.new("RGB", (32, 32)).save("x.png")
    before = Path("x.png").read_bytes()
    assert main(["a star", *FAST, "--num-images", "2", "-o", "x.png", *other]) == 2
    assert "expected a name of its own, found one that is read or written before" in capsys.readouterr().err
    assert Path("x.png").read_bytes() == before


def test_a_source_that_is_replaced_is_told(capsys):
    convert(tiny_checkpoint(), "a.safetensors")
    Path("link.safetensors").symlink_to("a.safetensors")
    for arguments in (["convert", "a.safetensors", "--prune"], ["merge", "tiny", "a.safetensors"]):
        assert main([*arguments, "-o", "link.safetensors"]) == 0
        told = "the result will take the place of link.safetensors, which it is made from"
        assert told in capsys.readouterr().err
        assert main([*arguments, "-o", "b.safetensors"]) == 0
        assert "take the place" not in capsys.readouterr().err


def test_ctrl_c_keeps_the_pictures_that_are_finished(tiny, monkeypatch, capsys):
    request = Request("a star", steps=2, width=32, height=32, seed=5, num_images=4)
    wanted = finish(tiny.stream(request))
    steps = type(tiny.engine).walk
    calls = []

    def stopping(self, *given):
        for step in steps(self, *given):
            calls.append(1)
            if len(calls) == 6:  # in the third picture
                raise KeyboardInterrupt
            yield step

    monkeypatch.setattr(type(tiny.engine), "walk", stopping)
    with pytest.raises(Interrupted) as stop:
        finish(tiny.stream(request))
    result = stop.value.result
    assert (result.seeds, len(result.images), len(result.latents), len(result.metadata)) == ([5, 6], 2, 2, 2)
    assert all(np.array_equal(a, b) for a, b in zip(result.images, wanted.images[:2], strict=True))

    calls.clear()
    size = ["--steps", "2", "--size", "32x32", "--seed", "5", "--device", "cpu"]
    assert main(["a star", *size, "--num-images", "4", "-o", "x.png"]) == 130
    said = capsys.readouterr()
    assert said.out.split() == ["x.png", "x-2.png"]
    assert said.err == "minisd: of 4 pictures 2 are finished\nminisd: interrupted\n"

    calls.clear()
    seen = []

    def look(step):
        seen.append(step)
        if len(seen) == 5:  # outside of the generator, after the first step of the third picture
            raise KeyboardInterrupt

    with pytest.raises(Interrupted) as stop:
        with_bar(tiny.stream(request), look, hidden=None)
    assert stop.value.result.seeds == [5, 6]

    calls.clear()
    calls += [1] * 4
    with pytest.raises(KeyboardInterrupt) as early:  # in the first: there is nothing to keep
        finish(tiny.stream(request))
    assert not isinstance(early.value, Interrupted)


def test_a_picture_that_fails_loses_none_before_it(tiny, monkeypatch, capsys):
    decode = type(tiny.codec).decode
    drawn = []

    def failing(self, latents):
        drawn.append(1)
        if len(drawn) == 3:
            raise NonFiniteError("broken")
        return decode(self, latents)

    monkeypatch.setattr(type(tiny.codec), "decode", failing)
    assert main(["a star", *FAST, "--num-images", "4"]) == 5
    said = capsys.readouterr()
    assert said.out.split() == ["out.png", "out-2.png"]
    assert said.err == "minisd: of 4 pictures 2 are finished\nminisd: error: broken\n"


def test_a_grid_is_made_again(capsys):
    assert main(["a star", *FAST, "--num-images", "3", "-o", "x.png", "--grid", "grid.png"]) == 0
    capsys.readouterr()
    assert main(["again", "grid.png", "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["images"], said["metadata"][0]["grid"]) == (["grid-again.png"], 3)
    with Image.open("grid.png") as grid, Image.open("grid-again.png") as again:
        assert np.array_equal(grid, again)
