"""Recognition: the family, how it was trained, and the reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
from families import SMALL
from helpers import manifest, recognised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from minisd import blueprint
from minisd.checkpoint import CheckpointError
from minisd.family import FAMILIES, SD1, UNET
from minisd.inspection import as_text, inspect
from minisd.shapes import Shapes

MEASURED = f"{UNET}.output_blocks.11.1.transformer_blocks.0.norm1.bias"


def spread(deviation: float) -> dict[str, list[float]]:
    return {MEASURED: [deviation, -deviation] * 160}


@pytest.mark.parametrize(
    ("name", "family", "task", "prediction"),
    [
        ("sd1", "sd1", "draw", "epsilon"),
        ("sd1-inpaint", "sd1", "inpaint", "epsilon"),
        ("sd1-edit", "sd1", "edit", "epsilon"),
        ("sd2", "sd2", "draw", "epsilon"),
        ("sdxl", "sdxl", "draw", "epsilon"),
        ("sdxl-v", "sdxl", "draw", "v"),
        ("sdxl-inpaint", "sdxl", "inpaint", "epsilon"),
        ("sdxl-refiner", "sdxl-refiner", "draw", "epsilon"),
        ("playground", "sdxl", "draw", "edm"),
        ("cosxl", "sdxl", "draw", "v"),
    ],
)
def test_every_kind(name, family, task, prediction, tmp_path):
    facts = inspect(SMALL[name].write(tmp_path / "x.safetensors"))
    assert (facts["family"], facts["task"], facts["prediction"]) == (family, task, prediction)
    assert facts["unused"] == sorted(SMALL[name].markers)
    assert "because: " in as_text(facts)


@pytest.mark.parametrize(("deviation", "prediction", "size"), [(0.02, "epsilon", 512), (0.12, "v", 768)])
def test_stable_diffusion_2_is_measured(deviation, prediction, size, tmp_path):
    found = recognised(tmp_path, manifest("sd21-768"), spread(deviation))
    assert (found.training.prediction, found.size) == (prediction, (size, size))
    assert "standard deviation of" in found.reasons[-1]


@pytest.mark.parametrize(("stated", "prediction"), [("v", "v"), ("epsilon", "epsilon")])
def test_metadata_counts_more_than_the_measurement(stated, prediction, tmp_path):
    metadata = {"modelspec.prediction_type": stated, "modelspec.resolution": "640x384"}
    found = recognised(tmp_path, manifest("sd21-768"), spread(0.06 if stated == "v" else 0.2), **metadata)
    assert (found.training.prediction, found.size) == (prediction, (640, 384))
    assert "the metadata" in found.reasons[-1]


@pytest.mark.parametrize(
    ("name", "shapes"),
    [
        ("SSD-1B", {"depths": (0, 2, 4), "cut": {"output_blocks.0": 4, "output_blocks.1": 4, "output_blocks.2": 10,
                                                 "output_blocks.3": 2, "output_blocks.4": 1, "output_blocks.5": 1}}),
        ("Segmind Vega", {"depths": (0, 1, 2), "cut": {"output_blocks.3": 1, "output_blocks.4": 1, "output_blocks.5": 1}}),
    ],
)  # fmt: skip
def test_distilled_unets_are_named_and_built(name, shapes, tmp_path):
    """SDXL with fewer transformer blocks and none in the middle."""
    from test_keys import built

    small = blueprint.assemble(
        FAMILIES[2],
        distilled(shapes["depths"], shapes["cut"]),
        blueprint.vae((32, 64), (32, 64), (2, 3)),
        blueprint.clip_text(64, 2, vocabulary=50),
        blueprint.open_text(64, 2, 64, vocabulary=50),
    )
    found = recognised(tmp_path, small)
    assert found.family.name == "sdxl"
    assert any(f"distilled like {name}" in reason for reason in found.reasons)
    assert built(small, found.family) == small


def distilled(depths: tuple[int, ...], cut: dict[str, int]) -> Shapes:
    """An SDXL UNet whose output blocks have `cut` transformer blocks, and whose middle is a single ResBlock."""
    shapes = blueprint.unet(64, (1, 2, 4), 2, tuple(10 if depth else 0 for depth in depths), 128, linear=True, vector=1600)
    kept = {}
    for key, shape in shapes.items():
        if key.startswith(("middle_block.1.", "middle_block.2.")):
            continue
        block = ".".join(key.split(".")[:2])
        level = {4: 1, 5: 1, 7: 2, 8: 2}.get(int(block.split(".")[1]), 0) if block.startswith("input_blocks") else None
        limit = cut.get(block, depths[2]) if block.startswith("output_blocks") else depths[level] if level else 0
        if ".transformer_blocks." in key and int(key.split(".transformer_blocks.")[1].split(".")[0]) >= limit:
            continue
        kept[key] = shape
    return Shapes(kept)


@pytest.mark.parametrize(
    ("key", "values", "message"),
    [
        ("edm_vpred.sigma_max", [0.001], "expected rising noise levels"),
        ("edm_vpred.sigma_max", [float("nan")], "holds NaN or infinity"),
        ("edm_vpred.sigma_max", [1.0, 2.0], "expected 1 floating-point numbers, found 2 of F32"),
    ],
)
def test_broken_markers_are_named(key, values, message, tmp_path):
    shapes = SMALL["sd1"].shapes() | {key: (len(values),)}
    with pytest.raises(CheckpointError, match=message):
        recognised(tmp_path, shapes, {key: values})


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_width_and_depth_of_every_family(tmp_path: Path, data: st.DataObject):
    """Whatever the widths: the family is recognised, and the module has the file's keys."""
    from test_keys import built

    family = data.draw(st.sampled_from(FAMILIES))
    levels = data.draw(st.integers(1, 3))
    multipliers = tuple(data.draw(st.lists(st.integers(1, 3), min_size=levels, max_size=levels)))
    depths = tuple(data.draw(st.lists(st.integers(0, 2), min_size=levels, max_size=levels)))
    extra = data.draw(st.sampled_from([0, 4, 5]))
    text = 64 * data.draw(st.integers(1, 2))
    unet = blueprint.unet(
        64, multipliers, data.draw(st.integers(1, 2)), depths, text * len(family.towers),
        linear=family is not SD1, vector=text + 1536 if family.vector else 0, extra_channels=extra,
    )  # fmt: skip
    texts = [
        blueprint.open_text(text, 2, text, 50) if "model" in tower.name.split(".") else blueprint.clip_text(text, 2, 50)
        for tower in family.towers
    ]
    shapes = blueprint.assemble(family, unet, blueprint.vae((32, 64), (32, 64), (1, 2)), *texts)
    found = recognised(tmp_path, shapes)
    assert found.family is family
    assert found.task == {0: "draw", 4: "edit", 5: "inpaint"}[extra]
    assert built(shapes, family) == shapes
