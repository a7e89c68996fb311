"""Pictures that a user gives: regular files, of a size that makes sense, and what they say of themselves."""

from __future__ import annotations

import json
import os
import struct
import time
import zlib
from pathlib import Path

import pytest
from PIL import Image, PngImagePlugin

from minisd.cli import main
from minisd.errors import UsageError
from minisd.pictures.init import open_picture
from minisd.pictures.metadata import read_recipe

SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(autouse=True)
def in_empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def flat_png(width: int, height: int) -> bytes:
    """A PNG of zeros in a few bytes for each thousand pixels."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    return SIGNATURE + head + chunk(b"IDAT", zlib.compress(bytes((width + 1) * height))) + chunk(b"IEND", b"")


def recipe_png(path: str, recipe: object) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_text("minisd", json.dumps(recipe))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)


def memory() -> int:
    """Bytes that the process has had at most."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["VmHWM"].split()[0]) << 10


def sparse(path: str, head: bytes, size: int) -> None:
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(size)


@pytest.mark.parametrize("read", [read_recipe, lambda path: open_picture("init_image", path)], ids=["again", "init"])
def test_sparse_and_heavy_headed_pictures_are_refused_at_once(read):
    head = flat_png(8, 8)[:33]
    sparse("text.png", head + struct.pack(">I", 2**31 - 20) + b"tEXt", 5 << 30)
    sparse("profile.png", head + struct.pack(">I", 40 << 20) + b"iCCP", 50 << 20)
    Path("many.png").write_bytes(head + chunk(b"tEXt", b"a\0b") * 20_000 + flat_png(8, 8)[33:])
    sparse("zeros.png", b"", 5 << 30)
    before = memory()
    for name in ("text.png", "profile.png", "many.png", "zeros.png"):
        begin = time.process_time()
        with pytest.raises(UsageError, match=rf"{name}: is n"):
            read(name)
        assert time.process_time() - begin < 2, name  # seconds
    assert memory() - before < 20 << 20


def test_wide_pictures_are_refused_before_their_pixels_are_made():
    Path("wide.png").write_bytes(flat_png(16_000_000, 1))
    Path("large.png").write_bytes(flat_png(7100, 7100))
    before = memory()
    with pytest.raises(UsageError, match=r"^mask wide.png: expected sides of at most 32,768 pixels, found 16000000x1"):
        open_picture("mask", "wide.png")
    with pytest.raises(UsageError, match=r"^mask large.png: expected at most 50 million pixels, found 7100x7100; scale it down$"):
        open_picture("mask", "large.png")
    assert memory() - before < 20 << 20
    Path("flat.png").write_bytes(flat_png(32_768, 2))
    assert open_picture("mask", "flat.png").size == (32_768, 2)


@pytest.mark.parametrize("arguments", [["a star", "--init"], ["a star", "--init", "whole.png", "--mask"], ["again"]])
def test_pipes_and_terminals_are_not_waited_for(arguments, capsys):
    Image.new("RGB", (64, 64)).save("whole.png")
    os.mkfifo("pipe.png")
    leader, terminal = os.openpty()
    for name in ("pipe.png", os.ttyname(terminal), "/dev/zero"):
        begin = time.monotonic()
        assert main([*arguments, name, *(["-o", "x.png"] if "again" in arguments else ["--steps", "1"])]) == 2
        assert time.monotonic() - begin < 5
        err = capsys.readouterr().err.splitlines()[-1]
        assert name in err
        assert "is not a regular file" in err
    os.close(leader)
    os.close(terminal)


def test_text_instead_of_a_picture_is_told_without_pythons_objects(capsys):
    Path("text.png").write_text("hello")
    with pytest.raises(UsageError, match=r"is no PNG, JPEG, WEBP picture that can be read: it does not begin like one$"):
        open_picture("init_image", "text.png")
    with pytest.raises(UsageError, match=r"^text.png: is not a PNG that can be read: it does not begin like one$"):
        read_recipe("text.png")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"width": 100, "height": 64}, "width: expected a multiple of 8, found 100; the nearest are 96 and 104"),
        ({"sampler": "heun3"}, "sampler: 'heun3' is unknown; did you mean heun"),
        ({"strength": 0.5}, "strength: expected an init_image to go with it"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_not_told_as_an_option(more, message, capsys):
    recipe_png("x.png", {"prompt": "a star", "seed": 1} | more)
    assert main(["again", "x.png"]) == 2
    wanted = f"minisd: error: x.png: its minisd chunk: {message}".replace("an init_image", "--init PICTURE")
    assert capsys.readouterr().err.splitlines()[-1].startswith(wanted)


@pytest.mark.parametrize("more", [{}, {"grid": 2}, {"compare": {"x": {}, "y": {}}}])
def test_a_recipe_without_a_prompt_is_one_line(more, capsys):
    recipe_png("x.png", {"prompt": None, "seed": 1, "steps": 1} | more)
    assert main(["again", "x.png"]) == 2
    assert "x.png: prompt: the picture's caller gave a conditioning" in capsys.readouterr().err
    for negative in (None, 7, ["a"]):
        recipe_png("x.png", {"prompt": "a star", "negative_prompt": negative, "seed": 1, "steps": 1} | more)
        assert main(["again", "x.png"]) == 2
        assert capsys.readouterr().err.startswith("minisd: error: ")


@pytest.mark.parametrize("device", ["privateuseone", "hpu", "xla", "nonsense", "meta", "cuda:99", "\x1b[2J"])
def test_devices_that_this_machine_has_not(device, capsys):
    assert main(["a star", "--device", device, "-o", "x.png"]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("minisd: error: --device: expected one that ")
    assert "\x1b" not in err
    recipe_png("x.png", {"prompt": "a star", "seed": 1, "steps": 1, "device": device})
    assert main(["again", "x.png"]) == 0
    assert "expect small differences" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["99999992x99999992", "4104x64", "64x56", "65x64"])
def test_inspect_counts_no_picture_that_cannot_be_drawn(size, capsys):
    assert main(["inspect", "tiny", "--tree", "--size", size]) == 2
    assert "size: expected multiples of 8 from 64 to 4096, found" in capsys.readouterr().err


@pytest.mark.parametrize(
    "blocks", ["input.0-99999999999=1", f"input.{'9' * 5000}=1", "input.0-9999=1", "input.3-0=1", "input.²=1"]
)
def test_ranges_of_blocks_that_no_model_has(blocks, capsys):
    begin = time.monotonic()
    assert main(["merge", "tiny", "tiny-lit", "-o", "x.safetensors", "--blocks", blocks]) == 2
    assert time.monotonic() - begin < 10
    assert "--blocks: expected blocks of this UNet" in capsys.readouterr().err
