"""The command line as a user meets it: data on stdout, one clear line on stderr, the right exit code, nothing half-written."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

import minisd
from minisd.cli import main
from minisd.cli.main import COMMANDS
from minisd.library.places import tiny_checkpoint

FAST = ["--steps", "2", "--device", "cpu"]


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(*arguments: str, **options) -> subprocess.CompletedProcess[str]:
    """A process of its own, started as the installed command is."""
    code = "import sys; from minisd.cli import main; sys.exit(main())"
    return subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, **options)


def test_draws_a_picture(tmp_path):
    done = run("a red circle on a blue background", "--seed", "1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "out.png\n", "")
    with Image.open("out.png") as image:
        assert image.size == (64, 64)
        assert image.info["parameters"].startswith("a red circle on a blue background\nSteps: 20, Sampler: Euler, ")


def test_a_picture_that_nobody_named_replaces_none(capsys):
    for _ in range(3):
        assert main(["a star", *FAST]) == 0
    assert capsys.readouterr().out.split() == ["out.png", "out-2.png", "out-3.png"]


def test_json_and_options(capsys):
    options = ["--num-images", "2", "--seed", "5", "--size", "96x72", "--sampler", "ddim", "--eta", "0.5", "--cfg", "3", "--json"]
    assert main(["draw", "a star", "-n", "red", "-o", "x.png", "--dtype", "float32", *options, *FAST]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown["images"] == ["x.png", "x-2.png"]
    assert shown["seeds"] == [5, 6]
    recipe = shown["metadata"][1]
    wanted = {"prompt": "a star", "negative_prompt": "red", "seed": 6, "width": 96, "height": 72, "sampler": "ddim", "eta": 0.5}
    assert wanted.items() <= recipe.items()
    assert (recipe["dtype"], recipe["guidance_scale"], recipe["spacing"]) == ("float32", 3, "leading")


def test_again_makes_the_same_picture(capsys):
    assert main(["a star", "--num-images", "2", "--seed", "5", "--sampler", "ddim", "--eta", "1", "-o", "x.png", *FAST]) == 0
    assert main(["again", "x-2.png"]) == 0
    assert capsys.readouterr().out.split()[-1] == "x-2-again.png"
    assert Path("x-2.png").read_bytes() == Path("x-2-again.png").read_bytes()


def test_levels_and_schedules_from_the_command_line(capsys):
    pipe, names = minisd.load(device="cpu"), ("x.png", "y.png")
    karras = ",".join(map(repr, pipe.noise_levels("karras", 3).tolist()))
    for name, options in zip(names, (["--sigmas", karras], ["--schedule", "Karras", "--steps", "3"]), strict=True):
        assert main(["a star", "--seed", "1", "--size", "32x32", "--device", "cpu", "-o", name, *options]) == 0
    assert Image.open("x.png").tobytes() == Image.open("y.png").tobytes()
    assert main(["again", "x.png"]) == 0
    assert Image.open("x-again.png").tobytes() == Image.open("x.png").tobytes()
    capsys.readouterr()
    for wrong in ("abc", "1,2", "3"):
        assert main(["a star", "--sigmas", wrong]) == 2
        assert "--sigmas: expected " in capsys.readouterr().err


def test_again_with_another_checkpoint_is_told(capsys, reduced_file):
    assert main(["a star", "--seed", "5", "-o", "x.png", *FAST]) == 0
    assert main(["again", "x.png", "-m", str(reduced_file)]) == 0
    assert "is not the checkpoint that drew this picture (tiny)" in capsys.readouterr().err


def test_inspect(capsys, reduced_file):
    assert main(["inspect", str(reduced_file), "--json", "--hash"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["family"], len(facts["model_hash"])) == ("sd1", 10)
    data = reduced_file.read_bytes()[1 << 20 :][: 64 << 10]
    assert facts["legacy_hash"] == hashlib.sha256(data).hexdigest()[:8]
    assert main(["inspect", str(reduced_file), "--hash"]) == 0
    assert f"  legacy hash   {facts['legacy_hash']}  (A1111's first" in capsys.readouterr().out
    assert main(["inspect", str(reduced_file)]) == 0
    assert "Stable Diffusion 1.x (sd1), task draw, predicts epsilon, 512x512" in capsys.readouterr().out


def test_a_long_prompt_is_read_to_its_end(capsys):
    assert main(["a red circle" + " a red circle" * 39, "--seed", "1", "-o", "long.png", *FAST]) == 0
    assert main(["a red circle " * 40 + "on blue", "--seed", "1", "-o", "longer.png", *FAST]) == 0
    assert capsys.readouterr().err == ""
    assert Path("long.png").read_bytes()[-3000:] != Path("longer.png").read_bytes()[-3000:]


def test_over_a_picture_and_again(capsys):
    assert main(["a red circle", "--seed", "1", "-o", "first.png", *FAST]) == 0
    assert main(["a blue star", "--init", "first.png", "--strength", "0.5", "--seed", "2", "-o", "x.png", "--steps", "4"]) == 0
    assert main(["again", "x.png"]) == 0
    with Image.open("x.png") as image, Image.open("x-again.png") as again, Image.open("first.png") as first:
        assert image.tobytes() == again.tobytes() != first.tobytes()
        assert "Denoising strength: 0.5" in image.info["parameters"]
    Image.open("first.png").rotate(90).save("first.png")
    assert main(["again", "x.png", "-o", "y.png"]) == 0
    assert "first.png is not the picture that this one was made from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("prompt", "model", "told"),
    [
        ("a cat on a sofa", [], True),
        ("the starting point", [], True),  # words are whole
        ("two Stars", [], False),
        ("crosses", ["-m", "tiny-lit"], False),
        ("a red, red sky", ["-m", "tiny-lit"], True),
        ("a cat", ["-m", "copy.safetensors"], False),
    ],
)
def test_what_the_checkpoints_in_the_box_know_is_told_where_a_prompt_names_none_of_it(prompt, model, told, capsys):
    Path("copy.safetensors").write_bytes(tiny_checkpoint().read_bytes())
    assert main([prompt, *model, "--seed", "1", "-o", "x.png", *FAST, "--size", "32x32", "--json"]) == 0
    said = capsys.readouterr()
    assert said.err.count("knows eight shapes (a circle, a star, …) in ten colours and nothing else; -m FILE") == told
    assert len(said.err.splitlines()) == told
    json.loads(said.out)


def test_a_preview_is_written_while_drawing(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "minisd.pictures.image.save_png", lambda image, path, recipe: seen.append((image.size, str(path))) or Path(path)
    )
    monkeypatch.setattr("time.monotonic", iter(range(1000)).__next__)
    assert main(["a star", "--preview", "now.png", "--steps", "3", "--device", "cpu"]) == 0
    assert seen == [((64, 64), "now.png")] * 3


def test_grid_of_several(capsys):
    assert main(["a star", "--num-images", "3", "--grid", "sheet.png", *FAST]) == 0
    with Image.open("sheet.png") as sheet, Image.open("out-2.png") as second:
        assert sheet.size == (128, 128)
        assert sheet.crop((64, 0, 128, 64)).tobytes() == second.tobytes()


def exit_code(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as stop:  # argparse leaves this way
        return int(stop.code or 0)


BAD = {
    "steps 0": (["a star", "--steps", "0"], 2, "steps: expected a whole number from 1 to 999, found 0"),
    "size": (["a star", "--size", "65x64"], 2, "--size: expected a multiple of 8, found 65"),
    "size 2": (["a star", "--size", "big"], 2, "--size: expected WIDTHxHEIGHT such as 512x768, found 'big'"),
    "sampler": (["a star", "--sampler", "heum"], 2, "sampler: 'heum' is unknown; did you mean heun? minisd samplers lists all"),
    "prompt": (["a" * 100_000], 2, "prompt: expected at most 10,000 characters, found 100,000"),
    "option": (["a star", "--color"], 2, "unrecognized arguments: --color"),
    "nothing": ([], 2, "the following arguments are required: PROMPT"),
    "missing model": (["a star", "-m", "none.safetensors"], 3, "none.safetensors: does not exist"),
    "empty model": (["a star", "-m", "empty"], 3, "empty: is empty"),
    "text model": (["a star", "-m", "text"], 3, "text: is a text"),
    "truncated model": (["a star", "-m", "cut"], 3, "cut: is not a whole .safetensors file"),
    "inspect text": (["inspect", "text"], 3, "text: is a text"),
    "again text": (["again", "text"], 2, "text: is not a PNG"),
    "again foreign": (["again", "plain.png"], 2, "plain.png: carries no minisd chunk"),
    "no folder": (["a star", "-o", "no/where.png"], 6, "no does not exist; make it first"),
    "folder": (["a star", "-o", "folder.png"], 6, "folder.png: is not a regular file"),
    "jpeg": (["a star", "-m", "no.safetensors", "-o", "x.jpg"], 2, "expected a name that ends in .png"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line(case, capsys, tmp_path, tiny):
    arguments, code, message = BAD[case]
    Path("empty").touch()
    Path("text").write_text("hello, I am a text")
    Path("cut").write_bytes(tiny.checkpoint.path.read_bytes()[:-1000])
    Path("folder.png").mkdir()
    Image.new("RGB", (8, 8)).save("plain.png")
    before = sorted(tmp_path.rglob("*"))
    assert exit_code(arguments) == code
    shown = capsys.readouterr()
    assert shown.out == ""
    assert message in shown.err
    assert len(shown.err.splitlines()[-1:]) == 1
    assert shown.err.splitlines()[-1].startswith(("minisd: error: ", "minisd again: error: ", "minisd inspect: error: "))
    assert "Traceback" not in shown.err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_read_only_folder_as_a_user(capsys):
    Path("closed").mkdir(mode=0o555)
    assert main(["a star", "-o", "closed/x.png", *FAST]) == 6
    assert "cannot be written" in capsys.readouterr().err


def test_a_process_says_the_same(tmp_path):
    done = run("a star", "-m", "none.safetensors")
    assert done.returncode == 3
    assert done.stdout == ""
    assert done.stderr.startswith("minisd: error: none.safetensors: does not exist, and no model has this name (searched ")
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_out_of_memory_is_told(capsys, monkeypatch):
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda *_: (_ for _ in ()).throw(MemoryError()))
    assert main(["a star", *FAST]) == 4
    assert "out of memory" in capsys.readouterr().err
    assert not Path("out.png").exists()


def test_interrupt(capsys, monkeypatch):
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    assert main(["a star", *FAST]) == 130
    assert capsys.readouterr().err == "minisd: interrupted\n"


def test_help_and_inspect_do_not_import_torch(reduced_file):
    for arguments in (["--help"], ["--version"], ["inspect", str(reduced_file)]):
        code = f"import sys; from minisd.cli import main\ntry: main({arguments!r})\nfinally: assert 'torch' not in sys.modules"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout


def test_version(capsys):
    assert main(["--version"]) == main(["-V"]) == 0
    assert capsys.readouterr().out == f"minisd {minisd.__version__}\n" * 2


def test_python_m_minisd_is_the_command():
    done = subprocess.run([sys.executable, "-m", "minisd", "-V"], capture_output=True, text=True, check=True)
    assert done.stdout == f"minisd {minisd.__version__}\n"


def test_help_begins_with_the_commands(capsys):
    assert main(["--help"]) == main(["help"]) == 0
    text = capsys.readouterr().out
    assert text.index("minisd inspect FILE") < text.index("--steps N") < text.index("examples:")
    assert all(f"\n  minisd {name} " in text for name in COMMANDS)


@pytest.mark.parametrize("word", ["inspct", "merg", "model", "comparee", "agian"])
def test_a_lone_word_that_is_nearly_a_command_asks(word, capsys, monkeypatch):
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda *_: pytest.fail("something was drawn"))
    assert exit_code([word]) == exit_code([word, "x.safetensors"]) == 2
    said = capsys.readouterr().err
    assert said.count("did you mean the command ") == 2
    assert f"if '{word}' is a prompt: minisd draw '{word}'" in said


def test_draw_is_the_long_form(capsys):
    assert main(["draw", "model", "--seed", "1", "-o", "x.png", *FAST]) == 0
    assert main(["draw", "a red circle", "--seed", "1", "-o", "y.png", *FAST]) == 0
    assert main(["a red circle", "--seed", "1", "-o", "z.png", *FAST]) == 0
    assert Path("y.png").read_bytes() == Path("z.png").read_bytes() != Path("x.png").read_bytes()


def test_again_elsewhere(capsys, tmp_path, monkeypatch):
    """The picture lies in a folder that is not written to, and all its files have moved."""
    lit = tiny_checkpoint().with_name("tiny-lit.safetensors")
    for name in ("vae", "refiner"):
        shutil.copy(lit, f"{name}.safetensors")
    Image.new("RGB", (64, 64), "red").save("init.png")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save("mask.png")
    files = ["--vae", "vae.safetensors", "--refiner", "refiner.safetensors", "--init", "init.png", "--mask", "mask.png"]
    Path("album").mkdir()
    assert main(["a star", *files, "--seed", "1", "--steps", "4", "--device", "cpu", "-o", "album/x.png"]) == 0
    Path("moved").mkdir()
    for name in ("vae.safetensors", "refiner.safetensors", "init.png", "mask.png"):
        Path(name).rename(f"moved/{name}")
    assert exit_code(["again", "album/x.png"]) != 0
    moved = [word if word.startswith("--") else f"moved/{word}" for word in files]
    capsys.readouterr()
    assert main(["again", "album/x.png", *moved]) == 0
    said = capsys.readouterr()
    assert (said.out, said.err) == ("x-again.png\n", "")
    with Image.open("album/x.png") as first, Image.open("x-again.png") as second:
        assert first.tobytes() == second.tobytes()


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_what_the_parsers_say(shell, capsys):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for command in COMMANDS.values():
        for action in command.parser()._actions:
            for flag in action.option_strings:
                if action.help != argparse.SUPPRESS:
                    assert (f"-l {flag[2:]} " if shell == "fish" and flag.startswith("--") else flag.lstrip("-")) in script
    if shutil.which(shell):
        check = [shell, "-n"] if shell != "fish" else [shell, "--no-execute"]
        subprocess.run([*check, "/dev/stdin"], input=script, text=True, check=True)


def test_bash_completes(capsys):
    assert main(["completion", "bash"]) == 0
    script = capsys.readouterr().out

    def completed(*words):
        asked = (
            f"COMP_WORDS=({' '.join(map(repr, ['minisd', *words]))}); COMP_CWORD={len(words)}; _minisd; echo ${{COMPREPLY[@]}}"
        )
        done = subprocess.run(["bash", "-c", f"{script}\n{asked}"], capture_output=True, text=True, check=True)
        return done.stdout.split()

    assert completed("mo") == ["models"]
    assert completed("inspect", "--t") == ["--tree"]
    assert set(completed("a castle", "--s")) == {
        "--steps",
        "--style",
        "--sampler",
        "--sampler-options",
        "--schedule",
        "--sde-noise",
        "--seed",
        "--sigmas",
        "--size",
        "--strength",
        "--spacing",
        "--strict",
        "--subseed",
        "--subseed-strength",
    }


@pytest.mark.parametrize("more", [["--init", "y.png"], ["--mask", "y.png"], ["--vae", "tiny"], ["--refiner", "tiny"]])
def test_again_refuses_what_would_make_another_picture(more, capsys):
    assert main(["a star", "--seed", "1", "-o", "x.png", *FAST]) == 0
    assert main(["again", "x.png", *more]) == 2
    assert f"{more[0]}: expected none, as the picture was drawn without" in capsys.readouterr().err
    assert main(["compare", "a star", "--seeds", "1", "-o", "sheet.png", *FAST[:2]]) == 0
    assert main(["again", "sheet.png", *more]) == 2
    assert f"{more[0]}: expected none, as the picture is a comparison" in capsys.readouterr().err


def test_a_picture_of_another_kind_of_device_is_made_on_this_one(capsys):
    assert main(["a star", "--seed", "1", "-o", "x.png", *FAST]) == 0
    with Image.open("x.png") as image:
        recipe = json.loads(image.info["minisd"]) | {"device": "xpu", "dtype": "float16"}
        chunks = PngImagePlugin.PngInfo()
        chunks.add_text("minisd", json.dumps(recipe))
        image.save("y.png", pnginfo=chunks)
    assert main(["again", "y.png"]) == 0
    assert "the picture was drawn on 'xpu', which this machine has not" in capsys.readouterr().err
    with Image.open("x.png") as first, Image.open("y-again.png") as second:
        assert first.tobytes() == second.tobytes()
