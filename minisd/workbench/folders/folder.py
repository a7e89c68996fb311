"""Between a raw checkpoint and a folder of diffusers: the same tensors under other names, and the configs that say their shapes.

What diffusers has no place for (schedule buffers, markers, SD 2's last text layer, the metadata) waits in a file of its own,
minisd.safetensors, which diffusers does not look at.  With it the way there and back changes no bit; without it only these are
lost.  Weights are read and written as in saving.py.

Reference: diffusers 0.42, pipelines/stable_diffusion*; the configs of the published folders.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...errors import CheckpointError, OutputError, UsageError, taken_apart
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.recognition import listing, native_size, recognise
from ...files.saving import Progress, with_markers, write_checkpoint
from ...files.tensors import TORCH, check_floats, read_stored
from ...files.training import metadata_of, said_training, title_of
from ...files.writers import is_unneeded
from ...files.writers_table import CONV_IN
from ...models.family import REFINER, SD1, SD2, SDXL, TASKS, VAE, Family, Recognition, Training
from ...models.naming import Link, Place, count, is_matrix, names_of, places
from ...system.atomic import check_place, check_room, draft_of, strays, sync
from ...system.regular import open_regular
from ..converting import FLOAT8, rounded, stored_name
from .configs import small_files

MAX_JSON = 16 << 20  # bytes; the index of SDXL's shards has 200,000
REST = "minisd.safetensors"
OLD_VAE = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # before diffusers 0.18

AnyPath = str | os.PathLike[str]
Tensors = dict[str, tuple[Checkpoint, str]]  # by name in a folder: the file that has it, and its name there


def to_folder(source: AnyPath, target: AnyPath, dtype: torch.dtype | None = None, progress: Progress | None = None) -> Path:
    """Writes a checkpoint as a folder that diffusers' `from_pretrained` opens; returns its path.

    dtype: of the weights; by default that of the file.  The folder appears whole or not at all.
    Raises CheckpointError (the source, also where diffusers has no config for its shape), UsageError (the dtype), OutputError
    (the target exists).
    """
    checkpoint, target = open_checkpoint(source), Path(target)
    if dtype in FLOAT8:
        raise UsageError("dtype: expected float32, bfloat16 or float16 for a folder of diffusers, found float8")
    found = recognise(checkpoint)
    with taken_apart(source):
        links = {place: links_of(place, checkpoint, found.family) for place in places(found.family)}
        texts = small_files(checkpoint, found)
    taken = {link.raw for each in links.values() for link in each}
    rest = [key for key in checkpoint.entries if key not in taken]
    total, done = sum(entry.nbytes for entry in checkpoint.entries.values()), 0
    with whole_folder(target, total) as draft:
        for name, content in texts.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_text(content, encoding="utf-8")
        for place, each in links.items():
            tell = (lambda part, _, before=done: progress(before + part, total)) if progress else None
            done += write_component(checkpoint, each, draft / place.folder, dtype, tell)
        planned = {key: (checkpoint.entries[key].dtype, checkpoint.entries[key].shape) for key in rest}
        write_checkpoint(draft / REST, planned, lambda key: [read_stored(checkpoint, key)], checkpoint.metadata)
    return target


def links_of(place: Place, checkpoint: Checkpoint, family: Family) -> list[Link]:
    """A link from every tensor of a network, by its whole raw name.  Raises CheckpointError if one has no place there."""
    keys = [key.removeprefix(place.prefix) for key in checkpoint.entries if key.startswith(place.prefix) and not is_unneeded(key)]
    names = names_of(place, keys, raw=True)
    if family is SD2 and place.tower:
        names.links = [link for link in names.links if link.raw != "text_projection"]
    links = [Link(place.prefix + link.raw, link.theirs, link.transposed) for link in names.forward(keys)]
    bare = next((link.raw for link in links if not checkpoint.entries[link.raw].shape), None)
    if bare:
        raise CheckpointError(checkpoint.path, "expected a tensor with axes, found a single number", key=bare)
    lost = {place.prefix + key for key in keys} - {link.raw for link in links}
    if family is SD2 and place.tower:  # theirs ends with the last layer that is used, which is not the last there is
        last = f"{place.prefix}transformer.resblocks.{count(keys, 'transformer.resblocks.') - 1}."
        lost = {key for key in lost if not key.startswith(last) and not key.endswith(".text_projection")}
    if lost:
        raise CheckpointError(checkpoint.path, f"has {len(lost)} tensors that diffusers has no place for{listing(sorted(lost))}")
    check_floats(checkpoint, {link.raw: checkpoint.entries[link.raw] for link in links})
    return links


def write_component(
    checkpoint: Checkpoint, links: list[Link], folder: Path, dtype: torch.dtype | None, progress: Progress | None
) -> int:
    """Writes the weights of one network; returns their size in bytes."""
    planned: dict[str, tuple[str, tuple[int, ...]]] = {}
    origin: dict[str, tuple[Link, int]] = {}
    for link in links:
        entry = checkpoint.entries[link.raw]
        shape = tuple(reversed(entry.shape)) if link.transposed else (entry.shape[0] // len(link.theirs), *entry.shape[1:])
        if link.raw.startswith(f"{VAE}.") and is_matrix(link.raw.removeprefix(f"{VAE}.")):
            shape = shape[:2]
        for part, name in enumerate(link.theirs):
            planned[name], origin[name] = (stored_name(link.raw, entry.dtype, entry.shape, dtype), shape), (link, part)

    def read(name: str) -> list[Tensor]:
        link, part = origin[name]
        tensor = read_stored(checkpoint, link.raw)
        tensor = tensor.T if link.transposed else tensor.chunk(len(link.theirs))[part]
        return [rounded(tensor, TORCH[planned[name][0]], checkpoint, link.raw)]

    write_checkpoint(folder / f"{weights_name(folder.name)}.safetensors", planned, read, {"format": "pt"}, progress=progress)
    return sum(checkpoint.entries[link.raw].nbytes for link in links)


def from_folder(source: AnyPath, target: AnyPath, dtype: torch.dtype | None = None, progress: Progress | None = None) -> Path:
    """Writes the raw checkpoint of a diffusers folder (.safetensors weights, whole or in shards); returns its path.

    dtype: of the weights; by default those of the folder.  Raises CheckpointError (the folder), OutputError.
    """
    folder = Path(source)
    with taken_apart(folder):
        origin = raw_origin(folder)
        rest = open_checkpoint(folder / REST) if (folder / REST).exists() else None
        found, metadata = what_it_is(folder, origin, rest)
    kept = [key for key in rest.entries if key not in origin] if rest else []
    planned = {key: (stored_name(key, each.dtype, each.shape, dtype), each.shape) for key, each in origin.items()}
    planned |= {key: (rest.entries[key].dtype, rest.entries[key].shape) for key in kept if rest}

    def read(key: str) -> list[Tensor]:
        if key in origin:
            return [rounded(tensor, TORCH[planned[key][0]], file, name) for tensor, file, name in origin[key].read()]
        assert rest
        return [read_stored(rest, key)]

    marked, read_marked = with_markers(planned, read, found.training, rest)
    return write_checkpoint(target, marked, read_marked, {"format": "pt"} | metadata, found, progress)


@dataclass(frozen=True)
class Found:
    """A raw tensor in a folder: the tensors there that make it up, one above the other, and whether each is transposed."""

    sources: list[tuple[Checkpoint, str]]
    transposed: bool
    shape: tuple[int, ...]

    @property
    def dtype(self) -> str:
        file, name = self.sources[0]
        return file.entries[name].dtype

    def read(self) -> Iterator[tuple[Tensor, Checkpoint, str]]:
        for file, name in self.sources:
            tensor = read_stored(file, name)
            yield (tensor.T if self.transposed else tensor), file, name


def raw_origin(folder: Path) -> dict[str, Found]:
    """Where the tensors of the raw checkpoint are in a folder.  Raises CheckpointError."""
    origin: dict[str, Found] = {}
    for place in places(family_of(folder)):
        tensors = weights(folder / place.folder)
        known = {key for key in tensors if not key.endswith(".position_ids")}
        links = names_of(place, known, raw=False).backward(known)
        strange = known - {name for link in links for name in link.theirs}
        if strange:
            raise CheckpointError(
                folder / place.folder, f"has {len(strange)} tensors that minisd has no place for{listing(sorted(strange))}"
            )
        for name in known:
            file, key = tensors[name]
            check_floats(file, {key: file.entries[key]})
        for link in links:
            sources = sources_of(folder / place.folder, link, tensors)
            shapes = [file.entries[name].shape for file, name in sources]
            shape = tuple(reversed(shapes[0])) if link.transposed else (sum(each[0] for each in shapes), *shapes[0][1:])
            if place.folder == "vae" and is_matrix(link.raw):
                shape = (*shape[:2], 1, 1)
            origin[place.prefix + link.raw] = Found(sources, link.transposed, shape)
    return origin


def sources_of(folder: Path, link: Link, tensors: Tensors) -> list[tuple[Checkpoint, str]]:
    """The tensors that make up a raw one.  Raises CheckpointError if one is missing or has a shape that no weight has."""
    for name in link.theirs:
        if name not in tensors:
            raise CheckpointError(folder, "is missing", "is the folder complete?", key=name)
        file, key = tensors[name]
        shape = file.entries[key].shape
        matrix = link.transposed or (folder.name == "vae" and is_matrix(link.raw))
        if not shape or (matrix and len(shape) < 2):
            raise CheckpointError(
                file.path, f"expected {'a matrix' if matrix else 'a row of numbers'}, found shape {shape}", key=key
            )
    return [tensors[name] for name in link.theirs]


def family_of(folder: Path) -> Family:
    """By its text encoders, which are what a pipeline's folder has one or two of."""
    first, second = ((folder / name / "config.json").is_file() for name in ("text_encoder", "text_encoder_2"))
    if not (folder / "model_index.json").is_file() or not (first or second):
        raise CheckpointError(folder, "is no diffusers folder of Stable Diffusion: expected model_index.json and text_encoder/")
    if second:
        return SDXL if first else REFINER
    return SD2 if read_json(folder / "text_encoder" / "config.json").get("hidden_act") == "gelu" else SD1


def weights(folder: Path) -> Tensors:
    """The tensors of a network's folder: in one file or in shards, in half precision where there is no other."""
    base = weights_name(folder.name)
    for variant in (base, f"{base}.fp16"):
        path, index = folder / f"{variant}.safetensors", folder / f"{variant}.safetensors.index.json"
        if path.is_file():
            files = [open_checkpoint(path)]
        elif index.is_file():
            with taken_apart(index):
                names = {str(name) for name in dict(read_json(index).get("weight_map", {})).values()}
            if any(Path(name).name != name for name in names):
                raise CheckpointError(index, "names files outside of its folder")
            files = [open_checkpoint(folder / name) for name in sorted(names)]
        else:
            continue
        return {modern(key) if folder.name == "vae" else key: (file, key) for file in files for key in file.entries}
    hint = (
        "its .bin files are programs; save it again with safe_serialization" if list(folder.glob("*.bin")) else "is it complete?"
    )
    raise CheckpointError(folder, f"expected {base}.safetensors, found none", hint)


def modern(key: str) -> str:
    """A VAE's key in today's names."""
    if ".attentions." not in key:
        return key
    start, _, rest = key.partition(".attentions.0.")
    old, _, kind = rest.rpartition(".")
    return f"{start}.attentions.0.{OLD_VAE.get(old, old)}.{kind}"


def weights_name(folder: str) -> str:
    return "model" if folder.startswith("text_encoder") else "diffusion_pytorch_model"


def what_it_is(folder: Path, origin: Mapping[str, Found], rest: Checkpoint | None) -> tuple[Recognition, dict[str, str]]:
    """What the raw file will be, by the folder's configs, and its metadata.

    Raises CheckpointError if the configs say something else of the training than what waits in the rest.
    """
    family, training = family_of(folder), training_of(folder)
    metadata = dict(rest.metadata) if rest else {}
    config = folder / "unet" / "config.json"
    side = read_json(config).get("sample_size") if rest is None and config.is_file() else None
    if type(side) is int:
        metadata |= {"modelspec.resolution": f"{8 * side}x{8 * side}"}
    if rest and (known := said_training(rest)) and title_of(known) != title_of(training):
        raise CheckpointError(
            folder,
            f"its scheduler says that it {title_of(training)}, its {REST} that it {title_of(known)}",
            f"put the scheduler's config right, or remove {REST}",
        )
    channels = origin[CONV_IN].shape[1] if CONV_IN in origin else 0
    if channels not in TASKS:
        raise CheckpointError(folder, f"expected a UNet with {', '.join(map(str, TASKS))} input channels, found {channels}")
    size = native_size(family, training, metadata, folder)
    return Recognition(family, TASKS[channels], training, size, ()), metadata | metadata_of(training)


def training_of(folder: Path) -> Training:
    """How the model was trained, by the folder's scheduler and VAE."""
    schedule = read_json(folder / "scheduler" / "scheduler_config.json")
    predicts_v = schedule.get("prediction_type") == "v_prediction"
    if not str(schedule.get("_class_name")).startswith("EDM"):
        return Training("v" if predicts_v else "epsilon", predicts_v and schedule.get("rescale_betas_zero_snr") is True)
    low, high = (float(schedule.get(name, default)) for name, default in (("sigma_min", 0.002), ("sigma_max", 80.0)))
    if predicts_v:
        return Training("v", sigmas=(low, high))
    vae = read_json(folder / "vae" / "config.json")
    mean, std = (tuple(float(each) for each in vae[name]) for name in ("latents_mean", "latents_std"))
    return Training(
        "edm", sigmas=(low, high), sigma_data=float(schedule.get("sigma_data", 0.5)), latent_mean=mean, latent_std=std
    )


def read_json(path: Path) -> dict[str, Any]:
    try:
        with open_regular(path, MAX_JSON) as file:
            found = json.loads(file.read().decode())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(path, f"cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise CheckpointError(path, f"expected a JSON object, found {type(found).__name__}")
    return found


@contextlib.contextmanager
def whole_folder(target: Path, size: int) -> Iterator[Path]:
    """Gives a folder to fill, which then takes the name `target`; if something goes wrong nothing of it stays."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise OutputError(f"output {target}: exists already; choose another name")
    check_place(target / "model_index.json" if target.exists() else target)
    check_room(target, size)
    draft = draft_of(target)
    try:
        for stray in strays(target):
            shutil.rmtree(stray, ignore_errors=True)
        draft.mkdir()
        yield draft
        for folder, _, files in os.walk(draft):
            for name in files:
                sync(Path(folder) / name)
            sync(Path(folder))
        draft.replace(target)
        sync(target.parent)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output {target}: could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
