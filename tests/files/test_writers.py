"""What the programs that write checkpoints add, rename and leave out, and what else is in a file; see test_writers_table.py."""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from families import SMALL
from helpers import manifest
from safetensors.torch import load_file, save_file
from written import FAMILIES, tiny

import minisd
from minisd.cli import main
from minisd.files.checkpoint import open_checkpoint
from minisd.files.entry import Entry
from minisd.files.model import build
from minisd.files.recognition import recognise
from minisd.files.tensors import broken, load_tensors, read_stored, stored_pieces
from minisd.files.upload import upload_tensors
from minisd.files.writers import is_asked_for, is_unneeded, usual_names
from minisd.workbench.converting import convert
from minisd.workbench.inspecting import as_text, inspect
from minisd.workbench.merging import merge

BIG_G = "conditioner.embedders.1.model"
HIGH = "cond_stage_model.model"
PLAIN = "model.diffusion_model.out.2.bias"


def without(weights, *keys):
    return {key: value for key, value in weights.items() if key not in keys}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("usual")
    for name in FAMILIES:
        save_file(tiny(name), folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in FAMILIES}


def drawn(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe = minisd.load(path, device="cpu", dtype="float32", **options)
    return np.asarray(pipe("a castle", seed=1, steps=1, width=64, height=64).images[0])


def test_a_ckpt_below_model_opens(files, tmp_path):
    torch.save({"model": load_file(files["sd1"]), "epoch": 3}, tmp_path / "x.ckpt")
    assert np.array_equal(drawn(tmp_path / "x.ckpt"), drawn(files["sd1"]))


def test_a_taken_name_is_not_taken_again():
    entry, other = Entry("F32", (2, 3), 0), Entry("F32", (3, 2), 24)
    twice = {f"{BIG_G}.text_projection": other, f"{BIG_G}.text_projection.weight": entry}
    assert usual_names(twice) == {key: (key, value) for key, value in twice.items()}
    ((name, (own, turned)),) = usual_names({f"{BIG_G}.text_projection.weight": entry}).items()
    assert (name, own) == (f"{BIG_G}.text_projection", f"{BIG_G}.text_projection.weight")
    assert (turned.shape, turned.stride) == ((3, 2), (1, 3))
    assert list(usual_names({"_orig_mod.a": entry, "module.a": other})) == ["a", "module.a"]


def test_what_lies_in_three_places_is_read_as_one(tmp_path):
    """In the file's dtype or another, on either way to a device; where the parts make no whole, they stay what they are."""
    names = [f"{HIGH}.transformer.text_model.encoder.layers.0.self_attn.{part}_proj.weight" for part in "qkv"]
    numbers = [torch.randn(3, 5).half() for _ in names]
    path, target = tmp_path / "x.safetensors", f"{HIGH}.transformer.resblocks.0.attn.in_proj_weight"
    save_file(dict(zip(names, numbers, strict=True)), path)
    checkpoint = open_checkpoint(path)
    assert checkpoint.renamed == {target: names[0]}
    whole = torch.cat(numbers)
    for dtype in (torch.float16, torch.float32, torch.bfloat16):
        assert torch.equal(load_tensors(checkpoint, [target], dtype)[target], whole.to(dtype))
        assert torch.equal(upload_tensors(checkpoint, [target], dtype, torch.device("cpu"))[target], whole.to(dtype))
    assert torch.equal(read_stored(checkpoint, target), whole)
    assert torch.equal(torch.cat([*stored_pieces(checkpoint, target)]), whole.flatten())
    assert not broken(checkpoint)
    numbers[2][2, 4] = torch.nan
    save_file(dict(zip(names, numbers, strict=True)), path)
    assert broken(open_checkpoint(path)) == [target]
    for parts in ({names[0]: whole, names[1]: whole}, dict(zip(names, [whole, whole, whole[:1]], strict=True))):
        save_file({key: value.clone() for key, value in parts.items()}, path)
        assert open_checkpoint(path).entries.keys() == parts.keys()
    save_file({key: whole.clone() for key in (*names, target)}, path)
    assert open_checkpoint(path).entries.keys() == {*names, target}


@pytest.mark.parametrize("name", ["sd15", "sd21-768", "sdxl-base", "sdxl-refiner", "sd15-inpainting"])
def test_names_of_the_networks_are_those_of_the_published_files(name):
    shapes = manifest(name)
    keys = [key for key in shapes if not is_unneeded(key)]
    assert [key for key in keys if not is_asked_for(key)] == []
    assert not is_asked_for("model.diffusion_model.extra.00")
    entries = {key: Entry("F16", tuple(shapes[key]), 0) for key in keys}
    assert usual_names(entries) == {key: (key, entries[key]) for key in sorted(keys)}


@pytest.fixture
def extra(files, tmp_path):
    more = {f"model.diffusion_model.extra.{i:02}": torch.zeros(1) for i in range(12)} | {"note": torch.ones(2)}
    save_file(load_file(files["sd1"]) | more, tmp_path / "extra.safetensors")
    return tmp_path / "extra.safetensors"


def test_extra_tensors_are_told_and_refused_only_where_that_is_asked_for(extra, files, capsys):
    told = r"13 tensors are not used, .*: model\.diffusion_model\.extra\.00, .*\.extra\.09, …"
    with pytest.warns(UserWarning, match=told):
        pipe = minisd.load(extra, device="cpu", dtype="float32")
    picture = pipe("a castle", seed=1, steps=1, width=64, height=64).images[0]
    assert np.array_equal(np.asarray(picture), drawn(files["sd1"]))
    with pytest.raises(minisd.CheckpointError, match="13 keys are unknown"):
        minisd.load(extra, device="cpu", strict=True)
    with pytest.raises(minisd.UsageError, match="strict"):
        minisd.load(extra, device="cpu", strict="yes")
    options = ["-m", str(extra), "--steps", "1", "--size", "64x64", "--device", "cpu", "-o", str(extra.with_suffix(".png"))]
    assert main(["a castle", *options, "--strict"]) == 3
    assert not extra.with_suffix(".png").exists()
    assert main(["a castle", *options]) == 0
    assert re.search(f"minisd: warning: .*{told}", capsys.readouterr().err)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_is_left_of_a_layer_is_no_extra_tensor(name, tmp_path):
    """The modules are built as the file has it: without the weight of an optional layer its bias is all that shows it."""
    checkpoint = open_checkpoint(SMALL[name].write(tmp_path / "small.safetensors"))
    family = recognise(checkpoint).family
    optional = [key for key in checkpoint.entries if re.search(r"(nin_shortcut|skip_connection|sample\.conv|\.op)\.weight", key)]
    assert len(optional) > 8
    for key in optional:
        entries = {other: entry for other, entry in checkpoint.entries.items() if other != key}
        with pytest.raises(minisd.CheckpointError, match=r"missing|unknown"):
            build(replace(checkpoint, entries=entries), family)


def test_extra_tensors_are_listed_and_pruned(extra, files, tmp_path):
    facts = inspect(extra)
    assert len(facts["extra"]) == 13
    assert "asked for by no network (13): model.diffusion_model.extra.00" in as_text(facts)
    json.dumps(facts)
    convert(extra, tmp_path / "kept.safetensors")
    assert "note" in open_checkpoint(tmp_path / "kept.safetensors").entries
    convert(extra, tmp_path / "pruned.safetensors", prune=True)
    assert open_checkpoint(tmp_path / "pruned.safetensors").entries.keys() == load_file(files["sd1"]).keys()


def test_extra_tensors_are_no_reason_to_refuse_a_merge_or_a_text_encoder(extra, files, tmp_path):
    usual = load_file(files["sd1"])
    for sources in ([extra, files["sd1"]], [files["sd1"], extra]):
        mix = load_file(merge(sources, tmp_path / "mix.safetensors", 0.5))
        assert all(torch.equal(mix[key], value) for key, value in usual.items())
        assert ("note" in mix) == (sources[0] == extra)
    more = {"cond_stage_model.transformer.text_model.extra": torch.zeros(1)}
    save_file(usual | more, tmp_path / "text.safetensors")
    convert(files["sd1"], tmp_path / "x.safetensors", text=tmp_path / "text.safetensors")
    assert load_file(tmp_path / "x.safetensors").keys() == usual.keys()


def test_inspect_gives_reasons_and_other_names(files, tmp_path):
    weights = {f"module.{key}": value for key, value in load_file(files["sdxl"]).items()}
    save_file(weights | {"conditioner.embedders.0.text_projection": torch.eye(64)}, tmp_path / "x.safetensors")
    facts = inspect(tmp_path / "x.safetensors")
    assert facts["unused"] == {"conditioner.embedders.0.text_projection": "projection for CLIP's own training"}
    assert facts["renamed"][PLAIN] == f"module.{PLAIN}"
    text = as_text(facts)
    assert "unused, projection for CLIP's own training: conditioner.embedders.0.text_projection" in text
    assert f"otherwise named ({len(weights)}): " in text.replace(",", "")


@pytest.mark.parametrize("name", ["sdxl", "sdxl-refiner"])
def test_a_missing_projection_is_told_at_once_and_can_be_put_back(name, files, tmp_path):
    weights = load_file(files[name])
    key = next(key for key in weights if key.endswith("model.text_projection"))
    save_file(without(weights, key), tmp_path / "without.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"text_projection.*is missing, without which .*--text OTHER"):
        minisd.load(tmp_path / "without.safetensors", device="cpu")
    assert list(inspect(tmp_path / "without.safetensors")["left_out"]) == [key]
    assert f"missing: {key}: take the text encoders" in as_text(inspect(tmp_path / "without.safetensors"))
    convert(tmp_path / "without.safetensors", tmp_path / "whole.safetensors", text=files[name])
    assert np.array_equal(drawn(tmp_path / "whole.safetensors"), drawn(files[name]))


def test_sd2_draws_without_its_projection(files, tmp_path):
    save_file(without(load_file(files["sd2"]), f"{HIGH}.text_projection"), tmp_path / "x.safetensors")
    assert np.array_equal(drawn(tmp_path / "x.safetensors"), drawn(files["sd2"]))


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
def test_scaled_float8_is_told(name, files, tmp_path):
    scale = {f"model.diffusion_model.time_embed.0.{name}": torch.ones(())}
    save_file(load_file(files["sd1"]) | scale, tmp_path / "x.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"looks like a model in scaled float8.* does not know its scales yet"):
        minisd.load(tmp_path / "x.safetensors", device="cpu")


@pytest.mark.parametrize("name", ["absmax", "quant_map", "quant_state.bitsandbytes__nf4"])
def test_what_bitsandbytes_quantised_is_told(name, files, tmp_path):
    """As stable-diffusion-webui-forge saves it (backend/utils.py, get_state_dict_after_quant)."""
    more = {f"model.diffusion_model.time_embed.0.weight.{name}": torch.ones(4)}
    save_file(load_file(files["sd1"]) | more, tmp_path / "x.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"looks like a model quantised by bitsandbytes.*take the model in float16"):
        minisd.load(tmp_path / "x.safetensors", device="cpu")


UNNEEDED = {
    "sqrt_recip_alphas_cumprod": torch.tensor([1.0] * 999 + [float("inf")]),
    "model_ema.num_updates": torch.tensor(840_000.0),
    "first_stage_model.loss.x": torch.full((2, 2), float("nan")),
}


@pytest.mark.parametrize("key", UNNEEDED)
def test_numbers_that_nobody_needs_may_be_anything(key, files, tmp_path):
    save_file(load_file(files["sd1"]) | {key: UNNEEDED[key]}, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", torch.float16)
    found = load_file(tmp_path / "y.safetensors")
    assert torch.equal(found[key].float(), UNNEEDED[key]) or found[key].isnan().all()
    assert found[PLAIN].dtype == torch.float16
    merge([tmp_path / "x.safetensors", files["sd1"]], tmp_path / "y.safetensors", dtype=torch.float16)


def test_averages_of_weights_are_still_weights(files, tmp_path):
    ema = {"model_ema.diffusion_modelout2bias": torch.full((4,), 1e5)}
    save_file(load_file(files["sd1"]) | ema, tmp_path / "x.safetensors")
    with pytest.raises(minisd.CheckpointError, match="too large"):
        convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", torch.float16)


def test_a_checkpoint_without_a_vae_takes_one_from_another_file(files, tmp_path):
    weights = load_file(files["sd1"])
    vae = {key: value for key, value in weights.items() if key.startswith("first_stage_model.")}
    save_file(without(weights, *vae), tmp_path / "novae.safetensors")
    alone = {key.removeprefix("first_stage_model."): value for key, value in vae.items()}
    save_file(alone, tmp_path / "vae.safetensors")
    assert np.array_equal(drawn(tmp_path / "novae.safetensors", vae=tmp_path / "vae.safetensors"), drawn(files["sd1"]))
    pipe = minisd.load(tmp_path / "novae.safetensors", device="cpu", dtype="float32", vae=files["sd1"])
    pipe.save(tmp_path / "whole.safetensors")
    assert all(torch.equal(value, weights[key]) for key, value in load_file(tmp_path / "whole.safetensors").items())
    with pytest.raises(minisd.CheckpointError, match=r"only the VAE is missing: name one with --vae"):
        minisd.load(tmp_path / "novae.safetensors", device="cpu")
    assert "--vae" in inspect(tmp_path / "novae.safetensors")["hint"]
    with pytest.raises(minisd.CheckpointError, match="expected a VAE"):
        minisd.load(tmp_path / "novae.safetensors", device="cpu", vae=tmp_path / "novae.safetensors")
    save_file(without(weights, *list(vae)[3:]), tmp_path / "torn.safetensors")
    with pytest.raises(minisd.CheckpointError, match="is missing"):
        minisd.load(tmp_path / "torn.safetensors", device="cpu", vae=tmp_path / "vae.safetensors")
