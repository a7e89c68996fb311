"""What may be wrong with a row, each reported with its line, while the rows around it are drawn."""

from __future__ import annotations

import csv
import json
import re

import pytest
from batches import QUICK, drawn, errors, write

from minisd.batch.rows import mark, no_name, seed_of
from minisd.cli import main

FINE = {"prompt": "a star"}


def row(**fields: object) -> bytes:
    return json.dumps({"id": "x", **FINE, **fields}).encode() + b"\n"


# What stands on a line, and words of what is said of it.
MALFORMED = {
    "no JSON": (b"a red circle\n", "expected a JSON object"),
    "half a line": (b'{"id": "x", "prompt": "a st\n', "expected a JSON object"),
    "two objects": (b'{"id": "x"} {"id": "y"}\n', "expected a JSON object"),
    "a list": (b'["x", "a star"]\n', "expected a JSON object, found .'x', 'a star'"),
    "a number": (b"5\n", "expected a JSON object, found 5"),
    "nothing": (b"null\n", "expected a JSON object, found None"),
    "a NUL": (b"\0\n", "expected a JSON object"),
    "no UTF-8": (b'{"id": "x", "prompt": "\xff"}\n', "UTF-8"),
    "UTF-16": ('{"id": "x"}'.encode("utf-16-le") + b"\n", "expected a JSON object"),
    "NaN": (b'{"id": "x", "prompt": "a", "guidance_scale": NaN}\n', "NaN is no number"),
    "infinity": (b'{"id": "x", "prompt": "a", "guidance_scale": -Infinity}\n', "-Infinity is no number"),
    "a field twice": (b'{"id": "x", "prompt": "a", "prompt": "b"}\n', "'prompt' is there twice"),
    "deep": (b"[" * 100_000 + b"\n", "JSON"),
    "a number of 5,000 digits": (b'{"id": ' + b"9" * 5000 + b"}\n", "JSON"),
    "a line of 2 MB": (b'{"id": "x", "prompt": "' + b"a" * (2 << 20) + b'"}\n', "at most 1,048,576 bytes"),
    "no id": (json.dumps(FINE).encode() + b"\n", "id: expected a text or a whole number, found none"),
    "id null": (row(id=None), "id: expected a text or a whole number, found none"),
    "id true": (row(id=True), "id: .* found True"),
    "id 1.5": (row(id=1.5), "id: .* found 1.5"),
    "id a list": (row(id=["x"]), r"id: .* found \['x'\]"),
    "id empty": (row(id=""), "id: .* it has 0 bytes"),
    "id of folders": (row(id="../../x"), "id: .* it has a '/'"),
    "id of Windows' folders": (row(id="..\\x"), r"id: .* it has a '\\\\'"),
    "id two dots": (row(id=".."), "id: .* begins or ends with a dot"),
    "id hidden": (row(id=".x"), "id: .* begins or ends with a dot"),
    "id with a space at its end": (row(id="x "), "id: .* begins or ends with a dot or a space"),
    "id with a NUL": (row(id="x\0y"), "id: .* cannot be shown"),
    "id with a line break": (row(id="x\ny"), "id: .* cannot be shown"),
    "id of escape sequences": (row(id="\x1b[2J"), "id: .* cannot be shown"),
    "id of half a letter": (b'{"id": "\\ud800", "prompt": "a"}\n', "id: .* it is no UTF-8"),
    "id too long": (row(id="é" * 100), "id: .* it has 200 bytes"),
    "id of a device": (row(id="con.x"), "id: .* device on Windows"),
    "id again": (row(id="good-1"), "id: expected one of its own, found 'good-1'"),
    "id again in capitals": (row(id="GOOD-1"), "id: expected one of its own, found 'GOOD-1'"),
    "no prompt": (b'{"id": "x"}\n', "prompt: expected a text, found None"),
    "prompt a list": (row(prompt=["a", "b"]), "prompt: expected a text, found"),
    "prompt too long": (row(prompt="a" * 10_001), "prompt: expected at most 10,000 characters"),
    "prompt with a NUL": (row(prompt="a\0"), "prompt: expected text in UTF-8 without a NUL"),
    "prompt of half a letter": (b'{"id": "x", "prompt": "\\ud800"}\n', "prompt: expected text in UTF-8"),
    "a weight that is none": (row(prompt="<lora:x:y>"), "prompt: expected <lora:NAME"),
    "an unknown field": (row(promt="a"), "promt: unknown; did you mean prompt"),
    "diffusers' name": (row(num_inference_steps=3), "num_inference_steps: unknown; here it is steps"),
    "a field by two names": (row(cfg=3, guidance_scale=4), "guidance_scale: expected it once"),
    "several pictures": (row(num_images=2), "num_images: a row of a manifest is one picture"),
    "latents": (row(latents=[0]), "latents: a row of a manifest is one picture"),
    "steps a text": (row(steps="many"), "steps: expected a whole number from 1 to 999"),
    "no steps": (row(steps=0), "steps: expected a whole number from 1 to 999, found 0"),
    "steps true": (row(steps=True), "steps: expected a whole number"),
    "seed too large": (row(seed=2**64), "seed: expected a whole number"),
    "several seeds": (row(seed=[1, 2]), "seed: expected one value, found a list"),
    "size of one number": (row(size="64"), "size: expected WIDTHxHEIGHT"),
    "size of three": (row(size=[1, 2, 3]), "size: expected WIDTHxHEIGHT"),
    "size twice": (row(size="64x64", width=64), "size: expected none beside width and height"),
    "width of no eights": (row(width=65), "width: expected a multiple of 8, found 65"),
    "an unknown sampler": (row(sampler="best"), "sampler"),
    "sampler a number": (row(sampler=5), "sampler: expected the name of one"),
    "clip_skip beyond the encoder": (row(clip_skip=99), "clip_skip: expected a whole number from 1 to"),
    "a strength without a picture": (row(strength=0.5), "strength: expected an init_image"),
    "a picture that is not there": (row(init_image="none.png"), "init_image .*none.png: does not exist"),
    "a picture that is none": (row(init_image="manifest.jsonl"), "init_image .*manifest.jsonl: is no PNG"),
    "a model that is not there": (row(model="none"), "none: does not exist"),
    "a model that is none": (row(model="manifest.jsonl"), "does not exist|manifest.jsonl"),
    "a refiner that is not there": (row(refiner="none"), "none: does not exist"),
    "a VAE that is not there": (row(vae="none"), "none: does not exist"),
    "a LoRA that is not there": (row(loras=["none"]), "none: does not exist"),
    "loras a text": (row(loras="none"), "loras: expected a list of LoRAs"),
    "a control without a picture": (row(controls=[{"source": "x"}]), "controls: expected objects with source and image"),
    "SDXL's second prompt": (row(prompt_2="b"), "prompt_2: only SDXL"),
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """All of it in one manifest, a good row after each bad one: (folder, exit code, output folder, lines by kind)."""
    folder = tmp_path_factory.mktemp("malformed")
    lines, where = [row(id="good-1")], {}
    for i, (kind, (line, _)) in enumerate(MALFORMED.items()):
        where[kind] = len(lines) + 1
        unique = line.replace(b'"id": "x"', f'"id": "x{i}"'.encode(), 1)
        lines.append(unique)
        if i % 16 == 0:
            lines += [b"\n", row(id=f"good-after-{i}")]
    manifest = write(folder / "manifest.jsonl", lines)
    code = main(["batch", manifest, "-o", str(folder / "out"), *QUICK, "--workers", "1", "--shard-rows", "30"])
    return folder, code, where


@pytest.mark.parametrize("kind", MALFORMED)
def test_is_reported_with_its_line(run, kind):
    folder, _, where = run
    found = errors(folder / "out")
    assert re.search(MALFORMED[kind][1], found[where[kind]]), found[where[kind]]


def test_all_others_are_drawn(run):
    folder, code, where = run
    assert code == 1
    assert len(MALFORMED) >= 40
    assert errors(folder / "out").keys() == set(where.values())
    good = {"good-1", *(f"good-after-{i}" for i in range(0, len(MALFORMED), 16))}
    assert {name.split("/")[1] for name in drawn(folder / "out")} == {f"{id}{end}" for id in good for end in (".png", ".json")}


def test_names_of_files():
    for name in ("x", "0001", "ein Bild", "é", "x.y", "x_(1)", "名前", "a" * 150):
        assert no_name(name) is None, name
    for name in ("a/b", "con", "NUL", "lpt1.txt", "a:b", "x.", "a" * 151, "\u202ex", "\u200b"):
        assert no_name(name), name


def test_names_that_file_systems_take_for_one():
    composed, decomposed = "é", "e\u0301"
    assert mark(composed) == mark(decomposed) == mark("É") != mark("e")
    assert mark("ß") == mark("SS")


def test_seeds_depend_on_the_job_and_the_id_alone():
    assert seed_of(0, "a") == 1011947698  # the second four bytes of sha256sum's
    assert len({seed_of(job, id) for job in range(10) for id in "abcdef"}) == 60


def test_tables_and_lines_say_the_same(tmp_path):
    """CSV, TSV and JSON lines of the same rows, the same bytes; empty cells are not given, and texts become what they should."""
    rows = [
        {"id": "a", "prompt": "a red circle, on a blue background", "seed": 3, "size": "24x16", "cfg": 3.5},
        {"id": "b", "prompt": 'a "star"\nin two lines', "zero_negative": False, "original_size": [16, 16]},
        {"id": "7", "prompt": "a ring", "sampler": "DPM++ 2M Karras", "steps": 2, "sampler_options": {}},
    ]
    names = ["id", "prompt", "seed", "size", "cfg", "zero_negative", "original_size", "sampler", "steps", "sampler_options"]
    write(tmp_path / "m.jsonl", rows)
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with open(tmp_path / f"m{suffix}", "w", newline="", encoding="utf-8-sig") as file:
            table = csv.DictWriter(file, names, delimiter=delimiter)
            table.writeheader()
            table.writerows(
                {n: json.dumps(v) if isinstance(v, list | dict | bool) else v for n, v in row.items()} for row in rows
            )
    found = []
    for suffix in (".jsonl", ".csv", ".tsv"):
        out = tmp_path / suffix[1:]
        assert main(["batch", str(tmp_path / f"m{suffix}"), "-o", str(out), *QUICK, "--workers", "1", "--shard-rows", "90"]) == 0
        found.append(drawn(out))
    assert len(found[0]) == 6
    assert found[0] == found[1] == found[2]


def test_malformed_tables(tmp_path):
    lines = [
        "id,prompt,steps",
        "a,a star,1",
        "b,a star",
        "c,a star,1,2",
        "d,a star,many",
        "",
        'e,"a ""star""",1',
        'f,"a star"x,1',
        "g,a,",
    ]
    write(tmp_path / "m.csv", [line.encode() + b"\n" for line in lines] + [b"h,\xff,1\n"])
    assert main(["batch", str(tmp_path / "m.csv"), "-o", str(tmp_path / "out"), *QUICK, "--workers", "1"]) == 1
    assert {name[6:] for name in drawn(tmp_path / "out") if name.endswith(".png")} == {"a.png", "e.png", "g.png"}
    found = errors(tmp_path / "out")
    assert found.keys() == {3, 4, 5, 8, 10}
    for line, words in {
        3: "expected 3 cells, found 2",
        4: "found 4",
        5: "steps: expected a whole",
        8: "CSV",
        10: "UTF-8",
    }.items():
        assert words in found[line]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("m.txt", b"", "expected a name that ends in .jsonl"),
        ("m.csv", b"", "expected different names on the first line, among them id, found none"),
        ("m.csv", b"prompt,seed\n", "among them id, found prompt, seed"),
        ("m.csv", b"id,id\n", "expected different names"),
        ("none.jsonl", None, "does not exist"),
        ("folder.jsonl", ..., "is a folder"),
    ],
)
def test_manifests_that_are_none(tmp_path, capsys, name, content, words):
    if content is ...:
        (tmp_path / name).mkdir()
    elif content is not None:
        (tmp_path / name).write_bytes(content)
    assert main(["batch", str(tmp_path / name), "-o", str(tmp_path / "out"), "--workers", "1", "--device", "cpu"]) == 2
    assert words in capsys.readouterr().err


def test_parquet(tmp_path):
    """Rows are counted from 1; what is null is not given."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.table({"id": ["a", "b", "b"], "prompt": ["a star", "a ring", "a ring"], "seed": [None, 5, None]})
    parquet.write_table(table, tmp_path / "m.parquet")
    write(tmp_path / "m.jsonl", [{"id": "a", "prompt": "a star"}, {"id": "b", "prompt": "a ring", "seed": 5}])
    for suffix, code in (("parquet", 1), ("jsonl", 0)):
        argv = ["batch", str(tmp_path / f"m.{suffix}"), "-o", str(tmp_path / suffix), *QUICK, "--workers", "1"]
        assert main(argv) == code
    assert drawn(tmp_path / "parquet") == drawn(tmp_path / "jsonl")
    assert errors(tmp_path / "parquet").keys() == {3}
    (tmp_path / "none.parquet").write_bytes(b"PAR1 no")
    assert main(["batch", str(tmp_path / "none.parquet"), "-o", str(tmp_path / "o"), *QUICK]) == 2
