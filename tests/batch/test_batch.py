"""Batches: the same bytes however they are drawn, what is missing and nothing else, each file whole, what goes wrong told."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from batches import QUICK, drawn, errors, rows, write
from PIL import Image
from safetensors.torch import load_file

import minisd
from minisd.batch import formats, store
from minisd.batch.rows import seed_of
from minisd.cli import main
from minisd.pictures.metadata import read_recipe

COUNT = 8


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    return write(tmp_path_factory.mktemp("manifest") / "m.jsonl", rows(COUNT))


def batch(manifest: str, out: Path, *more: str) -> int:
    return main(["batch", manifest, "-o", str(out), *QUICK, "--shard-rows", "3", *more])


@pytest.fixture(scope="module")
def alone(manifest, tmp_path_factory):
    """Drawn by one process, in one go."""
    out = tmp_path_factory.mktemp("alone") / "out"
    assert batch(manifest, out, "--workers", "1") == 0
    return drawn(out)


def test_a_row_is_the_picture_of_its_own_call(alone, tiny):
    """Bit for bit, with the seed that its id has; `minisd again` reads its recipe."""
    for i in (0, 7):
        row = rows(COUNT)[i]
        seed = seed_of(0, row["id"])
        expected = tiny(row["prompt"], seed=seed, steps=1, width=16, height=16)
        name = f"{i // 3:05}/{row['id']}"
        with Image.open(io.BytesIO(alone[f"{name}.png"])) as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(expected.images[0]))
            assert json.loads(picture.info["minisd"]) == expected.metadata[0]
        assert json.loads(alone[f"{name}.json"]) == {"id": row["id"], **expected.metadata[0]}


def test_workers_draw_the_same_bytes(manifest, alone, tmp_path):
    """Two processes; and three machines, one after the other, each with its shards."""
    assert batch(manifest, tmp_path / "two", "--workers", "2") == 0
    assert drawn(tmp_path / "two") == alone
    for i in (3, 1, 2):
        assert batch(manifest, tmp_path / "three", "--workers", "1", "--shard", f"{i}/3") == 0
    assert drawn(tmp_path / "three") == alone


@pytest.mark.slow
def test_another_order_gives_the_same_pictures(alone, tmp_path):
    manifest = write(tmp_path / "m.jsonl", reversed(rows(COUNT)))
    assert batch(manifest, tmp_path / "out", "--workers", "1") == 0
    assert {name[6:]: data for name, data in drawn(tmp_path / "out").items()} == {name[6:]: d for name, d in alone.items()}


def test_started_again_it_draws_what_is_missing_and_nothing_else(manifest, alone, tmp_path, capsys):
    assert batch(manifest, tmp_path, "--workers", "1", "--json") == 0
    gone = [tmp_path / "00000" / "row-00001.png", tmp_path / "00002" / "row-00007.png"]
    for path in gone:
        path.unlink()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png")}
    capsys.readouterr()
    assert batch(manifest, tmp_path, "--workers", "1", "--json") == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["drawn"], facts["already"], facts["failed"]) == (2, COUNT - 2, 0)
    assert drawn(tmp_path) == alone
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.png") if path not in gone} == before


@pytest.mark.slow
def test_a_manifest_may_grow_and_lines_be_emptied(manifest, alone, tmp_path):
    lines = Path(manifest).read_bytes().splitlines(keepends=True)
    growing = write(tmp_path / "m.jsonl", lines[:4])
    assert batch(growing, tmp_path / "out", "--workers", "1") == 0
    write(tmp_path / "m.jsonl", [*lines[:4], b"\n", *lines[5:]])
    assert batch(growing, tmp_path / "out", "--workers", "1") == 0
    assert drawn(tmp_path / "out") == {name: data for name, data in alone.items() if "row-00004" not in name}


def test_rows_that_have_moved_are_told(manifest, tmp_path, capsys):
    lines = Path(manifest).read_bytes().splitlines(keepends=True)
    assert batch(manifest, tmp_path / "out", "--workers", "1") == 0
    moved = write(tmp_path / "m.jsonl", lines[1:])
    capsys.readouterr()
    assert batch(moved, tmp_path / "out", "--workers", "1") == 2
    assert "shard 0: expected pictures of lines 1 to 3 alone, found 'row-00000'" in capsys.readouterr().err
    assert len(list((tmp_path / "out").rglob("*.png"))) == COUNT


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--seed", "1"], "--seed: the pictures in"),
        (["--cfg", "3"], 'defaults: .* found {"steps": 1, "guidance_scale": 3.0'),
        (["--format", "webp"], "format: the pictures in .* begun with .png., found .webp."),
        (["--shard-rows", "6"], "shard-rows: .* begun with 3, found 6; choose another -o"),
        (["-m", "tiny-lit"], "model: .* begun with null, found"),
    ],
)
def test_what_was_begun_otherwise_is_not_gone_on_with(manifest, tmp_path, capsys, more, words):
    write(tmp_path / "m.jsonl", [])
    assert batch(str(tmp_path / "m.jsonl"), tmp_path / "out", "--workers", "1") == 0
    assert batch(str(tmp_path / "m.jsonl"), tmp_path / "out", "--workers", "1", *more) == 2
    assert re.search(words, capsys.readouterr().err)


@pytest.fixture
def one_thread():
    """As workers have: of an encoder, other numbers of threads give other last digits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_many_models_and_options(tmp_path, tiny, one_thread):
    """Each row by itself: model, size, sampler, negative prompt, a picture to draw over whose path begins at the manifest."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    given = [
        {"id": "a", "prompt": "a star", "seed": 1},
        {"id": "b", "prompt": "a star", "seed": 1, "model": "tiny-lit"},
        {"id": "c", "prompt": "a star", "seed": 1, "size": "24x32", "sampler": "dpmpp_2m", "negative": "grey", "cfg": 3},
        {"id": "d", "prompt": "a star", "seed": 1, "init": "red.png", "strength": 0.5, "steps": 4, "width": 32, "height": 32},
        {"id": "e", "prompt": "a star", "seed": 1, "model": "tiny-lit", "steps": 2},
    ]
    assert main(["batch", write(tmp_path / "m.jsonl", given), "-o", str(tmp_path / "out"), *QUICK, "--workers", "1"]) == 0
    lit = minisd.load("tiny-lit", device="cpu")
    common = {"seed": 1, "steps": 1, "width": 16, "height": 16}
    expected = {
        "a": tiny("a star", **common),
        "b": lit("a star", **common),
        "c": tiny("a star", "grey", 24, 32, seed=1, steps=1, guidance_scale=3, sampler="dpmpp_2m"),
        "d": tiny("a star", seed=1, steps=4, width=32, height=32, init_image=str(tmp_path / "red.png"), strength=0.5),
        "e": lit("a star", **common | {"steps": 2}),
    }
    for id, result in expected.items():
        path = tmp_path / "out" / "00000" / f"{id}.png"
        assert np.array_equal(np.asarray(Image.open(path)), np.asarray(result.images[0])), id
        recipe, expected_recipe = read_recipe(path), result.metadata[0]
        for each in (recipe, expected_recipe):  # the library's may begin at the working folder
            each["model_path"] = each["model_path"] and os.path.abspath(each["model_path"])
        assert recipe == expected_recipe


@pytest.mark.parametrize(("kind", "suffix"), [("jpeg", ".jpg"), ("webp", ".webp"), ("latents", ".safetensors")])
def test_formats(tmp_path, tiny, kind, suffix):
    manifest = write(tmp_path / "m.jsonl", [{"id": "a.b", "prompt": "a star", "seed": 1}])
    assert batch(manifest, tmp_path / "out", "--workers", "1", "--format", kind) == 0
    result = tiny("a star", seed=1, steps=1, width=16, height=16)
    path = tmp_path / "out" / "00000" / f"a.b{suffix}"
    if kind == "latents":
        assert np.array_equal(load_file(path)["latents"].numpy(), result.latents[0].numpy())
    else:
        difference = np.asarray(Image.open(path), float) - np.asarray(result.images[0], float)
        assert np.abs(difference).mean() < 12
    assert json.loads((tmp_path / "out" / "00000" / "a.b.json").read_text())["prompt"] == "a star"


def test_tars(manifest, alone, tmp_path):
    """As WebDataset reads them: files of a sample follow one another and have one name.  Made again, the same bytes."""
    assert batch(manifest, tmp_path, "--workers", "1", "--format", "wds") == 0
    tars = sorted(tmp_path.glob("*.tar"))
    assert [path.name for path in tars] == ["00000.tar", "00001.tar", "00002.tar"]
    found = {}
    for path in tars:
        with tarfile.open(path) as tar:
            names = tar.getnames()
            assert names == [f"{id}{end}" for id in sorted({name[:9] for name in names}) for end in (".json", ".png")]
            found |= {f"{path.stem}/{name}": tar.extractfile(name).read() for name in names}
    assert found == alone
    before = [path.read_bytes() for path in tars]
    tars[1].unlink()
    assert batch(manifest, tmp_path, "--workers", "1", "--format", "wds") == 0
    assert [path.read_bytes() for path in tars] == before
    assert not (tmp_path / ".parts").exists() or not list((tmp_path / ".parts").iterdir())


@pytest.mark.slow
def test_a_tar_that_lacks_a_sample_gets_it(tmp_path):
    """A row that could not be drawn, and was put right."""
    given = [{"id": "a", "prompt": "a star"}, {"id": "b", "prompt": "a star", "width": 13}, {"id": "c.d", "prompt": "a star"}]
    manifest = write(tmp_path / "m.jsonl", given)
    assert batch(manifest, tmp_path / "out", "--workers", "1", "--format", "wds") == 1
    assert "expected no dot" in errors(tmp_path / "out")[3]
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == ["a.json", "a.png"]
        first = tar.extractfile("a.png").read()
    write(tmp_path / "m.jsonl", [given[0], {**given[1], "width": 16}])
    assert batch(manifest, tmp_path / "out", "--workers", "1", "--format", "wds") == 0
    with tarfile.open(tmp_path / "out" / "00000.tar") as tar:
        assert tar.getnames() == ["a.json", "a.png", "b.json", "b.png"]
        assert tar.extractfile("a.png").read() == first
    assert not (tmp_path / "out" / "errors.jsonl").exists()


@pytest.mark.slow
def test_through_fsspec(manifest, alone, tmp_path):
    """A URL in the place of a folder, and of a manifest."""
    pytest.importorskip("fsspec")
    out = tmp_path / "out"
    argv = ["batch", Path(manifest).as_uri(), "-o", out.as_uri(), *QUICK, "--shard-rows", "3", "--workers", "1"]
    assert main(argv) == 0
    assert drawn(out) == alone
    (out / "00001" / "row-00004.png").unlink()
    assert main(argv) == 0
    assert drawn(out) == alone
    assert main([*argv[:2], "-o", "nowhere://x", *argv[4:]]) == 2


# ---- what goes wrong ----


def test_dry_run_counts_checks_and_writes_nothing(tmp_path, capsys):
    given = [*rows(4), {"id": "x", "prompt": "a", "steps": 0}, {"id": "y", "prompt": "a", "width": 13}]
    manifest = write(tmp_path / "m.jsonl", [*given, {"id": "z", "prompt": "a star", "model": "tiny-lit"}])
    assert batch(manifest, tmp_path / "out", "--dry-run", "--json", "--workers", "2") == 1
    out, err = capsys.readouterr()
    facts = json.loads(out)
    assert (facts["missing"], facts["already"], facts["failed"]) == (5, 0, 2)
    assert facts["models"] == {"tiny": 4, "tiny-lit": 1}
    assert 0 < facts["seconds"] < 60
    assert "line 5: steps" in err
    assert "line 6: width" in err
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_full_ends_the_run(manifest, alone, tmp_path, monkeypatch, capsys):
    """What is written by then is whole; with room it goes on."""
    written = []

    def sync(path):
        written.append(path)
        if len(written) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(store, "sync", sync)
        assert batch(manifest, tmp_path, "--workers", "1") == 6
    assert "No space left on device" in capsys.readouterr().err
    found = drawn(tmp_path)
    assert 0 < len(found) < len(alone)
    assert found.items() <= alone.items()
    assert batch(manifest, tmp_path, "--workers", "1") == 0
    assert drawn(tmp_path) == alone


@pytest.mark.parametrize("name", ["file", "file/below", "link", "loop", ""])
def test_places_that_cannot_be_written_to(manifest, tmp_path, capsys, name):
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "link").symlink_to("nowhere/else")
    (tmp_path / "loop").symlink_to("loop")
    assert main(["batch", manifest, "-o", str(tmp_path / name) if name else "", "--workers", "1"]) in (2, 6)
    assert "output" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "link", "loop"]


def test_a_model_that_is_none_is_told_at_once(manifest, tmp_path):
    assert batch(manifest, tmp_path / "out", "-m", "none") == 3
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_worker_that_dies_of_a_row_costs_that_row(tmp_path):
    """Three times killed in the midst of one row: it is told, and all others are drawn."""
    manifest = write(tmp_path / "m.jsonl", rows(4))
    code = f"""
import os, sys, multiprocessing
from minisd.batch import drawing
draw = drawing.Drawer.drawn
def drawn(self, rows):
    if rows[0].id == "row-00001":
        os.kill(os.getpid(), 9)
    return draw(self, rows)
drawing.Drawer.drawn = drawn
if __name__ == "__main__":
    from minisd.cli import main
    sys.exit(main(["batch", {manifest!r}, "-o", "out", *{QUICK!r}, "--workers", "2"]))
"""
    (tmp_path / "script.py").write_text(code)
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    assert errors(tmp_path / "out") == {
        2: "the worker that drew it was ended by SIGKILL (as the system does when memory is short), 3 times"
    }
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3
    assert not list((tmp_path / "out").glob(".*"))


@pytest.mark.slow
def test_a_stream_is_drawn_as_it_comes(tmp_path):
    """Rows that come one by one are not kept waiting for a whole shard."""
    argv = [sys.executable, "-m", "minisd", "batch", "-", "-o", "out", *QUICK, "--workers", "1"]
    given = rows(3)
    with subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path) as process:
        for row in given:
            process.stdin.write(json.dumps(row) + "\n")
            process.stdin.flush()
            picture = tmp_path / "out" / "00000" / f"{row['id']}.png"
            deadline = time.monotonic() + 60
            while not picture.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert picture.exists()
        process.stdin.write(json.dumps({"id": "last", "prompt": "a star"}))  # without a line end
        process.stdin.close()
        assert process.wait(60) == 0
    assert (tmp_path / "out" / "00000" / "last.png").exists()


def test_together_rows_are_those_that_one_call_draws(tiny, tmp_path):
    """As on a GPU: the request of several rows gives each the picture of its own."""
    from minisd.batch.drawing import Drawer
    from minisd.batch.job import Job
    from minisd.batch.shards import Shards

    given = [
        {"id": "a", "prompt": "a red star", "cfg": 3},
        {"id": "b", "prompt": "a ring", "negative": "grey"},
        {"id": "c", "prompt": "a ring", "steps": 3},
        {"id": "d", "prompt": "a cross"},
        {"id": "e", "prompt": "word " * 100},
        {"id": "f", "prompt": "a heart", "cfg": 4},
        {"id": "g", "prompt": "a heart"},
    ]
    job = Job(str(tmp_path / "out"), defaults={"steps": 1, "width": 16, "height": 16}, loading={"device": "cpu"})
    kept = store.store_of(job.out)
    found = Shards(job, kept, (0, 1), pytest.fail, lambda _: None, lambda _: (2, True))
    pieces = [[row.id for row in piece.rows] for piece in found.pieces(write(tmp_path / "m.jsonl", given))]
    assert pieces == [["a", "f"], ["b"], ["c"], ["d", "e"], ["g"]]
    drawer = Drawer(job, lambda _: None)
    drawer.device = type("Gpu", (), {"type": "cuda"})()
    again = Shards(job, kept, (0, 1), pytest.fail, lambda _: None, lambda _: (9, True))
    for piece in again.pieces(str(tmp_path / "m.jsonl")):
        calls = list(drawer.together.calls(piece))
        assert [len(rows) for rows in calls] == ([2, 1] if "e" in [row.id for row in piece.rows] else [len(piece.rows)])
        for rows_ in calls:
            result = drawer.drawn(rows_)
            for i, row in enumerate(rows_):
                fields = {**job.defaults, **row.fields}
                assert np.array_equal(np.asarray(result.images[i]), np.asarray(tiny(**fields).images[0])), row.id


def piece_of(count: int, **more: object) -> tuple[Any, list[dict[str, Any]]]:
    from minisd.batch.rows import Row
    from minisd.batch.shards import Piece

    given = [{"prompt": row["prompt"], "seed": i} for i, row in enumerate(rows(count))]
    return Piece(tuple(Row(i + 1, f"r{i}", 0, fields) for i, fields in enumerate(given)), **more), given


@pytest.mark.parametrize("equal", [True, False])
def test_small_pictures_are_drawn_in_fours_where_that_changes_no_digit(tiny, tmp_path, monkeypatch, equal):
    """On a CPU.  The first four are drawn in both ways; whatever is found, each picture is that of its own call."""
    from minisd.batch.drawing import Drawer, together
    from minisd.batch.job import Job

    monkeypatch.setattr(together, "same", lambda joint, i, one: equal and isinstance(i, int))
    drawer, calls = Drawer(Job(str(tmp_path), defaults={"steps": 2}, loading={"device": "cpu"}), lambda _: None), list[int]()
    own = drawer.drawn
    drawer.drawn = lambda rows: (calls.append(len(rows)), own(rows))[1]
    piece, given = piece_of(9)
    drawer.draw(piece)
    drawer.finish()
    assert calls == ([4, 1, 1, 1, 1, 4, 1] if equal else [4, 1, 1, 1, 1, *[1] * 5])
    for i in (0, 3, 8) if equal else (0, 6):  # those that are drawn one by one in any case
        with Image.open(tmp_path / "00000" / f"r{i}.png") as picture:
            assert np.array_equal(np.asarray(picture), np.asarray(tiny(**given[i], steps=2).images[0]))


def test_what_four_took_is_let_go_before_two_are_tried(tmp_path):
    """Where memory is full, what they had made would leave no room for fewer."""
    from minisd.batch.drawing import Drawer
    from minisd.batch.job import Job

    drawer, held, failed = Drawer(Job(str(tmp_path), loading={"device": "cpu"}), print), [], []
    drawer.failed = lambda rows, missing, error: failed.append((len(rows), error))

    def without_room(rows: Any) -> Any:
        assert not any(each() is not None for each in held)
        maps = torch.zeros(len(rows))
        held.append(weakref.ref(maps))
        raise minisd.OutOfMemoryError("none") from torch.OutOfMemoryError("none")

    drawer.drawn = without_room
    drawer.draw(piece_of(4)[0])
    assert [count for count, _ in failed] == [1] * 4
    assert len(held) >= 7


def test_what_decides_whether_four_were_tried_before(tmp_path):
    """Not what pictures show, but the sizes that it leads to; two are tried anew, and one by one where four were not equal."""
    from dataclasses import replace

    from minisd.batch.drawing import Drawer, together
    from minisd.batch.job import Job

    drawer = Drawer(Job(str(tmp_path), loading={"device": "cpu"}), lambda _: None)
    four = piece_of(4)[0].rows

    def kind(**more: object) -> str:
        return drawer.together.kind([replace(row, fields={**row.fields, **more}) for row in four])

    assert {kind(steps=3), kind(negative_prompt="grey"), kind(guidance_scale=5), kind(prompt="a ring")} == {kind()}
    others = [{"guidance_scale": 1}, {"width": 32}, {"prompt": "word " * 100}, {"seed": 1}, {"seed": 1, "prompt": "a ring"}]
    assert len({kind(), *(kind(**more) for more in others)}) == 6
    calls: list[int] = []

    def draw(rows: Any) -> Any:
        calls.append(len(rows))
        return rows

    drawer.together.known = {drawer.together.kind(four): False, drawer.together.kind(four[:2]): True}
    assert drawer.together.drawn(four, draw) == [[row] for row in four]
    assert drawer.together.drawn(four[:2], draw) == [four[:2]]
    assert calls == [1, 1, 1, 1, 2]
    assert together.FEW == 4


def test_what_is_not_drawn_in_fours(tmp_path):
    """Large pictures, pictures that are drawn over, rows that differ, and those of which one may have ended a worker."""
    from minisd.batch.drawing import Drawer
    from minisd.batch.job import Job

    def calls(count: int, defaults: dict[str, Any], **more: object) -> list[int]:
        drawer = Drawer(Job(str(tmp_path), defaults=defaults, loading={"device": "cpu"}), lambda _: None)
        return [len(rows) for rows in drawer.together.calls(piece_of(count, **more)[0])]

    assert calls(4, {"width": 64, "height": 64}) == [4]
    assert calls(3, {}) == [1] * 3
    assert calls(4, {"width": 64, "height": 72}) == [1] * 4
    assert calls(4, {"init_image": "a.png"}) == [1] * 4
    assert calls(4, {}, apart=True) == [1] * 4
    assert calls(4, {}, there=frozenset({"r1"})) == [1] * 3


def test_missing_rows_are_drawn_with_those_that_were_there(tmp_path):
    """As on a GPU, where the last digits depend on how many are drawn in one call."""
    from minisd.batch.job import Job
    from minisd.batch.shards import Shards

    job, given = Job(str(tmp_path / "out")), rows(6)
    kept = store.store_of(job.out)
    for i in (0, 3):
        kept.write(f"00000/{given[i]['id']}.png", b"x")
    found = Shards(job, kept, (0, 1), pytest.fail, lambda _: None, lambda _: (3, True))
    pieces = list(found.pieces(write(tmp_path / "m.jsonl", given)))
    assert [[row.id for row in piece.rows] for piece in pieces] == [[row["id"] for row in given[i : i + 3]] for i in (0, 3)]
    assert [len(piece.missing) for piece in pieces] == [2, 2]


def test_pack_is_the_same_whenever_it_is_done(tmp_path):
    from minisd.batch.job import Job

    job, found = Job("", format="wds"), []
    for name, order in (("a", "xyz"), ("b", "zyx")):
        kept = store.Folder(tmp_path / name)
        for id in order:
            kept.write(f".parts/00000/{id}.png", id.encode())
            kept.write(f".parts/00000/{id}.json", b"{}")
            if name == "b":
                formats.pack(kept, job, 0, ["x", "y", "z"])
        if name == "a":
            formats.pack(kept, job, 0, ["x", "y", "z"])
        found.append((tmp_path / name / "00000.tar").read_bytes())
    assert found[0] == found[1]
