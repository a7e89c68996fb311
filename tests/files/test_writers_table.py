"""Each row of the table of what programs that write checkpoints do, in a file of each family that it is about."""

from __future__ import annotations

import json
import os
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from written import FAMILIES, WRITTEN, litema, tiny

import minisd
from minisd.files.checkpoint import open_checkpoint
from minisd.files.writers import is_asked_for, is_unneeded, left_out, rows_for, usual_name, written_by
from minisd.files.writers_table import DOES, LEFT_OUT, MARKERS, NAMED, TABLE
from minisd.workbench.converting import convert
from minisd.workbench.differing import diff
from minisd.workbench.folders.folder import from_folder, to_folder
from minisd.workbench.inspecting import as_text, inspect
from minisd.workbench.merging import merge

CASES = [(name, family) for name, families in WRITTEN.items() for family in families]
LACKING = ("diffusers' SD 2 before 0.11", "SD 2 without what it does not use")  # SD 2's last layer, its projection
MADE_UP = "SD 2 with dummies"  # the same, not as it was
# What the names in a file do not show: the row's example, and the file that shows it.
UNSEEN = {
    "first_stage_model.encoder.mid.attn_1.q.bias": "biases of 1x1",
    "cond_stage_model.model.text_projection": "SD 2 without what it does not use",
    "cond_stage_model.model.transformer.resblocks.23.ln_1.bias": "SD 2 without what it does not use",
    "conditioner.embedders.1.model.logit_scale": "the sgm denoiser",
    "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": "NovelAI",
}


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """Nothing here is about a power cut, and bringing each file to the disk takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture(scope="module")
def one_thread():
    """Several wait for each other longer than they work on networks as small as these."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def usual(tmp_path_factory, one_thread):
    """By family: the usual file, its weights, and the picture that it draws."""
    folder = tmp_path_factory.mktemp("usual")
    found = {}
    for name in FAMILIES:
        weights = tiny(name)
        save_file(weights, folder / f"{name}.safetensors")
        found[name] = (folder / f"{name}.safetensors", weights, drawn(folder / f"{name}.safetensors"))
    return found


def loaded(path, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return minisd.load(path, device="cpu", dtype="float32", **options)


def drawn(path, **options):
    return picture_of(loaded(path, **options))


def picture_of(pipe):
    return np.asarray(pipe("a castle", seed=1, steps=1, width=64, height=64).images[0])


def written(name, family, weights, folder):
    theirs = {key: value.clone().contiguous() for key, value in WRITTEN[name][family](dict(weights)).items()}
    save_file(theirs, folder / "theirs.safetensors")
    return folder / "theirs.safetensors"


def networks(path):
    return {key: value for key, value in load_file(path).items() if not is_unneeded(key)}


def same(found, expected):
    """All numbers to the bit; a 1x1 convolution may be a matrix."""
    return found.keys() == expected.keys() and all(
        torch.equal(found[key].reshape(value.shape), value) for key, value in expected.items()
    )


@pytest.mark.parametrize(("name", "family"), CASES)
def test_a_file_as_it_is_written_draws_and_goes_through_every_command(name, family, usual, tmp_path):
    plain, weights, picture = usual[family]
    theirs = written(name, family, weights, tmp_path)
    pipe = loaded(theirs, strict=True)
    assert np.array_equal(picture_of(pipe), picture)
    lacking = set(weights) - set(open_checkpoint(theirs).entries)
    assert bool(lacking) == (name in LACKING)
    asked = {key: value for key, value in weights.items() if key not in lacking}
    if name == MADE_UP:
        asked = networks(theirs)
    elif not lacking:
        facts = diff(plain, theirs)
        assert not facts["only_a"]
        assert all(is_unneeded(key) for key in facts["only_b"])
        assert all(part["changed"] == 0 for part in facts["parts"].values())
        for sources in ([theirs, plain], [plain, theirs]):
            assert same(networks(merge(sources, tmp_path / "mix.safetensors", 0.5)), asked)
    assert same(load_file(convert(theirs, tmp_path / "pruned.safetensors", prune=True)), asked)
    pipe.save(tmp_path / "saved.safetensors")
    assert same(load_file(tmp_path / "saved.safetensors"), asked)
    assert same(networks(from_folder(to_folder(theirs, tmp_path / "folder"), tmp_path / "back.safetensors")), asked)


def test_every_row_is_in_a_file_here(usual, tmp_path):
    seen = {row.example for row in TABLE if row.example in MARKERS or row.does == "left out"}  # see below
    for name, family in CASES:
        checkpoint = open_checkpoint(written(name, family, usual[family][1], tmp_path))
        names = {key: checkpoint.renamed.get(key, key) for key in checkpoint.entries}
        seen |= {row.example for row in written_by(names)}
    assert seen.isdisjoint(UNSEEN)
    assert seen | set(UNSEEN) == {row.example for row in TABLE}


def test_rows_are_whole():
    assert len(TABLE) == len({(row.example, row.does) for row in TABLE}) >= 40
    for row in TABLE:
        assert row.does in DOES
        assert row.writer
        assert row.what
        assert re.fullmatch(row.pattern, row.example)
        assert is_unneeded(row.example) == (row.does == "unneeded" or row.example.endswith((".logit_scale", "position_ids"))) or (
            row in NAMED
        )


@pytest.mark.parametrize("row", NAMED, ids=lambda row: row.example)
def test_other_names_lead_to_names_of_the_networks(row):
    rows = rows_for(frozenset({row.when, row.example}))
    name = usual_name(row.example, rows).name
    assert row in usual_name(row.example, rows).rows
    assert is_asked_for(name) or name == "model_ema.diffusion_modelout2bias"


@pytest.mark.parametrize("name", ["LitEma", "d8ahazard's averages"])
def test_averages_of_either_name_are_drawn_with(name, usual, tmp_path):
    weights = usual["sd1"][1]
    save_file(
        weights | {key: value + 0.125 for key, value in weights.items() if key.startswith("model.")}, tmp_path / "x.safetensors"
    )
    theirs = written(name, "sd1", weights, tmp_path)
    assert np.array_equal(drawn(theirs, ema=True), drawn(tmp_path / "x.safetensors"))
    assert litema("diffusion_model")(weights).keys() == open_checkpoint(theirs).entries.keys()


TOGETHER = [
    {"v_pred": [], "ztsnr": []},
    {"edm_mean": [0.0] * 4, "edm_std": [1.0] * 4},
    {"edm_vpred.sigma_min": [0.002], "edm_vpred.sigma_max": [120.0]},
]


@pytest.mark.parametrize("marker", MARKERS)
def test_markers_stay_when_the_rest_is_pruned(marker, usual, tmp_path):
    more = {key: torch.tensor(numbers) for key, numbers in next(each for each in TOGETHER if marker in each).items()}
    save_file(usual["sdxl"][1] | more, tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "y.safetensors", prune=True)
    assert marker in load_file(tmp_path / "y.safetensors")
    assert inspect(tmp_path / "x.safetensors")["unused"][marker] == "marker of how the model was trained"


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_out_is_told_with_what_to_do(family, usual, tmp_path):
    plain, weights, picture = usual[family]
    for row in LEFT_OUT:
        lacking = {key for key in weights if re.fullmatch(row.pattern, key)}
        if row.does != "left out" or not lacking:
            continue
        save_file({key: value for key, value in weights.items() if key not in lacking}, tmp_path / "x.safetensors")
        with pytest.raises(minisd.CheckpointError, match=re.escape(row.what.partition(":")[0])):
            minisd.load(tmp_path / "x.safetensors", device="cpu")
        other = {"text": plain} if "--text" in row.what else {"vae": plain}
        convert(tmp_path / "x.safetensors", tmp_path / "whole.safetensors", **other)
        assert np.array_equal(drawn(tmp_path / "whole.safetensors"), picture)
    assert not left_out(weights, FAMILIES[family])


@pytest.mark.parametrize(("name", "family"), CASES)
def test_inspect_names_the_writer_and_lists_what_is_unneeded(name, family, usual, tmp_path):
    theirs = written(name, family, usual[family][1], tmp_path)
    facts = inspect(theirs)
    json.dumps(facts)
    assert facts["family"] == family
    assert facts["extra"] == []
    unneeded = {key for row in facts["written_by"] if row["does"] == "unneeded" for key in row["tensors"]}
    assert len(unneeded) == len(facts["unused"])
    text = as_text(facts)
    for row in facts["written_by"]:
        assert row["writer"] in text
    named = {key for row in facts["written_by"] if row["does"] != "unneeded" for key in row["tensors"]}
    assert named <= set(load_file(theirs))


def test_the_page_has_every_row():
    page = (Path(__file__).parents[2] / "docs" / "writers.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\| `.*$", page, re.MULTILINE)
    assert lines == [line_of(row) for row in TABLE]


def line_of(row):
    """A row as docs/writers.md has it."""
    rows = rows_for(frozenset({row.when, row.example}))
    becomes = {
        "unneeded": f"not needed: {row.what}",
        "left out": row.what.partition(":")[0],
        "not missed": f"not needed: {row.what}",
    }
    name = f"`{usual_name(row.example, rows).name}`"
    extra = {"turned": ", transposed", "flattened": ", of shape (C,) again", "stacked": ", with k and v below q"}
    here = becomes.get(row.does, name + extra.get(row.does, ""))
    gone = " is left out" if row in LEFT_OUT else ""
    return f"| `{row.example}`{gone} | {here} | {row.writer} |"
