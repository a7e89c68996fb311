"""Files made by grammar, as grammar.py has it: nothing but the documented errors, and no input that takes long or much memory.

A twentieth of each kind in every run, all of them with -m slow; `pytest -rP` shows the figures.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

import grammar
import pytest
import torch
from safetensors.torch import save
from storm import InMemory, Storm

from minisd.files.checkpoint import open_checkpoint
from minisd.files.tensors import TORCH, load_tensors
from minisd.library.places import tiny_checkpoint
from minisd.pictures.metadata import read_recipe
from minisd.plan import planned
from minisd.recipe import repeat
from minisd.workbench.comparing import Axis, cells_again, compare
from minisd.workbench.folders.folder import from_folder, to_folder
from minisd.workbench.merging import merge
from minisd.workbench.merging import repeat as repeat_merge

SHARES = [pytest.param(60, id="a 60th"), pytest.param(1, id="all", marks=pytest.mark.slow)]
pytestmark = [
    pytest.mark.parametrize("share", SHARES),
    pytest.mark.filterwarnings("ignore"),  # of pickletools and Pillow, about texts and sizes that are then refused
]


def opened(file: InMemory, content: bytes) -> None:
    checkpoint = open_checkpoint(file.holding(content))
    load_tensors(checkpoint, [key for key, entry in checkpoint.entries.items() if entry.dtype in TORCH], torch.float32)


def test_safetensors(share):
    """200,000."""
    file = InMemory()
    storm = Storm().run(grammar.many(grammar.safetensors, 200_000 // share, seed=share), lambda content: opened(file, content))
    assert min(storm.good, storm.bad) > 10_000 // share


def test_ckpt(share):
    """20,000."""
    file = InMemory()
    storm = Storm().run(grammar.many(grammar.ckpt, 20_000 // share, seed=share), lambda content: opened(file, content))
    assert min(storm.good, storm.bad) > 1000 // share


# ---- recipes ----


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """What the sheet of a comparison carries; without "compare" it is that of a picture."""
    sheet = compare("a star", seeds=[1], x=Axis("steps", (1, 2)), width=32, height=32, device="cpu")
    return json.loads(json.dumps(sheet.recipe))


def test_recipes_in_pictures(share, recipe, tiny):
    """5,000: read, and planned as `minisd again` would draw them."""
    file = InMemory()
    single = {name: value for name, value in recipe.items() if name != "compare"}

    def again(content: bytes) -> None:
        found = read_recipe(file.holding(content))
        if "compare" in found:
            cells_again(found)
        else:
            planned(repeat(found, tiny.checkpoint.path), tiny.capabilities())

    rng = random.Random(share)
    storm = Storm().run((grammar.png(rng, rng.choice([single, recipe])) for _ in range(5000 // share)), again)
    assert min(storm.good, storm.bad) > 500 // share


def test_recipes_of_comparisons(share, recipe):
    """2,500 as JSON alone, changed in what makes the sheet."""
    rng = random.Random(share)

    def again(compared: Any) -> None:
        cells_again(recipe | {"compare": json.loads(grammar.dumped(compared))})

    def changed() -> Iterator[Any]:
        while True:
            compared = grammar.changed(rng, recipe["compare"], rng.choice([0.0, 0.05, 0.2]))
            with suppress(ValueError, RecursionError):
                json.loads(grammar.dumped(compared))
                yield compared

    storm = Storm().run(islice(changed(), 2500 // share), again)
    assert min(storm.good, storm.bad) > 250 // share


def test_recipes_of_merges(share, tmp_path, monkeypatch):
    """2,500, in the metadata of a file, until there would be something to write."""
    sources = [str(tiny_checkpoint()), str(tiny_checkpoint().with_name("tiny-lit.safetensors"))]
    merge(sources, tmp_path / "merged.safetensors", 0.3, blocks="input.1=0.5", by_part={"vae": 0.0})
    text = open_checkpoint(tmp_path / "merged.safetensors").metadata["minisd.merge"]
    rng, file = random.Random(share), InMemory()
    monkeypatch.setattr("minisd.workbench.merging.write_checkpoint", lambda target, *_, **__: Path(target))

    def again(facts: str) -> None:
        content = save({"w": torch.zeros(1)}, {"minisd.merge": facts})
        repeat_merge(file.holding(content), "x.safetensors", [tiny_checkpoint().parent])

    def changed() -> str:
        return grammar.dumped(grammar.changed(rng, json.loads(text), rng.choice([0.0, 0.03, 0.1])))

    storm = Storm().run((changed() for _ in range(2500 // share)), again)
    assert min(storm.good, storm.bad) > 250 // share


# ---- folders of diffusers ----


def test_folders(share, tmp_path, reduced_file, monkeypatch):
    """2,000: configurations, an index and headers changed, each as JSON or as a file."""
    folder = to_folder(reduced_file, tmp_path / "folder")
    whole = {path: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".json", ".safetensors")}
    monkeypatch.setattr("minisd.workbench.folders.folder.write_checkpoint", lambda target, *_, **__: Path(target))
    rng = random.Random(share)

    def spoiled(path: Path) -> bytes:
        if path.suffix == ".safetensors":
            return with_header(rng, whole[path]) if rng.random() < 0.7 else grammar.safetensors(rng)
        text = grammar.dumped(grammar.changed(rng, json.loads(whole[path]), rng.choice([0.0, 0.05, 0.3])))
        return text.encode(errors="surrogatepass") if rng.random() < 0.9 else grammar.anything(rng).encode(errors="replace")

    def take(path: Path) -> None:
        content = spoiled(path)
        index = path.with_name(f"{path.name}.index.json")
        if path.suffix == ".safetensors" and rng.random() < 0.2:  # a network in shards: the file goes, its index comes
            path.unlink()
            index.write_text(grammar.dumped(grammar.changed(rng, {"weight_map": {"a": path.name, "b": "../x"}}, 0.2)))
        else:
            path.write_bytes(content)
        try:
            from_folder(folder, tmp_path / "x.safetensors")
        finally:
            path.write_bytes(whole[path])
            index.unlink(missing_ok=True)

    storm = Storm().run((rng.choice(list(whole)) for _ in range(2000 // share)), take, megabytes=64 + 64)  # files of 20 MB
    assert min(storm.good, storm.bad) > 200 // share


def with_header(rng: random.Random, content: bytes) -> bytes:
    """A file with one tensor of another shape, type or name, its numbers as many as its header says."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    header.pop("__metadata__", None)
    if not header:
        return grammar.safetensors(rng)
    key = rng.choice(list(header))
    shape = header[key]["shape"]
    match rng.randrange(5):
        case 0:
            shape[:] = rng.choice([[], [1], shape[::-1], [*shape, 1], [0, *shape[1:]], [1] * 9])
        case 1:
            header[key]["dtype"] = rng.choice(["F16", "I64", "BOOL", "F8_E5M2", "F4", "C64"])
        case 2:
            header[rng.choice([key + ".1", "up_blocks.99.x", "text_model." + key, "²", "a.0.b", "0"])] = header.pop(key)
        case 3:
            del header[key]
        case _:
            header |= {f"extra.{i}": header[key] | {} for i in range(rng.randrange(3))}
    end = 0
    for facts in header.values():
        count = 1
        for length in facts["shape"]:
            count *= length
        start, end = end, end + count * {"F16": 2, "I64": 8, "BOOL": 1, "F8_E5M2": 1, "C64": 8}.get(facts["dtype"], 4)
        facts["data_offsets"] = [start, end]
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)
