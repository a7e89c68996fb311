"""A checkpoint written anew: its parts each from where they are wanted, in another dtype, without what nobody needs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..files.checkpoint import Checkpoint, open_checkpoint
from ..files.model import StableDiffusion, build, described_vae, latent_channels
from ..files.model import described as described_model
from ..files.recognition import listing, recognise
from ..files.saving import NAMES, Planned, Progress, described, with_markers, write_checkpoint
from ..files.tensors import TORCH, finite, stored_pieces
from ..files.training import said
from ..files.writers import is_bookkeeping, is_unneeded, may_be_left_out
from ..files.writers_table import MARKERS
from ..models.blocks import part_of
from ..models.family import VAE, Recognition
from ..models.shapes import below
from ..system.atomic import folder_of

Origin = dict[str, tuple[Checkpoint, str]]  # for a key of the result: the file, and the key there
STORABLE = {str(dtype).removeprefix("torch."): dtype for dtype in TORCH.values() if dtype != torch.float64}
FLOAT8 = {torch.float8_e4m3fn, torch.float8_e5m2}


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    dtype: torch.dtype | None = None,
    prune: bool = False,
    vae: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Path:
    """Writes a checkpoint (.safetensors or .ckpt) anew as .safetensors; returns its path.

    dtype: of the weights, where it is to change; numbers that are no floating-point numbers stay what they are.  In float8 only
        matrices and convolutions of the UNet and the text encoders are stored, the rest in float16; they draw as any other.
    prune: leaves out what nobody needs to draw: schedule buffers, the moving average, the loss of the training, and what no
        module asks for.
    vae: a VAE file or another checkpoint, whose VAE takes the place of the source's.
    text: another checkpoint of the same family, whose text encoders take the place of the source's.
    prediction, zero_snr: as for `load`, where the source says nothing of its training or the wrong thing; the result says it.
    Raises CheckpointError (the sources, also if they hold NaN), UsageError (the target's name) and OutputError (the target; what
    stood there is then whole).
    """
    return write_parts(said(open_checkpoint(source), prediction, zero_snr), target, dtype, prune, vae, text, progress)


def save(
    model: str | os.PathLike[str],
    filename_prefix: str = "checkpoints/minisd",
    dtype: torch.dtype | None = None,
    vae: str | os.PathLike[str] | None = None,
    text: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    folder: str | os.PathLike[str] = ".",
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Path:
    """Puts a checkpoint together as ComfyUI's CheckpointSave does, and writes it under the next free number; returns its path.

    filename_prefix: "checkpoints/mymix" gives checkpoints/mymix_00001_.safetensors, then _00002_; folders are made where they are
        missing, below `folder` and nowhere else.
    dtype, vae, text, prediction, zero_snr: as for `convert`; what nobody needs is left out.
    Raises CheckpointError, UsageError (the prefix leads out of the folder), OutputError.
    """
    root = Path(folder)
    target = root / f"{filename_prefix}.safetensors"
    inside = Path(os.path.realpath(root)) in Path(os.path.realpath(target)).parents  # resolve raises on links in a circle
    if not filename_prefix.isprintable() or Path(filename_prefix).name in ("", "..") or not inside:
        raise UsageError(f"filename prefix: expected folder and name below {root}, found {filename_prefix!r}")
    checkpoint = said(open_checkpoint(model), prediction, zero_snr)
    recognise(checkpoint, vae is not None)
    with folder_of(target):
        return write_parts(checkpoint, target, dtype, True, vae, text, progress, by_number=True)


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises UsageError unless weights can be stored so."""
    if dtype is not None and dtype not in STORABLE.values():
        raise UsageError(f"dtype: expected torch.{', torch.'.join(STORABLE)}, found {dtype!r}")


def write_parts(
    checkpoint: Checkpoint,
    target: str | os.PathLike[str],
    dtype: torch.dtype | None,
    prune: bool,
    vae: str | os.PathLike[str] | None,
    text: str | os.PathLike[str] | None,
    progress: Progress | None,
    by_number: bool = False,
) -> Path:
    check_dtype(dtype)
    found = what_it_is(checkpoint, vae is not None)
    dropped = {key for key in checkpoint.entries if is_pruned(key)} | extra_keys(checkpoint) if prune else set()
    origin: Origin = {key: (checkpoint, key) for key in checkpoint.entries if key not in dropped}
    if vae is not None:
        origin = {key: place for key, place in origin.items() if part_of(key) != "vae"} | vae_of(open_checkpoint(vae), checkpoint)
    if text is not None:
        origin |= text_of(open_checkpoint(text), checkpoint)
    entries = {key: file.entries[name] for key, (file, name) in origin.items()}
    if found:
        build(replace(checkpoint, entries=entries), found.family)  # raises before anything is written
    planned: Planned = {key: (stored_name(key, each.dtype, each.shape, dtype), each.shape) for key, each in entries.items()}

    def read(key: str) -> Iterator[Tensor]:
        file, name = origin[key]
        for piece in stored_pieces(file, name):
            if file.entries[name].dtype in TORCH:
                cast = narrowed if is_bookkeeping(key) else partial(rounded, file=file, key=name)
                yield cast(piece, TORCH[planned[key][0]])
            else:
                yield piece

    metadata = described(checkpoint, found)
    if found is None:
        return write_checkpoint(target, planned, read, metadata, None, progress, by_number)
    marked, read_marked = with_markers(planned, read, found.training, checkpoint)
    return write_checkpoint(target, marked, read_marked, metadata, found, progress, by_number)


def what_it_is(checkpoint: Checkpoint, vae_given: bool) -> Recognition | None:
    """What a checkpoint is, also one that leaves its VAE to another file; None of what is no checkpoint, but can be written anew.

    Raises CheckpointError of one that is to get another VAE, and UsageError where what the user says of it makes no sense.
    """
    try:
        return recognise(checkpoint, vae_given or not below(checkpoint.shapes, VAE))
    except CheckpointError:
        if vae_given or checkpoint.prediction or checkpoint.zero_snr is not None:
            raise
        return None


def stored_name(key: str, stored: str, shape: tuple[int, ...], dtype: torch.dtype | None) -> str:
    """safetensors' name of the dtype that a tensor, `stored` as it is now, gets where `dtype` is asked for.

    Counters and buffers stay what they are: one of steps may be too large for float16.
    """
    if dtype is None or stored not in TORCH or (is_bookkeeping(key) and len(shape) < 2):
        return stored
    kept = dtype in FLOAT8 and (len(shape) < 2 or part_of(key) == "vae")
    return NAMES[torch.float16 if kept else dtype]


def rounded(numbers: Tensor, dtype: torch.dtype, file: Checkpoint, key: str) -> Tensor:
    """The numbers in `dtype`.  Raises CheckpointError if they are not finite, or no longer."""
    result = narrowed(numbers, dtype)
    if not finite(result):
        if finite(numbers):
            raise CheckpointError(file.path, f"holds numbers too large for {dtype}", "choose bfloat16 or float32", key)
        raise CheckpointError(file.path, "holds NaN or infinity", "it is not worth keeping; get another copy", key)
    return result


def narrowed(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers in `dtype`; what is too large for float8 becomes its largest number, as torch would make NaN of it."""
    if dtype not in FLOAT8 or numbers.dtype == dtype:
        return numbers.to(dtype)
    limit = torch.finfo(dtype).max
    return numbers.float().clamp(-limit, limit).to(dtype)


def vae_of(vae: Checkpoint, checkpoint: Checkpoint) -> Origin:
    """Where the weights of a file's VAE are, by the names that they have in a checkpoint.

    Raises CheckpointError if the file has none that is whole and fits the checkpoint.
    """
    name, module = described_vae(vae, latent_channels(checkpoint))
    prefix = f"{name}." if name else ""
    return {f"{VAE}.{key}": (vae, f"{prefix}{key}") for key in module.state_dict()}


def text_of(checkpoint: Checkpoint, like: Checkpoint) -> Origin:
    """Where the weights of a checkpoint's text encoders are.  Raises CheckpointError unless they are those of `like`'s family."""

    def encoders(file: Checkpoint) -> dict[str, tuple[int, ...]]:
        prefixes = tuple(f"{tower.name}." for tower in recognise(file).family.towers)
        extra = extra_keys(file)
        asked = (key for key in file.entries if key.startswith(prefixes) and not is_unneeded(key) and key not in extra)
        return {key: file.entries[key].shape for key in asked}

    wanted, found = encoders(like), encoders(checkpoint)
    left_out = {key for key in found.keys() - wanted.keys() if may_be_left_out(key)}
    other = [key for key in {**wanted, **found} if wanted.get(key) != found.get(key) and key not in left_out]
    if other:
        reason = f"expected text encoders as in {like.path}, found {len(other)} keys that differ{listing(other)}"
        raise CheckpointError(checkpoint.path, reason)
    return {key: (checkpoint, key) for key in found}


def extra_keys(checkpoint: Checkpoint) -> set[str]:
    """The tensors that no module of the checkpoint asks for, and of which nobody knows what they are for.

    None of a file that minisd cannot draw with: there nothing tells what is needed.
    """
    found = what_it_is(checkpoint, vae_given=False)
    if found is None:
        return set()
    try:
        model = described_model(checkpoint, found.family.title, lambda: StableDiffusion(checkpoint.shapes, found.family))
    except CheckpointError:
        return set()
    return {key for key in checkpoint.entries.keys() - model.state_dict().keys() if not is_unneeded(key)}


def is_pruned(key: str) -> bool:
    """What nobody needs, but not the markers that say how a model was trained."""
    return is_unneeded(key) and key not in MARKERS
