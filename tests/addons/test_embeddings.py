"""Textual inversion: every form of its files, where its rows stand in a prompt, and what the encoders make of them."""

from __future__ import annotations

import base64
import hashlib
import json

import pytest
import torch
from families import SMALL
from helpers import assert_close
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file

import minisd
from minisd.addons.embeddings import read_embeddings
from minisd.cli import main
from minisd.errors import CheckpointError, UsageError
from minisd.library.embeddings import named_in
from minisd.text.added import FIRST_ID, NONE
from minisd.text.attention import Piece, weighted
from minisd.text.chunks import chunked
from minisd.text.tokenizer import END_ID, START_ID, encode

ROWS = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 0.2


def saved(path, content):
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def parameter_dict():
    """As the first trainer stored it."""
    return torch.nn.ParameterDict({"*": torch.nn.Parameter(ROWS)})


FORMS = {
    "A1111.pt": lambda: {
        "string_to_token": {"*": 265},
        "string_to_param": {"*": ROWS},
        "name": "x",
        "step": 5,
        "sd_checkpoint": None,
    },
    "first.pt": lambda: {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": parameter_dict()},
    "parameter.pt": lambda: {"string_to_token": {"*": 265}, "string_to_param": {"*": torch.nn.Parameter(ROWS)}},
    "diffusers.bin": lambda: {"<cat>": ROWS},
    "diffusers.safetensors": lambda: {"<cat>": ROWS},
    "emb_params.safetensors": lambda: {"emb_params": ROWS},
    "list.pt": lambda: [{"<a>": ROWS[:1]}, {"<b>": ROWS[1:]}],
    "half.safetensors": lambda: {"emb_params": ROWS.half()},
}


@pytest.mark.parametrize("form", FORMS)
def test_forms(form, tmp_path):
    (found,) = read_embeddings(saved(tmp_path / form, FORMS[form]()))
    assert found.name == form.rsplit(".", 1)[0]
    assert_close(found.rows[""], ROWS, 1e-3)
    assert found.rows[""].dtype == torch.float32


def test_a_single_row_sdxl_and_bundles(tmp_path):
    (found,) = read_embeddings(saved(tmp_path / "x.bin", {"<cat>": ROWS[0]}))
    assert torch.equal(found.rows[""], ROWS[:1])
    pair = {"clip_l": torch.ones(2, 64), "clip_g": torch.ones(2, 128)}
    (found,) = read_embeddings(saved(tmp_path / "x.safetensors", pair), "word")
    assert (found.name, {name: tuple(rows.shape) for name, rows in found.rows.items()}) == (
        "word",
        {"clip_l": (2, 64), "clip_g": (2, 128)},
    )
    bundle = {
        "bundle_emb.one.string_to_param.*": ROWS,
        "bundle_emb.two.clip_l": ROWS.clone(),
        "lora_unet_x.lora_up.weight": torch.ones(1, 1),
    }
    one, two = read_embeddings(saved(tmp_path / "x.safetensors", bundle))
    assert (one.name, two.name, list(two.rows)) == ("one", "two", ["clip_l"])


def test_several_words_of_one_file(tmp_path):
    words = saved(tmp_path / "x.bin", {"<a>": torch.ones(768), "<b>": torch.zeros(2, 768)})
    assert [(each.name, tuple(each.rows[""].shape)) for each in read_embeddings(words)] == [("<a>", (1, 768)), ("<b>", (2, 768))]
    assert [each.name for each in read_embeddings(words, "<b>")] == ["<b>"]
    with pytest.raises(CheckpointError, match=r"holds no word 'x' \(it holds <a>, <b>\)"):
        read_embeddings(words, "x")
    bundle = saved(
        tmp_path / "x.safetensors", {"bundle_emb.one.emb_params": ROWS, "lora_unet_x.lora_up.weight": torch.ones(1, 1)}
    )
    assert [each.name for each in read_embeddings(bundle, "mine")] == ["mine"]


def picture(path, chunk: bytes | None):
    """As A1111 writes it: its .pt as JSON, tensors as {"TORCHTENSOR": numbers}, in base64."""
    info = PngInfo()
    if chunk is not None:
        info.add_text("sd-ti-embedding", chunk)
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_pictures(tmp_path):
    content = {"string_to_token": {"*": 265}, "string_to_param": {"*": {"TORCHTENSOR": ROWS.tolist()}}, "name": "clay", "step": 5}
    path = picture(tmp_path / "x.png", base64.b64encode(json.dumps(content).encode()))
    (found,) = read_embeddings(path)
    assert (found.name, read_embeddings(path, "mine")[0].name) == ("clay", "mine")
    assert torch.equal(found.rows[""], ROWS)
    assert found.file.sha256() == hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(CheckpointError, match="a PNG picture without an embedding in a chunk sd-ti-embedding"):
        read_embeddings(picture(tmp_path / "y.png", None))
    content["string_to_param"]["*"]["TORCHTENSOR"][0][0] = float("nan")
    no_rows = {"string_to_param": {}}
    for broken, why in (
        (content, "holds NaN"),
        ({"name": "x"}, "string_to_param"),
        ([], "not put together"),
        (no_rows, "not put"),
    ):
        with pytest.raises(CheckpointError, match=why):
            read_embeddings(picture(tmp_path / "z.png", base64.b64encode(json.dumps(broken).encode())))
    with pytest.raises(CheckpointError, match="not put together"):
        read_embeddings(picture(tmp_path / "z.png", b"no base64 of JSON"))


@pytest.mark.parametrize(
    ("content", "why"),
    [
        ({"emb_params": torch.full((2, 64), float("nan"))}, "holds NaN or infinity"),
        ({"emb_params": torch.ones(76, 64)}, "expected at most 75 rows"),
        ({"emb_params": torch.ones(2, 2, 64)}, "expected rows of numbers"),
        ({"emb_params": torch.ones(2, 64, dtype=torch.int32)}, "expected rows of numbers"),
        ({"lora_unet_x.lora_up.weight": torch.ones(1, 1), "a": torch.ones(1)}, "found a LoRA"),
    ],
)
def test_what_is_none(content, why, tmp_path):
    with pytest.raises(CheckpointError, match=why):
        read_embeddings(saved(tmp_path / "x.safetensors", content))


ADDED = NONE.with_word("clay", torch.zeros(3, 64)).with_word("clay toy", torch.zeros(2, 64)).with_word("one", torch.zeros(1, 64))
CLAY, TOY, ONE = [FIRST_ID, FIRST_ID + 1, FIRST_ID + 2], [FIRST_ID + 3, FIRST_ID + 4], [FIRST_ID + 5]


def tokens(text: str, emphasis: str = "original") -> list[list[tuple[int, float]]]:
    """(id, weight) of every chunk, without start, end and filling."""
    found = []
    for chunk in chunked(weighted(text), emphasis, END_ID, ADDED):
        end = chunk.ids.index(END_ID)
        assert chunk.ids[0] == START_ID
        assert len(chunk.ids) == 77
        found.append(list(zip(chunk.ids[1:end], chunk.weights[1:end], strict=True)))
    return found


def test_where_the_rows_stand():
    """By hand from A1111's rules: ids of the name, the longest name first; weights of the place; and ComfyUI's words."""
    a, star = encode("a star")
    for text, ids in (
        ("a clay star", [a, *CLAY, star]),
        ("a Clay star", [a, *CLAY, star]),
        ("a clay toy star", [a, *TOY, star]),
        ("a clay clay toy", [a, *CLAY, *TOY]),
        ("a embedding:clay star", [a, *CLAY, star]),
        ("embedding:clay", CLAY),
        ("a embedding:one.safetensors star", [a, *ONE, star]),
        ("a embedding:one, star", [a, *ONE, 267, star]),
        ("a clays star", [a, *encode("clays"), star]),
    ):
        assert [[token for token, _ in chunk] for chunk in tokens(text)] == [ids], text
    assert tokens("a (clay:1.3) star") == [[(a, 1), *[(each, 1.3) for each in CLAY], (star, 1)]]
    assert tokens("(embedding:clay:0.5)") == [[(each, 0.5) for each in CLAY]]
    comfy = [chunk.ids for chunk in chunked(weighted("a clay star"), "comfy", END_ID, ADDED)]
    assert list(comfy[0][1:4]) == [a, *encode("clay"), star][:3]  # bare names are words there
    plain = chunked(weighted("embedding:clay"), "plain", END_ID, ADDED)
    assert all(each < FIRST_ID for each in plain[0].ids)


@pytest.mark.parametrize("emphasis", ["original", "comfy"])
def test_groups_are_not_torn(emphasis):
    star = encode("star")[0]
    for count, first in ((72, 75), (73, 73), (74, 74), (75, 75)):
        found = tokens(" ".join(["star"] * count) + " embedding:clay", emphasis)
        assert [len(chunk) for chunk in found] == ([first] if count == 72 else [first, 3])
        assert [token for token, _ in found[-1]][-3:] == CLAY
        assert {token for token, _ in found[0][:count]} == {star}


def test_unknown_ones_are_told(reduced):
    with pytest.raises(UsageError, match="embedding:clax is no embedding that is loaded; did you mean clay"):
        tokens("a embedding:clax star")
    with pytest.raises(UsageError, match="known: none; see add_embedding"):
        reduced.encode_prompt("a embedding:clay star")


@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_equal_to_transformers_with_new_tokens(name, tmp_path):
    """The rows as new ids of transformers' own encoder, in the place of the word."""
    small = SMALL[name]
    pipe = minisd.load(small.write(tmp_path / "x.safetensors"), device="cpu", dtype="float32")
    widths = [
        encoder.state_dict()[key].shape[1]
        for encoder in pipe.text_encoders
        for key in encoder.state_dict()
        if "token_embedding" in key
    ]
    rows = [torch.randn(2, width, generator=torch.Generator().manual_seed(i)) * 0.1 for i, width in enumerate(widths)]
    content = {"emb_params": rows[0]} if len(rows) == 1 else {"clip_l": rows[0], "clip_g": rows[1]}
    assert pipe.add_embedding(saved(tmp_path / "clay.safetensors", content)) == ["clay"]
    found = pipe.encode_prompt("a clay star")
    # The same by hand: the vocabulary's own rows 1000 and 1001 made into the word's.
    other = minisd.load(tmp_path / "x.safetensors", device="cpu", dtype="float32")
    for encoder, own in zip(other.text_encoders, rows, strict=True):
        table = next(value for key, value in encoder.state_dict().items() if "token_embedding" in key)
        table[1000:1002] = own
    a, star = encode("a star")
    ids = [START_ID, a, 1000, 1001, star, END_ID]
    read = [torch.tensor([ids + [tower.pad] * (77 - len(ids))]) for tower in other.family.towers]
    with torch.no_grad():
        contexts, pooled = other.conditioner.read(read)
    assert_close(found.context, torch.cat(contexts, dim=-1), 1e-6)
    if pooled is not None:
        assert_close(found.pooled, pooled, 1e-6)
    plain = pipe.encode_prompt("a red star")
    assert torch.equal(plain.context, other.encode_prompt("a red star").context)


def test_against_transformers(oracle, reduced_file, tmp_path):
    pipe = minisd.load(reduced_file, device="cpu", dtype="float32")
    pipe.add_embedding(saved(tmp_path / "clay.safetensors", {"emb_params": ROWS}))
    a, star = encode("a star")
    ids = [START_ID, a, 1000, 1001, 1002, star, END_ID]
    table = oracle.text.get_input_embeddings().weight
    before = table.detach()[1000:1003].clone()
    try:
        with torch.no_grad():
            table[1000:1003] = ROWS
            expected = oracle.text(torch.tensor([ids + [END_ID] * (77 - len(ids))])).last_hidden_state
    finally:
        with torch.no_grad():
            table[1000:1003] = before
    assert_close(pipe.encode_prompt("a clay star").context, expected, 1e-5)


def test_one_for_another_family_is_refused(reduced, tmp_path):
    saved(tmp_path / "clay.safetensors", {"emb_params": torch.ones(2, 1024)})
    with pytest.raises(CheckpointError, match=r"has rows of 1024 numbers, for SD 2"):
        reduced.add_embedding(tmp_path / "clay.safetensors")
    saved(tmp_path / "clay.safetensors", {"clip_l": torch.ones(2, 768), "clip_g": torch.ones(2, 1280)})
    with pytest.raises(CheckpointError, match="has rows of 768 and 1280 numbers, for SDXL"):
        reduced.add_embedding(tmp_path / "clay.safetensors")
    assert not reduced.embeddings


def test_from_the_library_by_name_and_again(reduced_file, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "models" / "embeddings"
    folder.mkdir(parents=True)
    monkeypatch.setenv("MINISD_MODELS", str(tmp_path / "models"))
    monkeypatch.chdir(tmp_path)
    saved(folder / "clay-toy.safetensors", {"emb_params": ROWS})
    words = ["-m", str(reduced_file), "--steps", "1", "--size", "64x64", "--seed", "1"]
    for i, prompt in enumerate(("a clay-toy star", "a embedding:clay-toy star", "a (embedding:clay-toy:1.0) star")):
        assert main([prompt, *words, "-o", f"{i}.png"]) == 0
    pictures = [Image.open(f"{i}.png") for i in range(3)]
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()
    recipe = json.loads(pictures[0].info["minisd"])
    assert [each["name"] for each in recipe["embeddings"]] == ["clay-toy"]
    assert f'TI hashes: "clay-toy: {recipe["embeddings"][0]["sha256"][:12]}"' in pictures[0].info["parameters"]
    assert main(["again", "0.png", "-o", "again.png"]) == 0
    with open("0.png", "rb") as first, open("again.png", "rb") as second:
        assert first.read() == second.read()
    assert main(["tokens", "a clay-toy star", "-m", str(reduced_file), "--json"]) == 0
    ids = json.loads(capsys.readouterr().out.splitlines()[-1])["chunks"][0][0]["ids"]
    assert ids[2:5] == [FIRST_ID, FIRST_ID + 1, FIRST_ID + 2]
    assert main(["tokens", "a clay-toy star", "-m", str(reduced_file)]) == 0
    assert f"[row] {FIRST_ID}" in capsys.readouterr().out
    assert main(["a embedding:clay-tox star", *words, "-o", "x.png"]) == 3
    assert "clay-tox: does not exist" in capsys.readouterr().err
    assert main(["a embedding:clay-toy star", "--plain-prompt", *words, "-o", "plain.png"]) == 0
    assert Image.open("plain.png").tobytes() != pictures[0].tobytes()
    assert named_in([Piece("a star")], "original") == []
