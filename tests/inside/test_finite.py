"""NaN: planted in every block in turn, the first module is named; what overflows is rescued."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from helpers import REDUCED, relative_error
from PIL import Image
from torch import nn

import minisd
from minisd.cli import main
from minisd.fast import choice
from minisd.files.checkpoint import open_checkpoint
from minisd.files.model import load_model
from minisd.inside.sketches import parts_of
from minisd.system.finite import Rescuing, part_name

QUICKLY = {"steps": 2, "seed": 1, "width": 32, "height": 32}
PROMPT = "a red circle on a blue background"
GREY = Image.fromarray(np.full((32, 32, 3), 128, dtype=np.uint8))


@pytest.fixture(scope="module")
def pipe() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32")


def poisoned(module: nn.Module, key: str = "") -> tuple[torch.Tensor, torch.Tensor]:
    """Puts NaN into a matrix of a module; returns the matrix, and what it was."""
    weight = dict(module.named_parameters())[key] if key else list(module.parameters())[-1]
    kept = weight.detach().clone()
    weight.data.fill_(float("nan"))
    return weight, kept


PARTS = [name for name, _ in parts_of(minisd.load(device="cpu").model)]


def test_planted_in_each_block_of_the_tiny_checkpoint_the_first_module_is_named(pipe):
    """In the last weight of each block: 100 %.  Drawing says so by itself."""
    named = {}
    for part in PARTS:
        weight, kept = poisoned(pipe.model.get_submodule(part))
        over = (
            {"init_image": GREY, "strength": 0.9} if "encoder.conv_in" in part or ".encoder." in part or "quant" in part else {}
        )
        try:
            with pytest.raises(minisd.NonFiniteError) as error, warnings.catch_warnings(action="ignore"):
                pipe(PROMPT, **QUICKLY, **over if "text_model" not in part else {})
        finally:
            weight.data.copy_(kept)
        named[part] = str(error.value)
    wrong = {part: said for part, said in named.items() if f"leave the finite numbers is {part}" not in said}
    assert not wrong
    assert all("weight holds NaN" in said or "bias holds NaN" in said for said in named.values())
    assert len(named) == len(PARTS) >= 35
    assert pipe(PROMPT, **QUICKLY).images


def test_the_innermost_module_is_named_and_what_it_was_given(pipe):
    attention = pipe.unet.middle_block[1].transformer_blocks[0].attn2
    attention.forward = lambda x, context: torch.full_like(x, float("inf"))
    try:
        with pytest.raises(
            minisd.NonFiniteError, match=r"is model\.diffusion_model\.middle_block\.1\.\S+attn2 \(CrossAttention\)"
        ):
            pipe(PROMPT, **QUICKLY)
    finally:
        del attention.forward
    with pytest.raises(minisd.NonFiniteError, match=r"the UNet produced NaN or infinity in float32: its weights"):
        pipe(PROMPT, **QUICKLY, transform=lambda step: step.latents * float("nan"))  # no module's fault
    assert not any(module._forward_hooks for module in pipe.model.modules())


def half_pipeline(path) -> minisd.Pipeline:
    """In float16 on a CPU, which drawing refuses there for its slowness."""
    checkpoint = open_checkpoint(path)
    model, found = load_model(checkpoint, torch.device("cpu"), torch.float16)
    return minisd.Pipeline(model, found, checkpoint, torch.device("cpu"), torch.float16)


def overflowing(pipe: minisd.Pipeline) -> minisd.Pipeline:
    """A ResBlock whose inner numbers go beyond 65,504 and come back, and one whose output does, which the next takes back."""
    with torch.no_grad():
        block = pipe.unet.input_blocks[1][0]
        block.in_layers[2].weight.mul_(200_000)
        block = pipe.unet.input_blocks[4][0]
        block.out_layers[3].bias.fill_(60_000)
        block.skip_connection.bias.fill_(60_000)
    return pipe


@pytest.mark.slow
def test_rescue_computes_what_overflows_in_float32(reduced_file):
    request = {"prompt": "a star", "steps": 1, "seed": 1, "width": 32, "height": 32}
    wide = overflowing(minisd.load(reduced_file, device="cpu", dtype="float32"))
    wanted = wide(**request)
    narrow = overflowing(half_pipeline(reduced_file))
    with pytest.raises(
        minisd.NonFiniteError, match=r"is model\.diffusion_model\.input_blocks\.1\.0\.\S+ .* in float16: draw with"
    ):
        narrow(**request)
    with pytest.warns(UserWarning, match="rescue") as told:
        found = narrow(**request, rescue=True)
    said = [str(each.message) for each in told if "rescue" in str(each.message)]
    assert said == [f"rescue: input_blocks.{i} overflows in float16; it is computed in float32" for i in ("1.0", "4.0")]
    assert relative_error(found.latents, wanted.latents) < 0.02
    assert found.metadata[0]["rescue"] is True
    assert not any("forward" in vars(module) or module._forward_hooks for module in narrow.model.modules())
    assert all(weight.dtype == torch.float16 for weight in narrow.unet.parameters())


def test_rescue_changes_nothing_where_nothing_overflows(pipe):
    with choice.using("torch"):  # the plain way, which a rescue takes
        assert torch.equal(pipe(PROMPT, **QUICKLY, rescue=True).latents, pipe(PROMPT, **QUICKLY).latents)


def test_rescue_does_not_hide_broken_weights(pipe):
    weight, kept = poisoned(pipe.unet.middle_block[0])
    try:
        with pytest.raises(minisd.NonFiniteError, match="holds NaN"):
            pipe(PROMPT, **QUICKLY, rescue=True)
    finally:
        weight.data.copy_(kept)


def test_parts_of_a_unet(reduced):
    names = {part_name(name) for name, _ in reduced.unet.named_modules()} - {None}
    assert {"time_embed", "input_blocks.1.0", "middle_block.1", "output_blocks.2.1", "out"} <= names
    assert isinstance(Rescuing(reduced.unet), nn.Module)
    assert REDUCED.channels == 32


def test_the_command_takes_rescue_and_says_what_is_at_fault(tmp_path, monkeypatch, capsys):
    from safetensors.torch import load_file, save_file

    from minisd.library.places import tiny_checkpoint

    monkeypatch.chdir(tmp_path)
    assert main(["a star", "--steps", "1", "--size", "32x32", "--rescue", "--seed", "1"]) == 0
    weights = load_file(tiny_checkpoint())
    weights["model.diffusion_model.output_blocks.2.0.in_layers.2.weight"][0, 0, 0, 0] = float("nan")
    save_file(weights, "broken.safetensors")
    capsys.readouterr()
    assert main(["a star", "-m", "broken.safetensors", "--steps", "1", "--size", "32x32", "--seed", "1"]) == 5
    said = capsys.readouterr().err
    assert "model.diffusion_model.output_blocks.2.0.in_layers.2 (Conv2d): its weight holds NaN" in said
    assert said.count("\n") == 1
