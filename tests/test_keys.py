"""The module built from a file has exactly the file's keys."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from minisd import blueprint
from minisd.family import is_spare
from minisd.model import StableDiffusion
from minisd.shapes import Shapes

MANIFEST = {
    key: tuple(shape) for key, (_, shape) in json.loads((Path(__file__).parent / "checkpoints" / "sd15.json").read_text()).items()
}
NEEDED = {key: shape for key, shape in MANIFEST.items() if not is_spare(key)}


def built(shapes: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        model = StableDiffusion(Shapes(shapes))
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_module_has_the_keys_of_stable_diffusion_15():
    assert len(MANIFEST) == 1145
    assert len(MANIFEST) - len(NEEDED) == 15  # 12 schedule buffers, position_ids, 2 scalars of the moving average
    assert built(NEEDED) == NEEDED


def test_blueprint_equals_the_published_file():
    assert blueprint.sd15() == NEEDED


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
    shapes = blueprint.stable_diffusion(
        blueprint.unet(channels, multipliers, blocks, attention, context),
        blueprint.clip_text(64, 1, vocabulary=10),
        blueprint.vae((32, 64), (64, 32), (1, 3)),
    )
    assert built(shapes) == shapes
