from __future__ import annotations

import json

import pytest
import torch
from families import SMALL
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.blueprint import random_weights
from minisd.cli import main
from minisd.family import CONV_IN
from minisd.merging import merge, part_of


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Three SD 1.x models of one shape, in float16, and an inpainting one."""
    folder, paths = tmp_path_factory.mktemp("models"), []
    for i, name in enumerate(("sd1", "sd1", "sd1", "sd1-inpaint")):
        paths.append(folder / f"{'abci'[i]}.safetensors")
        save_file(random_weights(SMALL[name].shapes(), seed=i, dtype=torch.float16), paths[-1])
    return paths


def test_weighted_sum_against_float64(models, tmp_path):
    a, b, *_ = models
    path = merge(a, b, tmp_path / "m.safetensors", 0.3)
    found, first, second = load_file(path), load_file(a), load_file(b)
    assert found.keys() == first.keys()
    for key, value in found.items():
        wanted = 0.7 * first[key].double() + 0.3 * second[key].double()
        assert value.dtype == torch.float16
        assert (value.double() - wanted).abs().max() <= 2**-11 * wanted.abs().max() + 1e-7, key
    assert minisd.load(path, device="cpu").family.name == "sd1"


@pytest.mark.parametrize("ratio", [0, 1])
def test_ratios_0_and_1_are_the_sources_to_the_bit(models, tmp_path, ratio):
    found, source = load_file(merge(*models[:2], tmp_path / "m.safetensors", ratio)), load_file(models[ratio])
    assert all(torch.equal(found[key].view(torch.int16), source[key].view(torch.int16)) for key in source)


def test_add_difference_and_ratios_by_part(models, tmp_path):
    a, b, c, _ = models
    path = merge(a, b, tmp_path / "m.safetensors", 0.5, base=c, by_part={"vae": 0, "text": 2})
    found, first, second, third = load_file(path), load_file(a), load_file(b), load_file(c)
    for key, value in found.items():
        ratio = {"unet": 0.5, "vae": 0, "text": 2}[part_of(key)]
        wanted = first[key].double() + ratio * (second[key].double() - third[key].double())
        assert (value.double() - wanted).abs().max() <= 2**-11 * wanted.abs().max() + 1e-6, key


def test_inpainting_with_an_ordinary_model_keeps_the_extra_channels(models, tmp_path):
    inpaint = models[3]
    found = load_file(merge(inpaint, models[1], tmp_path / "m.safetensors", 0.5))[CONV_IN]
    own, other = load_file(inpaint)[CONV_IN], load_file(models[1])[CONV_IN]
    assert torch.equal(found[:, 4:], own[:, 4:])
    assert torch.allclose(found[:, :4].float(), (own[:, :4].float() + other.float()) / 2, atol=1e-3)
    with pytest.raises(minisd.CheckpointError, match="name the inpainting model first"):
        merge(models[1], inpaint, tmp_path / "n.safetensors")


def test_command_line_and_recipe(models, tmp_path, capsys):
    out = tmp_path / "mix.safetensors"
    assert main(["merge", str(models[0]), str(models[1]), "--ratio", "0.25", "--vae-ratio", "0", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["minisd.merge"])["ratios"] == {"unet": 0.25, "text": 0.25, "vae": 0.0}
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert metadata["modelspec.title"] == "mix"


def test_writing_over_a_source_is_safe(models, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(models[0].read_bytes())
    wanted = load_file(merge(*models[:2], tmp_path / "m.safetensors"))
    found = load_file(merge(target, models[1], target))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_cannot_be_mixed_is_told_and_nothing_written(models, tmp_path):
    other = SMALL["sd2"].write(tmp_path / "sd2.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"is Stable Diffusion 2\.x, expected Stable Diffusion 1\.x"):
        merge(models[0], other, tmp_path / "m.safetensors")
    weights = load_file(models[1])
    weights["model.diffusion_model.out.2.bias"][0] = float("inf")
    save_file(weights, tmp_path / "inf.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"inf\.safetensors: 'model\.diffusion_model\.out\.2\.bias': holds NaN"):
        merge(models[0], tmp_path / "inf.safetensors", tmp_path / "m.safetensors")
    with pytest.raises(minisd.UsageError, match="ratio of the unet: expected a number from -10 to 10, found nan"):
        merge(*models[:2], tmp_path / "m.safetensors", float("nan"))
    assert not (tmp_path / "m.safetensors").exists()
