"""Controls from the command line: names, pictures, preprocessing, and again."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from controls import control_shapes
from helpers import REDUCED, assert_close
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.acting import hint_of
from minisd.addons.controls.control import Control
from minisd.cli import main
from minisd.errors import UsageError
from minisd.models.family import UNET
from minisd.models.shapes import below
from minisd.options import OPTIONS
from minisd.workbench import blueprint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A library with a ControlNet for the reduced checkpoint, and a hint: a white square on black."""
    shapes = control_shapes(below(REDUCED.shapes(), UNET))
    (tmp_path / "models").mkdir()
    save_file(blueprint.random_weights(shapes, 3), tmp_path / "models" / "edges.safetensors")
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[16:48, 16:48] = 255
    Image.fromarray(picture).save(tmp_path / "hint.png")
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_words():
    parse = OPTIONS["controls"].kind.parse
    assert parse("edges") == {"source": "edges"}
    assert parse("a b.safetensors:0.5") == {"source": "a b.safetensors", "strength": 0.5}
    assert parse("edges:0.5:0:0.8") == {"source": "edges", "strength": 0.5, "start": 0.0, "end": 0.8}


def test_draw_and_again(folder, reduced_file, capsys):
    words = ["a star", "-m", str(reduced_file), "--steps", "2", "--size", "64x64", "--seed", "1"]
    assert main([*words, "-o", "plain.png"]) == 0
    control = ["--control", "edges:0.7:0:1", "--control-image", "hint.png"]
    assert main([*words, *control, "--control-preprocess", "invert", "-o", "a.png"]) == 0
    assert (folder / "plain.png").read_bytes() != (folder / "a.png").read_bytes()
    (said,) = json.loads(Image.open("a.png").info["minisd"])["controls"]
    assert (said["strength"], said["end"], said["preprocess"]) == (0.7, 1.0, "invert")
    assert main(["again", "a.png", "-o", "b.png"]) == 0
    assert (folder / "a.png").read_bytes() == (folder / "b.png").read_bytes()
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    two = [minisd.Control(folder / "models" / "edges.safetensors", "hint.png", strength=each) for each in (0.2, 0.5)]
    one = [minisd.Control(folder / "models" / "edges.safetensors", "hint.png", strength=0.7)]
    found = [pipe("a star", controls=each, steps=2, seed=1, width=64, height=64).latents for each in (two, one)]
    assert_close(*found, 1e-4)
    assert main([*words, *control, *control, "-o", "c.png"]) == 0
    sides = ["--control-where", "positive", "--control-where", "negative", "--control-range", "noise"]
    assert main([*words, *control, *control, *sides, "-o", "d.png"]) == 0
    said = json.loads(Image.open("d.png").info["minisd"])["controls"]
    assert [(each["where"], each["range"], each["guess"]) for each in said] == [
        (side, "noise", False) for side in sides[1::2][:2]
    ]
    assert main([*words, *control, "--control-guess", "-o", "e.png"]) == 0
    assert main(["again", "e.png", "-o", "f.png"]) == 0
    assert (folder / "e.png").read_bytes() == (folder / "f.png").read_bytes() != (folder / "a.png").read_bytes()


def test_what_is_refused(folder, reduced_file, capsys):
    words = ["a star", "-m", str(reduced_file), "--steps", "1", "--size", "64x64", "-o", "out.png"]
    control = ["--control", "edges", "--control-image", "hint.png"]
    for more, status, why in (
        (["--control", "edges"], 2, "--control: expected a picture for each"),
        (["--control-image", "hint.png"], 2, "found 0 --control and 1 --control-image"),
        ([*control, "--control-preprocess", "openpose"], 2, "openpose is not made here; a skeleton: OpenPose or DWPose"),
        ([*control, "--control-preprocess", "sharpen"], 2, "expected one of none, tile, canny, invert, blur, found 'sharpen'"),
        (["--control-guess"], 2, "--control-guess: expected a --control that it is about, found none"),
        (["--control-kind", "canny"], 2, "--control-kind: expected one for all 0 --control, or one for each, found 1"),
        ([*control, "--control-where", "left"], 2, "--control: where: expected one of both, positive, negative, found 'left'"),
        ([*control, "--control-range", "time"], 2, "--control: range: expected one of steps, noise, found 'time'"),
        ([*control, "--control-kind", "canny"], 2, "--control: kind: is for a ControlNet Union, found edges"),
        (["--control", "edges:-1000", "--control-image", "hint.png"], 2, "strength: expected a number from -100 to 100"),
        (["--control", "edges:1:0.5:0.5", "--control-image", "hint.png"], 2, "start: expected less than end"),
        (["--control", "edgs", "--control-image", "hint.png"], 3, "did you mean edges?"),
        (["--control", "edges", "--control-image", "nowhere.png"], 2, "nowhere.png: does not exist"),
        (["--control", str(reduced_file), "--control-image", "hint.png"], 3, "not a ControlNet or T2I-Adapter"),
    ):
        assert main([*words, *more]) == status
        assert why in capsys.readouterr().err
        assert not (folder / "out.png").exists()


def test_hints():
    pytest.importorskip("cv2")
    picture = np.zeros((32, 32, 3), np.uint8)
    picture[8:24, 8:24] = 255
    image = Image.fromarray(picture)

    def hint(name):
        return hint_of(Control("x", image, preprocess=name), 64, 64)

    assert torch.allclose(hint("invert"), 1 - hint("none"), atol=1e-6)
    assert torch.equal(hint("tile"), hint("none"))
    edges = hint("canny")[0, 0]
    assert set(edges.unique().tolist()) == {0.0, 1.0}
    assert not edges[24:40, 24:40].any()  # within the square
    assert edges[12:20, 32].any()  # at its upper side
    assert 0 < float(hint("blur")[0, 0, 16, 32]) < 1


def test_canny_without_opencv(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "cv2", None)
    with pytest.raises(UsageError, match=r"canny takes OpenCV: pip install 'minisd\[control\]'"):
        Control("x", Image.new("RGB", (8, 8)), preprocess="canny")
