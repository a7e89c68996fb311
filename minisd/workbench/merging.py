"""Mixing checkpoints: arithmetic on keys, in float32, from files to a file.

The first model decides: its keys, its dtype, its metadata.  Sources are only read; the result may replace one of them.
A weighted sum goes piece by piece, the other methods tensor by tensor, so the size of the files does not matter.  What was done
is written into the result, and `repeat` does it again.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError, UsageError
from ..files.checkpoint import Checkpoint, file_sha256, open_checkpoint
from ..files.model import build
from ..files.recognition import listing, recognise
from ..files.saving import NAMES, Planned, Progress, Read, described, with_markers, write_checkpoint
from ..files.tensors import TORCH, finite, read_stored, stored_pieces
from ..files.writers import is_bookkeeping, is_unneeded
from ..files.writers_table import CONV_IN
from ..models.blocks import block_of, block_ratios, part_of
from .arithmetic import dare, generator_for, slerp, ties, weighted
from .converting import check_dtype, extra_keys, narrowed, stored_name
from .sources import Hashes, hashing, identity
from .sources import mixed as mixed_training

PARTS = ("unet", "text", "vae")
METHODS = ("weighted", "slerp", "ties", "dare")
DENSITY = {"ties": 0.2, "dare": 0.1}  # of the papers
RECIPE = "minisd.merge"  # its key in the metadata
THEIRS = ("sd_merge_recipe", "sd_merge_models")  # A1111's, which say how this very file was made


@dataclass(frozen=True)
class Recipe:
    """How models are mixed, see `merge`."""

    method: str = "weighted"
    ratios: tuple[float, ...] = ()
    by_part: Mapping[str, float] = field(default_factory=dict)
    by_block: Mapping[str, float] = field(default_factory=dict)
    density: float | None = None
    seed: int = 0
    prediction: str | None = None
    zero_snr: bool | None = None


def merge(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    ratios: float | Sequence[float] = (),
    base: str | os.PathLike[str] | None = None,
    method: str = "weighted",
    by_part: Mapping[str, float] | None = None,
    blocks: str | Mapping[str, float] | None = None,
    density: float | None = None,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    prediction: str | None = None,
    zero_snr: bool | None = None,
) -> Path:
    """Mixes two models or more into one; returns its path.

    ratios: a number for each model but the first, which has the rest: (1 - r) A + r B.  With a base A + r (B - base), which adds
        to A what B learned since the base.  By default equal shares or, with a base, 1.
    method: "weighted", "slerp" (two models), "ties" or "dare" (both with a base); arithmetic.py has the formulas.  "ties" has one
        ratio, for the merged change of all models.
    by_part: other ratios for "unet", "text" or "vae"; blocks: for blocks of the UNet, see blocks.block_ratios.  With two models.
    density: for "ties" and "dare", the part of the changes that is kept; by default that of the papers.  seed: of dare's choice.
    dtype: of the result; by default that of the first model.
    prediction, zero_snr: how the result draws, as for `load`, where the models were not trained alike.
    Where A is an inpainting model and B is not, A keeps the channels that B lacks (A1111 extras.py, run_modelmerger).
    A ratio of 0 copies A, of 1 (without a base) B, to the bit.  Moving averages of the training (model_ema.*) are left out.
    Raises CheckpointError (a source that is broken, or of another family than A), UsageError, OutputError.
    """
    models = [open_checkpoint(path) for path in (*sources, *([base] if base is not None else []))]
    check_dtype(dtype)
    by_block = block_ratios(blocks, models[0].entries, base is not None) if isinstance(blocks, str) else dict(blocks or {})
    given = (float(ratios),) if isinstance(ratios, int | float) else tuple(ratios)
    recipe = Recipe(method, given, by_part or {}, by_block, density, seed, prediction, zero_snr)
    recipe = settled(recipe, len(sources) - 1, base is not None)
    for other in models[1:]:
        check_alike(models[0], other)
    if len({other.entries[CONV_IN].shape for other in models[1:]}) > 1:
        raise UsageError("merge: expected the models beside the first to take the same input, found inpainting models and others")
    found, like = mixed_training(models, shares(models, recipe, base is not None), recipe.prediction, recipe.zero_snr)
    build(models[0], found.family)  # raises before anything is written
    kept = {key: entry for key, entry in models[0].entries.items() if not key.startswith("model_ema.")}
    planned = {key: (stored_name(key, entry.dtype, entry.shape, dtype), entry.shape) for key, entry in kept.items()}
    planned, read = with_markers(planned, reader(models, recipe, planned, base is not None), found.training, like)
    with hashing([model.path for model in models]) as hashes:
        own = {key: value for key, value in described(models[0], found).items() if key not in THEIRS}
        metadata = own | {"modelspec.title": Path(target).stem} | notes(models, hashes, recipe, base is not None, dtype)
        return write_checkpoint(target, planned, read, metadata, found, progress, later=hashes.later)


def reader(models: Sequence[Checkpoint], recipe: Recipe, planned: Planned, with_base: bool) -> Read:
    """What gives the numbers of a tensor of the result."""

    def read(key: str) -> Iterator[Tensor]:
        if planned[key][0] not in TORCH:
            yield from stored_pieces(models[0], key)
            return
        alone = is_unneeded(key) or any(key not in model.entries for model in models)
        pieces = stored_pieces(models[0], key) if alone else mixed(models, key, recipe, with_base)
        for piece in pieces:
            result = narrowed(piece, TORCH[planned[key][0]])
            if not finite(result) and not is_bookkeeping(key):
                raise why_not_finite(models, key, planned[key][0])
            yield result

    return read


def shares(models: Sequence[Checkpoint], recipe: Recipe, with_base: bool) -> list[list[float]]:
    """How much of each model, and of the base, the UNet's tensors have: every sum that occurs, once."""
    others = len(models) - 1 - with_base
    found = []
    for ratios in dict.fromkeys(tuple(ratios_of(key, recipe)) for key in models[0].entries if part_of(key) == "unet"):
        each = ratios if len(ratios) == others else ratios * others  # ties has one for all
        found.append([1.0, *each, -sum(each)] if with_base else [1 - sum(each), *each])
    return found


def settled(recipe: Recipe, others: int, with_base: bool) -> Recipe:
    """The recipe with its defaults.  Raises UsageError where it makes no sense for so many models beside the first."""
    if recipe.method not in METHODS:
        raise UsageError(f"method: expected one of {', '.join(METHODS)}, found {recipe.method!r}")
    if others < 1 or (recipe.method == "slerp" and (others > 1 or with_base)):
        expected = "exactly two models and no base" if recipe.method == "slerp" else "two models or more"
        raise UsageError(f"merge: expected {expected} for {recipe.method}, found {others + 1}{' and a base' * with_base}")
    if recipe.method in DENSITY and not with_base:
        raise UsageError(f"base: {recipe.method} mixes what models learned since a common base; name it")
    count = 1 if recipe.method == "ties" else others
    default = 1.0 if with_base else 1 / (others + 1)
    ratios = recipe.ratios or (default,) * count
    if len(ratios) != count:
        raise UsageError(f"ratio: expected {count}, one for each model but the first, found {len(ratios)}")
    if count > 1 and (recipe.by_part or recipe.by_block):
        raise UsageError(f"ratios of parts and blocks: expected with two models, found {others + 1}")
    if unknown := recipe.by_part.keys() - set(PARTS):
        raise UsageError(f"part: expected one of {', '.join(PARTS)}, found {min(unknown)!r}")
    for value in (*ratios, *recipe.by_part.values(), *recipe.by_block.values()):
        if not -10 <= value <= 10:
            raise UsageError(f"ratio: expected a number from -10 to 10, found {value!r}")
    density = recipe.density if recipe.density is not None else DENSITY.get(recipe.method)
    if density is not None and (recipe.method not in DENSITY or not 0 < density <= 1):
        raise UsageError(f"density: expected above 0 to 1, for {' or '.join(DENSITY)}, found {density!r} for {recipe.method}")
    return replace(recipe, ratios=ratios, density=density)


def check_alike(first: Checkpoint, other: Checkpoint) -> None:
    """Raises CheckpointError unless the other has every weight of the first, in its shape but for extra input channels."""
    ours, theirs = recognise(first), recognise(other)
    if ours.family is not theirs.family:
        raise CheckpointError(other.path, f"is {theirs.family.title}, expected {ours.family.title} as {first.path}")
    lacking = [key for key in first.entries if not is_unneeded(key) and key not in other.entries]
    if lacking := sorted({*lacking} - extra_keys(first)) if lacking else []:
        raise CheckpointError(other.path, f"lacks {len(lacking)} keys of {first.path}{listing(lacking)}")
    for key, entry in first.entries.items():
        if is_unneeded(key) or key not in other.entries:
            continue
        if math.prod(entry.shape) == math.prod(other.entries[key].shape):  # a 1x1 convolution may be a matrix
            continue
        if key == CONV_IN and entry.shape[1] > other.entries[key].shape[1]:
            continue
        hint = "name the inpainting model first" if key == CONV_IN else ""
        found = other.entries[key].shape
        raise CheckpointError(other.path, f"expected shape {entry.shape} as in {first.path}, found {found}", hint, key)


def ratios_of(key: str, recipe: Recipe) -> Sequence[float]:
    """Those of a tensor: its block's, or its part's, or everybody's."""
    block = block_of(key)
    if block is not None and block in recipe.by_block:
        return [recipe.by_block[block]]
    part = part_of(key)
    return [recipe.by_part[part]] if part in recipe.by_part else recipe.ratios


def mixed(models: Sequence[Checkpoint], key: str, recipe: Recipe, with_base: bool) -> Iterator[Tensor]:
    """The numbers of one tensor of the result, in pieces, (N,) each: float32, or as a source has them."""
    ratios = ratios_of(key, recipe)
    copied = source_of(ratios, with_base) if recipe.method != "ties" else None
    entries = [model.entries[key] for model in models]
    if copied is not None and entries[copied].shape == entries[0].shape:
        yield from stored_pieces(models[copied], key)
    elif (
        recipe.method == "weighted"
        and len({entry.numel for entry in entries}) == 1
        and all(entry.in_one_piece for entry in entries)
    ):
        for own, *others in zip(*(stored_pieces(model, key) for model in models), strict=True):
            base = others.pop().float() if with_base else None
            yield weighted(own.float(), [other.float() for other in others], ratios, base)
    else:
        yield combined([read_stored(model, key).float() for model in models], key, ratios, recipe, with_base).flatten()


def source_of(ratios: Sequence[float], with_base: bool) -> int | None:
    """The number of the model that these ratios just copy."""
    if not any(ratios):
        return 0
    return 1 + [*ratios].index(1) if not with_base and sorted(ratios) == [0.0] * (len(ratios) - 1) + [1.0] else None


def combined(tensors: list[Tensor], key: str, ratios: Sequence[float], recipe: Recipe, with_base: bool) -> Tensor:
    """The same for a whole tensor of every model."""
    own, *others = tensors
    if others[0].numel() < own.numel():  # A's extra input channels stay
        seen = others[0].shape[1]
        mix = combined([own[:, :seen], *others], key, ratios, recipe, with_base)
        return torch.cat([mix, own[:, seen:]], dim=1)
    others = [other.reshape(own.shape) for other in others]
    base = others.pop() if with_base else None
    if recipe.method == "slerp":
        return slerp(own, others[0], ratios[0])
    if recipe.method == "weighted":
        return weighted(own, others, ratios, base)
    assert base is not None
    assert recipe.density is not None
    if recipe.method == "ties":
        return ties([own, *others], base, ratios[0], recipe.density)
    return dare(own, others, ratios, base, recipe.density, generator_for(recipe.seed, key))


def why_not_finite(models: Iterable[Checkpoint], key: str, dtype: str) -> CheckpointError | UsageError:
    for model in models:
        if not finite(read_stored(model, key)):
            return CheckpointError(model.path, "holds NaN or infinity", "it would spread; get another copy", key)
    return UsageError(f"merge: {key} becomes too large for {dtype}; choose smaller ratios, or dtype bfloat16 or float32")


def notes(
    models: Sequence[Checkpoint], hashes: Hashes, recipe: Recipe, with_base: bool, dtype: torch.dtype | None
) -> dict[str, str]:
    """What the metadata says about the merge: ours, ModelSpec's and, for what A1111 can do, A1111's."""
    sources = [identity(model, hashes.texts[model.path]) for model in models]
    ours = asdict(recipe) | {"sources": sources, "with_base": with_base, "dtype": NAMES[dtype] if dtype else None}
    found = {RECIPE: json.dumps(ours), "modelspec.merged_from": ", ".join(model.path.name for model in models)}
    if recipe.method != "weighted" or len(recipe.ratios) > 1 or recipe.by_part or recipe.by_block:
        return found
    digests = [source["sha256"] for source in sources]
    theirs = {
        "type": "webui",
        "primary_model_hash": digests[0],
        "secondary_model_hash": digests[1],
        "tertiary_model_hash": digests[2] if with_base else None,
        "interp_method": "Add difference" if with_base else "Weighted sum",
        "multiplier": recipe.ratios[0],
        "save_as_half": dtype == torch.float16,
        "custom_name": None,
        "config_source": 0,
        "bake_in_vae": None,
        "discard_weights": "",
        "is_inpainting": recognise(models[0]).task == "inpaint",
        "is_instruct_pix2pix": recognise(models[0]).task == "edit",
    }
    known = {
        source["sha256"]: {
            "name": source["name"],
            "legacy_hash": source["legacy_hash"],
            "sd_merge_recipe": model.metadata.get("sd_merge_recipe"),
        }
        for source, model in zip(sources, models, strict=True)
    }
    return found | {"sd_merge_recipe": json.dumps(theirs), "sd_merge_models": json.dumps(known)}


def repeat(
    merged: str | os.PathLike[str],
    target: str | os.PathLike[str],
    folders: Iterable[Path] | None = None,
    progress: Progress | None = None,
) -> Path:
    """Makes a merged checkpoint again from the recipe in its metadata and the sources; returns its path.

    folders: where the sources are looked for, by name and content; by default the folder of the file and the working directory.
    Raises CheckpointError if there is no recipe, or a source is missing or another one, and what `merge` raises.
    """
    checkpoint = open_checkpoint(merged)
    text = checkpoint.metadata.get(RECIPE)
    if text is None:
        raise CheckpointError(checkpoint.path, f"carries no {RECIPE}, the recipe of a merge", "name the models to merge")
    places = list(folders) if folders is not None else [checkpoint.path.parent, Path()]
    try:
        facts = json.loads(text)
        options = {name: facts[name] for name in ("method", "density", "seed")}
        options["by_part"] = None if facts["by_part"] is None else dict(facts["by_part"])
        options |= {name: facts.get(name) for name in ("prediction", "zero_snr")}
        ratios, blocks, dtype = tuple(facts["ratios"]), dict(facts["by_block"]), TORCH[facts["dtype"]] if facts["dtype"] else None
        sources = [found_again(source, places, checkpoint.path) for source in facts["sources"]]
        base = sources.pop() if facts["with_base"] else None
        return merge(sources, target, ratios, base, blocks=blocks, dtype=dtype, progress=progress, **options)
    except (LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"carries a {RECIPE} that minisd did not write: {type(error).__name__} {error}"
        raise CheckpointError(checkpoint.path, reason, "name the models to merge") from error


def found_again(source: Mapping[str, Any], folders: Iterable[Path], merged: Path) -> Path:
    """The file that a recipe means.  Its name comes from a stranger's file: only a plain name is looked for."""
    name = str(source["name"])
    if name != Path(name).name or not name.isprintable() or name in ("", ".", "..") or len(os.fsencode(name)) > 255:
        raise ValueError(f"the name {name[:100]!r}")
    candidates = [folder / name for folder in folders if (folder / name).is_file()]
    for path in candidates:
        facts = identity(open_checkpoint(path))
        same = all(facts[what] == source[what] for what in ("bytes", "legacy_hash"))
        if same and source["sha256"] in (None, file_sha256(path)):
            return path
    where = f"found another file of that name: {candidates[0]}" if candidates else "found none"
    raise CheckpointError(
        merged, f"was made from {name}, which was looked for by name and content; {where}", "name the models to merge"
    )
