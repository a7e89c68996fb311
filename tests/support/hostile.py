"""Whatever may be handed to a command: files, texts and places to write to that are hostile or unlucky, each by what is wrong."""

from __future__ import annotations

import json
import os
import socket
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from pickles import archive, bad_views, bombs, payloads, saved, tensor, text, with_weights
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from minisd.library.places import tiny_checkpoint

HUGE = "9" * 25
TEXTS = {
    "empty": "",
    "a space": " ",
    "zero": "0",
    "negative": "-1",
    "NaN": "nan",
    "infinity": "inf",
    "beyond a float": "1e999",
    "beyond 64 bits": HUGE,
    "5,000 digits": "9" * 5000,
    "digits of another script": "٣²",
    "escape sequences": "\x1b[2J\x9b31m\r\u202e",
    "line breaks": "a\nb\n\nc",
    "no letters": "\udcff\udc80",
    "100,000 letters": "x" * 100_000,
    "commas": ",,,",
    "100,000 commas": "," * 100_000,
    "signs of equality": "==a=1,=",
    "a huge size": "99999992x99999992",
    "a size of nothing": "0x0",
    "a size of one sign": "x",
    "a range": "input.0-99999999999=1",
    "braces": "{0}%s%n{",
    "nobody's home": "~nobody-here/x",
    "outside": "../../../../etc/hostname",
    "a device": "cuda:99",
    "a folder": "/",
}


def raw(header: object, data: bytes = b"") -> bytes:
    """A .safetensors with this header, whatever it is."""
    content = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(content)) + content + data


def one(**facts: Any) -> dict[str, Any]:
    return {"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | facts}


def headers() -> dict[str, bytes]:
    """Contents of .safetensors whose headers are wrong."""
    four = bytes(4)
    return {
        "empty": b"",
        "7 bytes": bytes(7),
        "a header of 2^64 bytes": b"\xff" * 8 + b"{}",
        "a header of 0 bytes": bytes(8),
        "no JSON": raw(b"{]"),
        "a list": raw([]),
        "nothing in it": raw({}),
        "100,000 lists deep": raw(b"[" * 100_000),
        "100,000 dicts deep": raw(b'{"a":' * 100_000),
        "no UTF-8": raw(b'{"\xff":1}'),
        "serde's list": raw({"w": ["F32", [1], [0, 4]]}, four),
        "serde's enum": raw(one(dtype={"F32": None}), four),
        "NaN": raw(b'{"w":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', four),
        "half a letter": raw(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', four),
        "a huge shape": raw(one(shape=[10**30]), four),
        "a shape whose product is huge": raw(one(shape=[1 << 40] * 40), four),
        "a negative shape": raw(one(shape=[-1]), four),
        "true": raw(one(shape=[True]), four),
        "huge offsets": raw(one(data_offsets=[1 << 63, (1 << 63) + 4]), four),
        "a number of 100,000 digits": raw(b'{"w":{"dtype":"F32","shape":[' + b"9" * 100_000 + b'],"data_offsets":[0,4]}}', four),
        "an unknown dtype": raw(one(dtype="\x1b[2J" + "x" * 10_000), four),
        "a text for a tensor": raw({"w": "y" * 4_000_000}),
        "metadata that are numbers": raw({"__metadata__": {"a": 1}} | one(), four),
        "metadata that are a list": raw({"__metadata__": ["a"]} | one(), four),
        "100,000 empty tensors": raw({f"t{i}": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for i in range(100_000)}),
        "a tensor of one number": raw(one(), four),
        "a name of escape sequences": raw({"\x1b[2J\n": one()["w"]}, four),
        "a LoRA": raw({"lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight": one()["w"]}, four),
        "an embedding": raw({"emb_params": one(shape=[1, 1])["w"]}, four),
        "a VAE of one tensor": raw({"first_stage_model.decoder.conv_in.weight": one()["w"]}, four),
    }


def pickled(canary: Path) -> dict[str, bytes]:
    """Contents of .ckpt: bombs and payloads in an archive, tensors that lie, and what is no archive."""
    found = {f"bomb: {name}": archive(content) for name, content in bombs().items()}
    found |= {f"view: {name}": archive(with_weights(of)) for name, (of, _) in list(bad_views().items())[::6]}
    harmful = payloads(canary)
    found |= {f"payload: {name}": archive(harmful[name]) for name in ("os.system", "nothing else", "builtins.exec", "INST")}
    deep = b"\x80\x02)" + b"\x85" * 500_000 + b"."
    legacy = saved({"w": torch.zeros(2)}, _use_new_zipfile_serialization=False)
    found |= {"legacy, deep keys": legacy[: legacy.rindex(b"\x80\x02]")] + deep, "legacy, cut": legacy[:100]}
    found |= {"a deep tuple": archive(deep), "no archive": b"PK\x03\x04" + bytes(100)}
    return found | {"numbers for names": archive(b"\x80\x02}(K\x01" + tensor() + text("b") + tensor() + b"u.")}


def lying_models(folder: Path) -> dict[str, bytes]:
    """Checkpoints that look like one, and are not."""
    tiny = tiny_checkpoint().read_bytes()
    length = struct.unpack("<Q", tiny[:8])[0]
    header, data = json.loads(tiny[8 : 8 + length]), tiny[8 + length :]
    found = {"half of tiny": tiny[: len(tiny) // 2], "tiny's header": tiny[: 8 + length], "tiny and more": tiny + b"more"}
    key = next(name for name in header if name.endswith("time_embed.0.weight"))
    scalar = {name: facts for name, facts in header.items() if name != "__metadata__"}
    found["tiny without metadata, and without a tensor"] = raw({name: each for name, each in scalar.items() if name != key}, data)
    found["tiny of other numbers"] = raw(header | {key: header[key] | {"dtype": "I16"}}, data)
    found["tiny turned"] = raw(header | {key: header[key] | {"shape": header[key]["shape"][::-1]}}, data)
    for name, value in {
        "modelspec.resolution": "99999999x1",
        "modelspec.prediction_type": "\x1b[2J",
        "modelspec.title": "x" * 1_000_000,
        "sd_merge_recipe": "[" * 100_000,
    }.items():
        found[f"tiny with {name}"] = raw(header | {"__metadata__": header["__metadata__"] | {name: value}}, data)
    return found


def pictures() -> dict[str, bytes]:
    """Contents of pictures: too large, cut, or none."""
    png = b"\x89PNG\r\n\x1a\n"

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    def head(width: int, height: int) -> bytes:
        return png + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))

    bomb = chunk(b"zTXt", b"minisd\0\0" + zlib.compress(bytes(64 << 20), 1))
    end = chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")
    return {
        "the head of a PNG": png,
        "a PNG of 2^31 by 2^31": head((1 << 31) - 1, (1 << 31) - 1) + end,
        "a PNG of 16,000,000 by 1": head(16_000_000, 1) + end,
        "a PNG of 0 by 0": head(0, 0) + end,
        "a PNG cut": head(64, 64) + end,
        "a text of 64 MB in a PNG": head(64, 64) + bomb + end,
        "a million chunks": head(8, 8) + chunk(b"tEXt", b"a\0b") * 100_000 + end,
        "a JPEG cut": b"\xff\xd8\xff\xe0\x00\x10JFIF",
        "a GIF": b"GIF89a\xff\xff\xff\xff\x00\x00\x00",
    }


def folders(root: Path) -> dict[str, Path]:
    """Folders where a file or a folder of diffusers is expected."""
    found = {"an empty folder": root / "nothing", "a folder with a list": root / "list", "a folder that lies": root / "lies"}
    for path in found.values():
        path.mkdir()
    found["a folder with a list"].joinpath("model_index.json").write_text("[" * 100_000)
    lies = found["a folder that lies"]
    lies.joinpath("model_index.json").write_text('{"_class_name": "StableDiffusionPipeline", "unet": 5, "vae": ["a"]}')
    for part in ("unet", "vae", "text_encoder"):
        (lies / part).mkdir()
        (lies / part / "config.json").write_text('{"block_out_channels": "many", "cross_attention_dim": 1e999}')
        save_file({"conv_in.weight": torch.zeros(())}, lies / part / "diffusion_pytorch_model.safetensors")
    return found


def special(root: Path) -> dict[str, Path]:
    """What is no regular file, or lies where it cannot be reached, or has a name that is none."""
    os.mkfifo(root / "pipe.safetensors")
    (root / "loop.safetensors").symlink_to("loop.safetensors")
    (root / "gone.safetensors").symlink_to("nowhere.safetensors")
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(root / "socket"))
    for name in ("sparse.safetensors", "sparse.ckpt", "sparse.png"):
        with (root / name).open("wb") as file:
            file.truncate(5 << 30)
    (root / "locked.safetensors").write_bytes(b"x")
    (root / "locked.safetensors").chmod(0)
    odd = {"no UTF-8": b"a\xff\xfe", "escape sequences": b"\x1b[2J\r\x9b", "a line break": b"a\nb"}
    found = {f"a name of {what}": root / os.fsdecode(name + b".safetensors") for what, name in odd.items()}
    for path in found.values():
        path.write_bytes(raw(one(), bytes(4)))
    named = ("pipe.safetensors", "loop.safetensors", "gone.safetensors", "socket", "sparse.safetensors", "sparse.ckpt",
             "sparse.png", "locked.safetensors")  # fmt: skip
    found |= {name: root / name for name in named}
    devices = ("/dev/zero", "/dev/full", "/dev/null", "/proc/self/mem", "/proc/self/maps")
    found |= {name: Path(name) for name in devices if os.path.exists(name)}
    return found | {"not there": root / "not-there.safetensors", "below a file": root / "pipe.safetensors" / "x"}


def contents(root: Path) -> dict[str, tuple[str, bytes]]:
    """What is written to files, each with the suffix that it is written under."""
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 4265380512\n"
    page = b"<!DOCTYPE html><html><head><title>404</title></head></html>"
    found = {f"header: {name}": (".safetensors", content) for name, content in headers().items()}
    found |= {f"pickle: {name}": (".ckpt", content) for name, content in pickled(root / "canary").items()}
    found |= {f"model: {name}": (".safetensors", content) for name, content in lying_models(root).items()}
    found |= {f"picture: {name}": (".png", content) for name, content in pictures().items()}
    for kind in (".safetensors", ".ckpt", ".png"):
        found |= {f"a pointer of LFS{kind}": (kind, lfs), f"a page{kind}": (kind, page)}
    return found | {"Python": (".py", b"raise SystemExit('\x1b[2J')"), "YAML": (".yaml", b"a: [" * 10_000)}


LONG = ("pickle: bomb", "pickle: legacy, deep", "pickle: a deep")  # a second or so each, until too many instructions are counted


def files(root: Path) -> dict[str, Path]:
    """All of it on the disk below `root`, by what is wrong; what takes long apart, where no search for models looks.

    The pickles would make the file root / "canary".
    """
    (root / ".long").mkdir(parents=True)
    found = {}
    for i, (name, (suffix, content)) in enumerate(contents(root).items()):
        found[name] = root / (".long" if name.startswith(LONG) else "") / f"{i}{suffix}"
        found[name].write_bytes(content)
    return found | special(root) | folders(root)


def outputs(root: Path) -> dict[str, Path | str]:
    """Places to write to, none of which can be a file afterwards."""
    root.mkdir()
    (root / "folder.png").mkdir()
    (root / "loop.png").symlink_to("loop.png")
    os.mkfifo(root / "pipe.png")
    (root / "far.png").symlink_to(root / "no" / "where.png")
    return {
        "nothing": "",
        "here": ".",
        "the root": "/",
        "a folder": root / "folder.png",
        "a loop": root / "loop.png",
        "through a loop": "loop/x.png",  # which stands in the working folder of commands.alone
        "a pipe": root / "pipe.png",
        "a link into a folder that is not there": root / "far.png",
        "a folder that is not there": root / "no" / "x.png",
        "below a file": root / "pipe.png" / "x.png",
        "a long name": root / ("n" * 300 + ".png"),
        "a long path": "d/" * 3000 + "x.png",
        "a device": "/dev/full",
        "proc": "/proc/minisd.png",
        "letters that are none": root / "no\udcff" / "\udcff.png",
        "escape sequences": root / "\x1b[2J\n" / "x.png",
    }


VALUES: tuple[Any, ...] = (
    None, "", -1, 0, 1e308, float("nan"), float("inf"), 10**400, [], {}, [[[]]], [None], {"a": {"b": []}}, "\x1b[2J\n",
    "\0", "\ud800", "x" * 100_000, "/dev/zero", ["/dev/zero"], True, [1] * 100_000,
)  # fmt: skip


def with_recipe(path: Path, recipe: object, picture: Image.Image | None = None) -> Path:
    """A PNG that carries this recipe in its minisd chunk."""
    info = PngImagePlugin.PngInfo()
    info.add_text("minisd", recipe if isinstance(recipe, str) else json.dumps(recipe))
    (picture or Image.new("RGB", (8, 8))).save(path, pnginfo=info)
    return path


def changed(recipe: dict[str, Any], values: tuple[Any, ...] = VALUES) -> dict[str, Callable[[], dict[str, Any]]]:
    """The recipe with each of its fields, those of inner ones too, as each of the values; made when called."""

    def at(way: tuple[Any, ...], value: Any) -> dict[str, Any]:
        copy = json.loads(json.dumps(recipe))
        inner = copy
        for name in way[:-1]:
            inner = inner[name]
        inner[way[-1]] = value
        return copy

    def ways(inner: Any, before: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        pairs = inner.items() if isinstance(inner, dict) else enumerate(inner[:1]) if isinstance(inner, list) else ()
        return [way for name, each in pairs for way in [(*before, name), *ways(each, (*before, name))]]

    return {
        f"{'.'.join(map(str, way))} = {value!r:.40}": lambda way=way, value=value: at(way, value)
        for way in ways(recipe)
        for value in values
    }
