"""Embeddings that prompts name: which files are taken, what a picture says of them, and what is told where one is missing."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from families import SMALL
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import minisd
from minisd.addons.embeddings import read_embeddings
from minisd.cli import main
from minisd.errors import CheckpointError, UsageError
from minisd.library.embeddings import found_again, named_in
from minisd.plan import planned, words_of
from minisd.request import Request
from minisd.text.attention import Piece
from minisd.text.grammar import all_pieces

ONCE = {"steps": 1, "width": 64, "height": 64, "seed": 1}
ROWS = torch.randn(2, 64, generator=torch.Generator().manual_seed(0)) * 0.2


def embedding(path: Path, rows: torch.Tensor = ROWS) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"emb_params": rows}, path)
    return path


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    return SMALL["sd1"].write(tmp_path_factory.mktemp("small") / "small.safetensors")


@pytest.fixture
def library(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "models"


def found(text: str, reading: str = "original") -> list[tuple[str, bool]]:
    return [(each.name, each.bare) for each in named_in(all_pieces(text, True, 4, reading), reading)]


def test_which_files_a_prompt_names(library):
    for name in ("embeddings/clay toy", "embeddings/cat", "other/lone", "sub/deep"):
        embedding(library / f"{name}.safetensors")
    for text, wanted in (
        ("a clay toy", [("clay toy", True)]),
        ("a Clay \n toy", [("clay toy", True)]),  # the same tokens
        ("a [clay toy|dog] [x:(cat:1.2):3]", [("clay toy", True), ("cat", True)]),
        ("concatenate a claytoy", []),
        ("a lone wolf", []),  # only in folders called embeddings
        ("a (embedding:lone:1.3)", [("lone", False)]),
        ("embedding:sub/deep.pt embedding:lone,", [("sub/deep", False), ("lone", False)]),
    ):
        assert sorted(found(text)) == sorted(wanted), text
    assert found("a cat, ((embedding:lone))", "comfy") == [("lone", False)]
    assert found("a cat, embedding:lone", "plain") == []
    assert found("a cat, embedding:lone", "none") == [("lone", False), ("cat", True)]
    with pytest.raises(CheckpointError, match="lune: does not exist, and no model has this name"):
        found("embedding:lune")
    with pytest.raises(UsageError, match="no embedding that is loaded"):
        named_in([Piece("embedding:../secret")], "original")


def test_one_for_another_family_is_set_aside_by_its_bare_name_alone(library, small, capsys):
    embedding(library / "embeddings" / "cat.safetensors", torch.ones(1, 1024))
    words = ["-m", str(small), "--steps", "1", "--size", "64x64", "--seed", "1"]
    assert main(["a cat", *words, "-o", "x.png"]) == 0
    told = capsys.readouterr().err
    assert "for SD 2.x" in told
    assert "'cat' is read as plain words" in told
    assert main(["a embedding:cat", *words, "-o", "y.png"]) == 3
    assert main(["tokens", "a cat", "-m", str(small)]) == 0
    assert main(["a embedding:kat", *words, "-o", "y.png"]) == 3


def test_a_picture_says_what_its_texts_have(small, tmp_path):
    pipe = minisd.load(small, device="cpu", dtype="float32")
    for name in ("cat", "clay toy", "star"):
        pipe.add_embedding(embedding(tmp_path / f"{name}.safetensors"))

    def words(**options) -> list[str]:
        plan = planned(Request(**options), pipe.capabilities())
        return words_of(plan, 0, pipe.conditioner.added[0])

    assert words(prompt="concatenate [x:clay  toy:0.5]", negative_prompt="(star:1.2)") == ["clay toy", "star"]
    assert words(prompt="concatenate") == words(prompt="a star", plain_prompt=True) == []
    assert words(prompt="a cat", emphasis="comfy") == []
    recipe = pipe("a clay \n toy", **ONCE).metadata[0]
    assert [each["name"] for each in recipe["embeddings"]] == ["clay toy"]


def test_what_is_not_known_is_told_before_anything_is_drawn(reduced):
    for name in ("prompt", "negative_prompt"):
        with pytest.raises(UsageError, match="embedding:clay is no embedding that is loaded"):
            reduced.stream(**{"prompt": "a star", name: "a (embedding:clay:1.2)"})


def test_both_text_encoders_and_the_refiner(tmp_path):
    pipe, refiner = (
        minisd.load(SMALL[name].write(tmp_path / f"{name}.safetensors"), device="cpu", dtype="float32")
        for name in ("sdxl", "sdxl-refiner")
    )
    path = tmp_path / "clay.safetensors"
    save_file({"clip_l": ROWS, "clip_g": ROWS + 0.1}, path)
    pipe.add_embedding(path)
    plan = planned(Request("a star", prompt_2="a clay star"), pipe.capabilities())
    assert words_of(plan, 0, pipe.conditioner.added[1]) == ["clay"]
    for text in ("a clay star", "a embedding:clay star"):
        with pytest.raises(UsageError, match="refiner: does not know the embedding 'clay'"):
            pipe.stream(text, refiner=refiner)
    pipe.stream("a star", refiner=refiner)
    refiner.add_embedding(path)
    options = ONCE | {"steps": 2}
    pipe("a embedding:clay star", refiner=refiner, high_noise_frac=0.5, **options)


def test_again_tells_of_another_file_and_of_none(library):
    path = embedding(library / "embeddings" / "clay.safetensors")
    said = read_embeddings(path)[0].facts()
    with warnings.catch_warnings(action="error"):
        assert found_again(said) == ("clay", path)
    embedding(path, ROWS + 1)
    with pytest.warns(UserWarning, match=r"is not the embedding that this picture was made with \(clay\)"):
        found_again(said)
    path.unlink()
    with pytest.raises(CheckpointError, match="clay: does not exist"):
        found_again(said)


def test_pictures_of_others_whose_embeddings_are_not_here(library, small, tmp_path, capsys):
    embedding(library / "embeddings" / "clay.safetensors")
    info = PngInfo()
    hashes = 'TI hashes: "clay: 0123456789ab, easy negative: fff5d51ab655"'
    fields = f"Steps: 1, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64, {hashes}, Version: v1.9.0"
    info.add_text("parameters", f"a clay star\nNegative prompt: easy negative\n{fields}")
    Image.new("RGB", (64, 64)).save(tmp_path / "theirs.png", pnginfo=info)
    assert main(["again", "theirs.png", "--dry-run"]) == 0
    told = capsys.readouterr().err
    assert "embedding 'easy negative': not in the library" in told
    assert "'clay'" not in told


def test_comparisons_know_them_too(library, small, capsys):
    embedding(library / "embeddings" / "clay.safetensors")
    words = [
        "-m",
        str(small),
        "--steps",
        "1",
        "--size",
        "64x64",
        "--seeds",
        "1",
        "--x",
        "cfg=1,2",
        "-o",
        "sheet.png",
        "--json",
    ]
    with warnings.catch_warnings(action="ignore"):
        assert main(["compare", "a (embedding:clay:1.1) star", *words]) == 0
    cells = json.loads(capsys.readouterr().out)["cells"]
    assert [[each["name"] for each in cell["embeddings"]] for cell in cells] == [["clay"], ["clay"]]
