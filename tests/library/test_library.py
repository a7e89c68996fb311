"""The library: what is found, what it is called, and that names lead nowhere else."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch
from helpers import manifest, write_holes
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

import minisd
from minisd.cli import main
from minisd.errors import CheckpointError, OutputError, UsageError
from minisd.files.checkpoint import file_sha256
from minisd.files.recognition import recognise
from minisd.library.importing import add, checked_name
from minisd.library.names import as_text, identify, list_models, resolve
from minisd.library.places import extra_folders, model_files, searched, tiny_checkpoint

CONV = "model.diffusion_model.input_blocks.0.0.weight"
SD1 = {CONV: (32, 4, 3, 3), "first_stage_model.x": (2,), "cond_stage_model.transformer.x": (2,)}
VAE = {"decoder.conv_in.weight": (8, 4, 3, 3), "encoder.conv_in.weight": (8, 3, 3, 3)}
LORA = {"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight": (4, 2048)}
BOX = ["tiny", "tiny-lit", "tiny-clay", "tiny-outline"]


@pytest.fixture(autouse=True)
def empty_machine(tmp_path, monkeypatch):
    """No models anywhere but in the box; a home and a working folder of one's own."""
    for name in ("MINISD_MODELS", "HF_HOME", "HF_HUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    for name, variable in (("home", "HOME"), ("cache", "XDG_CACHE_HOME")):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(variable, str(tmp_path / name))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


def put(path: str | Path, shapes: dict[str, tuple[int, ...]] = SD1, **metadata: str) -> Path:
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_holes(path, shapes, None, **metadata)


def listed() -> dict[str, str]:
    """What is listed beside the box: path by name."""
    return {model.name: str(model.path) for model in list_models() if model.name not in BOX}


def test_an_empty_machine_has_the_box():
    assert [model.name for model in list_models()] == BOX
    assert resolve("tiny") == tiny_checkpoint()
    assert searched() == []


def test_what_was_searched_on_an_empty_machine_is_said_as_it_is(capsys):
    assert main(["models"]) == 0
    said = capsys.readouterr()
    assert len(said.out.splitlines()) == len(BOX)
    assert said.err == "minisd: searched minisd's own folder alone: there is no ./models, and MINISD_MODELS names none\n"
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["searched"] == []


def test_every_place_is_searched(tmp_path, monkeypatch):
    home = tmp_path / "home"
    given = [tmp_path / "disk", home / "more"]
    monkeypatch.setenv("MINISD_MODELS", f"{given[0]}{os.pathsep}~/more")
    hub = tmp_path / "cache" / "huggingface" / "hub" / "models--some--model"
    wanted = {
        "given": put(given[0] / "given.safetensors"),
        "deeper": put(given[0] / "a" / "b" / "deeper.ckpt"),
        "second": put(given[1] / "second.safetensors"),
        "plain": put("models/plain.safetensors"),
        "weight": put("weights/weight.safetensors"),
        "hubbed": hub / "snapshots" / "abc" / "hubbed.safetensors",
        "comfy": put(home / "ComfyUI" / "models" / "checkpoints" / "xl" / "comfy.safetensors"),
        "comfy-vae": put(home / "ComfyUI" / "models" / "vae" / "comfy-vae.safetensors", VAE),
        "extra": put(tmp_path / "elsewhere" / "checkpoints" / "extra.safetensors"),
        "a1111": put(home / "stable-diffusion-webui" / "models" / "Stable-diffusion" / "a1111.safetensors"),
        "a1111-lora": put(home / "stable-diffusion-webui" / "models" / "Lora" / "a1111-lora.safetensors", LORA),
    }
    blob = put(hub / "blobs" / "0123")
    wanted["hubbed"].parent.mkdir(parents=True)
    wanted["hubbed"].symlink_to(blob)
    put(home / "ComfyUI" / "custom_nodes" / "hidden.safetensors")  # a program's other folders are not looked at
    put("models/.trash/thrown.safetensors")
    (home / "ComfyUI" / "extra_model_paths.yaml").write_text(
        f"other:\n  base_path: {tmp_path}/elsewhere\n  checkpoints: checkpoints\n"
    )
    assert {name: os.path.abspath(path) for name, path in listed().items()} == {
        name: os.path.abspath(path) for name, path in wanted.items()
    }
    for name, path in wanted.items():
        assert resolve(name).samefile(path)
    assert resolve("some/model/hubbed") == wanted["hubbed"]
    assert [folder.name for folder in searched()] == [
        "disk",
        "more",
        "models",
        "weights",
        "hub",
        "ComfyUI",
        "stable-diffusion-webui",
    ]


def test_a_program_that_is_named_in_the_variable(tmp_path, monkeypatch):
    put(tmp_path / "UI" / "models" / "checkpoints" / "a.safetensors")
    put(tmp_path / "UI" / "venv" / "b.safetensors")
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "UI"))
    assert list(listed()) == ["a"]


def test_a_folder_that_does_not_exist_is_told(monkeypatch):
    monkeypatch.setenv("MINISD_MODELS", "/nowhere/at/all")
    with pytest.warns(UserWarning, match="MINISD_MODELS: /nowhere/at/all is not a folder"):
        list_models()


def test_the_current_revision_of_a_repository_counts(tmp_path):
    hub = tmp_path / "cache" / "huggingface" / "hub" / "models--a--b"
    old, new = (put(hub / "snapshots" / name / "x.safetensors") for name in ("0old", "1new"))
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("1new")
    assert resolve("x") == new
    (hub / "refs" / "main").write_text("../../../../../../work")  # a revision is the name of a folder beside, or nothing
    put("x.safetensors")
    assert sorted(listed().values()) == [str(old), str(new)]


def test_folders_that_lead_in_circles_and_elsewhere(tmp_path):
    put("models/a.safetensors")
    put(tmp_path / "private" / "b.safetensors")
    Path("models/again").symlink_to(Path("models").absolute())
    Path("models/out").symlink_to(tmp_path / "private")
    Path("models/gone.safetensors").symlink_to("nothing")
    Path("models/name.safetensors").symlink_to(tmp_path / "private" / "b.safetensors")  # a link to a file is a name for it
    assert sorted(listed()) == ["a", "name"]


def test_one_folder_by_two_ways_is_listed_once(monkeypatch):
    put("models/a.safetensors")
    Path("linked").symlink_to("models")
    monkeypatch.setenv("MINISD_MODELS", os.pathsep.join([os.path.abspath("models"), "linked", "models"]))
    assert len(listed()) == 1


EXTRA = """\
# a comment
a111:
    base_path: "/data/stable diffusion"   # spaces
    checkpoints: models/Stable-diffusion
    loras: |
         models/Lora
         models/LyCORIS
    hypernetworks: models/hypernetworks
    is_default: true
comfyui:
    vae: /abs/vae
    checkpoints: local

    controlnet: >-
        ~/nets
"""


def test_extra_model_paths(tmp_path):
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(EXTRA)
    base = Path("/data/stable diffusion/models")
    here = tmp_path
    assert list(extra_folders(path)) == [
        *(base / name for name in ("Stable-diffusion", "Lora", "LyCORIS")),
        *(here / "local", Path("/abs/vae"), here / "~/nets"),
    ]
    assert list(extra_folders(tmp_path / "none.yaml")) == []


@given(st.text(max_size=300) | st.text("ab:|\n -#\0~", max_size=300))
@example("a:\n  checkpoints: a\0b\n")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_extra_model_paths_may_hold_anything(tmp_path, text):
    path = tmp_path / "extra_model_paths.yaml"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    assert all(str(folder).isprintable() for folder in extra_folders(path))


KINDS = {
    "sd15": ("checkpoint", "sd1", "Stable Diffusion 1.x"),
    "sd15-inpainting": ("checkpoint", "sd1", "Stable Diffusion 1.x, inpaint"),
    "sdxl-refiner": ("checkpoint", "sdxl-refiner", "Stable Diffusion XL refiner"),
    "vae-ft-mse": ("vae", None, "a VAE alone"),
    "sd2-depth": ("other", None, "looks like a depth-to-image model of Stable Diffusion 2"),
}
OTHERS = {
    "a LoRA": ("lora", "sdxl", LORA),
    "a LoRA of PEFT": ("lora", "sd1", {"unet.down_blocks.0.attentions.0.attn2.to_k.lora_A.weight": (4, 768)}),
    "a LoRA of the text": ("lora", None, {"lora_te_text_model_encoder_layers_0_mlp_fc1.lora_down.weight": (4, 768)}),
    "a ControlNet": ("controlnet", "sd2", {"control_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": (320, 1024)}),
    "an embedding": ("embedding", None, {"emb_params": (4, 768)}),
    "a tiny autoencoder": ("vae", None, {"decoder.layers.1.weight": (64, 4, 3, 3)}),
    "Flux": ("other", None, {"double_blocks.0.img_attn.qkv.weight": (9, 3)}),
}


@pytest.mark.parametrize("name", KINDS)
def test_kinds_of_published_files(name, tmp_path):
    facts = identify(write_holes(tmp_path / "x.safetensors", manifest(name)))
    assert (facts.kind, facts.family, facts.what) == KINDS[name]


@pytest.mark.parametrize("name", OTHERS)
def test_kinds_of_other_files(name):
    kind, family, shapes = OTHERS[name]
    facts = identify(put("x.safetensors", shapes))
    assert (facts.kind, facts.family) == (kind, family)


def test_files_that_are_no_models():
    put("models/cut.safetensors").write_bytes(Path("models/cut.safetensors").read_bytes()[:-1])
    Path("models/text.pt").write_text("hello")
    Path("models/empty.ckpt").touch()
    os.mkfifo("models/pipe.safetensors")
    Path("models/folder.safetensors").mkdir()
    others = {model.name: model.what for model in list_models() if model.kind == "other"}
    assert sorted(others) == ["cut", "empty", "pipe", "text"]
    assert "is not a whole .safetensors file" in others["cut"]


def test_a_file_that_breaks_its_reader_costs_its_row_only(monkeypatch, capsys):
    put("models/good.safetensors")
    put("models/bad.safetensors")

    def breaking(checkpoint):
        if checkpoint.path.name == "bad.safetensors":
            raise ZeroDivisionError("\x1b[2J")
        return recognise(checkpoint)

    monkeypatch.setattr("minisd.library.names.recognise", breaking)
    assert main(["models", "--all"]) == 0
    shown = capsys.readouterr().out
    assert "\x1b" not in shown
    assert "ZeroDivisionError" in shown
    assert {model.name: model.kind for model in list_models()} | dict.fromkeys(BOX) == {
        "good": "checkpoint", "bad": "other", **dict.fromkeys(BOX)
    }  # fmt: skip
    assert resolve("good") == Path("models/good.safetensors")
    assert resolve("bad") == Path("models/bad.safetensors")


@pytest.mark.parametrize("call", ["stat", "scandir"])
def test_a_folder_that_cannot_be_read_is_left_out_with_a_word(call, tmp_path, monkeypatch):
    """A network that is gone answers EIO."""
    put("models/good.safetensors")
    gone = tmp_path / f"gone-{call}"
    put(gone / "models" / "checkpoints" / "far.safetensors")
    monkeypatch.setenv("MINISD_MODELS", str(gone))
    original = getattr(os, call)

    def failing(path=".", *arguments, **options):
        if str(path).startswith(str(gone)):
            raise OSError(5, "Input/output error")
        return original(path, *arguments, **options)

    monkeypatch.setattr(os, call, failing)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert resolve("good") == Path("models/good.safetensors")
        assert list(listed()) == ["good"]
    if call == "stat":
        assert any("is left out of the search for models: Input/output error" in str(each.message) for each in told)


def test_two_hundred_checkpoints_and_a_second_time(capsys, monkeypatch):
    for i in range(200):
        put(f"models/{i % 7}/mix{i:03}.safetensors", SD1, number=str(i))
    opened = []
    monkeypatch.setattr("minisd.library.names.identify", lambda path: opened.append(path) or identify(path))
    assert main(["models", "--json"]) == 0
    first = json.loads(capsys.readouterr().out)
    assert len(opened) == 204
    opened.clear()
    assert main(["models", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == first
    assert opened == []
    names = [model["name"] for model in first["models"]]
    assert names == [f"mix{i:03}" for i in range(200)] + BOX
    entry = first["models"][0]
    assert entry == {
        "name": "mix000",
        "kind": "checkpoint",
        "family": "sd1",
        "what": "Stable Diffusion 1.x",
        "bytes": os.path.getsize("models/0/mix000.safetensors"),
        "model_hash": None,
        "path": "models/0/mix000.safetensors",
    }
    put("models/0/mix000.safetensors", VAE)  # another file under the same name is looked at
    assert [model.kind for model in list_models() if model.name == "mix000"] == ["vae"]


def test_a_file_that_may_not_be_read_today_is_looked_at_again_tomorrow(monkeypatch):
    put("models/a.safetensors")
    refused = CheckpointError("a", "cannot be opened: Permission denied")
    with monkeypatch.context() as closed:
        closed.setattr("os.access", lambda *_: False)
        closed.setattr("minisd.library.names.open_checkpoint", lambda _: (_ for _ in ()).throw(refused))
        assert {model.kind for model in list_models()} == {"other"}
    assert {model.kind for model in list_models()} == {"checkpoint", "lora", "controlnet"}


def test_listing_does_not_import_torch():
    put("models/a.safetensors")
    code = "import sys; from minisd.cli import main; main(['models']); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[:2] == ["a", "checkpoint"]
    assert done.stderr == "minisd: searched models\n"


def test_a_broken_cache_costs_nothing_but_time(tmp_path):
    put("models/a.safetensors")
    before = list_models()
    cache = tmp_path / "cache" / "minisd" / "library.json"
    known = json.loads(cache.read_text())
    for value in (None, 7, [], {}, ["checkpoint"], ["nonsense", None, "x"], ["checkpoint", 7, "x"], ["checkpoint", "sd1", None]):
        cache.write_text(json.dumps(known | {"known": dict.fromkeys(known["known"], value)}))
        assert list_models() == before
    for text in ("", "[]", "[" * 100_000, '{"known": []}', '{"version": 1, "known": {}}', "\0"):
        cache.write_text(text)
        assert list_models() == before
    cache.unlink()
    cache.mkdir()
    assert list_models() == before


def test_hashes_are_shown_once_they_are_known(capsys):
    path = put("models/a.safetensors")
    hashes = {model.name: model.model_hash for model in list_models()}
    assert hashes["a"] is None
    wanted = file_sha256(path)[:10]
    assert {model.name: model.model_hash for model in list_models()}["a"] == wanted
    put("models/b.safetensors", SD1, other="x")
    assert main(["models", "--hash"]) == 0
    assert " -  " not in capsys.readouterr().out
    assert all(model.model_hash for model in list_models())


def test_names_are_found_whatever_way_they_are_written():
    path = put("models/sdxl/MyMix v2.safetensors")
    for name in ("MyMix v2", "mymix V2", "sdxl/MyMix v2", "SDXL/mymix v2.SAFETENSORS", "MyMix v2.safetensors"):
        assert resolve(name) == path
    for name in ("MyMix", "xl/MyMix v2", "MyMix v2.ckpt"):
        with pytest.raises(CheckpointError, match="no model has this name"):
            resolve(name)


def test_an_existing_path_wins_over_a_name():
    put("models/a.safetensors")
    put("a")
    assert resolve("a") == Path("a")
    assert resolve(Path("b")) == Path("b")


def test_upper_and_lower_case_where_they_matter():
    upper, lower = put("models/Mix.safetensors"), put("models/mix.safetensors")
    assert (resolve("Mix"), resolve("mix")) == (upper, lower)
    with pytest.raises(UsageError, match="several models"):
        resolve("MIX")


def test_an_ambiguous_name_lists_its_candidates(capsys):
    put("models/a/mix.safetensors")
    put("models/b/mix.ckpt", SD1, other="x")
    assert sorted(listed()) == ["a/mix", "b/mix"]
    assert main(["a prompt", "-m", "mix"]) == 2
    shown = capsys.readouterr().err
    expected = "minisd: error: mix: is the name of several models; give the path of one: models/a/mix.safetensors "
    assert shown.startswith(expected)
    assert "models/b/mix.ckpt (Stable Diffusion 1.x)" in shown
    assert resolve("mix.ckpt") == Path("models/b/mix.ckpt")
    assert resolve("a/mix") == Path("models/a/mix.safetensors")


def test_two_names_of_one_file_are_not_ambiguous(monkeypatch):
    path = put("models/mix.safetensors")
    Path("weights").mkdir()
    Path("weights/mix.safetensors").symlink_to(path.absolute())
    assert resolve("mix") == path


def test_the_kind_that_is_wanted_decides():
    put("models/mix.safetensors")
    put("models/loras/mix.safetensors", LORA)
    put("models/vae/mix.safetensors", VAE)
    assert [str(resolve("mix", kind).parent) for kind in ("checkpoint", "lora", "vae")] == [
        "models",
        "models/loras",
        "models/vae",
    ]
    assert [model.name for model in list_models()] == ["mix", "tiny", "tiny-lit", "mix", "mix", "tiny-clay", "tiny-outline"]
    put("models/only.safetensors", LORA)
    with pytest.raises(CheckpointError, match="this looks like a LoRA"):
        minisd.load("only")


def test_every_listed_name_is_found():
    for folder in ("models", "weights", "models/x", "models/x/y"):
        for name in ("a", "b" if folder == "models" else "c", "-dash", "..dots", "~tilde", "bell\a", "x"):
            put(f"{folder}/{name}.safetensors", SD1, where=folder + name)
    for model in list_models():
        assert resolve(model.name).samefile(model.path), model


def test_unknown_names_say_what_was_searched(capsys):
    put("models/samaritan.safetensors")
    assert main(["a prompt", "-m", "samariton"]) == 3
    expected = "samariton: does not exist, and no model has this name (did you mean samaritan? searched models; "
    assert capsys.readouterr().err == f"minisd: error: {expected}minisd models lists what there is)\n"
    for path in ("/no/such", "./no", "../no", "~/no"):
        with pytest.raises(CheckpointError, match=r"does not exist \(check the path\)"):
            resolve(path)


EVIL = "evil\x1b[2J\rname\n\u202e\udcff"


def test_hostile_names_are_shown_escaped(capsys):
    path = put(f"models/{EVIL}.safetensors", SD1, title="\x1b[2J" * 1000)
    put("models/" + "long" * 50 + ".safetensors", SD1, a="b")
    assert main(["models"]) == 0
    shown = capsys.readouterr()
    assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
    assert r"evil\x1b[2J\rname\n\u202e\udcff" in shown.out
    assert len(shown.out.splitlines()) == 2 + len(BOX)
    assert main(["models", "--json"]) == 0
    assert [model["path"] for model in json.loads(capsys.readouterr().out)["models"]].count(str(path)) == 1
    with pytest.raises(CheckpointError) as error:
        resolve("evil\x1b[2J")
    assert str(error.value).isprintable()


@given(st.text(min_size=1, max_size=20))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_names_lead_nowhere_but_into_the_library(tmp_path, name):
    put("models/a.safetensors")
    put(tmp_path / "private" / "a.safetensors")
    inside = {os.path.realpath(file.path) for file in model_files()}
    with contextlib.suppress(CheckpointError, UsageError):
        assert os.path.realpath(resolve(name)) in inside or os.path.exists(name)
    for trick in ("../private/a", "models/../../private/a", "sub/../a", str(tmp_path / "private" / "a")):
        with pytest.raises(CheckpointError, match="does not exist"):
            resolve(trick)


def test_short_names_everywhere(tiny, capsys):
    Path("models").mkdir()
    for name in ("one", "two"):
        Path(f"models/{name}.safetensors").write_bytes(tiny.checkpoint.path.read_bytes())
    fast = ["--steps", "1", "--device", "cpu", "--seed", "1"]
    assert main(["a star", "-m", "one", "--vae", "two", "-o", "x.png", *fast]) == 0
    assert main(["again", "x.png", "-m", "two"]) == 0
    assert main(["inspect", "one"]) == 0
    assert main(["convert", "one", "-o", "three.safetensors", "--vae", "two"]) == 0
    assert main(["merge", "one", "two", "--base", "one", "-o", "four.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "models/one.safetensors\n  Stable Diffusion 1.x (sd1)" in out
    assert minisd.load("one", vae="two").vae_files[0].path == Path("models/two.safetensors")


def test_add(capsys, tiny):
    assert main(["models", "add", str(tiny.checkpoint.path), "--name", "samaritan"]) == 0
    assert capsys.readouterr() == ("models/samaritan.safetensors\n", "")
    path = resolve("samaritan")
    assert path.read_bytes() == tiny.checkpoint.path.read_bytes()
    assert os.listdir("models") == ["samaritan.safetensors"]
    entry = next(model for model in list_models() if model.name == "samaritan")
    assert entry.model_hash == file_sha256(tiny.checkpoint.path)[:10]  # known from copying
    before = path.stat()
    assert add(tiny.checkpoint.path, "samaritan") == path  # the same again: nothing to do
    assert path.stat() == before


def test_add_tells_by_content_what_a_file_is(tiny):
    weights = {"state_dict": {key: torch.zeros(shape) for key, shape in SD1.items()}}
    torch.save(weights, "download")
    assert add("download") == Path("models/download.ckpt")
    torch.save(weights, "named.safetensors")
    assert add("named.safetensors", "other name") == Path("models/other name.ckpt")
    assert add(put("vae", VAE), "fine.pt").name == "fine.safetensors"


def test_add_puts_it_where_it_is_told(tmp_path, monkeypatch):
    source = put("x.safetensors")
    (tmp_path / "disk").mkdir()
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "disk"))
    assert add(source) == tmp_path / "disk" / "x.safetensors"
    Path("folder").mkdir()
    with pytest.warns(UserWarning, match="folder is not searched for models"):
        assert add(source, folder="folder") == Path("folder/x.safetensors")
    with pytest.raises(OutputError, match="does not exist; make it first"):
        add(source, folder="none")
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "gone"))
    with pytest.warns(UserWarning, match="not a folder"), pytest.raises(OutputError, match="does not exist; make it first"):
        add(source)


REFUSED = {
    "missing": ("none.safetensors", "does not exist"),
    "text": ("text", "is a text"),
    "cut": ("cut", "is not a whole .safetensors file"),
    "flux": ("flux", "looks like a Flux model"),
    "pickle": ("evil.ckpt", "evil.ckpt: "),
}


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_model_is_not_imported(case, capsys):
    file, message = REFUSED[case]
    Path("text").write_text("hello, I am a text")
    Path("cut").write_bytes(put("whole").read_bytes()[:-1])
    put("flux", {"double_blocks.0.img_attn.qkv.weight": (9, 3)})
    torch.save({"state_dict": {key: torch.zeros(shape) for key, shape in SD1.items()}, "evil": Evil()}, "evil.ckpt")
    before = sorted(Path().rglob("*"))
    assert main(["models", "add", file]) == 3
    assert message in capsys.readouterr().err
    assert sorted(Path().rglob("*")) == before


def test_add_takes_no_other_models_place(tmp_path, capsys):
    first, second = put("first.safetensors", SD1, a="1"), put("second.safetensors", SD1, a="2")
    add(first, "mix")
    for name in ("mix", "MIX", "mix.safetensors"):
        assert main(["models", "add", str(second), "--name", name]) == 6
        assert "models/mix.safetensors has this name already; choose another with --name" in capsys.readouterr().err
    Path("models/link.pt").symlink_to("nowhere")
    with pytest.raises(OutputError, match="has this name already"):
        add(second, "link")
    elsewhere = put(tmp_path / "home" / "ComfyUI" / "models" / "checkpoints" / "theirs.safetensors", SD1, a="3")
    with pytest.raises(OutputError, match="has this name already"):
        add(second, "theirs")
    assert add(elsewhere) == elsewhere  # it is in the library, under this name
    assert Path("models/mix.safetensors").read_bytes() == first.read_bytes()
    assert sorted(os.listdir("models")) == ["link.pt", "mix.safetensors"]


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_of_two_imports_at_once_one_is_told(monkeypatch, links):
    if not links:  # as on FAT
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(PermissionError(1, "Operation not permitted")))
    sources = [put(f"{i}.safetensors", SD1, number=str(i)) for i in range(2)]
    together = threading.Barrier(2)
    monkeypatch.setattr(
        "minisd.library.importing.check_room", lambda *_: together.wait(10)
    )  # both have seen that the name is free
    monkeypatch.setattr("os.getpid", threading.get_ident)  # as if two processes
    monkeypatch.setattr("minisd.system.atomic.running", lambda _: True)
    outcome: list[object] = [None, None]

    def run(i: int) -> None:
        try:
            outcome[i] = add(sources[i], "mix")
        except OutputError as error:
            outcome[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = next(i for i in range(2) if isinstance(outcome[i], Path))
    assert "has just taken this name" in str(outcome[1 - winner])
    assert Path("models/mix.safetensors").read_bytes() == sources[winner].read_bytes()
    assert os.listdir("models") == ["mix.safetensors"]


def flip(path: Path) -> None:
    if ".minisd-tmp-" in path.name:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)


def test_a_copy_that_went_wrong_is_not_kept(monkeypatch):
    source = put("x.safetensors")
    monkeypatch.setattr("minisd.library.importing.PIECE", 1 << 10)
    monkeypatch.setattr("minisd.system.atomic.sync", lambda path: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OutputError, match="No space left on device"):
        add(source)
    assert os.listdir("models") == []
    monkeypatch.setattr("minisd.system.atomic.sync", lambda path: None)
    with monkeypatch.context() as flipped:  # a disk that changes one byte of the numbers, which no header tells
        flipped.setattr("minisd.library.importing.identify", lambda path: flip(path) or identify(path))
        with pytest.raises(OutputError, match="what was written is not what was read back"):
            add(source)
    assert os.listdir("models") == []
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 100}))
    with pytest.raises(OutputError, match=r"needs [\d,]+ bytes, 100 are free"):
        add(source)


BAD_NAMES = [
    "",
    ".",
    "..",
    "a/b",
    "a\\b",
    "../up",
    "/root",
    "-m",
    "~",
    ".hidden",
    "a\0",
    "a\nb",
    "\x1b[2J",
    "C:",
    "a*",
    " a",
    "a ",
]


@pytest.mark.parametrize("name", [*BAD_NAMES, "x" * 101, "é" * 51, "\udcff", "a.", ".safetensors"])
def test_names_that_no_file_should_have(name):
    source = put("x.safetensors")
    with pytest.raises(UsageError, match="name: expected 1 to 100 plain characters") as error:
        add(source, name)
    assert str(error.value).isprintable()
    assert not Path("models").exists()


@given(st.text(max_size=120))
@settings(max_examples=500, deadline=None)
def test_an_accepted_name_is_one_plain_part_of_a_path(name):
    try:
        accepted = checked_name(name)
    except UsageError:
        return
    assert Path("models", f"{accepted}.safetensors").resolve().parent == Path("models").resolve()
    assert accepted.isprintable()
    assert 0 < len(os.fsencode(accepted)) <= 100


def test_metadata_of_two_megabytes(capsys):
    path = put("models/big.safetensors", SD1, thumbnail="\x1b" * (1 << 18) + "x" * (2 << 20))
    assert main(["models"]) == 0
    assert len(capsys.readouterr().out) < 1000
    assert add(path, "copy").read_bytes() == path.read_bytes()


def test_as_text_of_nothing():
    assert as_text([]) == ""


def test_a_real_file_still_loads_by_its_path(tmp_path, tiny):
    save_file({key: value.contiguous().clone() for key, value in tiny.model.state_dict().items()}, tmp_path / "t.safetensors")
    assert minisd.load(str(tmp_path / "t.safetensors")).family.name == "sd1"
