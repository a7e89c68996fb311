"""ControlNet Union: its files, and pictures drawn with one."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from controls import control_shapes, their_union, union_shapes
from families import EULER, SMALL, Parts, pipeline
from helpers import assert_close, write_holes
from PIL import Image
from safetensors.torch import save_file

import minisd
from minisd.addons.controls.acting import activated
from minisd.addons.controls.control import as_controls
from minisd.addons.controls.files import built
from minisd.addons.controls.names import told
from minisd.cli import main
from minisd.errors import CheckpointError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.library.names import Facts, identify
from minisd.models.control import ControlNetUnion
from minisd.models.control.union import check_union
from minisd.models.shapes import Shapes
from minisd.recipe import repeat
from minisd.workbench import blueprint

PROMPT = "a photograph of an astronaut riding a horse"
CALL = {"width": 96, "height": 64, "guidance_scale": 5.0, "negative_prompt": "blurry"}
SDXL = SMALL["sdxl"]


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    return blueprint.random_weights(union_shapes(SDXL.unet()), 3)


@pytest.fixture(scope="module")
def files(weights, tmp_path_factory):
    """A model, its parts in diffusers, and a Union in diffusers' names, as it is published."""
    folder = tmp_path_factory.mktemp("union")
    model = SDXL.write(folder / "sdxl.safetensors")
    union = their_union(weights, SDXL)
    save_file(union.state_dict(), folder / "union.safetensors")
    return minisd.load(model, device="cpu", dtype="float32"), Parts(model, SDXL), folder / "union.safetensors", union


def latents() -> torch.Tensor:
    return torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(5))


def test_names(files, weights, tmp_path):
    """diffusers' names, and ComfyUI's for what a Union has in common with a ControlNet."""
    *_, file, _ = files
    save_file(weights, tmp_path / "raw.safetensors")
    for path in (file, tmp_path / "raw.safetensors"):
        control = minisd.load_control(path)
        assert type(control) is ControlNetUnion
        found = control.state_dict()
        assert found.keys() == weights.keys()
        assert all(torch.equal(found[key], value) for key, value in weights.items())


@pytest.mark.parametrize("kinds", [6, 8])
def test_the_keys_of_both_published_sizes(kinds, tmp_path):
    """Union and ProMax as diffusers builds them for SDXL, by their headers."""
    from diffusers import ControlNetUnionModel

    with torch.device("meta"):
        theirs = ControlNetUnionModel(
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), block_out_channels=(320, 640, 1280),
            cross_attention_dim=2048, transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20),
            use_linear_projection=True, addition_embed_type="text_time", addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816, conditioning_embedding_out_channels=(16, 32, 96, 256),
            num_control_type=kinds,
        )  # fmt: skip
    shapes = {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    checkpoint = open_checkpoint(write_holes(tmp_path / "union.safetensors", shapes))
    title, names = told(checkpoint)
    control = built(
        checkpoint, title, names, Shapes({key: shapes[own] for key, own in names.items()}), ControlNetUnion, check_union
    )
    assert title == "a ControlNet Union"
    assert {names[key]: tuple(value.shape) for key, value in control.state_dict().items()} == shapes
    assert control.kinds[-1] == ("inpaint" if kinds == 8 else "segment")
    assert identify(checkpoint.path) == Facts("controlnet", "sdxl", "a ControlNet Union")


@pytest.mark.parametrize("piece", ["task_embedding", "control_add_embedding", "transformer_layes", "spatial_ch_projs"])
def test_a_missing_piece_is_named(piece, files, tmp_path):
    *_, union = files
    kept = {key: value for key, value in union.state_dict().items() if not key.startswith(piece)}
    save_file(kept, tmp_path / "torn.safetensors")
    with pytest.raises(CheckpointError, match=rf"{piece}.*this looks like a ControlNet Union, but a key is missing"):
        minisd.load_control(tmp_path / "torn.safetensors")


@pytest.mark.parametrize(("count", "guess"), [(1, False), (2, False), (2, True)])
def test_pictures_as_in_diffusers(count, guess, files, tmp_path):
    """In guess mode without guidance: with it diffusers 0.42 gives the network as many kinds as both sides have, and fails."""
    pipe, parts, file, union = files
    hints, kinds, strengths = [picture(1), picture(2)][:count], ["canny", "depth"][:count], [0.7, 1.3][:count]
    controls = [
        minisd.Control(file, hint, strength, kind=kind, guess=guess)
        for hint, strength, kind in zip(hints, strengths, kinds, strict=True)
    ]
    common = {"latents": latents(), **CALL, "guidance_scale": 1.0 if guess else 5.0}
    found = pipe(PROMPT, steps=3, controls=controls, **common)
    from diffusers import EulerDiscreteScheduler

    scheduler = EulerDiscreteScheduler(**EULER)
    reference = pipeline("StableDiffusionXLControlNetUnionPipeline", parts, SDXL, tmp_path, scheduler, controlnet=union)
    wanted = reference(
        PROMPT, control_image=hints, control_mode=[[3, 1][i] for i in range(count)], num_inference_steps=3, output_type="latent",
        controlnet_conditioning_scale=strengths, guess_mode=guess, **common,
    ).images  # fmt: skip
    assert_close(found.latents, wanted, 1e-3)
    assert (found.latents - pipe(PROMPT, steps=3, **common).latents).norm() / wanted.norm() > 0.02


def test_one_call_for_those_that_act_together(files, monkeypatch):
    """A file is read once; its hints go in together where they act at the same time and on the same side."""
    pipe, _, file, _ = files
    asked = []
    plain = ControlNetUnion.residuals
    monkeypatch.setattr(
        ControlNetUnion, "residuals",
        lambda self, x, hints, t, context, y, kinds, strengths: asked.append((len(x), tuple(kinds), list(strengths)))
        or plain(self, x, hints, t, context, y, kinds, strengths),
    )  # fmt: skip
    first, second = minisd.Control(file, picture(1), 0.5, kind="canny"), minisd.Control(file, picture(2), 0.7, kind="tile")
    one, other = activated(as_controls([first, second]), pipe, 96, 64)
    assert one.network is other.network

    def calls(*controls):
        asked.clear()
        pipe(PROMPT, steps=2, seed=1, controls=controls, **CALL)
        return asked[:]

    both = (2, ("canny", "tile"), [0.5, 0.7])
    assert calls(first, second) == [both, both]
    assert calls(first, replace(second, end=0.5)) == [both, (2, ("canny",), [1.0])]
    assert calls(first, replace(second, strength=0.0)) == [(2, ("canny",), [1.0])] * 2
    assert calls(first, replace(second, where="positive")) == [(2, ("canny",), [1.0]), (1, ("tile",), [1.0])] * 2


def test_beside_a_mask_of_an_inpainting_model(files, tmp_path):
    """Whose UNet sees nine channels, the Union four of them."""
    _, _, file, _ = files
    pipe = minisd.load(SMALL["sdxl-inpaint"].write(tmp_path / "inpaint.safetensors"), device="cpu", dtype="float32")
    mask = Image.new("L", (96, 64), 0)
    mask.paste(255, (0, 0, 48, 64))
    common = {"steps": 1, "seed": 1, "init_image": picture(3), "mask": mask, "guidance_scale": 5.0}
    plain = pipe(PROMPT, **common)
    found = pipe(PROMPT, controls=[minisd.Control(file, picture(1), kind="inpaint")], **common)
    assert (found.latents - plain.latents).norm() / plain.latents.norm() > 1e-3


def test_kinds(files, tmp_path):
    pipe, _, file, _ = files
    six = blueprint.random_weights(union_shapes(SDXL.unet(), 6), 3)
    save_file(six, tmp_path / "six.safetensors")
    save_file(blueprint.random_weights(control_shapes(SDXL.unet()), 3), tmp_path / "plain.safetensors")
    one = picture(1)
    pipe.stream(PROMPT, controls=[minisd.Control(file, one, preprocess="tile")], **CALL)  # says what it is
    for given, options, why in (
        (file, {}, r"controls: kind: expected one of openpose, .*, found None: union.safetensors is a ControlNet Union"),
        (tmp_path / "six.safetensors", {"kind": "inpaint"}, r"controls: kind: .*, found 'inpaint', which takes ProMax: six"),
        (tmp_path / "plain.safetensors", {"kind": "canny"}, r"kind: is for a ControlNet Union, found plain.safetensors, a Contr"),
        (minisd.load_control(file), {}, r"controls: kind: expected one of openpose, .*, found None: ControlNetUnion is"),
    ):
        with pytest.raises(UsageError, match=why):
            pipe.stream(PROMPT, controls=[minisd.Control(given, one, **options)], **CALL)
    with pytest.raises(UsageError, match=r"controls: kind: expected one of openpose, depth, .*, found 'pose'"):
        minisd.Control(file, one, kind="pose")


def test_command_line_and_again(files, tmp_path, monkeypatch, capsys):
    pipe, _, file, _ = files
    monkeypatch.chdir(tmp_path)
    picture(1).save("pose.png")
    words = ["a star", "-m", str(pipe.checkpoint.path), "--dtype", "float32", "--steps", "1", "--size", "96x64", "--seed", "1"]
    union = ["--control", f"{file}:0.8", "--control-image", "pose.png"]
    assert main([*words, *union, *union, "--control-kind", "openpose", "--control-kind", "depth", "-o", "a.png"]) == 0
    recipe = json.loads(Image.open("a.png").info["minisd"])
    assert [each["kind"] for each in recipe["controls"]] == ["openpose", "depth"]
    controls = [minisd.Control(file, "pose.png", 0.8, kind=kind) for kind in ("openpose", "depth")]
    wanted = pipe("a star", steps=1, seed=1, width=96, height=64, controls=controls)
    assert np.array_equal(np.asarray(Image.open("a.png")), np.asarray(wanted.images[0]))
    assert torch.equal(pipe(repeat(recipe, pipe.checkpoint.path)).latents, wanted.latents)
    capsys.readouterr()
    assert main([*words, *union, "-o", "b.png"]) == 2
    assert "--control: kind: expected one of openpose, depth" in capsys.readouterr().err
    assert main([*words, *union, "--control-kind", "depth", "--control-kind", "hed", "-o", "b.png"]) == 2
    assert "--control-kind: expected one for all 1 --control, or one for each, found 2" in capsys.readouterr().err
    assert not (tmp_path / "b.png").exists()
