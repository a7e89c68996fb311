"""ControlNets in the parameters text, read as sd-webui-controlnet reads it, and in what `minisd again` is told."""

from __future__ import annotations

import hashlib
import json
import re

import numpy as np
import pytest
import torch
from controls import control_shapes
from families import SMALL
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.preprocess import PREPROCESS
from minisd.pictures.infotext import parsed
from minisd.pictures.metadata import MODULES, parameters_text
from minisd.recipe import repeat
from minisd.workbench import blueprint

SD1 = SMALL["sd1"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lines")
    pipe = minisd.load(SD1.write(folder / "sd1.safetensors"), device="cpu", dtype="float32")
    file = folder / "control, v11: canny.safetensors"
    save_file(blueprint.random_weights(control_shapes(SD1.unet()), 3), file)
    Image.fromarray(np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / "hint.png")
    return pipe, file, folder / "hint.png"


def unit(text: str) -> dict[str, object]:
    """As the extension reads it (internal_controlnet/args.py, parse): fields by commas, names in small letters."""

    def value(word: str) -> object:
        if word in ("True", "False"):
            return word == "True"
        return float(word) if re.fullmatch(r"-?[\d.]+", word) else word

    pairs = [item.strip().split(": ") for item in text.split(",")]
    return {name.lower().replace(" ", "_"): value(word) for name, word in pairs}


def test_units(files):
    pipe, file, hint = files
    controls = [
        minisd.Control(file, hint, 0.8, 0.0, 0.6, preprocess="canny"),
        minisd.Control(file, hint, preprocess="invert", guess=True),
        minisd.Control(minisd.load_control(file), hint),
        minisd.Control(file, hint, where="negative", range="noise", end=0.5),
    ]
    result = pipe("a castle", negative_prompt="a moat", steps=1, seed=1, width=64, height=64, controls=controls)
    prompt, negative, fields = parsed(parameters_text(json.loads(json.dumps(result.metadata[0]))))
    assert (prompt, negative) == ("a castle", "a moat")
    assert [name for name in fields if name.startswith("ControlNet")] == ["ControlNet 0", "ControlNet 1", "ControlNet 3"]
    with file.open("rb") as stream:
        stream.seek(0x100000)
        old = hashlib.sha256(stream.read(0x10000)).hexdigest()[:8]
    model, common = f"control v11 canny [{old}]", {"resize_mode": "Just Resize", "pixel_perfect": True}
    assert unit(fields["ControlNet 0"]) == common | {
        "module": "canny", "model": model, "weight": 0.8, "threshold_a": 100.0, "threshold_b": 200.0, "guidance_start": 0.0,
        "guidance_end": 0.6, "control_mode": "Balanced",
    }  # fmt: skip
    assert unit(fields["ControlNet 1"]) == common | {
        "module": "invert (from white bg & black line)", "model": model, "weight": 1.0, "guidance_start": 0.0,
        "guidance_end": 1.0, "control_mode": "ControlNet is more important",
    }  # fmt: skip
    assert unit(fields["ControlNet 3"]) == common | {"module": "none", "model": model, "weight": 1.0}


def test_every_preprocessing_has_its_word():
    assert MODULES.keys() == PREPROCESS.keys()


def test_again_finds_a_moved_file_by_its_name_and_tells_another(files, tmp_path, monkeypatch):
    pipe, file, hint = files
    (tmp_path / "models").mkdir()
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "models"))
    old, new = tmp_path / "edges.safetensors", tmp_path / "models" / "edges.safetensors"
    old.write_bytes(file.read_bytes())
    result = pipe("a castle", steps=1, seed=1, width=64, height=64, controls=[minisd.Control(old, hint)])
    recipe = json.loads(json.dumps(result.metadata[0]))
    assert recipe["controls"][0]["sha256"] == hashlib.sha256(old.read_bytes()).hexdigest()
    old.rename(new)
    assert torch.equal(pipe(repeat(recipe, pipe.checkpoint.path)).latents, result.latents)
    save_file(blueprint.random_weights(control_shapes(SD1.unet()), 4), new)
    with pytest.warns(UserWarning, match=r"edges.safetensors is not the control that this picture was made with \(edges\)"):
        pipe.stream(repeat(recipe, pipe.checkpoint.path))
