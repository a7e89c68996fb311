"""Traces: written small, taken again to the bit, and what is changed is named within its block."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.cli import main
from minisd.fast import choice
from minisd.files.checkpoint import file_sha256
from minisd.inside.sketches import apart, distance, parts_of, sketch
from minisd.inside.traces import read_trace, trace
from minisd.inside.verifying import verify
from minisd.library.places import tiny_checkpoint
from minisd.text.tokenizer import tokenize

PROMPT = "a red circle on a blue background"
QUICKLY = {"steps": 3, "seed": 1, "width": 32, "height": 32}
PUBLISHED = Path(__file__).with_name("tiny.trace.safetensors")  # float32, 4 steps; see `test_published_trace`


@pytest.fixture(scope="module")
def pipe() -> minisd.Pipeline:
    return minisd.load(device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def traced(pipe, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("traces") / "t.safetensors"
    trace(pipe, path, PROMPT, **QUICKLY)
    return path


def test_a_trace_holds_the_way(pipe, traced):
    with choice.using("torch"):  # the plain way, which a trace takes
        found, steps = read_trace(traced), list(pipe.stream(PROMPT, **QUICKLY))
    assert found.recipe["prompt"] == PROMPT
    assert "changed" not in found.recipe
    told = pipe.encode_prompt(["", PROMPT]).context
    for i, role in enumerate(("negative", "positive")):
        assert torch.equal(found.kept[f"conditioning.{role}.0.context"], told[i : i + 1])
    for i, step in enumerate(steps):
        assert found.calls[i].sigma == step.sigma
        assert torch.equal(found.kept[f"call.{i}.x"], step.before)
        assert torch.equal(found.kept[f"call.{i}.denoised"], step.denoised)
        eps = [found.kept[f"call.{i}.eps.{role}"] for role in ("negative", "positive")]
        assert distance(eps[0] + 6 * (eps[1] - eps[0]), step.eps) < 1e-4
    assert torch.equal(found.kept["latents"], steps[-1].latents)
    assert found.kept["sigmas"].shape == (4,)


def test_a_whole_drawing_of_the_tiny_checkpoint_is_small(pipe, tmp_path):
    path = tmp_path / "t.safetensors"
    result = trace(pipe, path, PROMPT, seed=1)
    assert path.stat().st_size < 1_000_000
    with choice.using("torch"):
        assert torch.equal(result.latents, pipe(PROMPT, seed=1).latents)


def test_again_on_this_machine_is_identical_to_the_bit(traced):
    facts = verify(traced)
    assert facts["identical"]
    assert facts["first"] is None
    assert facts["checked"] == len(read_trace(traced).names)
    assert facts["surroundings"] == []


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "euler_a", "dpmpp_2m_sde", "euler_cfg_pp"])
def test_goes_on_from_a_step(sampler, pipe, tmp_path):
    """What the sampler remembers, and the noise that it has drawn, come out of the trace as well."""
    path = tmp_path / "t.safetensors"
    trace(pipe, path, PROMPT, **QUICKLY | {"steps": 4}, sampler=sampler)
    with minisd.tap(pipe, "model.diffusion_model.out") as asked:
        facts = verify(path, pipe, from_step=2)
    known = read_trace(path)
    assert len(asked) == sum(call.step >= 2 for call in known.calls)
    assert facts["identical"]
    assert verify(path, pipe, from_step=0)["identical"]


PARTS = [
    name for name, _ in parts_of(minisd.load(device="cpu").model) if ".encoder.conv" not in name and "quant_conv" not in name
]
PARTS = [name for name in PARTS if not name.startswith(("first_stage_model.encoder",))] + ["first_stage_model.post_quant_conv"]
SOME = ("input_blocks.4", "middle_block", "time_embed", "layers.2", "decoder.up.1")


@pytest.mark.parametrize("part", [part if part.endswith(SOME) else pytest.param(part, marks=pytest.mark.slow) for part in PARTS])
def test_one_changed_weight_is_named_within_its_block(part, pipe, traced):
    """The largest of the last matrix in it, by a thousandth."""
    weight = [each for each in pipe.model.get_submodule(part).parameters() if each.numel() > 1][-1].data.view(-1)
    if part.endswith("embeddings"):  # of which the prompt reads few rows
        weight = pipe.model.get_submodule(part).token_embedding.weight.data[tokenize([PROMPT])[0][1]]
    place, kept = int(weight.abs().argmax()), float(weight.view(-1)[int(weight.abs().argmax())])
    try:
        weight[place] = kept * 1.001
        facts = verify(traced, pipe)
    finally:
        weight[place] = kept
    assert facts["first"]["what"] == part
    assert facts["first"]["step"] == (0 if part.startswith("model.") else None)
    assert 0 < facts["first"]["relative"] < 0.01
    assert verify(traced, pipe)["identical"]


def test_another_number_format_names_the_first_step_past_the_bound(traced):
    facts = verify(traced, dtype="bfloat16", bound=0.02)
    assert not facts["identical"]
    assert facts["first"]["what"].endswith("text_model.embeddings")
    assert facts["surroundings"] == ["dtype float32, now bfloat16"]
    past = next(row for row in facts["calls"] if max(row["x"], row["denoised"], row["eps"]) > 0.02)
    assert facts["past"]["step"] == past["step"]
    assert facts["past"]["relative"] > 0.02
    assert verify(traced, dtype="bfloat16", bound=2)["past"] is None


def test_another_file_and_another_course_are_told(pipe, traced, tmp_path):
    weights = load_file(tiny_checkpoint())
    weights["model.diffusion_model.middle_block.0.out_layers.3.bias"][0] += 0.01
    save_file(weights, tmp_path / "other.safetensors", {"modelspec.resolution": "64x64"})
    with pytest.warns(UserWarning, match="is not the checkpoint"):
        facts = verify(traced, minisd.load(tmp_path / "other.safetensors", device="cpu", dtype="float32"))
    assert facts["first"]["what"] == "model.diffusion_model.middle_block"
    assert facts["surroundings"] == ["model tiny, now another file"]
    known = read_trace(traced)
    known.recipe["steps"] = 2
    known.write(tmp_path / "t.safetensors")
    facts = verify(tmp_path / "t.safetensors", pipe)
    assert facts["first"]["what"] == "sigmas"
    assert facts["first"]["relative"] is None


def test_sketches_estimate_the_difference():
    generator = torch.Generator().manual_seed(0)
    for size in (3, 64, 1000, 100_001):
        for scale in (1e-6, 1e-2, 1.0):
            x = torch.randn(size, generator=generator)
            y = x + scale * torch.randn(size, generator=generator)
            assert abs(apart(sketch(y), sketch(x)) / distance(y, x) - 1) < (1e-3 if size <= 64 else 0.4)
    assert apart(sketch(x), sketch(x)) == 0


def test_published_trace():
    """That of the tiny checkpoint is drawn again on every machine.  Made by: minisd trace "a red circle on a blue background"
    --seed 1 --steps 4 --dtype float32 -o tests/inside/tiny.trace.safetensors"""
    assert read_trace(PUBLISHED).recipe["model_sha256"] == file_sha256(tiny_checkpoint()), "trained anew: make its trace anew"
    facts = verify(PUBLISHED, device="cpu", bound=1e-3)
    assert facts["past"] is None, facts["past"]


def written(path: Path, **changes) -> Path:
    """The published trace with other metadata, or other tensors."""
    with safe_open(PUBLISHED, "pt") as file:
        metadata = dict(file.metadata())
    tensors = load_file(PUBLISHED)
    facts = json.loads(metadata["minisd_facts"])
    change = changes.get("facts")
    if change:
        change(facts)
    tensors = changes.get("tensors", lambda tensors: tensors)(tensors)
    save_file(tensors, path, metadata | {"minisd_facts": json.dumps(facts)} | changes.get("metadata", {}))
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {"metadata": {"minisd_facts": "{"}},
        {"metadata": {"minisd_facts": "[]"}},
        {"metadata": {"minisd_trace": "7\x1b[2J"}},
        {"facts": lambda facts: facts.pop("names")},
        {"facts": lambda facts: facts["names"].pop()},
        {"facts": lambda facts: facts.update(calls=[])},
        {"facts": lambda facts: facts.update(calls=[[0, 0, "a", 4]])},
        {"facts": lambda facts: facts.update(recipe=3)},
        {"facts": lambda facts: facts["recipe"].pop("prompt")},
        {"facts": lambda facts: facts["recipe"].update(steps="many")},
        {"facts": lambda facts: facts["recipe"].update(dtype=["x"])},
        {"facts": lambda facts: facts["recipe"].update(model_path="not/there.safetensors")},
        {"facts": lambda facts: facts.update(threads="x")},
        {"tensors": lambda tensors: {k: v for k, v in tensors.items() if k != "call.1.denoised"}},
        {"tensors": lambda tensors: {k: v for k, v in tensors.items() if k != "sketches"}},
    ],
)
def test_what_is_no_trace_is_told(changes, tmp_path, capsys):
    path = written(tmp_path / "t.safetensors", **changes)
    assert main(["verify", str(path)]) in (2, 3)
    error = capsys.readouterr().err
    assert error.count("minisd: error: ") == 1
    assert error.isprintable() or error.strip("\n").replace("\n", "").isprintable()


def test_requests_that_no_recipe_tells_are_refused(pipe, tmp_path):
    for options in ({"num_images": 2}, {"guide": lambda answers, x, call: answers[1]}, {"latents": torch.zeros(1, 4, 8, 8)}):
        with pytest.raises(minisd.UsageError, match=r"^trace: expected"):
            trace(pipe, tmp_path / "t.safetensors", PROMPT, **QUICKLY | {"seed": None} | options)
    with pytest.raises(minisd.UsageError, match="expected a name that ends in"):
        trace(pipe, tmp_path / "t.bin", PROMPT)
    assert list(tmp_path.iterdir()) == []


def test_commands(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    line = ["trace", PROMPT, "-o", "t.safetensors", "--steps", "2", "--size", "32x32", "--seed", "1", "--dtype", "float32"]
    assert main(line) == 0
    assert capsys.readouterr().out == "t.safetensors\n"
    assert main(["verify", "t.safetensors"]) == 0
    assert "identical, to the bit" in capsys.readouterr().out
    assert main(["verify", "t.safetensors", "--dtype", "bfloat16", "--json"]) == 1
    said = capsys.readouterr()
    assert json.loads(said.out)["past"]["relative"] > 0.01
    assert "past the bound 0.01" in said.err
    assert main(["verify", "t.safetensors", "--from-step", "2"]) == 2
    assert "--from-step: expected a whole number from 0 to 1" in capsys.readouterr().err


def test_a_trace_of_a_prompt_that_changes_and_of_two_roles_goes_on(pipe, tmp_path):
    path = tmp_path / "t.safetensors"
    trace(pipe, path, "a [red:blue:0.5] circle", **QUICKLY, guidance_scale=1)
    known = read_trace(path)
    assert [name for name in known.names if "eps" in name] == [f"call.{i}.eps.positive" for i in range(3)]
    assert "conditioning.positive.1.context" in known.kept
    assert verify(path, pipe, from_step=1)["identical"]
    assert replace(known, recipe={}).steps == 3
