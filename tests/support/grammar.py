"""Hostile files by grammar: each is made of the pieces of an honest one, and in some places of something else.  All by a seed."""

from __future__ import annotations

import io
import json
import pickletools
import random
import struct
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pickles

HUGE = ["1e999", "-1e999", "1e5", "0.5", "-0", "-1", str(1 << 31), str(1 << 63), str((1 << 64) - 1), str(1 << 64), "9" * 400]
WORDS = ["F32", "F16", "BF16", "F64", "F8_E4M3", "I64", "U8", "BOOL", "F4", "C64", "f32", "float32", "", "F32\\u0000"]
NAMES = ["w", "a.b", "model.diffusion_model.out.2.bias", "v_pred", "..", "/etc/passwd", "../x", "a b", "²", "w" * 600, ""]
ESCAPED = ["\\u0000", "\\ud800", "\\udc00\\ud800", "\\u202e", "\\n", "\\u001b[31m", "\\u00b2"]


def many(make: Callable[[random.Random], bytes], count: int, seed: int) -> Iterator[bytes]:
    rng = random.Random(seed)
    return (make(rng) for _ in range(count))


# ---- JSON ----


def anything(rng: random.Random, depth: int = 0) -> str:
    """Some JSON, now and then some that is none."""
    match rng.randrange(12 if depth < 3 else 7):
        case 0:
            return rng.choice(HUGE)
        case 1:
            return str(rng.randrange(-2, 100))
        case 2:
            return name(rng)
        case 3:
            return rng.choice(["null", "true", "false", "NaN", "Infinity", "-Infinity"])
        case 4:
            return rng.choice(["[]", "{}", '""', "[[]]", "[{}]", '{"":null}'])
        case 5:
            return "[" * (deep := rng.choice([1, 3, 50, 900, 1100, 5000])) + "]" * deep
        case 6:
            return f'"{rng.choice(WORDS)}"'
        case 7 | 8:
            return "[" + ",".join(anything(rng, depth + 1) for _ in range(rng.randrange(4))) + "]"
        case 9 | 10:
            return members([(name(rng), anything(rng, depth + 1)) for _ in range(rng.randrange(4))])
        case _:
            return rng.choice(["", "'a'", "[1,]", "{1:2}", '{"a"}', "01", '"\\x"', "\x00", "// a", '"a', "[1"])


def name(rng: random.Random) -> str:
    middle = rng.choice(ESCAPED) if rng.random() < 0.15 else ""
    return f'"{rng.choice(NAMES)}{middle}"'


def members(pairs: list[tuple[str, str]]) -> str:
    return "{" + ",".join(f"{key}:{value}" for key, value in pairs) + "}"


def changed(rng: random.Random, value: Any, chance: float) -> Any:
    """A copy of JSON data in which parts are something else, each with that chance; Junk stands for its text."""
    if rng.random() < chance:
        return Junk(anything(rng))
    if isinstance(value, dict):
        return {key: changed(rng, inner, chance) for key, inner in value.items() if rng.random() > chance / 2}
    if isinstance(value, list):
        return [changed(rng, inner, chance) for inner in value for _ in range(rng.choice([0, 1, 1, 1, 2]) if chance else 1)]
    return value


class Junk(str):
    """Text that goes into JSON as it is."""


def dumped(value: Any) -> str:
    if isinstance(value, Junk):
        return value
    if isinstance(value, dict):
        return members([(json.dumps(key), dumped(inner)) for key, inner in value.items()])
    if isinstance(value, list):
        return "[" + ",".join(map(dumped, value)) + "]"
    return json.dumps(value)


# ---- .safetensors ----


def safetensors(rng: random.Random) -> bytes:
    """A file of up to five small tensors; half of them with one thing wrong, the others with several or with nothing."""
    chance = rng.choice([0.0, 0.02, 0.1, 0.4])
    pairs, end = [], 0
    for i in range(rng.randrange(6)):
        shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
        numbers = 1
        for length in shape:
            numbers *= length
        start, end = end, end + 4 * numbers
        key = f'"{"w" * (i + 1)}"' if rng.random() > chance else name(rng)
        pairs.append((key, entry(rng, shape, start, end, chance)))
    if rng.random() < chance:
        pairs += rng.choices(pairs, k=1) if pairs else []
    if rng.random() < 0.3:
        honest = members([('"format"', '"pt"'), ('"modelspec.title"', '"x"')])
        pairs.insert(rng.randrange(len(pairs) + 1), ('"__metadata__"', honest if rng.random() > chance else anything(rng)))
    rng.random() < chance and rng.shuffle(pairs)
    header = members(pairs) if rng.random() > chance / 4 else anything(rng)
    text = header.encode(errors="surrogatepass")
    if rng.random() < chance:
        text = rng.choice([b" " + text, text + b" " * 9, text + b"\0", text[:-1], text + b"}", text.replace(b"w", b"\xff", 1)])
    length = len(text) if rng.random() > chance / 3 else rng.choice([0, 1, len(text) + 1, len(text) - 1, 1 << 40, (1 << 64) - 1])
    data = bytes(end) if rng.random() > chance / 3 else bytes(max(0, end + rng.choice([-4, -1, 1, 100])))
    return struct.pack("<Q", length % (1 << 64)) + text + data


def entry(rng: random.Random, shape: list[int], start: int, end: int, chance: float) -> str:
    """A tensor of a header: as everybody writes it, as an array, with the type as an enumeration of serde's, or with junk."""
    fields = {"dtype": '"F32"', "shape": json.dumps(shape), "data_offsets": f"[{start},{end}]"}
    if rng.random() < chance:
        fields["dtype"] = rng.choice(['{"F32":null}', '["F32"]', "0", '{"F32":[]}', f'"{rng.choice(WORDS)}"'])
    if rng.random() < chance:
        off = rng.choice([-4, 4, 1, 1 << 62, (1 << 64) - 4])
        fields["data_offsets"] = rng.choice(
            [f"[{start + off},{end + off}]", f"[{end},{start}]", f"[{start}]", f"[{start}.0,{end}]", f'["{start}",{end}]', "[]"]
        )
    if rng.random() < chance:
        fields["shape"] = rng.choice([f"[{1 << 32},{1 << 32}]", "[-1]", "[1e1]", '["2"]', "[[2]]", "2", "[" + "1," * 70 + "1]"])
    if rng.random() < chance:
        fields[rng.choice(list(fields))] = anything(rng)
    if rng.random() < chance / 2:
        del fields[rng.choice(list(fields))]
    if rng.random() < chance:
        return "[" + ",".join(fields.values()) + "]"
    pairs = [(f'"{key}"', value) for key, value in fields.items()]
    if rng.random() < chance:
        pairs.append(rng.choice([('"extra"', anything(rng)), ('"dtype"', '"F16"'), ('"shape"', "[]")]))
    rng.random() < chance and rng.shuffle(pairs)
    return members(pairs)


# ---- .ckpt ----

GLOBALS = [
    ("collections", "OrderedDict"), ("collections", "defaultdict"), ("torch._utils", "_rebuild_tensor_v2"),
    ("torch._utils", "_rebuild_tensor_v3"), ("torch._utils", "_rebuild_parameter"), ("torch._tensor", "_rebuild_from_type_v2"),
    ("torch._utils", "_rebuild_parameter_with_state"), ("torch", "FloatStorage"), ("torch", "float8_e5m2"), ("torch", "Tensor"),
    ("torch.storage", "UntypedStorage"), ("numpy._core.multiarray", "scalar"), ("builtins", "set"), ("trainer", "Thing"),
    ("_operator", "getitem"), ("typing", "Any"), ("posix", "system"), ("", ""), ("copyreg", "_reconstructor"),
]  # fmt: skip
OPCODES = [each.code.encode("latin-1") for each in pickletools.opcodes]


def value(rng: random.Random, depth: int = 0) -> bytes:
    """Instructions that leave one value on the stack, most of the time."""
    kinds: list[Callable[[], bytes]] = [
        lambda: pickles.number(rng.choice([0, 1, -1, 3, 6, 24, 1 << 31, 1 << 63, -(1 << 70), 1 << 600])),
        lambda: b"K" + rng.randbytes(1),
        lambda: b"G" + struct.pack(">d", rng.choice([0.5, float("nan"), float("inf")])),
        lambda: pickles.text(
            rng.choice(["w", "state_dict", "storage", "0", "cpu", "epoch", "a" * 600, "\x1b[31m", "²", "..", ""])
        ),
        lambda: rng.choice([b"N", b"\x88", b"\x89", b")", b"]", b"}", b"\x8f"]),
        lambda: pickles.named(*rng.choice(GLOBALS)),
        lambda: rng.choice([b"h", b"j"]) + rng.randbytes(rng.choice([1, 4])),
        lambda: rng.choice(OPCODES) + rng.randbytes(rng.randrange(6)),
        lambda: pickles.tensor(),
        lambda: pickles.storage(rng.choice([6, 24, 0, -1, 1 << 50]), rng.choice(["FloatStorage", "HalfStorage", "float32"])),
    ]
    if depth < 4:
        inner = [value(rng, depth + 1) for _ in range(rng.randrange(4))]
        kinds += 2 * [
            lambda: b"(" + b"".join(inner) + rng.choice([b"t", b"l", b"d", b"\x91", b"1", b"u", b"e", b"\x90", b""]),
            lambda: b"}(" + b"".join(pickles.text(f"{i}") + each for i, each in enumerate(inner)) + b"u",
            lambda: b"](" + b"".join(inner) + b"e",
            lambda: (
                pickles.named(*rng.choice(GLOBALS)) + b"(" + b"".join(inner) + b"t" + rng.choice([b"R", b"\x81", b"R}b", b"b"])
            ),
            lambda: b"(" + b"".join(inner) + b"tQ",
            lambda: (
                value(rng, depth + 1) + rng.choice([b"q\x05", b"\x94", b"r\xff\xff\xff\x7f", b"0", b"2", b"b", b"s", b"a", b"R"])
            ),
        ]
    return rng.choice(kinds)()


def pickled(rng: random.Random) -> bytes:
    """A pickle of {"w": a tensor, "x": anything}, or with the places of the tensor's arguments changed."""
    if rng.random() < 0.5:
        return pickles.with_weights(value(rng))
    arguments = [pickles.storage(6), b"K\x00", pickles.numbers((2, 3)), pickles.numbers((3, 1)), b"\x89", b"}"]
    for _ in range(rng.choice([0, 1, 1, 2])):
        arguments[rng.randrange(len(arguments))] = value(rng, 3)
    if rng.random() < 0.1:
        arguments += [value(rng, 3)]
    call = pickles.named(*rng.choice(GLOBALS[2:8]) if rng.random() < 0.3 else GLOBALS[2]) + b"(" + b"".join(arguments) + b"tR"
    return b"\x80" + rng.choice([b"\x02", b"\x04", b"\x7f"]) + b"}" + pickles.text("w") + call + b"s."


def ckpt(rng: random.Random) -> bytes:
    """A pickle in one of the wrappings that it comes in, honest or not."""
    content = pickled(rng)
    match rng.randrange(10):
        case 0:
            return content
        case 1 | 2:
            return legacy(rng, content)
        case 3:
            return tar(rng, content)
        case _:
            return archive(rng, content)


def legacy(rng: random.Random, content: bytes) -> bytes:
    parts = [
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",  # torch's magic number
        b"\x80\x02M\xe9\x03.",
        b"\x80\x02}" + pickles.text("little_endian") + b"\x88s.",
        content,
        b"\x80\x02]" + pickles.text("0") + b"a.",
        struct.pack("<Q", 6) + bytes(24),
    ]
    if rng.random() < 0.5:
        i = rng.randrange(len(parts))
        parts[i] = rng.choice([b"\x80\x02" + value(rng) + b".", b"", parts[i][:-1], parts[i] * 2, struct.pack("<Q", 1 << 62)])
    return b"".join(parts)


def tar(rng: random.Random, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as file:
        for each in ("sys_info", "pickle", "storages", "tensors"):
            if rng.random() < 0.9:
                info = tarfile.TarInfo(each)
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def archive(rng: random.Random, content: bytes) -> bytes:
    """A zip archive: in a third of them records are missing, doubled or strange, in another the directory lies."""
    records = {
        "archive/data.pkl": content,
        "archive/data/0": bytes(24),
        "archive/version": b"3\n",
        "archive/byteorder": b"little",
    }
    wrong = rng.randrange(3)
    if wrong == 1:
        other = rng.choice(
            ["archive/data/1", "x/data.pkl", "archive/code/x.py", "archive/../x", "archive/data/0/", "\\", "é", "/"]
        )
        records |= {other: rng.randbytes(rng.randrange(30))}
        rng.random() < 0.5 and records.pop(rng.choice(list(records)))
        if rng.random() < 0.3:
            records["archive/byteorder"] = rng.choice([b"big", b"", b"little\0", b"\xff"])
    buffer = io.BytesIO()
    kind = rng.choice([zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2]) if wrong == 1 and rng.random() < 0.2 else 0
    with zipfile.ZipFile(buffer, "w", kind) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of doubled names
        for key, data in records.items():
            for _ in range(1 + (wrong == 1 and rng.random() < 0.1)):
                file.writestr(key, data)
        file.comment = rng.randbytes(rng.choice([0, 0, 5]))
    data = bytearray(buffer.getvalue())
    if wrong == 2:  # a field of a local header, of the directory or of its end
        mark, fields = rng.choice([(b"PK\x03\x04", 30), (b"PK\x01\x02", 46), (b"PK\x05\x06", 22)])
        places = [i for i in range(len(data)) if data.startswith(mark, i)]
        at = rng.choice(places) + rng.randrange(0, fields, 2)
        data[at : at + 4] = struct.pack("<I", rng.choice([0, 1, 8, 0xFF, 0xFFFF, 0xFFFFFFFF, len(data), rng.randrange(1 << 32)]))
    return bytes(data)


# ---- PNG ----


def chunk(rng: random.Random, kind: bytes, data: bytes, chance: float = 0.0) -> bytes:
    crc = zlib.crc32(kind + data) if rng.random() > chance else rng.randrange(1 << 32)
    length = len(data) if rng.random() > chance / 2 else rng.choice([0, 1, len(data) + 1, 1 << 31, (1 << 32) - 1])
    return struct.pack(">I", length) + kind + data + struct.pack(">I", crc)


def written(rng: random.Random, key: bytes, text: bytes, chance: float) -> bytes:
    """A text in one of the three chunks that there are for it."""
    squeezed = zlib.compress(text) if rng.random() > chance else rng.choice([b"", b"x", zlib.compress(text)[:-4], text])
    flags = bytes(rng.choice([0, 1, 2, 255]) for _ in range(2)) if rng.random() < chance else b"\1\0"
    language = rng.choice([b"\0\0", b"\0", b"en\0\xff\0", b""]) if rng.random() < chance else b"\0\0"
    kind, data = rng.choice(
        [
            (b"tEXt", key + b"\0" + text),
            (b"zTXt", key + b"\0" + (flags[1:] if rng.random() < chance else b"\0") + squeezed),
            (b"iTXt", key + b"\0" + flags + language + (squeezed if flags[:1] == b"\1" else text)),
        ]
    )
    return chunk(rng, kind, data, chance / 2)


def png(rng: random.Random, recipe: Mapping[str, Any]) -> bytes:
    """A PNG of one pixel with a recipe: both are wrong in some places, or neither is."""
    chance = rng.choice([0.0, 0.0, 0.1, 0.3])
    text = dumped(changed(rng, dict(recipe), rng.choice([0.0, 0.02, 0.1]))) if rng.random() > chance / 5 else anything(rng)
    encoding = rng.choice(["utf-8", "utf-8", "utf-16", "latin-1"]) if rng.random() < chance else "utf-8"
    data = text.encode(encoding, "replace")
    size = rng.choice([0, 1 << 31, 1 << 15, 20_000]) if rng.random() < chance / 3 else 1
    header = struct.pack(">IIBBBBB", size, size, *(rng.choice([(8, 2), (16, 6), (3, 9), (1, 0)]) if chance else (8, 2)), 0, 0, 0)
    parts = [chunk(rng, b"IHDR", header, chance / 4), written(rng, b"minisd", data, chance)]
    if rng.random() < chance:
        extra = [
            written(rng, b"minisd", b"{}", 0),
            chunk(rng, b"gAMA", b"\0\0"),
            chunk(rng, b"PLTE", b""),
            chunk(rng, b"tEXt", b""),
            chunk(rng, b"eXIf", b"II*\0"),
            chunk(rng, b"iCCP", b"a\0\0"),
            chunk(rng, b"acTL", struct.pack(">II", 1 << 30, 0)),
            written(rng, rng.choice([b"", b"minisd\0", b"k" * 90]), data, 0),
            rng.randbytes(12),
        ]
        parts.insert(rng.randrange(3), rng.choice(extra))
    parts += [chunk(rng, b"IDAT", zlib.compress(b"\0" * 4), chance / 4), chunk(rng, b"IEND", b"")]
    rng.random() < chance / 4 and rng.shuffle(parts)
    start = b"\x89PNG\r\n\x1a\n" if rng.random() > chance / 5 else rng.choice([b"", b"\x89PNG", b"GIF89a", b"\xff\xd8\xff"])
    whole = start + b"".join(parts)
    return whole if rng.random() > chance / 4 else whole[: rng.randrange(len(whole))]
