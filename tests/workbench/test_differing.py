from __future__ import annotations

import json

import pytest
import torch
from families import SMALL
from PIL import Image
from safetensors.torch import load_file, save_file

from minisd.cli import main
from minisd.workbench.blueprint import random_weights
from minisd.workbench.differing import as_text, diff, heat_map

CONV = "model.diffusion_model.middle_block.0.in_layers.2.weight"
ATTN = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"


@pytest.fixture
def pair(tmp_path):
    """An SD 1.x model, and one in which the weights of a layer are doubled and another's moved by a tenth."""
    weights = random_weights(SMALL["sd1"].shapes(), seed=0)
    save_file(weights, tmp_path / "a.safetensors")
    weights[CONV] = 2 * weights[CONV]
    weights[ATTN] = 1.1 * weights[ATTN]
    return tmp_path / "a.safetensors", save_file(weights, tmp_path / "b.safetensors") or tmp_path / "b.safetensors"


def test_a_file_is_the_same_as_itself(pair):
    facts = diff(pair[0], pair[0])
    assert not any(facts[what] for what in ("only_a", "only_b", "shape", "dtype"))
    assert all(each["change"] == 0 and each["changed"] == 0 for each in facts["blocks"].values())
    assert sum(each["tensors"] for each in facts["parts"].values()) == facts["common"] == len(load_file(pair[0]))


def test_relative_change_against_float64(pair):
    facts = diff(*pair)
    a, b = load_file(pair[0]), load_file(pair[1])
    assert facts["layers"]["middle convolution"]["changed"] == 1
    assert facts["layers"]["input.1 self-attention"]["changed"] == 1
    assert facts["blocks"]["output.0"] == {"tensors": facts["blocks"]["output.0"]["tensors"], "changed": 0, "change": 0.0}
    keys = [key for key in a if key.startswith("model.diffusion_model.middle_block.")]
    wanted = sum((b[key].double() - a[key].double()).norm() ** 2 for key in keys) / sum(
        a[key].double().norm() ** 2 for key in keys
    )
    assert facts["blocks"]["middle"]["change"] == pytest.approx(float(wanted) ** 0.5, rel=1e-6)
    assert facts["parts"]["vae"]["changed"] == facts["parts"]["text"]["changed"] == 0


def test_keys_shapes_dtypes_and_what_has_no_ratio(pair, tmp_path):
    weights = load_file(pair[0])
    weights["extra\x1b[31m"] = torch.ones(2)
    del weights[CONV]
    weights[ATTN] = weights[ATTN].half()
    weights["model.diffusion_model.out.2.bias"] = torch.zeros(7)
    weights["model.diffusion_model.out.2.weight"][0, 0, 0, 0] = float("nan")
    save_file({key: value for key, value in weights.items() if "\x1b" not in key}, tmp_path / "c.safetensors")
    facts = diff(pair[0], tmp_path / "c.safetensors")
    assert facts["only_a"] == [CONV]
    assert facts["dtype"] == {ATTN: ["F32", "F16"]}
    assert facts["shape"] == {"model.diffusion_model.out.2.bias": [(4,), (7,)]}
    assert facts["blocks"]["out"]["change"] is None
    json.dumps(facts, allow_nan=False)
    text = as_text(facts)
    shape = "1 in another shape: model.diffusion_model.out.2.bias (4,) -> (7,)"
    for line in (f"1 only in A: {CONV}", shape, "F32 -> F16", "no ratio"):
        assert line in text


def test_command_line_and_heat_map(pair, tmp_path, capsys):
    plot = tmp_path / "diff.png"
    assert main(["diff", *map(str, pair), "--json", "--plot", str(plot)]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"]["middle convolution"]["changed"] == 1
    assert Image.open(plot).size == heat_map(facts).size
    assert main(["diff", *map(str, pair)]) == 0
    assert "middle" in capsys.readouterr().out
    same = heat_map(diff(pair[0], pair[0]))
    assert same.tobytes() != heat_map(facts).tobytes()
    assert main(["diff", str(pair[0]), str(pair[1]), "--plot", str(tmp_path / "x.jpg")]) == 2


def test_any_two_files_can_be_compared(tmp_path):
    save_file({"lora_a.weight": torch.ones(3)}, tmp_path / "a.safetensors")
    save_file({"lora_a.weight": torch.full((3,), 2.0)}, tmp_path / "b.safetensors")
    facts = diff(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert facts["blocks"] == {"lora_a": {"tensors": 1, "changed": 1, "change": pytest.approx(1.0)}}
    heat_map(facts)
