"""Writing checkpoints: whole or not at all, tensor by tensor, so that a file of any size takes the memory of its largest one.

The new file grows beside its target under another name, is read back, and takes the target's place in one step; until then what
stood there is untouched.  Metadata by ModelSpec 1.0.1 (Stability-AI/ModelSpec), with a hash over all tensor content.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from .atomic import check_place, check_room, replacing
from .checkpoint import Checkpoint, open_checkpoint
from .errors import CheckpointError, OutputError
from .family import MARKERS, VAE, is_spare, recognise, vae_name
from .shapes import PLAIN, Entry
from .tensors import STORED, TORCH, finite, read_stored

NAMES = {dtype: name for name, dtype in TORCH.items()}
NO_HASH = "0x" + "0" * 64
ARCHITECTURES = {  # ModelSpec's identifiers, by family and task
    ("sd1", "draw"): "stable-diffusion-v1",
    ("sd1", "inpaint"): "stable-diffusion-v1-inpainting",
    ("sd2", "draw"): "stable-diffusion-v2-512",
    ("sd2", "inpaint"): "stable-diffusion-v2-inpainting",
    ("sdxl", "draw"): "stable-diffusion-xl-v1-base",
    ("sdxl", "edit"): "stable-diffusion-xl-v1-edit",
    ("sdxl-refiner", "draw"): "stable-diffusion-xl-v1-refiner",
}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    prune: bool = False,
    vae: str | os.PathLike[str] | None = None,
) -> Path:
    """Writes a checkpoint (.safetensors or .ckpt) anew as .safetensors; returns its path.

    dtype: of the weights, where it is to change; numbers that are no floating-point numbers stay what they are.
    prune: leaves out what nobody needs to draw: schedule buffers, the moving average, the loss of the training.
    vae: a VAE file or another checkpoint, whose VAE takes the place of the source's.
    Raises CheckpointError (the sources, also if they hold NaN) and OutputError (the target; what stood there is then whole).
    """
    checkpoint = open_checkpoint(source)
    origin = {key: (checkpoint, key) for key in checkpoint.entries if not (prune and is_unneeded(key))}
    if vae is not None:
        origin = {key: place for key, place in origin.items() if not key.startswith(f"{VAE}.")} | vae_of(open_checkpoint(vae))
    entries = {key: file.entries[name] for key, (file, name) in origin.items()}
    planned = {
        key: (NAMES[dtype] if dtype and entry.dtype in TORCH else entry.dtype, entry.shape) for key, entry in entries.items()
    }

    def read(key: str) -> Tensor:
        file, name = origin[key]
        tensor = read_stored(file, name)
        if file.entries[name].dtype not in TORCH:
            return tensor
        if not finite(tensor):
            raise CheckpointError(file.path, "holds NaN or infinity", "it is not worth keeping; get another copy", name)
        return tensor.to(dtype) if dtype else tensor

    return write_checkpoint(Path(target), planned, read, described(checkpoint))


def vae_of(checkpoint: Checkpoint) -> dict[str, tuple[Checkpoint, str]]:
    """Where the weights of a file's VAE are, by the names that they have in a checkpoint.  Raises CheckpointError."""
    name = vae_name(checkpoint.shapes)
    if name is None:
        raise CheckpointError(checkpoint.path, "expected a VAE, or a checkpoint that has one")
    prefix = f"{name}." if name else ""
    inside = {f"{VAE}.{key.removeprefix(prefix)}": key for key in checkpoint.entries if key.startswith(prefix)}
    return {key: (checkpoint, original) for key, original in inside.items() if not is_spare(key)}


def save_model(model: nn.Module, checkpoint: Checkpoint, path: str | os.PathLike[str]) -> Path:
    """Writes a model that was loaded from a checkpoint, and perhaps changed since, with the file's metadata and markers."""
    tensors = {key: value.cpu() for key, value in model.state_dict().items()}
    tensors |= {key: read_stored(checkpoint, key) for key in MARKERS if key in checkpoint.entries}
    names = {dtype: name for name, dtype in STORED.items()}
    planned = {key: (names[value.dtype], tuple(value.shape)) for key, value in tensors.items()}
    return write_checkpoint(Path(path), planned, tensors.__getitem__, described(checkpoint))


def is_unneeded(key: str) -> bool:
    """Spare keys, but not the markers that say how a model was trained."""
    return is_spare(key) and key not in MARKERS


def described(checkpoint: Checkpoint) -> dict[str, str]:
    """The source's metadata, completed to what ModelSpec asks for; of a file that is no checkpoint only its own."""
    metadata = {"format": "pt"} | dict(checkpoint.metadata)
    try:
        found = recognise(checkpoint)
    except CheckpointError:
        return metadata
    architecture = ARCHITECTURES.get((found.family.name, found.task), found.family.name)
    if (found.family.name, found.training.prediction) == ("sd2", "v"):
        architecture = "stable-diffusion-v2-768-v"
    defaults = {
        "modelspec.architecture": architecture,
        "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
        "modelspec.title": checkpoint.path.stem,
        "modelspec.resolution": "{}x{}".format(*found.size),
        "modelspec.prediction_type": found.training.prediction,
    }
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    ours = {"modelspec.sai_model_spec": "1.0.1", "modelspec.date": now, "modelspec.hash_sha256": NO_HASH}
    return defaults | metadata | ours


def write_checkpoint(
    path: Path, planned: Mapping[str, tuple[str, tuple[int, ...]]], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> Path:
    """Writes a .safetensors file of these (dtype, shape) by key, with the tensors that `read` hands over one by one."""
    if path.suffix != ".safetensors":
        raise OutputError(f"output {path}: expected a name that ends in .safetensors")
    check_place(path)
    head = header(planned, metadata)
    check_room(path, len(head) + sum(Entry(*facts, 0).nbytes for facts in planned.values()))
    with replacing(path) as draft:
        with draft.open("wb") as file:
            file.write(head)
            content = hashlib.sha256()
            for key in sorted(planned):
                data = bytes_of(read(key), planned[key])
                content.update(data)
                file.write(data)
            if NO_HASH.encode() in head:  # its place was kept free in the header
                file.seek(head.index(NO_HASH.encode()))
                file.write(f"0x{content.hexdigest()}".encode())
        read_back(draft, planned)
    return path


def header(planned: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    """Length and JSON of the header, tensors in alphabetical order without gaps, filled up to a multiple of 8 bytes."""
    table: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for key in sorted(planned):
        dtype, shape = planned[key]
        size = Entry(dtype, shape, 0).nbytes
        table[key] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def bytes_of(tensor: Tensor, planned: tuple[str, tuple[int, ...]]) -> memoryview:
    """The numbers of a tensor as the file holds them: little-endian, the last dimension contiguous."""
    dtype, shape = planned
    assert tuple(tensor.shape) == shape, (tensor.shape, shape)
    assert tensor.element_size() == PLAIN[dtype], (tensor.dtype, dtype)
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def read_back(draft: Path, planned: Mapping[str, tuple[str, tuple[int, ...]]]) -> None:
    written = {key: (entry.dtype, entry.shape) for key, entry in open_checkpoint(draft).entries.items()}
    if written != dict(planned):
        raise OSError("what was written is not what was read back")
