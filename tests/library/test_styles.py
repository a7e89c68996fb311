"""Styles: the 78 in the box, own ones, and what they make of prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest

from minisd.cli import main
from minisd.errors import UsageError
from minisd.library.styles import named, styled, styles

PROMPT = "a red circle on a blue background"


@pytest.fixture(autouse=True)
def alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("MINISD_STYLES", "MINISD_MODELS"):
        monkeypatch.delenv(name, raising=False)


def test_the_box_has_the_names_of_octoai_and_words_of_its_own():
    known = styles()
    assert len(known) == 78
    assert {"base", "3d-model", "Craft Clay", "Pokémon", "Tilt-Shift", "neon-punk"} <= set(known)
    assert (known["base"].prompt, known["base"].negative_prompt) == ("{prompt}", "")
    words = [style.prompt for name, style in known.items() if name != "base"]
    assert all(text.count("{prompt}") == 1 for text in words)
    assert len({text.replace("{prompt}", "") for text in words}) == 77
    octoai = pytest.importorskip("octoai.image_gen.types.sdxl_styles")
    literal = next(each for each in octoai.SdxlStyles.__args__ if hasattr(each, "__args__"))
    assert list(known) == list(literal.__args__)


def test_prompts_go_into_the_words_or_before_them():
    assert styled(named("base"), "a cat", "dog") == ("a cat", "dog")
    prompt, negative = styled(named("origami"), "a cat", "dog")
    assert prompt.startswith("a cat folded from paper")
    assert negative.startswith("dog, ")


def test_own_ones_come_first_and_in_a1111s_form(tmp_path, monkeypatch):
    (tmp_path / "styles.csv").write_text(
        '\ufeffname,prompt,negative_prompt\nours,"flat, bold",grain\nanime,"mine {prompt}",\n----,,\n,x,\n'
    )
    (tmp_path / "more.csv").write_text("name,text,prompt\nmore,unused,{prompt} more\n")
    monkeypatch.setenv("MINISD_STYLES", str(tmp_path / "more.csv"))
    known = styles()
    assert next(iter(known)) == "more"
    assert len(known) == 80
    assert styled(known["ours"], "a cat") == ("a cat, flat, bold", "grain")
    assert styled(known["ours"], "", "dog") == ("flat, bold", "dog, grain")
    assert styled(known["anime"], "a cat") == ("mine a cat", "")
    web_ui = tmp_path / "stable-diffusion-webui"
    (web_ui / "models" / "Stable-diffusion").mkdir(parents=True)
    (web_ui / "styles.csv").write_text("name,prompt,negative_prompt\ntheirs,x,y\n")
    assert "theirs" in styles()


@pytest.mark.parametrize("content", [b"", b"prompt\nx\n", b"name,prompt\n\xff,x\n", b"name,prompt\n" + b'"' + b"x" * 200_000])
def test_a_table_that_is_none_is_told(tmp_path, content):
    (tmp_path / "styles.csv").write_bytes(content)
    with pytest.raises(UsageError, match=r"styles\.csv"):
        styles()


def test_the_command_line(tmp_path, capsys):
    assert main(["styles"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 78
    assert main(["styles", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["styles"]
    assert listed[0]["name"] == "base"
    options = ["--seed", "1", "--steps", "2", "--device", "cpu"]
    assert main([PROMPT, "--style", "Origami", *options, "-o", "a.png"]) == 0
    prompt, negative = styled(named("origami"), PROMPT)
    assert main([prompt, "-n", negative, *options, "-o", "b.png"]) == 0
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert main([PROMPT, "--style", "orgami", *options]) == 2
    assert "did you mean origami?" in capsys.readouterr().err


def test_python(tiny):
    prompt, negative = styled(named("anime"), PROMPT)
    one, two = tiny(PROMPT, style="anime", steps=2, seed=1), tiny(prompt, negative_prompt=negative, steps=2, seed=1)
    assert np.array_equal(np.asarray(one.images[0]), np.asarray(two.images[0]))
    both = tiny([PROMPT, "a star"], style="anime", steps=1, seed=1)
    assert [each["prompt"].split(",")[0] for each in both.metadata] == [PROMPT, "a star"]
    with pytest.raises(UsageError, match="style: expected a text"):
        tiny(tiny.encode_prompt(PROMPT), style="anime", steps=1)
