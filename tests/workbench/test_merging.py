from __future__ import annotations

import hashlib
import json
import shutil

import pytest
import torch
from families import SMALL
from helpers import manifest
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import minisd
from minisd.cli import main
from minisd.errors import OutputError
from minisd.files.checkpoint import file_sha256, known_sha256, legacy_hash
from minisd.files.writers import CONV_IN
from minisd.models.blocks import block_ratios, blocks_of, group_of, part_of
from minisd.workbench.arithmetic import dare, generator_for, slerp, ties
from minisd.workbench.blueprint import random_weights
from minisd.workbench.differing import diff
from minisd.workbench.merging import merge, repeat


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
    path = merge([a, b], tmp_path / "m.safetensors", 0.3)
    found, first, second = load_file(path), load_file(a), load_file(b)
    assert found.keys() == first.keys()
    for key, value in found.items():
        wanted = 0.7 * first[key].double() + 0.3 * second[key].double()
        assert value.dtype == torch.float16
        assert (value.double() - wanted).abs().max() <= 2**-11 * wanted.abs().max() + 1e-7, key
    assert minisd.load(path, device="cpu").family.name == "sd1"


@pytest.mark.parametrize("ratio", [0, 1])
def test_ratios_0_and_1_are_the_sources_to_the_bit(models, tmp_path, ratio):
    found, source = load_file(merge(models[:2], tmp_path / "m.safetensors", ratio)), load_file(models[ratio])
    assert all(torch.equal(found[key].view(torch.int16), source[key].view(torch.int16)) for key in source)


def test_add_difference_and_ratios_by_part(models, tmp_path):
    a, b, c, _ = models
    path = merge([a, b], tmp_path / "m.safetensors", 0.5, base=c, by_part={"vae": 0, "text": 2})
    found, first, second, third = load_file(path), load_file(a), load_file(b), load_file(c)
    for key, value in found.items():
        ratio = {"unet": 0.5, "vae": 0, "text": 2}[part_of(key)]
        wanted = first[key].double() + ratio * (second[key].double() - third[key].double())
        assert (value.double() - wanted).abs().max() <= 2**-11 * wanted.abs().max() + 1e-6, key


def test_inpainting_with_an_ordinary_model_keeps_the_extra_channels(models, tmp_path):
    inpaint = models[3]
    found = load_file(merge([inpaint, models[1]], tmp_path / "m.safetensors", 0.5))[CONV_IN]
    own, other = load_file(inpaint)[CONV_IN], load_file(models[1])[CONV_IN]
    assert torch.equal(found[:, 4:], own[:, 4:])
    assert torch.allclose(found[:, :4].float(), (own[:, :4].float() + other.float()) / 2, atol=1e-3)
    with pytest.raises(minisd.UsageError, match="found inpainting models and others"):
        merge([inpaint, models[1]], tmp_path / "n.safetensors", base=inpaint)
    merge([inpaint, models[1]], tmp_path / "n.safetensors", base=models[2], method="dare")
    with pytest.raises(minisd.CheckpointError, match="name the inpainting model first"):
        merge([models[1], inpaint], tmp_path / "n.safetensors")


def test_command_line_and_recipe(models, tmp_path, capsys):
    out = tmp_path / "mix.safetensors"
    assert main(["merge", str(models[0]), str(models[1]), "--ratio", "0.25", "--vae-ratio", "0", "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    with safe_open(out, framework="pt") as file:
        metadata = file.metadata()
    recipe = json.loads(metadata["minisd.merge"])
    assert (recipe["ratios"], recipe["by_part"]) == ([0.25], {"vae": 0.0})
    assert metadata["modelspec.merged_from"] == "a.safetensors, b.safetensors"
    assert metadata["modelspec.title"] == "mix"


def test_writing_over_a_source_is_safe(models, tmp_path):
    target = tmp_path / "a.safetensors"
    target.write_bytes(models[0].read_bytes())
    wanted = load_file(merge(models[:2], tmp_path / "m.safetensors"))
    found = load_file(merge([target, models[1]], target))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_what_cannot_be_mixed_is_told_and_nothing_written(models, tmp_path):
    other = SMALL["sd2"].write(tmp_path / "sd2.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"is Stable Diffusion 2\.x, expected Stable Diffusion 1\.x"):
        merge([models[0], other], tmp_path / "m.safetensors")
    weights = load_file(models[1])
    weights["model.diffusion_model.out.2.bias"][0] = float("inf")
    save_file(weights, tmp_path / "inf.safetensors")
    with pytest.raises(minisd.CheckpointError, match=r"inf\.safetensors: 'model\.diffusion_model\.out\.2\.bias': holds NaN"):
        merge([models[0], tmp_path / "inf.safetensors"], tmp_path / "m.safetensors")
    with pytest.raises(minisd.UsageError, match="ratio: expected a number from -10 to 10, found nan"):
        merge(models[:2], tmp_path / "m.safetensors", float("nan"))
    assert not (tmp_path / "m.safetensors").exists()


def close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """As near as float16 can say it, after arithmetic in float32."""
    return bool((found.double() - wanted).abs().max() <= 2**-11 * wanted.abs().max() + 1e-6)


def test_three_models_and_equal_shares(models, tmp_path):
    tensors = [load_file(path) for path in models[:3]]
    for ratios, shares in (((), (1 / 3, 1 / 3, 1 / 3)), ((0.5, -0.25), (0.75, 0.5, -0.25)), ((0, 1), (0, 0, 1))):
        found = load_file(merge(models[:3], tmp_path / "m.safetensors", ratios))
        for key, value in found.items():
            assert close(value, sum(share * each[key].double() for share, each in zip(shares, tensors, strict=True))), key


def test_with_a_base_what_two_models_learned_is_added_up(models, tmp_path):
    a, b, c, _ = models
    found = load_file(merge([a, b, c], tmp_path / "m.safetensors", (0.5, 0.25), base=a))
    first, second, third = load_file(a), load_file(b), load_file(c)
    for key, value in found.items():
        one, two, three = (each[key].double() for each in (first, second, third))
        assert close(value, one + 0.5 * (two - one) + 0.25 * (three - one)), key


def test_pieces_do_not_matter(models, tmp_path, monkeypatch):
    wanted = load_file(merge(models[:2], tmp_path / "m.safetensors", 0.3))
    monkeypatch.setattr("minisd.files.tensors.NUMBERS", 1000)
    found = load_file(merge(models[:2], tmp_path / "m.safetensors", 0.3))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_ratios_by_block(models, tmp_path):
    spec = "input.0-1=0, middle=1, output=0.25, time_embed=0.75, output.1=0.5"
    path = merge(models[:2], tmp_path / "m.safetensors", 0.125, blocks=spec, by_part={"vae": 1})
    found, first, second = load_file(path), load_file(models[0]), load_file(models[1])
    ratios = {"input.0": 0, "input.1": 0, "middle": 1, "time_embed": 0.75, "output.1": 0.5}
    for key, value in found.items():
        group = group_of(key)
        ratio = 1 if part_of(key) == "vae" else ratios.get(group, 0.25 if group.startswith("output") else 0.125)
        assert close(value, (1 - ratio) * first[key].double() + ratio * second[key].double()), key
        if ratio in (0, 1):
            assert torch.equal(value, (first, second)[ratio][key]), key


def test_the_numbers_of_comfyuis_node_keep_the_first_model(models, tmp_path):
    """Model 1 keeps r, model 2 brings 1 - r; `out` is for output_blocks and out, `input` for all that has no number."""
    path = merge(models[:2], tmp_path / "m.safetensors", blocks="comfy:0.8,0.5,0.2", by_part={"text": 0, "vae": 0})
    found, first, second = load_file(path), load_file(models[0]), load_file(models[1])
    kept = {"input_blocks": 0.8, "time_embed": 0.8, "middle_block": 0.5, "output_blocks": 0.2, "out": 0.2}
    seen = set()
    for key, value in found.items():
        if part_of(key) == "unet":
            place = key.removeprefix("model.diffusion_model.").split(".")[0]
            seen.add(place)
            assert close(value, kept[place] * first[key].double() + (1 - kept[place]) * second[key].double()), key
        else:
            assert torch.equal(value, first[key]), key
    assert seen == set(kept)


def test_the_numbers_of_comfyuis_node_for_sdxl_and_wrong_ones(models, tmp_path, capsys):
    ratios = block_ratios("Comfy: 1, 0.25, 0", manifest("sdxl-base"))
    wanted = {"input.0": 0, "input.8": 0, "middle": 0.75, "output.0": 1, "output.8": 1, "out": 1, "time_embed": 0, "label_emb": 0}
    assert {block: ratios[block] for block in wanted} == wanted
    assert len(ratios) == 9 + 1 + 9 + 3
    for wrong in ("comfy:", "comfy:1", "comfy:1,2", "comfy:1,2,3,4", "comfy:a,b,c", "comfy:1,nan,0"):
        with pytest.raises(minisd.UsageError, match=r"^blocks: expected"):
            block_ratios(wrong, manifest("sd15"))
    a, b, c = (str(path) for path in models[:3])
    assert main(["merge", a, b, "--base", c, "--blocks", "comfy:1,1,1", "-o", str(tmp_path / "x.safetensors")]) == 2
    assert "--blocks: comfy: says how much of the first of two models is kept" in capsys.readouterr().err


@pytest.mark.parametrize(("name", "inputs", "outputs"), [("sd15", 12, 12), ("sdxl-base", 9, 9)])
def test_blocks_and_presets_of_the_published_models(name, inputs, outputs):
    keys = manifest(name)
    assert blocks_of(keys) == [*(f"input.{i}" for i in range(inputs)), "middle", *(f"output.{i}" for i in range(outputs))]
    count = inputs + 1 + outputs
    grad_v = list(block_ratios("grad_v", keys).values())
    assert grad_v[: inputs + 1] == pytest.approx([1 - i / inputs for i in range(inputs + 1)])  # 1, 0.9167, 0.8333, … for SD 1.x
    assert grad_v == pytest.approx(grad_v[::-1])
    assert list(block_ratios("grad_a", keys).values()) == pytest.approx([1 - value for value in grad_v])
    if count == 25:  # the second number in SuperMerger's file
        assert list(block_ratios("smoothstep", keys).values())[1] == pytest.approx(0.00506365740740741)
        assert list(block_ratios("cosine", keys).values())[1] == pytest.approx(0.995722430686905)
    numbers = ",".join(str(i / 100) for i in range(count))
    assert list(block_ratios(numbers, keys).values()) == [i / 100 for i in range(count)]
    assert block_ratios("input.3=0.5", keys) == {"input.3": 0.5}
    for spec in (
        "grad_x",
        "0,1",
        "input.12=1",
        "input.3-12=0",
        "middle.1=0",
        "input.1=x",
        "input.1=nan",
        "a=b",
        "=",
        "input.=1",
        "out.1=1",
    ):
        with pytest.raises(minisd.UsageError, match=r"^blocks: expected"):
            block_ratios(spec, keys)


def test_slerp_against_float64(models, tmp_path):
    found = load_file(merge(models[:2], tmp_path / "m.safetensors", 0.3, method="slerp"))
    first, second = load_file(models[0]), load_file(models[1])
    for key in ("model.diffusion_model.out.2.weight", "model.diffusion_model.input_blocks.1.0.in_layers.2.weight"):
        a, b = first[key].double(), second[key].double()
        angle = torch.arccos((a * b).sum() / a.norm() / b.norm())
        wanted = (torch.sin(0.7 * angle) * a + torch.sin(0.3 * angle) * b) / torch.sin(angle)
        assert close(found[key], wanted)
        assert float(found[key].double().norm()) == pytest.approx(float(a.norm()), rel=0.1)  # a mean of random weights is shorter


def test_slerp_goes_straight_where_there_is_no_circle():
    a = torch.tensor([1.0, 2.0, 3.0])
    assert torch.allclose(slerp(a, 2 * a, 0.25), 1.25 * a)
    assert torch.allclose(slerp(a, torch.zeros(3), 0.25), 0.75 * a)
    assert torch.allclose(slerp(a, -a, 0.25), 0.5 * a)


def test_ties_by_hand():
    """Each keeps its 2 largest changes of 4; where they disagree the larger sum has the say."""
    base = torch.tensor([1.0, 1.0, 1.0, 1.0])
    one, two = base + torch.tensor([4.0, -3.0, 1.0, 0.0]), base + torch.tensor([2.0, 5.0, 0.0, 1.0])
    assert ties([one, two], base, 1.0, 0.5).tolist() == [1 + 3.0, 1 + 5.0, 1.0, 1.0]
    assert ties([one, two], base, 0.5, 0.5).tolist() == [1 + 1.5, 1 + 2.5, 1.0, 1.0]
    assert ties([one, two], base, 1.0, 0.25).tolist() == [1 + 4.0, 1 + 5.0, 1.0, 1.0]
    assert ties([one], base, 1.0, 1.0).tolist() == one.tolist()


def test_dare_keeps_a_part_of_the_changes_and_their_sum_on_average():
    a, b, base = torch.zeros(100_000), torch.full((100_000,), 3.0), torch.full((100_000,), 1.0)
    found = dare(a, [b], [0.5], base, 0.1, generator_for(0, "w"))
    assert set(found.tolist()) == {0.0, 10.0}
    assert float(found.mean()) == pytest.approx(1.0, rel=0.05)
    assert torch.equal(found, dare(a, [b], [0.5], base, 0.1, generator_for(0, "w")))
    assert not torch.equal(found, dare(a, [b], [0.5], base, 0.1, generator_for(0, "v")))
    assert not torch.equal(found, dare(a, [b], [0.5], base, 0.1, generator_for(1, "w")))


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_ties_and_dare_of_files(models, tmp_path, method):
    a, b, c, _ = models
    found = load_file(merge([a, b], tmp_path / "m.safetensors", base=c, method=method, density=1))
    first, second, third = load_file(a), load_file(b), load_file(c)
    key = "model.diffusion_model.out.2.weight"
    one, two, base = (each[key].double() for each in (first, second, third))
    if method == "dare":  # all changes: the weighted sum
        assert close(found[key], one + two - base)
    else:
        changes = torch.stack([one - base, two - base])
        agrees = changes.sign() == changes.sum(0).sign()
        assert close(found[key], base + (changes * agrees).sum(0) / agrees.sum(0).clamp(min=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "mean"}, "method: expected one of weighted, slerp, ties, dare, found 'mean'"),
        ({"method": "slerp", "base": 2}, "exactly two models and no base for slerp"),
        ({"method": "ties"}, "base: ties mixes what models learned"),
        ({"ratios": (0.1, 0.2)}, "ratio: expected 1, one for each model but the first, found 2"),
        ({"by_part": {"clip": 1}}, "part: expected one of unet, text, vae, found 'clip'"),
        ({"density": 0.5}, "density: expected above 0 to 1, for ties or dare"),
        ({"method": "dare", "base": 2, "density": 0}, "density: expected above 0"),
        ({"ratios": 11}, "ratio: expected a number from -10 to 10, found 11"),
        ({"blocks": {"middle": float("inf")}}, "ratio: expected a number"),
    ],
)
def test_wrong_options_are_told(models, tmp_path, options, message):
    options = {name: models[value] if name == "base" else value for name, value in options.items()}
    with pytest.raises(minisd.UsageError, match=message):
        merge(models[:2], tmp_path / "m.safetensors", **options)
    with pytest.raises(minisd.UsageError, match="two models or more"):
        merge(models[:1], tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_overflow_is_not_blamed_on_a_source(models, tmp_path):
    weights = load_file(models[1])
    weights["model.diffusion_model.out.2.bias"][0] = 60000.0
    save_file(weights, tmp_path / "large.safetensors")
    with pytest.raises(minisd.UsageError, match=r"merge: model\.diffusion_model\.out\.2\.bias becomes too large for F16"):
        merge([models[0], tmp_path / "large.safetensors"], tmp_path / "m.safetensors", 5)
    merge([models[0], tmp_path / "large.safetensors"], tmp_path / "m.safetensors", 5, dtype=torch.bfloat16)


def test_a_linear_and_a_convolutional_vae_attention_mix(models, tmp_path):
    """Both kinds of file are published; they hold the same numbers."""
    weights = load_file(models[1])
    key = "first_stage_model.decoder.mid.attn_1.q.weight"
    assert weights[key].dim() == 4
    weights[key] = weights[key].flatten(1)
    save_file(weights, tmp_path / "b.safetensors")
    found = load_file(merge([models[0], tmp_path / "b.safetensors"], tmp_path / "m.safetensors", 0.5))
    wanted = load_file(merge(models[:2], tmp_path / "n.safetensors", 0.5))
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)


def test_a_merge_is_repeated_from_its_result(models, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    a, b, c = (shutil.copy(path, tmp_path) for path in models[:3])
    options = {"method": "dare", "blocks": "grad_v", "density": 0.3, "seed": 7, "dtype": torch.float32}
    first = merge([a, b], tmp_path / "m.safetensors", base=c, **options)
    assert main(["merge", "--from", str(first), "-o", str(tmp_path / "n.safetensors")]) == 0
    found, wanted = load_file(tmp_path / "n.safetensors"), load_file(first)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    with pytest.raises(
        minisd.CheckpointError, match=r"was made from a\.safetensors, which was looked for by name and content; found none"
    ):
        repeat(first, tmp_path / "o.safetensors", [models[0].parent / "none"])
    shutil.copy(models[1], a)
    with pytest.raises(minisd.CheckpointError, match=r"found another file of that name: .*a\.safetensors"):
        repeat(first, tmp_path / "o.safetensors")
    assert main(["merge", str(b), str(c), "--from", str(first), "-o", str(tmp_path / "o.safetensors")]) == 2
    assert "found both" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [
        "nonsense", "[]", "{}", "[" * 100_000, "null",
        '{"sources": [{"name": "../a.safetensors"}]}',
        '{"method": "weighted", "by_part": {}, "density": null, "seed": 0, "ratios": [0.5], "by_block": {}, "dtype": null,'
        ' "sources": [{"name": "../secret", "bytes": 1, "legacy_hash": "0", "sha256": null}], "with_base": false}',
        '{"method": 5, "by_part": 7, "density": "x", "seed": [], "ratios": ["a"], "by_block": {}, "dtype": null,'
        ' "sources": [], "with_base": false}',
    ],
)  # fmt: skip
def test_recipes_that_lie_are_told(models, tmp_path, recipe):
    path = tmp_path / "m.safetensors"
    save_file(load_file(models[0]), path, {"minisd.merge": recipe})
    with pytest.raises((minisd.CheckpointError, minisd.UsageError)):
        repeat(path, tmp_path / "n.safetensors")
    save_file(load_file(models[0]), path)
    with pytest.raises(minisd.CheckpointError, match=r"carries no minisd\.merge, the recipe of a merge"):
        repeat(path, tmp_path / "n.safetensors")


def test_a1111_reads_its_recipe(models, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    file_sha256(models[0])  # known beforehand; the others are found out
    path = merge([models[0], models[1]], tmp_path / "m.safetensors", 0.3, base=models[2], dtype=torch.float16)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    digests = [hashlib.sha256(model.read_bytes()).hexdigest() for model in models[:3]]
    recipe = json.loads(metadata["sd_merge_recipe"])
    assert (recipe["interp_method"], recipe["multiplier"], recipe["save_as_half"]) == ("Add difference", 0.3, True)
    assert [recipe[f"{which}_model_hash"] for which in ("primary", "secondary", "tertiary")] == digests
    known = {
        digest: {"name": model.name, "legacy_hash": legacy_hash(model), "sd_merge_recipe": None}
        for digest, model in zip(digests, models, strict=False)
    }
    assert json.loads(metadata["sd_merge_models"]) == known
    assert [source["sha256"] for source in json.loads(metadata["minisd.merge"])["sources"]] == digests
    assert [known_sha256(model) for model in models[:3]] == digests  # and remembered


def test_a_hash_that_nobody_waits_for_is_not_found_out(models, tmp_path, monkeypatch):
    """What goes wrong while merging is told at once, not after gigabytes of reading."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    stopped = []

    def fail(*_, later):
        raise OutputError("output: full")

    monkeypatch.setattr("minisd.workbench.merging.write_checkpoint", fail)
    monkeypatch.setattr("minisd.workbench.sources.hashed", lambda path, stop: stopped.append(stop.wait(60)) or "0" * 64)
    with pytest.raises(OutputError):
        merge(models[:2], tmp_path / "m.safetensors")
    assert all(stopped)


def test_a_recipe_of_another_merge_is_not_handed_on(models, tmp_path):
    first = merge(models[:2], tmp_path / "a.safetensors", 0.5)
    second = merge([first, models[2]], tmp_path / "b.safetensors", 0.5, method="slerp")
    with safe_open(second, framework="pt") as file:
        metadata = file.metadata()
    assert "sd_merge_recipe" not in metadata
    assert json.loads(metadata["minisd.merge"])["method"] == "slerp"


def test_a_merge_in_float8_keeps_the_vae_and_vectors_finer(models, tmp_path):
    found = load_file(merge(models[:2], tmp_path / "m.safetensors", 0.5, dtype=torch.float8_e4m3fn))
    again = load_file(merge([tmp_path / "m.safetensors"] * 2, tmp_path / "n.safetensors", 0.5))
    for key, value in found.items():
        matrix = value.dim() > 1 and part_of(key) != "vae"
        assert value.dtype == (torch.float8_e4m3fn if matrix else torch.float16), key
        assert torch.equal(again[key].float(), value.float()), key
    assert diff(tmp_path / "m.safetensors", tmp_path / "n.safetensors")["parts"]["unet"]["change"] == 0
