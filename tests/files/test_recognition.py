"""Recognition: the family, how it was trained, and the reasons."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import SMALL
from helpers import assert_close, built, manifest, recognised
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from minisd.diffusion.denoiser import Conditioning
from minisd.files.checkpoint import CheckpointError, open_checkpoint
from minisd.files.recognition import recognise
from minisd.models.family import FAMILIES, SD1, UNET
from minisd.models.naming import raw_levels, unet_names
from minisd.models.shapes import Shapes
from minisd.models.unet import UNet
from minisd.text.conditioner import with_sizes
from minisd.workbench import blueprint
from minisd.workbench.inspecting import as_text, inspect

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
    assert list(facts["unused"]) == sorted(SMALL[name].markers)
    assert "because: " in as_text(facts)


@pytest.mark.parametrize(("deviation", "prediction", "size"), [(0.02, "epsilon", 512), (0.12, "v", 768)])
def test_stable_diffusion_2_is_measured(deviation, prediction, size, tmp_path):
    found = recognised(tmp_path, manifest("sd21-768"), spread(deviation))
    assert (found.training.prediction, found.size) == (prediction, (size, size))
    assert "standard deviation of" in found.reasons[-1]


def test_a_measured_bias_near_the_largest_number_is_told(tmp_path):
    shapes = {"cond_stage_model.model.x": (1,), "first_stage_model.x": (1,), f"{UNET}.input_blocks.0.0.weight": (1, 4, 1, 1)}
    weights = {key: torch.zeros(shape) for key, shape in shapes.items()}
    save_file(weights | {MEASURED: torch.tensor([1.7e308, -1.7e308] * 8, dtype=torch.float64)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"norm1\.bias': holds numbers too large for weights"):
        recognise(open_checkpoint(tmp_path / "x.safetensors"))


@pytest.mark.parametrize(("stated", "prediction"), [("v", "v"), ("epsilon", "epsilon")])
def test_metadata_counts_more_than_the_measurement(stated, prediction, tmp_path):
    metadata = {"modelspec.prediction_type": stated, "modelspec.resolution": "640x384"}
    found = recognised(tmp_path, manifest("sd21-768"), spread(0.06 if stated == "v" else 0.2), **metadata)
    assert (found.training.prediction, found.size) == (prediction, (640, 384))
    assert "the metadata" in found.reasons[-1]


@pytest.mark.parametrize("stated", ["10x9999", "1x9999", "4100x4100", "0016x0016", "99999x99999", "\x1b[2J", "", "٥١٢x٥١٢"])
def test_a_senseless_size_is_ignored_with_a_word(stated, tmp_path):
    with pytest.warns(UserWarning, match="modelspec.resolution = .*, which nothing can be drawn at: taking 768x768") as told:
        found = recognised(tmp_path, manifest("sd21-768"), spread(0.12), **{"modelspec.resolution": stated})
    assert found.size == (768, 768)
    assert str(told[0].message).isprintable()


@pytest.mark.parametrize(("stated", "size"), [("1020x1020", (1024, 1024)), ("1019x511", (1016, 512)), ("4099x0512", (4096, 512))])
def test_a_size_that_is_not_in_whole_eights_becomes_the_nearest_that_is(stated, size, tmp_path):
    taken = rf"which is not in whole eights: taking {size[0]}x{size[1]} instead"
    wanted = rf"shapes\.safetensors: its metadata say modelspec\.resolution = {stated}, {taken}"
    with pytest.warns(UserWarning, match=wanted) as told:
        found = recognised(tmp_path, manifest("sdxl-base"), **{"modelspec.resolution": stated})
    assert found.size == size
    assert len(told) == 1


def test_a_file_may_have_its_own_guidance_scale(tmp_path):
    assert recognised(tmp_path, manifest("sd15")).guidance == 7.5
    assert recognised(tmp_path, manifest("sd15"), **{"minisd.guidance_scale": "3.5"}).guidance == 3.5


@pytest.mark.parametrize("stated", ["", "-1", "1e9", "nan", "seven", "100", "٥"])
def test_a_senseless_guidance_scale_is_ignored_with_a_word(stated, tmp_path):
    with pytest.warns(UserWarning, match=r"minisd\.guidance_scale = .*, which is no number from 0 to 99: taking 7\.5 instead"):
        assert recognised(tmp_path, manifest("sd15"), **{"minisd.guidance_scale": stated}).guidance == 7.5


DISTILLED = {  # transformer blocks by level on the way down, and block by block on the way up
    "SSD-1B": ((0, 2, 4), [[4, 4, 10], [2, 1, 1]]),
    "Segmind Vega": ((0, 1, 2), [[2, 2, 2], [1, 1, 1]]),
}


@pytest.mark.parametrize("name", DISTILLED)
def test_distilled_unets_are_named_and_built(name, tmp_path):
    """SDXL with fewer transformer blocks and none in the middle."""
    small = blueprint.assemble(
        FAMILIES[2],
        distilled(*DISTILLED[name]),
        blueprint.vae((32, 64), (32, 64), (2, 3)),
        blueprint.clip_text(64, 2, vocabulary=50),
        blueprint.open_text(64, 2, 64, vocabulary=50),
    )
    found = recognised(tmp_path, small)
    assert found.family.name == "sdxl"
    assert any(f"distilled like {name}" in reason for reason in found.reasons)
    assert built(small, found.family) == small


@pytest.mark.parametrize("name", DISTILLED)
@torch.no_grad()
def test_distilled_unets_equal_those_of_diffusers(name):
    from diffusers import UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    down, up = DISTILLED[name]
    weights = blueprint.random_weights(distilled(down, up))
    ours = UNet(distilled(down, up))
    ours.load_state_dict(weights)
    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128, 256),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2D",
        transformer_layers_per_block=[0, [down[1]] * 2, [down[2]] * 2],
        reverse_transformer_layers_per_block=[*up, 0],
        **THEIRS,
    )
    named = {f"{UNET}.{key}": value for key, value in weights.items()}
    theirs.load_state_dict(convert_ldm_unet_checkpoint(named, dict(theirs.config)))
    compare(ours, theirs)


@pytest.mark.parametrize(("name", "depth", "middle"), [("KOALA 700M", 5, 0), ("KOALA 1B", 6, 6)])
@torch.no_grad()
def test_koala_equals_that_of_diffusers(name, depth, middle, tmp_path):
    """One block a level and, in the smaller one, no middle at all (ComfyUI supported_models.py, model_detection.py)."""
    from diffusers import UNet2DConditionModel

    shapes = blueprint.unet(64, (1, 2, 4), 1, (0, 2, depth), 128, middle=middle, linear=True, vector=1600)
    shapes = Shapes({key: shape for key, shape in shapes.items() if middle or not key.startswith("middle_block.")})
    texts = blueprint.clip_text(64, 2, vocabulary=50), blueprint.open_text(64, 2, 64, vocabulary=50)
    whole = blueprint.assemble(FAMILIES[2], shapes, blueprint.vae((32, 64), (32, 64), (2, 3)), *texts)
    assert any(f"distilled like {name}" in reason for reason in recognised(tmp_path, whole).reasons)
    weights = blueprint.random_weights(shapes)
    ours = UNet(shapes)
    ours.load_state_dict(weights)
    theirs = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(64, 128, 256),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        mid_block_type="UNetMidBlock2DCrossAttn" if middle else None,
        transformer_layers_per_block=[1, 2, depth],
        **THEIRS,
    )
    names = unet_names(raw_levels(shapes, "input_blocks", "op"), raw_levels(shapes, "output_blocks", "conv"))
    theirs.load_state_dict({link.theirs[0]: weights[link.raw] for link in names.forward(weights)})
    compare(ours, theirs)


THEIRS = {
    "attention_head_dim": (1, 2, 4),
    "cross_attention_dim": 128,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 1600,
}


def compare(ours: UNet, theirs: torch.nn.Module) -> None:
    """One forward of each, as SDXL's."""
    random = torch.Generator().manual_seed(0)
    x, context, pooled = (torch.randn(shape, generator=random) for shape in ((1, 4, 8, 8), (1, 77, 128), (1, 64)))
    t, sizes = torch.tensor([500.0]), torch.tensor([[64.0, 64.0, 0.0, 0.0, 64.0, 64.0]])
    y = with_sizes(Conditioning(context, pooled), sizes[0].tolist()).vector
    wanted = theirs(x, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    assert_close(ours(x, t, context, y), wanted, 1e-5)


def distilled(down: tuple[int, ...], up: list[list[int]]) -> Shapes:
    """An SDXL UNet with these transformer blocks, and a middle that is a single ResBlock."""
    shapes = blueprint.unet(64, (1, 2, 4), 2, (0, 10, 10), 128, linear=True, vector=1600)
    limits = {f"input_blocks.{i}": down[level] for i, level in ((4, 1), (5, 1), (7, 2), (8, 2))}
    limits |= {f"output_blocks.{i}": count for i, count in enumerate([*up[0], *up[1]])}
    kept = {}
    for key, shape in shapes.items():
        if key.startswith(("middle_block.1.", "middle_block.2.")):
            continue
        block, _, rest = key.partition(".transformer_blocks.")
        if rest and int(rest.split(".")[0]) >= limits[".".join(block.split(".")[:2])]:
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
