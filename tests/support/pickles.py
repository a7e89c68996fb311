"""Hostile and honest .ckpt files by hand: payloads that would touch a canary file, archives that lie, and a seeded mutator."""

from __future__ import annotations

import io
import os
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

HONEST = {"a.weight": torch.arange(6, dtype=torch.float16).view(2, 3), "b.bias": torch.ones(4), "c": torch.zeros(())}


def saved(top: Any, **options: Any) -> bytes:
    """What torch.save writes."""
    buffer = io.BytesIO()
    torch.save(top, buffer, **options)
    return buffer.getvalue()


def data_pkl(archive: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(archive)) as file:
        return file.read("archive/data.pkl")


def with_pickle(content: bytes, pickled: bytes) -> bytes:
    """An archive of torch.save with another pickle in it."""
    with zipfile.ZipFile(io.BytesIO(content)) as file:
        records = {name: file.read(name) for name in file.namelist() if not name.endswith("data.pkl")}
    return archive(pickled, records)


def archive(pickled: bytes, records: dict[str, bytes] | None = None, compression: int = zipfile.ZIP_STORED) -> bytes:
    """An archive around a pickle, with one storage of 24 bytes unless other records are given (by their whole names)."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("archive/data.pkl", pickled)
        for name, data in ({"archive/data/0": bytes(24), "archive/version": b"3\n"} if records is None else records).items():
            file.writestr(name, data)
    return buffer.getvalue()


# ---- pickles by hand: a letter each is an instruction, see pickletools ----


def text(string: str) -> bytes:
    data = string.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def number(value: int) -> bytes:
    data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8a" + bytes([len(data)]) + data


def named(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def numbers(values: tuple[int, ...]) -> bytes:
    return b"(" + b"".join(number(value) for value in values) + b"t"


def storage(numel: int, kind: str = "FloatStorage", key: str = "0") -> bytes:
    return b"(" + text("storage") + named("torch", kind) + text(key) + text("cpu") + number(numel) + b"tQ"


def tensor(shape: tuple[int, ...] = (6,), stride: tuple[int, ...] = (1,), offset: int = 0, of: bytes = storage(6)) -> bytes:
    """The call that makes a tensor; by default of the 24 bytes of `archive`."""
    rest = b"\x89" + named("collections", "OrderedDict") + b")RtR"
    return named("torch._utils", "_rebuild_tensor_v2") + b"(" + of + number(offset) + numbers(shape) + numbers(stride) + rest


def with_weights(payload: bytes, key: bytes = text("x")) -> bytes:
    """{"w": a tensor, "x": what the payload leaves behind}."""
    return b"\x80\x02}(" + text("w") + tensor() + key + payload + b"u."


# ---- what must never run ----


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.parts = function, arguments

    def __reduce__(self) -> Any:
        return self.parts

    def __call__(self) -> None:
        """Only a callable may stand as the function of another call."""


def reduced(call: Call, protocol: int = 2) -> bytes:
    """The instructions of a call, without the pickle's first and last ones."""
    return pickle.dumps(call, protocol=protocol)[2:-1]


def payloads(canary: Path) -> dict[str, bytes]:
    """Pickles, each of which makes the file `canary` in a Python that runs it: a test runs them all, to be sure."""
    import cProfile
    import functools
    import importlib
    import operator
    import pkgutil
    import runpy
    import subprocess
    import timeit

    shell, python = f"touch {canary}", f"open({str(canary)!r}, 'w').close()"
    script = canary.with_suffix(".py")
    script.write_text(python)
    system = named("posix", "system") + b"(" + text(shell) + b"tR"
    calls = {
        "os.system": Call(os.system, shell),
        "os.popen": Call(os.popen, shell),
        "os.spawnv": Call(os.spawnv, os.P_WAIT, "/bin/sh", ["sh", "-c", shell]),
        "subprocess.call": Call(subprocess.call, ["touch", str(canary)]),
        "subprocess.getoutput": Call(subprocess.getoutput, shell),
        "builtins.eval": Call(eval, python),
        "builtins.exec": Call(exec, python),
        "builtins.open": Call(open, str(canary), "w"),
        "builtins.map": Call(list, Call(map, exec, [python])),
        "getattr of os": Call(Call(getattr, Call(__import__, "os"), "system"), shell),
        "import_module": Call(Call(getattr, Call(importlib.import_module, "os"), "system"), shell),
        "pkgutil.resolve_name": Call(Call(pkgutil.resolve_name, "os:system"), shell),
        "runpy": Call(runpy.run_path, str(script)),
        "functools.partial": Call(functools.partial(os.system, shell)),
        "operator.methodcaller": Call(operator.methodcaller("system", shell), Call(__import__, "os")),
        "operator.attrgetter": Call(Call(operator.attrgetter("system"), Call(__import__, "os")), shell),
        "timeit": Call(timeit.timeit, python, "pass", timeit.default_timer, 1),
        "cProfile": Call(cProfile.run, python, os.devnull),
        "pickle in a pickle": Call(pickle.loads, pickle.dumps(Call(os.system, shell))),
        "torch.load in a pickle": Call(torch.storage._load_from_bytes, saved(Call(os.system, shell))),
    }
    found = {name: with_weights(reduced(call)) for name, call in calls.items()}
    found |= {f"{name}, protocol 4": b"\x80\x04" + reduced(calls[name], 4) + b"." for name in ("os.system", "builtins.exec")}
    dotted = text("os") + text("path.os.system") + b"\x93" + text(shell) + b"\x85R"
    honest = data_pkl(saved(HONEST))
    popen = named("subprocess", "Popen")
    arguments = b"](" + text("touch") + text(str(canary)) + b"e"
    ordered = named("collections", "OrderedDict")
    hooks = named("torch._utils", "_rebuild_tensor_v2") + b"(" + storage(6) + b"K\x00" + numbers((6,)) + numbers((1,))
    return found | {
        "nothing else": b"\x80\x02" + system + b".",
        "the name of Python 2": with_weights(named("__builtin__", "exec") + b"(" + text(python) + b"tR"),
        "INST": with_weights(b"(" + text(shell) + b"iposix\nsystem\n"),
        "OBJ": with_weights(b"(" + popen + arguments + b"o"),
        "NEWOBJ of a tuple": with_weights(popen + b"(" + arguments + b"tR"),
        "STACK_GLOBAL": with_weights(text("posix") + text("system") + b"\x93" + text(shell) + b"\x85R"),
        "a dotted name": b"\x80\x04" + dotted + b".",
        "a dotted name in an allowed module": b"\x80\x04" + text("collections") + text("_sys.modules.get") + b"\x93"
        + text("os") + b"\x85R0" + dotted + b".",
        "EXT1": with_weights(b"\x82\xf1" + text(shell) + b"\x85R"),
        "EXT2": with_weights(b"\x83\xf1\x00" + text(shell) + b"\x85R"),
        "EXT4": with_weights(b"\x84\xf1\x00\x00\x00" + text(shell) + b"\x85R"),
        "thrown away again": b"\x80\x02" + system + b"0}" + text("w") + tensor() + b"s.",
        "thrown away with its mark": b"\x80\x02(" + system + b"1}" + text("w") + tensor() + b"s.",
        "kept in the memo only": b"\x80\x02" + system + b"q\x01\x30}" + text("w") + tensor() + b"s.",
        "before honest weights": b"\x80\x02" + system + b"0" + honest[2:],
        "beside an honest state_dict": with_weights(b"}" + text("w") + tensor() + b"s" + text("optimizer_states") + system,
                                                    text("state_dict")),
        "as a key": with_weights(b"N", system),
        "in the hooks of a tensor": with_weights(hooks + b"\x89" + system + b"tR"),
        "in the name of a storage": with_weights(b"(" + text("storage") + named("torch", "FloatStorage") + system + b"tQ"),
        "as the state of a dict": with_weights(ordered + b")R" + system + b"b"),
        "as arguments of an OrderedDict": with_weights(ordered + b"](" + text("a") + system + b"\x86e\x85R"),
        "as the factory of a defaultdict": with_weights(named("collections", "defaultdict") + named("builtins", "list")
                                                        + b"\x85R" + text("a") + system + b"s"),
        "in an early frame": b"\x80\x04\x95\x05\x00\x00\x00\x00\x00\x00\x00" + b"NNNN0" + system + b".",
        "proto in the middle": b"\x80\x02" + b"\x80\x04" + system + b"\x80\x02.",
        "protocol 0": b"cposix\nsystem\n(V" + shell.encode() + b"\ntR.",
    }  # fmt: skip


def harmless_but_refused() -> dict[str, bytes]:
    """Pickles that do nothing bad in Python, or only there where they are looked at wrongly."""
    benign = with_weights(b"N")
    return {
        "Windows": with_weights(named("nt", "system") + b"(" + text("echo") + b"tR"),
        "an attribute of an allowed class": with_weights(named("collections", "OrderedDict.fromkeys") + b"(](K\x01etR"),
        "torch by a dotted name": b"\x80\x04" + text("torch") + text("serialization.os.system") + b"\x93.",
        "a type of tensor from elsewhere": with_weights(named("torch._utils", "_rebuild_sparse_tensor") + b")R"),
        "a whole module": b"\x80\x02" + named("torch.nn.modules.linear", "Linear") + b")\x81}b.",
        "a function of ours called": with_weights(named("trainer.tools", "load") + b"(" + text("x") + b"tR"),
        "a class of ours called": with_weights(named("trainer.tools", "Loader") + b"(" + text("x") + text("y") + b"tR"),
        "a function of numpy called": with_weights(named("numpy.testing", "runstring") + b"(" + text("x") + b"}tR"),
        "a function of the system named": with_weights(named("posix", "system")),
        "an object of the system": with_weights(named("subprocess", "Popen") + b")\x81}b"),
        "a tensor of a tensor of a tensor": with_weights(
            (named("torch._tensor", "_rebuild_from_type_v2") + b"(") * 3 + named("torch", "Tensor") + b")Nt" + b"R" * 3
        ),
        "something behind the end": benign + b"cposix\nsystem\n(X\x04\x00\x00\x00truetR.",
        "NEWOBJ_EX": b"\x80\x04" + named("collections", "OrderedDict") + b")}\x92.",
        "PERSID": with_weights(b"P0\n"),
        "a text called": with_weights(text("os.system") + b")R"),
        "a number built": with_weights(b"K\x01}b"),
        "items set in a list": with_weights(b"]K\x01K\x01s"),
        "items set in a tensor": with_weights(tensor() + text("a") + b"K\x01s"),
        "items appended to a dict": with_weights(b"}K\x01a"),
        "a name that is no text": b"\x80\x04" + b"K\x01K\x02\x93.",
        "a name with a line break and colours": b"\x80\x04" + text("os\n\x1b[31m") + text("system\ud7ff\u202e") + b"\x93.",
        "a thousand names": with_weights(b"](" + b"".join(named("os", f"f{i}") for i in range(1000)) + b"e"),
        "no memo": with_weights(b"h\x07"),
        "no mark": b"\x80\x02t.",
        "an empty stack": b"\x80\x02.",
        "nothing": b"",
        "no end": b"\x80\x02}",
        "only None": b"\x80\x02N.",
        "an unknown instruction": b"\x80\x02\xff.",
        "half a text": b"\x80\x02X\xff\xff\xff\x7fabc",
        "a text that is none": b"\x80\x02X\x02\x00\x00\x00\xff\xff.",
        "a key twice": b"\x80\x02}(" + (text("w") + tensor()) * 2 + b"u.",
        "an odd number of items": b"\x80\x02}(" + text("w") + tensor() + text("x") + b"u.",
    }


def bombs() -> dict[str, bytes]:
    """Pickles that would fill the memory, the stack or the day."""
    return {
        "a memo at 2 billion": with_weights(b"Nr\xff\xff\xff\x7f"),
        "800,000 places in the memo": b"\x80\x02N" + b"".join(b"r" + struct.pack("<I", i) for i in range(800_000)) + b".",
        "600,000 dicts": b"\x80\x02(" + b"}" * 599_990 + b"t.",
        "4 million marks": b"\x80\x02" + b"(" * ((4 << 20) - 3) + b".",
        "tuples 500,000 deep": b"\x80\x02)" + b"\x85" * 500_000 + b".",
        "lists 250,000 deep": b"\x80\x02" + b"](" * 1 + b"](" * 249_999 + b"e" * 250_000 + b".",
        "deep tuples as a key": with_weights(b"N", b")" + b"\x85" * 500_000),
        "2^60 references": b"\x80\x02)" + b"q\x00h\x00\x86" * 60 + b".",
        "2^60 references as a key": with_weights(b"N", b")" + b"q\x00h\x00\x86" * 60),
        "2^60 references as a shape": with_weights(tensor()[:-20] + b")" + b"q\x00h\x00\x86" * 60 + b"tR"),
        "a number of 2 MB": with_weights(b"\x8b\x00\x00\x20\x00" + bytes([255]) * (2 << 20)),
        "a number of 1 million digits": with_weights(b"I" + b"9" * 1_000_000 + b"\n"),
        "a frame of 2^63 bytes": b"\x80\x04\x95" + b"\xff" * 8 + b"N.",
        "bytes of 2^62": b"\x80\x04\x8e" + struct.pack("<Q", 1 << 62) + b"x.",
        "a pickle of 5 MB": with_weights(text("x" * (5 << 20))),
        "100,000 axes": with_weights(tensor((1 << 40,) * 100_000, (1 << 40,) * 100_000)),
        "100,000 names of one tensor": b"\x80\x02" + tensor() + b"q\x000}("
        + b"".join(text(f"{i}") + b"h\x00" for i in range(100_000)) + b"u.",
        "9,000 tensors of one storage": b"\x80\x02" + tensor() + b"q\x000}("
        + b"".join(text(f"{i}") + b"h\x00" for i in range(9_000)) + b"u.",
    }  # fmt: skip


def bad_views() -> dict[str, tuple[bytes, str]]:
    """Tensors that are not what their storage of 24 bytes can give, and what the error says of each."""
    return {
        "too long": (tensor((7,)), "needs more numbers than the 6"),
        "too late": (tensor((6,), offset=1), "needs more numbers than the 6"),
        "far too late": (tensor((1,), offset=1 << 47), "needs more numbers than the 6"),
        "before the start": (tensor((1,), offset=-1), "whole numbers from 0"),
        "a negative shape": (tensor((-1,)), "whole numbers from 0"),
        "a negative stride": (tensor((2,), (-1,)), "whole numbers from 0"),
        "a product beyond 64 bits": (tensor((1 << 40, 1 << 40), (1 << 40, 1)), "needs more numbers"),
        "2^40 times the same number": (tensor((1 << 40,), (0,)), "needs more numbers"),
        "6 times the same number": (tensor((6,), (0,)), "gaps or repetitions"),
        "every other number": (tensor((3,), (2,)), "gaps or repetitions"),
        "a window": (tensor((2, 2), (3, 1)), "gaps or repetitions"),
        "more strides than axes": (tensor((6,), (1, 1)), "at most 8"),
        "9 axes": (tensor((1,) * 9, (1,) * 9), "at most 8"),
        "axes that are texts": (tensor((6,)).replace(numbers((6,)), b"(" + text("6") + b"t", 1), "whole numbers"),
        "a storage that claims more": (tensor(of=storage(7)), "expected 24 bytes of F32, found 7"),
        "a storage that claims less": (tensor((1,), of=storage(5)), "expected 24 bytes of F32, found 5"),
        "a storage of half the bytes": (tensor(of=storage(6, "HalfStorage")), "expected 24 bytes of F16, found 6"),
        "a storage that is missing": (tensor(of=storage(6, key="1")), "are missing"),
        "a storage outside": (tensor(of=storage(6, key="../version")), "are missing"),
        "a storage below nothing": (tensor(of=storage(-6)), "is of no type or size"),
        "complex numbers": (tensor(of=storage(3, "ComplexFloatStorage")), "asks for torch.ComplexFloatStorage"),
        "quantised numbers": (tensor(of=storage(6, "QInt32Storage")), "asks for torch.QInt32Storage"),
        "a dtype for a storage": (tensor(of=storage(6, "float32")), "asks for torch.float32"),
    }


# ---- mutations ----

EDGES = [
    0,
    1,
    0x7F,
    0x80,
    0xFF,
    0x7FFF,
    0xFFFF,
    1 << 31,
    (1 << 31) - 1,
    (1 << 32) - 1,
    1 << 40,
    (1 << 63) - 1,
    1 << 63,
    (1 << 64) - 1,
]


def mutants(original: bytes, count: int, seed: int) -> Iterator[bytes]:
    """Copies of a file with one to three things wrong: bits, bytes, numbers, pieces cut, doubled, moved or swapped."""
    rng = random.Random(seed)
    for _ in range(count):
        data = bytearray(original)
        for _ in range(rng.choice((1, 1, 2, 3))):
            mutate(data, rng)
        yield bytes(data)


def mutate(data: bytearray, rng: random.Random) -> None:
    at = rng.randrange(len(data)) if data else 0
    length = min(rng.choice((1, 2, 4, 8, 30, 100)), len(data) - at)
    match rng.randrange(8):
        case 0 if data:
            data[at] ^= 1 << rng.randrange(8)
        case 1 if data:
            data[at] = rng.randrange(256)
        case 2:
            edge = rng.choice(EDGES).to_bytes(8, "little")[: rng.choice((2, 4, 8))]
            data[at : at + len(edge)] = edge
        case 3:
            del data[at : at + length]
        case 4:
            data[at:at] = data[at : at + length]
        case 5:
            data[at:at] = rng.randbytes(length)
        case 6:
            del data[at:]
        case _:
            other = rng.randrange(len(data)) if data else 0
            data[at : at + length] = data[other : other + length]
