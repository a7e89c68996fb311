"""What other programs can read of our pictures, and we of theirs."""

from __future__ import annotations

import json
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
from minisd.pictures.foreign import found_in
from minisd.pictures.infotext import of_infotext, options_of, parsed
from minisd.pictures.metadata import read_recipe, unreadable

FAST = ["--steps", "2", "--size", "32x32", "--dtype", "float32", "--device", "cpu", "--seed", "1"]
TEXT = (
    'a castle, \u65e5\u672c\nin winter\nNegative prompt: people, "cars"\n'
    "Steps: 30, Sampler: DDIM, Schedule type: Karras, CFG scale: 7.5, Seed: 42, Size: 512x768, Model hash: 6ce0161689, "
    'Model: v1-5-pruned-emaonly, Clip skip: 2, Eta DDIM: 0.5, Lora hashes: "a: 12, b: 34", Hypernet: ink, Version: v1.10.1'
)
COMMAND = (
    "minisd draw -m v1-5-pruned-emaonly --like a1111 --steps 30 --sampler ddim --spacing karras --cfg 7.5 --seed 42 "
    "--size 512x768 --clip-skip 2 --eta 0.5 -n 'people, \"cars\"' 'a castle, \u65e5\u672c in winter'"
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
    assert main(["again", path, "--dry-run"]) == 0
    said = capsys.readouterr()
    assert said.out == f"{COMMAND}\n"
    lines = said.err.splitlines()
    assert lines[0] == f"minisd: {path}: by AUTOMATIC1111's web UI"
    assert "minisd:   Schedule type: Karras -> --spacing karras" in lines
    assert "minisd:   not understood: Hypernet: ink" in lines
    args = draw.parse(shlex.split(COMMAND)[2:])
    assert (args.prompt, args.negative_prompt, args.size) == ("a castle, \u65e5\u672c in winter", 'people, "cars"', (512, 768))
    assert (args.steps, args.sampler, args.spacing, args.seed, args.eta) == (30, "ddim", "karras", 42, 0.5)
    assert main(["again", path]) == 2
    expected = "minisd: error: model: the picture's, v1-5-pruned-emaonly (hash 6ce0161689), is not on this machine; -m FILE"
    assert capsys.readouterr().err.splitlines()[-1].startswith(expected)
    with pytest.raises(UsageError, match=r"nearest, without Hypernet: ink: minisd draw -m v1"):
        read_recipe(path)


@pytest.mark.parametrize(
    ("fields", "words", "rest"),
    [
        ({"Sampler": "DPM++ 2M Karras"}, "--sampler dpmpp_2m --spacing karras", []),
        ({"Sampler": "Euler a", "Eta": "0.7"}, "--sampler euler_ancestral --eta 0.7", []),
        ({"Sampler": "Nosuch"}, "", ["Sampler"]),
        ({"Sampler": "Euler", "Schedule type": "Automatic"}, "--sampler euler", []),
        ({"Schedule type": "SGM Uniform", "Seed": "-5"}, "--spacing sgm_uniform", ["Seed"]),
        ({"Schedule type": "Nosuch"}, "", ["Schedule type"]),
        ({"Size": "512x99999", "CFG scale": "nan", "Steps": "x"}, "", ["Size", "CFG scale", "Steps"]),
        ({"Denoising strength": "0.6", "Mask blur": "4"}, "--init PICTURE --strength 0.6", ["Mask blur"]),
        ({"Denoising strength": "0.6", "Hires upscale": "2"}, "", ["Hires upscale"]),
        ({"VAE": "a.safetensors", "VAE hash": "0"}, "--vae a.safetensors", []),
        ({"VAE": "Automatic", "RNG": "CPU"}, "--rng cpu", []),
    ],
)
def test_what_fields_become(fields, words, rest):
    said, lacking = options_of(fields)
    assert [word for _, each in said for word in each] == words.split()
    assert [each.partition(":")[0] for each in lacking] == rest


@pytest.mark.parametrize(
    ("version", "whose"),
    [("v1.6.0", "AUTOMATIC1111's web UI"), ("f2.0.1v1.10.1-previous-1", "Forge"), ("minisd 0.1.0", "minisd"), ("x", "another")],
)
def test_whose_text_it_is(version, whose):
    text = f"a\nSteps: 1, Sampler: Euler, Seed: 1, Version: {version}"
    assert of_infotext(text).program.startswith(whose)


def test_prompts_are_read_from_any_text():
    assert parsed("only words") == ("only words", "", {})
    assert parsed("Negative prompt: b\nSteps: 1, Seed: 2, CFG scale: 3")[:2] == ("", "b")
    found = of_infotext("-x\nNegative prompt: -y\nSteps: 1, Seed: 2, CFG scale: 3")
    assert found.command().endswith(" --negative=-y -- -x")
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
    prompt, negative = " a red star \r\nNegative prompt: x\nSteps: three ", "Steps: 9, Sampler: none, Seed: 7"
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


GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {
        "seed": 7, "steps": 3, "cfg": 2.5, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1.0,
        "model": ["11", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "sub\\tiny.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 64, "height": 32, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (red:1.2) star", "clip": ["12", 0]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": ["13", 0], "clip": ["12", 0]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "x"}},
    "11": {"class_type": "LoraLoader", "inputs": {
        "lora_name": "sub\\x.safetensors", "strength_model": 0.8, "strength_clip": 0.5, "model": ["14", 0], "clip": ["4", 1]}},
    "14": {"class_type": "LoraLoaderModelOnly", "inputs": {"lora_name": "y", "strength_model": 1, "model": ["15", 0]}},
    "15": {"class_type": "LoraLoader", "inputs": {"lora_name": "z", "model": ["4", 0], "clip": ["4", 1]}},
    "12": {"class_type": "CLIPSetLastLayer", "inputs": {"stop_at_clip_layer": -2, "clip": ["11", 1]}},
    "13": {"class_type": "PrimitiveString", "inputs": {"value": "blue"}},
}  # fmt: skip
INVOKE = {
    "generation_mode": "txt2img", "positive_prompt": "a star", "negative_prompt": "blue", "width": 64, "height": 64, "seed": 5,
    "cfg_scale": 7.5, "steps": 4, "scheduler": "dpmpp_2m_k", "model": {"name": "tiny", "hash": "x"}, "clip_skip": 1,
    "loras": [{"weight": 1}], "app_version": "5.0",
}  # fmt: skip
KOHYA = {"prompt": "a star", "seed": "3", "sampler": "euler_a", "steps": "4", "scale": "7.5", "negative-prompt": "blue"}
OTHERS = {
    "ComfyUI": (
        {"prompt": json.dumps(GRAPH), "workflow": "{}"},
        "minisd draw -m tiny.safetensors --like comfyui --seed 7 --steps 3 --cfg 2.5 --sampler dpmpp_2m --spacing karras "
        "--size 64x32 --clip-skip 2 --lora x.safetensors:0.8:0.5 --lora y:1:0 -n blue 'a (red:1.2) star'",
        ["node LoraLoader"],
    ),
    "InvokeAI": (
        {"invokeai_metadata": json.dumps(INVOKE)},
        "minisd draw -m tiny --like diffusers --steps 4 --cfg 7.5 --seed 5 --size 64x64 --clip-skip 2 --sampler dpmpp_2m "
        "--spacing karras -n blue 'a star'",
        ["loras"],
    ),
    "kohya's sd-scripts": (
        KOHYA, "minisd draw --like diffusers --steps 4 --cfg 7.5 --seed 3 --sampler euler_ancestral -n blue 'a star'", [],
    ),
    "stable-diffusion.cpp": (
        {"parameters": "a star\nSteps: 4, CFG scale: 7, Seed: 3, Size: 64x64, Model: tiny.safetensors, RNG: CPU, "
         "Sampler: euler_a karras, Version: stable-diffusion.cpp"},
        "minisd draw -m tiny.safetensors --like a1111 --steps 4 --cfg 7 --seed 3 --size 64x64 --rng cpu "
        "--sampler euler_ancestral --spacing karras 'a star'",
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("program", OTHERS)
def test_pictures_of_other_programs(program, capsys):
    texts, command, lacking = OTHERS[program]
    Image.new("RGB", (8, 8)).save("x.png", pnginfo=chunks(**texts))
    with Image.open("x.png") as image:
        found = found_in(image)
    assert (found.program, list(found.lacking)) == (program, lacking)
    assert found.command() == command
    assert main(["again", "x.png", "--dry-run"]) == 0
    assert capsys.readouterr().out == f"{command}\n"


def test_a_graph_in_exif():
    Image.new("RGB", (8, 8)).save("x.webp", exif=described("prompt:" + json.dumps(GRAPH)))
    with Image.open("x.webp") as image:
        assert found_in(image).prompt == "a (red:1.2) star"


def test_it_is_drawn_with_the_model_that_it_names(capsys):
    Image.new("RGB", (8, 8)).save("x.png", pnginfo=chunks(**OTHERS["InvokeAI"][0]))
    assert main(["again", "x.png", "--device", "cpu", "--dtype", "float32"]) == 0
    assert capsys.readouterr().out == "x-again.png\n"
    recipe = read_recipe("x-again.png")
    assert (recipe["sampler"], recipe["spacing"], recipe["seed"], recipe["like"]) == ("dpmpp_2m", "karras", 5, "diffusers")
    assert main(["again", "x-again.png", "--dry-run"]) == 2
    assert "--dry-run: expected a picture of another program" in capsys.readouterr().err


def test_what_it_was_drawn_over_must_be_given(capsys):
    write("x.png", TEXT.replace("Clip skip: 2", "Denoising strength: 0.5"))
    assert main(["again", "x.png", "-m", "tiny"]) == 2
    assert "the picture was drawn over another, which it does not carry; give it with --init" in capsys.readouterr().err
    assert main(["again", "x.png", "-m", "tiny", "--init", "y.png", "--dry-run"]) == 0
    assert "--init y.png" in (out := capsys.readouterr().out)
    assert "PICTURE" not in out


@pytest.mark.parametrize(
    "graph",
    [
        [], {"3": 5}, {"3": {"class_type": "KSampler"}}, {"3": {"class_type": "KSampler", "inputs": {"positive": ["3", 0]}}},
        {"3": {"class_type": "KSampler", "inputs": {"positive": ["4", 0], "seed": {}, "steps": True, "cfg": [[[]]]}},
         "4": {"class_type": "A", "inputs": {"a": ["4", 0]}}},
        {"3": {"class_type": "KSampler", "inputs": {"sampler_name": "none", "scheduler": 5, "denoise": "x", "latent_image": 1}}},
    ],
)  # fmt: skip
def test_a_strange_graph_is_no_crash(graph, capsys):
    Image.new("RGB", (8, 8)).save("x.png", pnginfo=chunks(prompt=json.dumps(graph)))
    assert main(["again", "x.png"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_our_own_text_is_read_back():
    """What the parameters text says of a drawing is what its recipe says."""
    options = ["--sampler", "DPM++ 2M SDE Karras", "--cfg", "3", "--eta", "0.5", "--sampler-options", "s_noise=0.9", *FAST]
    assert main(["a (red:1.2) star", "-n", "blue", *options, "-o", "x.png"]) == 0
    with Image.open("x.png") as image:
        text, known = image.info["parameters"], read_recipe("x.png")
    found = of_infotext(text)
    assert not found.lacking
    args = draw.parse(found.words())
    assert (args.prompt, args.negative_prompt) == (known["prompt"], known["negative_prompt"])
    for name in ("sampler", "spacing", "steps", "seed", "eta", "guidance_scale"):
        assert getattr(args, name) == known[name], name
    assert args.sampler_options == known["sampler_options"]
    assert args.size == (known["width"], known["height"])
