"""What other programs can read of our pictures, and we of theirs."""

from __future__ import annotations

import re
import shlex
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from minisd.cli import draw
from minisd.cli.main import main
from minisd.errors import UsageError
from minisd.pictures.foreign import nearest, options_of, parsed
from minisd.pictures.metadata import read_recipe, unreadable

FAST = ["--steps", "2", "--size", "32x32", "--dtype", "float32", "--device", "cpu", "--seed", "1"]
TEXT = (
    'a castle, \u65e5\u672c\nin winter\nNegative prompt: people, "cars"\n'
    "Steps: 30, Sampler: DDIM, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, "
    'Model: v1-5-pruned-emaonly, Clip skip: 2, Eta DDIM: 0.5, Lora hashes: "a: 12, b: 34", Version: v1.10.1'
)
COMMAND = (
    "minisd draw --steps 30 --sampler ddim --spacing karras --cfg 7.5 --seed 42 --size 512x768 -m v1-5-pruned-emaonly "
    "--clip-skip 2 --eta 0.5 -n 'people, \"cars\"' 'a castle, \u65e5\u672c in winter'"
)


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write(path: str, text: str, order: str = "be") -> None:
    """A picture as A1111 writes it, or with the low byte first."""
    picture = Image.new("RGB", (8, 8))
    if path.endswith(".png"):
        info = PngImagePlugin.PngInfo()
        info.add_itxt("parameters", text)
        picture.save(path, pnginfo=info)
        return
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode(f"utf-16-{order}")
    picture.save(path, exif=exif)


@pytest.mark.parametrize(("path", "order"), [("x.png", ""), ("x.jpg", "be"), ("x.jpg", "le"), ("x.webp", "be")])
def test_a_picture_of_a1111_gives_the_nearest_command(path, order, capsys):
    write(path, TEXT, order)
    assert main(["again", path]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err == (
        f"minisd: error: {path}: carries no minisd chunk but the parameters text of AUTOMATIC1111's web UI, from which it cannot "
        f"be made again exactly; nearest, without Lora hashes: {COMMAND}\n"
    )
    args = draw.parse(shlex.split(COMMAND)[2:])
    assert (args.prompt, args.negative_prompt, args.size) == ("a castle, \u65e5\u672c in winter", 'people, "cars"', (512, 768))
    assert (args.steps, args.sampler, args.spacing, args.seed, args.eta) == (30, "ddim", "karras", 42, 0.5)


@pytest.mark.parametrize(
    ("fields", "words", "rest"),
    [
        ({"Sampler": "DPM++ 2M Karras"}, "--sampler dpmpp_2m --spacing karras", []),
        ({"Sampler": "Euler a", "Eta": "0.7"}, "--sampler euler_ancestral --eta 0.7", []),
        ({"Sampler": "Nosuch"}, "", ["Sampler: Nosuch"]),
        ({"Sampler": "Euler", "Schedule type": "Automatic"}, "--sampler euler", []),
        ({"Schedule type": "SGM Uniform", "Seed": "-5"}, "--spacing sgm_uniform", ["Seed"]),
        ({"Schedule type": "Nosuch"}, "", ["Schedule type: Nosuch"]),
        ({"Size": "512x99999", "CFG scale": "nan", "Steps": "x"}, "", ["Size", "CFG scale", "Steps"]),
        ({"Denoising strength": "0.6", "Mask blur": "4"}, "--init PICTURE --strength 0.6", ["Mask blur"]),
        ({"Denoising strength": "0.6", "Hires upscale": "2"}, "", ["Hires upscale"]),
        ({"VAE": "a.safetensors", "VAE hash": "0"}, "--vae a.safetensors", []),
        ({"VAE": "Automatic", "RNG": "CPU"}, "", []),
    ],
)
def test_what_fields_become(fields, words, rest):
    assert options_of(fields) == (words.split(), rest)


@pytest.mark.parametrize(
    ("version", "whose"),
    [("v1.6.0", "AUTOMATIC1111's web UI"), ("f2.0.1v1.10.1-previous-1", "Forge"), ("minisd 0.1.0", "minisd"), ("x", "another")],
)
def test_whose_text_it_is(version, whose):
    text = f"a\nSteps: 1, Sampler: Euler, Seed: 1, Version: {version}"
    assert nearest(text).startswith(f"carries no minisd chunk but the parameters text of {whose}")


def test_prompts_are_read_from_any_text():
    assert parsed("only words") == ("only words", "", {})
    assert parsed("Negative prompt: b\nSteps: 1, Seed: 2, CFG scale: 3")[:2] == ("", "b")
    assert nearest("-x\nNegative prompt: -y\nSteps: 1, Seed: 2, CFG scale: 3").endswith(" --negative=-y -- -x")
    hard = "a:" * 50_000 + '"' * 5000
    assert parsed(hard)[0] == hard


@pytest.mark.parametrize(
    ("save", "message"),
    [
        (lambda image: image.save("x.jpg"), "x.jpg: is a JPEG, which carries nothing of how it was made"),
        (lambda image: image.save("x.webp"), "x.webp: is a WEBP, which carries nothing"),
        (lambda image: image.save("x.png", pnginfo=chunks(workflow="{}")), "x.png: .* but what ComfyUI writes: open it there"),
        (lambda image: image.save("x.png", pnginfo=chunks(Software="NovelAI")), "x.png: .* but what NovelAI writes"),
        (lambda image: image.save("x.webp", exif=described("workflow:{}")), "x.webp: .* but what ComfyUI writes"),
        (lambda image: image.save("x.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff"), "x.jpg: is a JPEG, which carries nothing"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_what_else_a_picture_is(save, message):
    save(Image.new("RGB", (8, 8)))
    (path,) = Path().iterdir()
    with pytest.raises(UsageError, match=f"^{message}"):
        read_recipe(path)


def chunks(**texts: str) -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    for key, text in texts.items():
        info.add_text(key, text)
    return info


def described(text: str) -> Image.Exif:
    exif = Image.Exif()
    exif[0x010F] = text
    return exif


def test_a_large_file_of_another_kind_is_not_brought_in():
    with open("x.webp", "wb") as file:
        file.write(b"RIFF" + struct.pack("<I", 2**31 - 20) + b"WEBPVP8 ")
        file.truncate(2 << 30)
    with pytest.raises(UsageError, match=r"^x.webp: is not a PNG that can be read: it has 2,147,483,648 bytes; at most"):
        read_recipe("x.webp")


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("a star", None),
        ("", None),
        ("a\n\nb, Steps: 3", None),
        (" a star", "spaces or empty lines around it or its lines"),
        ("a \nb", "spaces or empty lines around it or its lines"),
        ("a\n", "spaces or empty lines around it or its lines"),
        ("a\r\nb", "a line end other than a line feed"),
        ("a\u2028b", "a line end other than a line feed"),
        ("a\nNegative prompt: b", "a line that begins with 'Negative prompt:'"),
        ("Steps: of stone", "a line that begins with 'Steps:'"),
    ],
)
def test_what_others_cannot_read_back(text, why):
    assert unreadable(text) == why


def test_a_prompt_that_others_cannot_read_back_is_told_once_and_made_again(capsys):
    prompt, negative = " a red star \r\nNegative prompt: x\nSteps: 3 ", "Steps: 9, Sampler: none, Seed: 7"
    assert main([prompt, "-n", negative, "--num-images", "2", "-o", "x.png", *FAST]) == 0
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2
    assert told[0].startswith("minisd: warning: prompt: has a line end other than a line feed, which other programs cannot")
    assert told[1].startswith("minisd: warning: --negative: has a line that begins with 'Steps:', which other programs cannot")
    recipe = read_recipe("x-2.png")
    assert (recipe["prompt"], recipe["negative_prompt"]) == (prompt, negative)
    assert main(["again", "x-2.png", "-o", "y.png"]) == 0
    assert read_recipe("y.png")["prompt"] == prompt
    with Image.open("x-2.png") as first, Image.open("y.png") as second:
        assert np.array_equal(np.asarray(first), np.asarray(second))
        assert re.match(r" a red star \r?\n", first.info["parameters"])
