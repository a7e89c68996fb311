"""ControlNet-LLLite: its files, and pictures drawn with one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from controls import control_shapes, lllite_shapes
from families import SMALL
from helpers import assert_close, manifest, write_holes
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.files import built
from minisd.addons.controls.fitting import check_fits
from minisd.addons.controls.names import told
from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.library.names import identify
from minisd.models.control import LLLite
from minisd.models.control.lllite import Lent, applied, check_lllite
from minisd.models.family import UNET
from minisd.models.shapes import below
from minisd.models.unet import UNet
from minisd.recipe import repeat
from minisd.workbench import blueprint

PROMPT = "a photograph of an astronaut riding a horse"
CALL = {"width": 96, "height": 64, "guidance_scale": 5.0, "negative_prompt": "blurry"}
SDXL = SMALL["sdxl"]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lllite")
    save_file(blueprint.random_weights(lllite_shapes(SDXL.unet()), 3), folder / "lllite.safetensors")
    picture = np.random.default_rng(1).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(picture).save(folder / "hint.png")
    pipe = minisd.load(SDXL.write(folder / "sdxl.safetensors"), device="cpu", dtype="float32")
    return pipe, folder / "lllite.safetensors", folder / "hint.png"


def test_names(files):
    _, file, _ = files
    network = minisd.load_control(file)
    assert isinstance(network, LLLite)
    assert {key: tuple(value.shape) for key, value in network.state_dict().items()} == lllite_shapes(SDXL.unet())
    facts = identify(file)
    assert (facts.kind, facts.what) == ("controlnet", "a ControlNet-LLLite")


def test_every_layer_of_sdxl_has_its_name(tmp_path):
    """136 of them, as sd-scripts makes one with its defaults for SDXL at its real size."""
    unet = below(manifest("sdxl-base"), UNET)
    shapes = lllite_shapes(unet, 32, 64)
    assert len({key.split(".")[0] for key in shapes}) == 136
    checkpoint = open_checkpoint(write_holes(tmp_path / "lllite.safetensors", shapes))
    title, names = told(checkpoint)
    network = built(checkpoint, title, names, shapes, LLLite, check_lllite)
    with torch.device("meta"):
        check_fits(network, UNet(unet))


@torch.no_grad()
def test_draws_and_leaves_no_trace(files):
    """The latents of a UNet that sees it at the steps where it acts, and afterwards the picture without it, bit for bit."""
    pipe, file, hint = files
    common = {"steps": 4, "seed": 7, **CALL}
    plain = pipe(PROMPT, **common)
    found = pipe(PROMPT, controls=[minisd.Control(file, hint, 0.8, end=0.5)], **common)
    assert (found.latents - plain.latents).norm() / plain.latents.norm() > 1e-3
    assert found.metadata[0].get("changed") is None

    network, calls, unet = minisd.load_control(file), [], pipe.unet
    pixels = torch.from_numpy(np.array(Image.open(hint))).permute(2, 0, 1)[None].float() / 255

    def seeing(*given):
        calls.append(given)
        with applied(unet, [Lent(network, network.seen(pixels), 0.8)] if len(calls) <= 2 else []):
            return unet(*given[:4])

    plan = minisd.pipeline.planned(minisd.Request(PROMPT, **common), pipe.capabilities())
    legs = minisd.walks.course(plan, pipe)
    x, draws = minisd.walks.start(plan, slice(0, 1), legs[0], None)
    walk = minisd.walks.walk(plan, slice(0, 1), legs[0], None, minisd.walks.Progress(plan, legs, 1))
    *_, (latents, _) = walk.sampler.run(walk.denoiser(seeing), x, walk.levels.sigmas, draws)
    assert_close(found.latents, latents / legs[-1].levels.end_scale, 1e-5)
    assert torch.equal(pipe(PROMPT, **common).latents, plain.latents)


def test_beside_a_controlnet_and_on_one_side(files, tmp_path):
    pipe, file, hint = files
    save_file(blueprint.random_weights(control_shapes(SDXL.unet()), 3), tmp_path / "control.safetensors")
    controls = [minisd.Control(file, hint), minisd.Control(tmp_path / "control.safetensors", hint, 0.5)]
    common = {"steps": 1, "seed": 7, **CALL}
    drawn = [pipe(PROMPT, controls=each, **common).latents for each in (controls, controls[:1], controls[1:])]
    assert all((drawn[0] - each).norm() / each.norm() > 1e-3 for each in drawn[1:])
    sides = [
        pipe(PROMPT, controls=[minisd.Control(file, hint, where=where)], **common).latents for where in ("positive", "negative")
    ]
    plain = pipe(PROMPT, **common).latents
    # Of one step the estimate is linear in what each side answers.
    assert_close(sides[0] + sides[1] - plain, drawn[1], 1e-5)


def test_a_recipe_makes_it_again(files):
    pipe, file, hint = files
    result = pipe(PROMPT, steps=2, seed=7, controls=[minisd.Control(file, hint, 0.7)], **CALL)
    recipe = json.loads(json.dumps(result.metadata[0]))
    assert torch.equal(pipe(repeat(recipe, pipe.checkpoint.path)).latents, result.latents)


def test_what_is_refused(files, tmp_path):
    pipe, file, hint = files
    shapes = lllite_shapes(SDXL.unet())
    names = sorted({key.split(".")[0] for key in shapes})
    wide = {key: (shape[0], 64) if key == f"{names[0]}.down.0.weight" else shape for key, shape in shapes.items()}
    wide |= {f"{names[0]}.up.0.weight": (64, 16), f"{names[0]}.up.0.bias": (64,)}
    deep = {key.replace("transformer_blocks_0", "transformer_blocks_9"): shape for key, shape in shapes.items()}
    for changed, what in ((wide, rf"{names[0]} has 64 channels, here 128"), (deep, "has 128 channels, here none")):
        path = write_holes(tmp_path / "other.safetensors", changed)
        with pytest.raises(UsageError, match=f"controls: expected a ControlNet-LLLite for .*, found one with .*{what}"):
            pipe(PROMPT, steps=1, controls=[minisd.Control(path, hint)], **CALL)
    torn = {key: shape for key, shape in shapes.items() if key != f"{names[0]}.mid.0.bias"}
    with pytest.raises(CheckpointError, match=r"this looks like a ControlNet-LLLite, but .*mid\.0\.bias"):
        minisd.load_control(write_holes(tmp_path / "torn.safetensors", torn))
    with pytest.raises(
        UsageError, match=r"controls: guess: expected a ControlNet, found lllite.safetensors, a ControlNet-LLLite"
    ):
        pipe.stream(PROMPT, controls=[minisd.Control(file, hint, guess=True)], **CALL)
