"""Comparisons: every cell is the picture that its settings give alone, where its labels say."""

from __future__ import annotations

import copy
import gc
import json
import os
import weakref
from pathlib import Path

import pytest
import torch
from families import SMALL
from hypothesis import given, settings
from hypothesis import strategies as st
from loras import whole
from PIL import Image, ImageFont
from safetensors.torch import save_file

import minisd
from minisd.cli import main
from minisd.errors import CheckpointError, NonFiniteError, OutOfMemoryError, UsageError
from minisd.files.checkpoint import open_checkpoint
from minisd.library.places import tiny_checkpoint
from minisd.models.unet import UNet
from minisd.pictures.grids import fitting, labelled_grid
from minisd.request import Request
from minisd.workbench import comparing
from minisd.workbench.comparing import Axis, cells_again, compare, labels, settle_cells
from minisd.workbench.merging import merge

LIT = tiny_checkpoint().with_name("tiny-lit.safetensors")
FAST = {"steps": 2, "device": "cpu"}
PROMPT = "a red circle on a blue background"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    for name, value in (("HOME", tmp_path / "home"), ("MINISD_MODELS", "")):
        monkeypatch.setenv(name, str(value))
    monkeypatch.chdir(tmp_path)


def pixels(image: Image.Image | None) -> bytes:
    assert image is not None
    return image.tobytes()


def test_checkpoints_against_seeds(tiny):
    done = compare(PROMPT, [None, "tiny-lit"], [1, 2, 3], **FAST)
    alone = [tiny, minisd.load(LIT, device="cpu")]
    expected = [pixels(pipe(PROMPT, seed=seed, steps=2).images[0]) for seed in (1, 2, 3) for pipe in alone]
    assert [pixels(image) for image in done.images] == expected
    assert [(facts["model"], facts["seed"]) for facts in done.metadata if facts] == [
        (name, seed) for seed in (1, 2, 3) for name in ("tiny", "tiny-lit")
    ]
    assert done.failures == [None] * 6


def test_two_settings(tiny):
    x, y = Axis.parse("sampler=ddim,euler"), Axis.parse("cfg=3,7.5")
    done = compare(PROMPT, seeds=[5], x=x, y=y, spacing="trailing", **FAST)
    for i, (scale, sampler) in enumerate([(3, "ddim"), (3, "euler"), (7.5, "ddim"), (7.5, "euler")]):
        assert pixels(done.images[i]) == pixels(
            tiny(PROMPT, seed=5, steps=2, guidance_scale=scale, sampler=sampler, spacing="trailing").images[0]
        )


def test_the_sheet_has_every_picture_in_its_place():
    done = compare(PROMPT, seeds=[1, 2], x=Axis("steps", (1, 2, 3)), device="cpu")
    found = []
    for image in done.images:
        assert image is not None
        found.append(place(done.sheet, image))
    xs, ys = sorted({x for x, _ in found}), sorted({y for _, y in found})
    assert found == [(x, y) for y in ys for x in xs]
    assert (len(xs), len(ys)) == (3, 2)


def place(sheet: Image.Image, image: Image.Image) -> tuple[int, int]:
    """Where a picture stands on a sheet, to the bit."""
    whole, part = sheet.tobytes(), image.tobytes()
    row = part[: 3 * image.width]
    at = whole.find(row)
    while at >= 0:
        x, y = at % (3 * sheet.width) // 3, at // (3 * sheet.width)
        if sheet.crop((x, y, x + image.width, y + image.height)).tobytes() == part:
            return x, y
        at = whole.find(row, at + 1)
    raise AssertionError("the picture is not on the sheet")


AXES = {
    "nothing": ((), (), None, None, ("model", 1, "seed", 1)),
    "models": (("a", "b"), (), None, None, ("model", 2, "seed", 1)),
    "seeds": ((), (1, 2), None, None, ("model", 1, "seed", 2)),
    "both": (("a", "b"), (1, 2, 3), None, None, ("model", 2, "seed", 3)),
    "x": ((), (), "steps=1,2", None, ("steps", 2, "model", 1)),
    "x and models": (("a", "b"), (), "steps=1,2", None, ("steps", 2, "model", 2)),
    "y and models": (("a", "b"), (7,), None, "steps=1,2", ("model", 2, "steps", 2)),
    "x and seeds": (("a",), (1, 2), "cfg=1", None, ("cfg", 1, "seed", 2)),
    "y are seeds": (("a", "b"), (), None, "seed=1,2", ("model", 2, "seed", 2)),
    "x are models": ((), (4,), "model=a,b", None, ("model", 2, "seed", 1)),
    "x and y": (("a",), (4,), "sampler=ddim,euler", "cfg=3,7", ("sampler", 2, "cfg", 2)),
}


@pytest.mark.parametrize("case", AXES)
def test_axes(case, monkeypatch):
    models, seeds, x, y, expected = AXES[case]
    monkeypatch.setattr(comparing, "path_of", lambda model: Path(model or "tiny"))
    monkeypatch.setattr(comparing, "check_models", lambda cells: None)
    cells = settle_cells(Request("x"), models, seeds, *(text and Axis.parse(text) for text in (x, y)))
    assert (cells.x.name, len(cells.x.values), cells.y.name, len(cells.y.values)) == expected
    assert len(cells.models) == len(cells.requests) == len(cells.x.values) * len(cells.y.values)
    settled = {request.seed for request in cells.requests}
    assert None not in settled
    assert len(settled) == (len(cells.y.values) if cells.y.name == "seed" else 1)  # one seed for all unless it is an axis
    if len(seeds) == 1:
        assert settled == set(seeds)


BAD = {
    "models twice": (["-m", "tiny", "--x", "model=tiny,tiny-lit"], 2, "-m: expected none beside an axis of models, found tiny"),
    "seeds twice": (["--seeds", "3", "--y", "seed=1,2"], 2, "--seeds: expected none beside an axis of seeds, found 3"),
    "unknown axis": (["--x", "colour=red,blue"], 2, "--x, --y: expected one of model, steps, sampler, cfg, seed"),
    "no values": (["--x", "steps"], 2, "--x, --y: expected steps=A,B,… with numbers"),
    "empty value": (["--x", "sampler=ddim,"], 2, "--x, --y: expected sampler=A,B,… with names"),
    "not a number": (["--x", "steps=1,two"], 2, "--x, --y: expected steps=A,B,… with numbers, found \"steps=['1', 'two']\""),
    "escape": (["--x", "\x1b[2J=1"], 2, r"found '\\x1b[2J'"),
    "no value": (["--x", "lora="], 2, "lora=A,B,… with names and strengths, such as clay:0.5"),
    "no lora": (["--x", "lora=nowhere:1"], 3, "nowhere: does not exist, and no model has this name"),
    "twice": (["--x", "cfg=1", "--y", "cfg=2"], 2, "axes: expected two different ones, found cfg twice"),
    "three": (["--seeds", "1,2", "--x", "cfg=1", "--y", "steps=1"], 2, "expected one seed beside cfg and steps, found 2"),
    "three models": (["-m", "tiny", "-m", "tiny-lit", "--seeds", "1,2", "--x", "cfg=1"], 2, "a picture has two axes"),
    "seeds": (["--seeds", "1,x"], 2, "--seeds: expected whole numbers such as 1,2,3, found '1,x'"),
    "too many": (["--x", "steps=" + "1," * 100 + "1", "--y", "cfg=" + "1," * 100 + "1"], 2, "at most 1,000 cells, found 10,201"),
    "too large": (["--seeds", "1,2,3,4,5,6,7,8,9,10", "--size", "4096x4096"], 2, "at most 150,000,000 pixels"),
    "sampler": (["--x", "sampler=euler,heum"], 2, "sampler: 'heum' is unknown; did you mean heun? minisd samplers lists all"),
    "steps": (["--y", "steps=0"], 2, "steps: expected a whole number from 1 to 999, found 0"),
    "guidance": (["--y", "cfg=nan"], 2, "--cfg: expected a number from 0 to 100, found nan"),
    "seed": (["--seeds", "-5"], 2, "seed: expected a whole number from 0"),
    "model": (["-m", "tiny", "-m", "none"], 3, "none: does not exist, and no model has this name"),
    "folder": (["-o", "no/where.png"], 6, "no does not exist; make it first"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_told_before_anything_is_drawn(case, capsys, monkeypatch, tmp_path):
    arguments, code, message = BAD[case]
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda *_: pytest.fail("something was drawn"))
    try:
        found = main(["compare", PROMPT, "--device", "cpu", *arguments])
    except SystemExit as stop:
        found = stop.code
    shown = capsys.readouterr()
    assert (found, shown.out) == (code, "")
    assert message in shown.err
    assert list(tmp_path.iterdir()) == []


def test_models_that_need_a_picture_are_refused_before_anything_is_drawn(tmp_path):
    name = next(name for name in SMALL if "inpaint" in name)
    path = SMALL[name].write(tmp_path / "inpaint.safetensors")
    with pytest.raises(CheckpointError, match="is trained to inpaint, expected a checkpoint that draws from text alone"):
        compare(PROMPT, [None, path], **FAST)


def test_again_makes_the_same_sheet(capsys):
    arguments = ["--x", "sampler=ddim,euler", "-m", str(LIT), "-m", "tiny", "--steps", "2", "--dtype", "float32"]
    assert main(["compare", "ein Kreis,\nrot: ✓", "-n", "blue", *arguments]) == 0
    assert main(["again", "compare.png"]) == 0
    assert capsys.readouterr().out.split() == ["compare.png", "compare-again.png"]
    assert Path("compare.png").read_bytes() == Path("compare-again.png").read_bytes()
    with Image.open("compare.png") as sheet:
        text = sheet.info["parameters"]
    fields = 'Script: X/Y/Z plot, X Type: Sampler, X Values: "ddim, euler", Y Type: Checkpoint name, Y Values: "tiny-lit, tiny"'
    assert fields in text
    assert main(["again", "compare.png", "-m", "tiny"]) == 2
    assert "-m: expected none" in capsys.readouterr().err


def test_strengths_of_a_lora_are_an_axis(reduced_file, tmp_path, capsys):
    folder = tmp_path / "models"
    folder.mkdir()
    save_file(whole(scale=0.2), folder / "clay.safetensors")
    save_file(whole(seed=9, scale=0.1), folder / "other.safetensors")
    x = ["--x", "lora=clay:0,0.5,other:1", "--lora", "other:0.3", "-m", str(reduced_file), "--steps", "1", "--size", "64x64"]
    assert main(["compare", PROMPT, *x, "--seeds", "1,2", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    strengths = [[(Path(each["source"]).stem, each["strength"]) for each in cell["loras"]] for cell in done["cells"]]
    row = [[("other", 0.3), each] for each in (("clay", 0), ("clay", 0.5), ("other", 1))]
    assert strengths == row * 2
    assert main(["again", "compare.png"]) == 0
    assert Path("compare.png").read_bytes() == Path("compare-again.png").read_bytes()
    with Image.open("compare.png") as sheet:
        assert "X Type: LoRA" in sheet.info["parameters"]


def test_the_name_of_a_lora_is_without_folder_and_suffix():
    axis = Axis("lora", ("a/b/clay.safetensors:0.5", "clay:0.8:0.3", "style.v2:1", "x.y.sft"))
    assert labels(axis) == ["clay:0.5", "clay:0.8:0.3", "style.v2:1", "x.y"]


def test_a_lora_of_an_axis_that_does_not_fit_is_told_before_anything_is_drawn(reduced_file, tmp_path, capsys, monkeypatch):
    save_file({"lora_unet_nothing.lora_up.weight": torch.ones(1, 1)}, tmp_path / "wrong.safetensors")
    save_file(whole(), tmp_path / "clay.safetensors")
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda *_: pytest.fail("something was drawn"))
    words = ["compare", PROMPT, "-m", str(reduced_file), "--x", f"lora={tmp_path}/clay.safetensors,{tmp_path}/wrong.safetensors"]
    assert main(words) == 3
    assert "wrong.safetensors" in capsys.readouterr().err


def test_each_checkpoint_draws_at_its_own_size_again_too(tmp_path, tiny, capsys):
    other = tmp_path / "models" / "wide.safetensors"
    other.parent.mkdir()
    weights = {key: value.contiguous().clone() for key, value in tiny.model.state_dict().items()}
    save_file(weights, other, {"modelspec.resolution": "96x72"})
    assert main(["compare", PROMPT, "-m", "tiny", "-m", "wide", "--seeds", "1", "--steps", "1", "--json"]) == 0
    done = json.loads(capsys.readouterr().out)
    assert done["image"] == "compare.png"
    assert [(cell["model"], cell["width"], cell["height"]) for cell in done["cells"]] == [("tiny", 64, 64), ("wide", 96, 72)]
    assert main(["again", "compare.png"]) == 0
    assert Path("compare.png").read_bytes() == Path("compare-again.png").read_bytes()
    other.unlink()
    assert main(["again", "compare.png", "-o", "x.png"]) == 3


def test_another_checkpoint_at_the_recorded_path_is_told(tmp_path, capsys):
    Path("a.safetensors").write_bytes(LIT.read_bytes())
    assert main(["compare", PROMPT, "-m", "a.safetensors", "--seeds", "1", "--steps", "1"]) == 0
    Path("a.safetensors").write_bytes(tiny_checkpoint().read_bytes())
    assert main(["again", "compare.png"]) == 0
    assert "a.safetensors is not the checkpoint that drew this picture" in capsys.readouterr().err
    Path("a.safetensors").unlink()
    os.mkfifo("a.safetensors")
    assert main(["again", "compare.png"]) == 3
    assert "a.safetensors: is not a regular file, expected a .safetensors or .ckpt file" in capsys.readouterr().err


def test_a_merge_made_again_is_the_same_checkpoint_and_one_with_false_metadata_is_not(capsys):
    merge([tiny_checkpoint(), LIT], "a.safetensors")
    assert main(["compare", PROMPT, "-m", "a.safetensors", "--seeds", "1", "--steps", "1"]) == 0
    first = Path("a.safetensors").read_bytes()
    facts = open_checkpoint("a.safetensors").metadata
    earlier = facts["modelspec.date"].encode()
    Path("a.safetensors").write_bytes(first.replace(earlier, b"1" + earlier[1:], 1))  # as if on another day
    assert main(["again", "compare.png"]) == 0
    assert "is not the checkpoint" not in capsys.readouterr().err
    Path("a.safetensors").write_bytes(first[:-1] + bytes([first[-1] ^ 1]))  # another number under the same metadata
    assert main(["again", "compare.png"]) == 0
    assert "a.safetensors is not the checkpoint that drew this picture" in capsys.readouterr().err


RECIPE = {
    "prompt": "x",
    "seed": 1,
    "steps": 1,
    "compare": {
        "x": {"name": "model", "values": ["tiny"]},
        "y": {"name": "seed", "values": [1, 2]},
        "models": [{"model": "tiny", "model_path": None, "model_sha256": None}],
        "asked": {"width": None, "height": None, "spacing": None},
    },
}


def places(value: object) -> list[tuple[object, ...]]:
    """The ways to every part of a recipe."""
    if isinstance(value, dict | list):
        pairs = value.items() if isinstance(value, dict) else enumerate(value)
        return [way for key, inner in pairs for way in [(key,), *((key, *rest) for rest in places(inner))]]
    return []


NONSENSE = [None, [], {}, "", "x", 0, -1, 1e400, 10**30, True, [None], [[]], "\0", "\x1b", "../../x", {"name": "x"}]


def test_a_whole_recipe_is_read():
    cells = cells_again(RECIPE)
    assert (len(cells.requests), cells.y.values) == (2, (1, 2))


@pytest.mark.filterwarnings("ignore:.* is not the checkpoint that drew this picture")
@settings(max_examples=300, deadline=None)
@given(st.sampled_from(places(RECIPE)), st.sampled_from(NONSENSE), st.booleans())
def test_a_recipe_may_hold_anything(way, value, left_out):
    recipe = copy.deepcopy(RECIPE)
    inner = recipe
    for key in way[:-1]:
        inner = inner[key]
    if left_out and isinstance(inner, dict):
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    try:
        cells = cells_again(recipe)
    except (UsageError, CheckpointError):
        return
    assert set(cells.models) == {tiny_checkpoint()}
    assert all(isinstance(request.steps, int) for request in cells.requests)


def test_one_checkpoint_at_a_time(monkeypatch):
    alive: list[weakref.ref] = []
    load = comparing.load

    def watched(*arguments, **options):
        assert [pipe for pipe in alive if pipe() is not None] == []
        pipe = load(*arguments, **options)
        alive.append(weakref.ref(pipe))
        return pipe

    monkeypatch.setattr(comparing, "load", watched)
    forward, calls = UNet.forward, []

    def step(self, x, *rest):
        calls.append(0)
        if len(calls) == 2:
            raise MemoryError  # an error must not keep the checkpoint in memory, either
        return forward(self, x, *rest)

    monkeypatch.setattr(UNet, "forward", step)
    gc.disable()  # memory is to be free at once, not some time later
    try:
        done = compare(PROMPT, ["tiny", LIT, None], [1, 2], **FAST)
    finally:
        gc.enable()
    assert len(alive) == 2  # the tiny one twice is one
    failed = [type(failure) for failure in done.failures]
    assert failed == [OutOfMemoryError, *[type(None)] * 5]


def test_a_cell_that_fails_does_not_lose_the_others(monkeypatch, capsys):
    forward, calls = UNet.forward, []
    monkeypatch.setattr(UNet, "forward", lambda self, x, *rest: calls.append(0) or forward(self, x, *rest) * broken(len(calls)))

    def broken(call: int) -> float:
        return float("nan") if call == 4 else 1.0  # in the second of four cells of two steps

    assert main(["compare", PROMPT, "--seeds", "1,2,3,4", "--steps", "2", "--device", "cpu", "--json"]) == 5
    shown = capsys.readouterr()
    cells = json.loads(shown.out)["cells"]
    assert [cell and cell["seed"] for cell in cells] == [1, None, 3, 4]
    assert shown.err.startswith("minisd: error: the UNet produced NaN or infinity")
    assert shown.err.count("\n") == 1
    assert Path("compare.png").exists()


def test_no_picture_at_all_is_an_error(monkeypatch, capsys):
    monkeypatch.setattr("minisd.models.unet.UNet.forward", lambda self, x, *_: torch.full_like(x, float("nan")))
    assert main(["compare", PROMPT, "--seeds", "1,2", "--steps", "1", "--device", "cpu"]) == 5
    assert not Path("compare.png").exists()
    with pytest.raises(NonFiniteError):
        compare(PROMPT, **FAST)


def test_a_second_checkpoint_that_cannot_be_loaded_does_not_lose_the_first(tmp_path, tiny):
    weights = {key: value.contiguous().clone() for key, value in tiny.model.state_dict().items()}
    weights.popitem()
    save_file(weights, tmp_path / "lacking.safetensors")
    done = compare(PROMPT, [None, "lacking.safetensors"], [1], **FAST)
    assert done.images[0] is not None
    assert isinstance(done.failures[1], CheckpointError)
    with pytest.raises(CheckpointError):
        compare(PROMPT, ["lacking.safetensors", None], [1], **FAST)


def test_progress_counts_over_all_cells():
    cells = settle_cells(Request(PROMPT), [None, LIT], [1], y=Axis("steps", (1, 3)))
    seen = list(comparing.stream(cells, lambda path: minisd.load(path, device="cpu")))
    assert [step.index for step in seen] == list(range(8))
    assert {step.total for step in seen} == {8}


def test_labels_tell_checkpoints_apart():
    paths = [Path("a/mix.safetensors"), Path("b/mix.safetensors"), Path("b/\x1b[2J.ckpt")]
    assert labels(Axis("model", tuple(paths[:1]))) == ["mix"]
    assert labels(Axis("model", tuple(paths))) == ["a/mix", "b/mix", r"b/\x1b[2J"]
    assert labels(Axis("model", (Path("x/a/mix.ckpt"), Path("y/a/mix.ckpt")))) == ["x/a/mix.ckpt", "y/a/mix.ckpt"]
    assert labels(Axis("cfg", (3.0, 7.5))) == ["cfg 3", "cfg 7.5"]


def test_labelled_grid_keeps_pictures_and_fits_texts():
    red, blue = Image.new("RGB", (64, 64), "red"), Image.new("RGB", (32, 48), "blue")
    sheet = labelled_grid([red, blue, "NaN", red], ["x" * 1000, "b"], ["1", "2" * 1000], "a title " * 1000)
    assert sheet.size[0] < 1000
    colours = {colour: count for count, colour in sheet.getcolors(1 << 16)}
    assert (colours[(0, 0, 255)], colours[(255, 0, 0)] >= 2 * 64 * 64) == (32 * 48, True)


@given(st.text(max_size=60), st.integers(0, 400))
@settings(deadline=None)
def test_fitting(text, width):
    font = ImageFont.load_default(12)
    found = fitting(text, font, width)
    assert found == text or (found.endswith("…") and text.startswith(found[:-1]))
    assert font.getlength(found) <= max(width, font.getlength("…"))


def test_prompt_lists_and_unknown_options_are_refused():
    with pytest.raises(UsageError, match="prompt: expected one text"):
        compare(["a", "b"])  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="prompt: expected one text, and one picture"):
        compare("a", num_images=2)
    with pytest.raises(UsageError, match="colour: unknown"):
        compare("a", colour="red")
