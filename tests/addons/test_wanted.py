"""LoRAs of a request: listed, named in the prompt, kept in the recipe, and taken off again."""

from __future__ import annotations

import json

import pytest
import torch
from loras import whole
from PIL import Image
from safetensors.torch import load_file, save_file

import minisd
from minisd.addons.wanted import Lora, as_lora, without_tags
from minisd.cli import main
from minisd.errors import CheckpointError, UsageError
from minisd.options import OPTIONS
from minisd.request import Request
from minisd.result import finish
from minisd.workbench.teaching import teach

FEW = {"steps": 2, "seed": 1, "width": 64, "height": 64}


@pytest.fixture
def lora(tmp_path, monkeypatch):
    folder = tmp_path / "models"
    folder.mkdir()
    save_file(whole(scale=0.2), folder / "clay style.safetensors")
    monkeypatch.setenv("MINISD_MODELS", str(folder))
    monkeypatch.chdir(tmp_path)
    return folder / "clay style.safetensors"


@pytest.fixture(scope="module")
def loaded(reduced_file):
    return minisd.load(reduced_file, device="cpu", dtype="float32")


@pytest.fixture
def pipe(loaded):
    yield loaded
    loaded.set_loras([])


@pytest.mark.parametrize(
    ("text", "words", "loras"),
    [
        ("a star <lora:clay:0.8>", "a star", [Lora("clay", 0.8, 0.8)]),
        ("a <lora:clay> star", "a star", [Lora("clay", 1.0, 1.0)]),
        ("<lora:sub/clay v1.2:0.5:1>, a star<lyco:b:-1>", ", a star", [Lora("sub/clay v1.2", 1.0, 0.5), Lora("b", -1.0, -1.0)]),
        ("a star <lora:clay:unet=0.3:te=0.6>", "a star", [Lora("clay", 0.3, 0.6)]),
        ("a star <lora:clay:unet=0.3>", "a star", [Lora("clay", 0.3, 1.0)]),
        ("a < b > c", "a < b > c", []),
    ],
)
def test_words_of_a_prompt(text, words, loras):
    """As A1111 reads them: <lora:name:text encoder:UNet>, and one number for both."""
    request, found = without_tags(Request(text))
    assert (request.prompt, found) == (words, loras)


def test_words_that_mean_nothing():
    for text in ("<lora:clay:much>", "<lora:clay:1:1:1>", "<lora:clay:1e9>"):
        with pytest.raises(UsageError, match=r"prompt: expected <lora:NAME|loras: strength: expected"):
            without_tags(Request(text))
    with pytest.raises(UsageError, match="the same <lora:…> in all prompts"):
        without_tags(Request(["a star <lora:a:1>", "a heart <lora:a:0.5>"]))
    plain = Request("a star <lora:clay:0.8>", plain_prompt=True)
    assert without_tags(plain) == (plain, [])


def test_names_on_the_command_line():
    parse = OPTIONS["loras"].kind.parse
    assert parse("clay") == ("clay",)
    assert parse("clay:0.8") == ("clay", 0.8)
    assert parse("a b/clay.safetensors:-0.8:1") == ("a b/clay.safetensors", -0.8, 1.0)
    assert parse("C:clay:0.5") == ("C:clay", 0.5)
    assert as_lora(parse("clay:1:0")) == Lora("clay", 1.0, 0.0)


def test_one_request_has_them_and_the_next_has_not(pipe, lora):
    plain = pipe("a star", **FEW)
    before = {key: value.clone() for key, value in pipe.model.state_dict().items()}
    with_it = pipe("a star", loras=[(lora, 0.8)], **FEW)
    named = pipe("a star <lora:clay style:0.8>", **FEW)
    assert not torch.equal(with_it.latents, plain.latents)
    assert torch.equal(named.latents, with_it.latents)
    assert torch.equal(pipe("a star", **FEW).latents, plain.latents)
    assert all(torch.equal(value, before[key]) for key, value in pipe.model.state_dict().items())
    pipe.set_loras([(lora, 0.8)])
    assert torch.equal(pipe("a star", **FEW).latents, with_it.latents)
    assert torch.equal(pipe("a star", loras=[], **FEW).latents, plain.latents)
    twice = pipe("a star <lora:clay style:0.4>", loras=[(lora, 0.4)], **FEW)
    assert torch.allclose(twice.latents, with_it.latents, atol=1e-3)


def test_the_fast_way_sees_them(reduced_file, lora):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32", fast=True)
    slow = minisd.load(reduced_file, device="cpu", dtype="float32", fast=False)
    for loras in ([], [(lora, 0.8)], [(lora, 0.3)], []):
        found, expected = (each("a star", loras=loras, **FEW).latents for each in (pipe, slow))
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-3)


def test_a_recipe_names_them_and_is_no_model_that_was_changed(reduced_file, lora):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    recipe = pipe("a star", loras=[(lora, 0.8, 0.5)], lora_blocks="middle=0", **FEW).metadata[0]
    assert "changed" not in recipe
    (said,) = recipe["loras"]
    assert said["source"] == str(lora)
    assert (said["strength"], said["text_strength"], said["blocks"]) == (0.8, 0.5, "middle=0")
    assert len(said["sha256"]) == 64
    assert recipe["lora_rule"] == "paper"
    assert pipe("a star", loras=[lora], like="comfyui", **FEW).metadata[0]["lora_rule"] == "comfyui"
    assert "loras" not in pipe("a star", **FEW).metadata[0]
    with torch.no_grad():
        pipe.model.state_dict()["model.diffusion_model.out.2.weight"].mul_(1.1)
    assert pipe("a star", loras=[lora], **FEW).metadata[0]["changed"] == "weights were written to"


def test_pictures_in_the_making_keep_theirs(pipe, lora):
    first = pipe.stream("a star", loras=[lora], **FEW)
    next(first)
    with pytest.raises(UsageError, match="loras: a picture is being drawn with others"):
        next(pipe.stream("a star", **FEW))
    with pytest.raises(UsageError, match="being drawn"):
        pipe.set_loras([])
    second = pipe.stream("a star", loras=[lora], **FEW)
    assert torch.equal(finish(second).latents, finish(first).latents)
    pipe.set_loras([])


def test_blocks_are_for_all_of_them_wherever_they_are_named(pipe, lora):
    """Also for those of set_loras and of the prompt; without any they are an error, and not forgotten."""
    plain = pipe("a star", **FEW)
    listed = pipe("a star", loras=[lora], lora_blocks="middle=0", **FEW)
    assert not torch.equal(listed.latents, plain.latents)
    assert not torch.equal(listed.latents, pipe("a star", loras=[lora], **FEW).latents)
    assert torch.equal(pipe("a star <lora:clay style:1>", lora_blocks="middle=0", **FEW).latents, listed.latents)
    pipe.set_loras([lora])
    assert torch.equal(pipe("a star", lora_blocks="middle=0", **FEW).latents, listed.latents)
    with pytest.raises(UsageError, match="lora_blocks: expected LoRAs"):
        pipe("a star", loras=[], lora_blocks="middle=0", **FEW)


def test_wrong_ones_are_told_at_the_call(pipe, lora):
    with pytest.raises(CheckpointError, match="nowhere: does not exist, and no model has this name"):
        pipe.stream("a star <lora:nowhere:1>", **FEW)
    with pytest.raises(UsageError, match="loras: expected a list"):
        pipe.stream("a star", loras=str(lora), **FEW)
    with pytest.raises(UsageError, match="blocks: expected blocks of this UNet"):
        pipe.stream("a star", loras=[lora], lora_blocks="nowhere=1", **FEW)


def test_command_line_and_again(reduced_file, lora, capsys):
    draw = [
        "a star <lora:clay style:0.2>",
        "-m",
        str(reduced_file),
        "--steps",
        "2",
        "--size",
        "64x64",
        "--seed",
        "1",
        "-o",
        "a.png",
    ]
    assert main([*draw, "--lora", f"{lora}:0.4:0.5", "--lora", "clay style", "--lora-rule", "comfyui"]) == 0
    recipe = json.loads(Image.open("a.png").info["minisd"])
    assert [each["strength"] for each in recipe["loras"]] == [0.4, 1.0, 0.2]
    assert main(["again", "a.png", "-o", "b.png"]) == 0
    with open("a.png", "rb") as first, open("b.png", "rb") as second:
        assert first.read() == second.read()
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    pipe.set_loras([lora])
    lora.rename(lora.with_name("gone.safetensors"))
    assert pipe("a star", **FEW).metadata[0]["loras"][0]["sha256"] is None  # it stays on, and can no longer be named
    assert main(["again", "a.png", "-o", "b.png"]) == 3
    assert "clay style: does not exist, and no model has this name" in capsys.readouterr().err
    save_file(whole(seed=5), lora)
    assert main(["again", "a.png", "-o", "b.png"]) == 0
    assert "is not the LoRA that this picture was made with" in capsys.readouterr().err


def test_words_inside_a_lora_are_known_while_it_is_on(reduced_file, lora, capsys):
    """The bundles of OneTrainer and sd-scripts, without a file of their own."""
    save_file({**load_file(lora), "bundle_emb.clayish.emb_params": torch.randn(2, 64)}, lora)
    words = ["-m", str(reduced_file), "--steps", "1", "--size", "64x64", "--seed", "1"]
    for name, prompt in (
        ("a", "clayish star <lora:clay style:0>"),
        ("b", "clayish star"),
        ("c", "claeish star <lora:clay style:0>"),
    ):
        assert main([prompt, *words, "-o", f"{name}.png"]) == 0
    assert main(["again", "a.png", "-o", "again.png"]) == 0
    pictures = {name: Image.open(f"{name}.png").tobytes() for name in ("a", "b", "c", "again")}
    assert pictures["a"] == pictures["again"] != pictures["b"]
    recipes = {name: json.loads(Image.open(f"{name}.png").info["minisd"]) for name in "abc"}
    assert [each["name"] for each in recipes["a"]["embeddings"]] == ["clayish"]
    assert "embeddings" not in recipes["b"]
    assert "embeddings" not in recipes["c"]


def test_other_programs_read_them_in_the_parameters(pipe, lora, tmp_path):
    result = pipe("a star", loras=[(lora, 0.8, 0.5), (lora, 1)], **FEW)
    result.save(tmp_path / "a.png")
    text = Image.open(tmp_path / "a.png").info["parameters"]
    assert text.splitlines()[0] == "a star <lora:clay style:0.5:0.8> <lora:clay style:1>"
    assert 'Lora hashes: "clay style: ' in text


def test_words_inside_a_lora_are_forgotten_when_it_is_not_named(reduced_file, lora):
    """Rows of a batch and requests of a server come one after the other, to one pipeline."""
    save_file({**load_file(lora), "bundle_emb.clayish.emb_params": torch.randn(2, 64)}, lora)
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    before = pipe("clayish star", **FEW)
    teach([pipe], Request("clayish star <lora:clay style:0>"))
    assert list(pipe.embeddings) == ["clayish"]
    within = pipe("clayish star", **FEW)
    teach([pipe], Request("clayish star"))
    assert not pipe.embeddings
    after = pipe("clayish star", **FEW)
    assert torch.equal(before.latents, after.latents)
    assert not torch.equal(before.latents, within.latents)
