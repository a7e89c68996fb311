"""The module built from a file has exactly the file's keys: for every manifest of a published checkpoint."""

from __future__ import annotations

import pytest
from helpers import built, manifest, recognised

from minisd.files.checkpoint import CheckpointError
from minisd.files.writers import is_unneeded
from minisd.models.family import FAMILIES, SD1
from minisd.workbench import blueprint

DRAWS = {
    "sd15": ("sd1", "draw", 512, 15),  # 12 schedule buffers, position_ids, 2 scalars of the moving average
    "sd15-inpainting": ("sd1", "inpaint", 512, 15),
    "instruct-pix2pix": ("sd1", "edit", 512, 12 + 688 + 1),
    "sd21-base": ("sd2", "draw", 512, 15),
    "sd21-768": ("sd2", "draw", 512, 15),  # its keys are those of sd21-base: the prediction is measured, test_family.py
    "sd2-inpainting": ("sd2", "inpaint", 512, 15),
    "sdxl-base": ("sdxl", "draw", 1024, 2),
    "sdxl-refiner": ("sdxl-refiner", "draw", 1024, 1),
}
REFUSED = {
    "sd2-depth": "a depth-to-image model",
    "sd21-unclip-h": "an unCLIP model",
    "vae-ft-mse": "a VAE alone",
    "taesd": "a tiny autoencoder (TAESD)",
}
NEEDED = {key: shape for key, shape in manifest("sd15").items() if not is_unneeded(key)}


@pytest.mark.parametrize("name", DRAWS)
def test_every_published_checkpoint_is_recognised_and_has_its_keys(name, tmp_path):
    family, task, size, spare = DRAWS[name]
    shapes = manifest(name)
    found = recognised(tmp_path, shapes)
    assert (found.family.name, found.task, found.size) == (family, task, (size, size))
    needed = {key: shape for key, shape in shapes.items() if not is_unneeded(key)}
    assert len(shapes) - len(needed) == spare
    assert built(needed, found.family) == needed


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_published_and_no_checkpoint_for_drawing_is_named(name, tmp_path):
    with pytest.raises(CheckpointError) as caught:
        recognised(tmp_path, {key.removeprefix("decoder:"): shape for key, shape in manifest(name).items()})
    assert f"looks like {REFUSED[name]}" in str(caught.value)


@pytest.mark.parametrize(
    ("made", "name"),
    [
        (blueprint.sd15, "sd15"),
        (blueprint.sd21, "sd21-base"),
        (blueprint.sdxl, "sdxl-base"),
        (blueprint.refiner, "sdxl-refiner"),
    ],
)
def test_blueprint_equals_the_published_file(made, name):
    assert made() == {key: shape for key, shape in manifest(name).items() if not is_unneeded(key)}


def test_families_are_told_apart_by_their_clues():
    for family in FAMILIES:
        others = [other for other in FAMILIES if other is not family]
        assert all(set(family.clues) - set(other.clues) for other in others)


def test_text_encoder_without_text_model_in_its_names():
    renamed = {key.replace(".text_model.", "."): shape for key, shape in NEEDED.items()}
    assert renamed != NEEDED
    assert built(renamed) == renamed


def test_vae_attention_stored_as_linear_layers():
    linear = {key: shape[:2] if ".attn_1." in key and len(shape) == 4 else shape for key, shape in NEEDED.items()}
    assert linear != NEEDED
    assert built(linear) == linear


@pytest.mark.parametrize(
    ("channels", "multipliers", "blocks", "attention", "context"),
    [
        (32, (1,), 1, (True,), 8),
        (64, (1, 3), 3, (False, True), 40),
        (32, (2, 1, 4, 2, 3), 1, (True, False, True, False, True), 16),
    ],
)
def test_any_width_and_depth(channels, multipliers, blocks, attention, context):
    shapes = blueprint.assemble(
        SD1,
        blueprint.unet(channels, multipliers, blocks, attention, context),
        blueprint.vae((32, 64), (64, 32), (1, 3)),
        blueprint.clip_text(64, 1, vocabulary=10),
    )
    assert built(shapes) == shapes
