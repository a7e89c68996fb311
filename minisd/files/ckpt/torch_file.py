"""The files that torch.save writes (.ckpt, .pt), read as a .safetensors header is: names, types, shapes and places.

Both formats of torch/serialization.py: a zip archive (`_save`, since PyTorch 1.6), and pickles with the numbers behind them
(`_legacy_save`).  In both, the numbers of a tensor lie in the file as they are, uncompressed; they are read later, from there.
"""

from __future__ import annotations

import io
import math
import re
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import CheckpointError
from ..entry import MAX_TENSORS, PLAIN, Entry
from .pickled import CONVERT, DAMAGED, NONSENSE, Machine, Storage, UnreadableError, Unused, View, shown_name

MAX_READ = 4 << 20  # bytes of a pickle or of an archive's directory; 10,000 tensors take 2.5 MB
MAX_DIMENSIONS = 8
MAGIC_NUMBER, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the legacy format
OTHERS = r"version|byteorder|\.format_version|\.storage_alignment|\.data/serialization_id"  # records of no weights
RECORD = re.compile(rf"[^/]+/(data\.pkl|data/[0-9]+|{OTHERS})")

Records = dict[str, tuple[int, int]]  # name: (first byte, number of bytes)


def read_torch_file(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a file that torch.save wrote, and the few words about training that stand beside them.

    Takes those below "state_dict" where there is one, else those at the top and one level below ("a" in "b" is "b.a").
    Raises CheckpointError for anything but tensors and what trainers are known to put beside them.
    """
    try:
        with BoundedReader(io.FileIO(path)) as file:
            size = file.seek(0, io.SEEK_END)
            top, records = from_archive(file) if file.peek_at(0, 4) == b"PK\x03\x04" else from_legacy(file, size)
            if isinstance(top, list) and all(isinstance(each, dict) for each in top):  # embeddings, one after the other
                top = {str(i): each for i, each in enumerate(top)}
            if not isinstance(top, dict):
                of = f", but an object of {shown_name(top.of)}" if isinstance(top, Unused) and top.of else ""
                raise UnreadableError(f"holds no dict of tensors{of}", CONVERT)
            return entries(top, records, size), about(top)
    except UnreadableError as error:
        raise CheckpointError(path, str(error), error.hint, error.key) from None
    except OSError as error:
        raise CheckpointError(path, f"cannot be read: {error.strerror}") from error
    # NotImplementedError is what zipfile raises for a kind or a version of compression that it does not know
    except (*NONSENSE, OverflowError, struct.error, zipfile.BadZipFile, NotImplementedError) as error:
        raise CheckpointError(path, f"is not a whole torch.save file: {ascii(str(error))[1:-1][:200]}", DAMAGED) from error


class BoundedReader(io.BufferedReader):
    """A file that refuses to be read in large pieces: no size that a file claims may fill the memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        data = super().read(MAX_READ + 1 if size is None or size < 0 else min(size, MAX_READ + 1))
        if len(data) > MAX_READ:
            raise UnreadableError(f"has a pickle or a directory of more than {MAX_READ:,} bytes", CONVERT)
        return data

    def peek_at(self, position: int, size: int) -> bytes:
        self.seek(position)
        return self.read(size)


def from_archive(file: BoundedReader) -> tuple[Any, Records]:
    """The one object and the records of a zip archive."""
    records = zip_records(file)
    byteorder = file.peek_at(*records["byteorder"]) if "byteorder" in records else b"little"
    if byteorder != b"little":
        raise UnreadableError("was written by a big-endian machine", "load and save it again on a little-endian one")
    source = io.BytesIO(file.peek_at(*records["data.pkl"]))
    top = Machine().run(source)
    if source.read(1):
        raise UnreadableError("has bytes behind the end of its pickle", CONVERT)
    return top, {name.removeprefix("data/"): place for name, place in records.items() if name.startswith("data/")}


def zip_records(file: BoundedReader) -> Records:
    """Where the records of the archive lie.  Raises UnreadableError unless it is as plain as torch.save makes it."""
    with zipfile.ZipFile(file) as archive:
        infos = archive.infolist()
    names = [info.filename for info in infos]
    check_names(names)
    records: Records = {}
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.compress_size != info.file_size or info.flag_bits & 1:
            raise UnreadableError(f"its record {info.filename!a} is compressed or encrypted", CONVERT)
        header = file.peek_at(info.header_offset, 30)
        name_length, extra_length = struct.unpack("<HH", header[26:])
        start = info.header_offset + 30 + name_length + extra_length
        same = file.read(name_length) == info.orig_filename.encode("utf-8" if info.flag_bits & 0x800 else "cp437")
        if header[:4] != b"PK\x03\x04" or not same or info.header_offset < end:
            raise UnreadableError(f"its record {info.filename!a} does not begin where the archive's directory says")
        end = start + info.file_size
        records[info.filename.partition("/")[2]] = (start, info.file_size)
    if end > file.seek(0, io.SEEK_END):
        raise UnreadableError("has a record that reaches beyond its end")
    return records


def check_names(names: list[str]) -> None:
    """Raises UnreadableError unless these are the names of torch.save's records, each once, in one folder."""
    others = [name for name in names if not RECORD.fullmatch(name)]
    if not any(name.endswith("/data.pkl") for name in names):
        shown = ", ".join(ascii(name)[:80] for name in names[:3]) or "nothing"
        hint = "unpack it, and give the model in it"
        raise UnreadableError(f"is a zip archive, but not one of torch.save: it holds {shown}", hint)
    if any(name.partition("/")[2].startswith(("code/", "constants")) for name in others):
        raise UnreadableError("is a TorchScript program", "minisd takes weights: .safetensors, or a .ckpt of tensors")
    if others:
        raise UnreadableError(f"is an archive with a record {ascii(others[0])[:80]}, which torch.save does not write", CONVERT)
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        raise UnreadableError("is an archive with two records of one name, or with two folders", CONVERT)


def from_legacy(file: BoundedReader, size: int) -> tuple[Any, Records]:
    """The object and the storages of a file from before PyTorch 1.6: pickles, then each storage's length and numbers."""
    file.seek(0)
    source = io.BytesIO(io.BufferedReader.read(file, MAX_READ))
    if Machine().run(source) != MAGIC_NUMBER or Machine().run(source) != PROTOCOL:
        raise UnreadableError("is a Python pickle, but not one of torch.save", CONVERT)
    system = Machine().run(source)
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UnreadableError("was written by a big-endian machine", "load and save it again on a little-endian one")
    machine = Machine()
    top, keys = machine.run(source), Machine().run(source)
    records: Records = {}
    position = source.tell()
    for key in keys:
        if type(key) is not str:  # hashing a tuple in a tuple in a tuple … ends the process
            raise UnreadableError(f"expected texts as the keys of its storages, found a {type(key).__name__}")
        storage = machine.storages[key]
        if int.from_bytes(file.peek_at(position, 8), "little") != storage.numel or key in records:
            raise UnreadableError(f"its storage {key!a} is not as long as its pickle says")
        records[key] = (position + 8, nbytes(storage))
        position += 8 + nbytes(storage)
    if position > size:
        raise UnreadableError(f"ends at byte {size:,} of at least {position:,}", "download it again")
    return top, records


def entries(top: dict[str, Any], records: Records, size: int) -> dict[str, Entry]:
    """The tensors of a checkpoint, each with its place in the file."""
    state = top.get("state_dict", top)
    found = list(views(state)) if isinstance(state, dict) else []
    if len(found) > MAX_TENSORS:
        raise UnreadableError(f"has {len(found):,} tensors; at most {MAX_TENSORS:,} were expected", CONVERT)
    placed = {key: place(key, view, records) for key, view in sorted(found, key=lambda pair: pair[0])}
    if not placed:
        objects = list(dict.fromkeys(shown_name(value.of) for value in top.values() if isinstance(value, Unused) and value.of))
        beside = f"; its objects, such as {', '.join(objects[:5])}, are not made" if objects else ""
        raise UnreadableError(f"holds no tensors that minisd could find{beside}", "minisd looks at its top and below state_dict")
    if len(placed) < len(found):
        raise UnreadableError("has two tensors of one name", CONVERT)
    if sum(entry.nbytes for entry in placed.values()) > 2 * size:  # aliases are honest up to weights and averages in one
        raise UnreadableError("describes more than twice the numbers that it holds", CONVERT)
    return placed


def views(state: dict[str, Any]) -> Iterator[tuple[str, View]]:
    for key, value in state.items():
        if isinstance(value, View):
            yield key, value
        elif isinstance(value, dict):
            yield from ((f"{key}.{name}", inner) for name, inner in value.items() if isinstance(inner, View))


def place(key: str, view: View, records: Records) -> Entry:
    """Where the numbers of a tensor lie.  Raises UnreadableError unless they lie inside its storage, and that inside the file."""
    storage, offset, shape, stride = view.storage, view.offset, view.shape, view.stride
    if not (type(shape) is tuple and type(stride) is tuple and len(shape) == len(stride) <= MAX_DIMENSIONS):
        raise UnreadableError(f"expected a shape and a stride of at most {MAX_DIMENSIONS} numbers each", key=key)
    if not all(type(number) is int and 0 <= number < 1 << 48 for number in (offset, *shape, *stride)):
        raise UnreadableError("expected a shape, stride and offset of whole numbers from 0", key=key)
    if storage.key not in records:
        raise UnreadableError(f"its numbers, record {ascii(storage.key)[:80]}, are missing", key=key)
    start, length = records[storage.key]
    if nbytes(storage) != length:
        raise UnreadableError(f"expected {length:,} bytes of {storage.dtype}, found {storage.numel:,} elements", key=key)
    size = PLAIN[view.dtype]
    if offset + math.prod(shape) > length // size:
        raise UnreadableError(f"needs more numbers than the {length // size:,} of its storage", key=key)
    return Entry(view.dtype, shape, start + offset * size, order_of_axes(key, shape, stride))


def order_of_axes(key: str, shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...] | None:
    """None for a contiguous tensor, its stride for one whose axes are swapped.  Raises UnreadableError if it is neither."""
    if 0 in shape:
        return None
    axes = [(step, length) for step, length in zip(stride, shape, strict=True) if length != 1]
    inward = sorted(axes, reverse=True)
    if [step for step, _ in inward] != [math.prod(length for _, length in inward[i + 1 :]) for i in range(len(inward))]:
        raise UnreadableError("is a view with gaps or repetitions in it", CONVERT, key)
    return None if axes == inward else stride


def nbytes(storage: Storage) -> int:
    return storage.numel * PLAIN[storage.dtype]


def about(top: dict[str, Any]) -> dict[str, str]:
    """What a trainer wrote beside the weights: epoch, global_step, its version."""
    return {key: str(value) for key, value in top.items() if "state_dict" in top and type(value) in (str, int, float)}
