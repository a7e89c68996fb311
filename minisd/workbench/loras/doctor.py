"""What a LoRA is, whether it fits, and what is wrong with it: for `minisd inspect LORA [-m CHECKPOINT]`."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from collections.abc import Mapping
from typing import Any

import torch

from ...addons.lora_file import Addon, Change, by_module, kind_of, open_addon, part_of
from ...errors import shown, taken_apart
from ...files.checkpoint import Checkpoint, open_checkpoint
from ...files.recognition import recognise
from ...files.tensors import broken, read_stored
from ...models.blocks import group_of, in_order
from ...models.family import FAMILIES
from .published import shapes_of

WORDS = 20  # of the most frequent words of a training's captions that are shown
ABOUT = {  # what the metadata say, by whose field
    "base": ("ss_base_model_version", "modelspec.architecture"),
    "trained_on": ("ss_sd_model_name",),
    "module": ("ss_network_module",),
    "trigger": ("modelspec.trigger_phrase", "ss_trigger_words"),
    "title": ("modelspec.title", "ss_output_name"),
}


def examined(path: str | os.PathLike[str], model: str | os.PathLike[str] | None = None) -> dict[str, Any]:
    """Facts about a LoRA, ready for JSON.

    kinds, ranks, alphas: how many modules have which; fits: of how many modules a family has the weight, by its name;
    strange: keys that are no part of a LoRA; embeddings: names of those that are bundled; broken: tensors with NaN; dead: modules
    that change nothing; about: what its metadata say.  With a checkpoint also misfits (key and reason), and change: by block the
    size of the change relative to the weight, and `strongest`, the module where it is largest.
    Raises CheckpointError.
    """
    file = open_checkpoint(path)
    with taken_apart(path):
        facts = contents(file)
        return facts | (against(file, model) if model is not None and not facts["broken"] else {})


def contents(file: Checkpoint) -> dict[str, Any]:
    """What it is by itself."""
    modules, strange = by_module(file)
    kinds = Counter(kind_of(set(parts) - {"diff_b"}) or "not whole" for parts in modules.values())
    ranks = Counter(file.entries[parts["down"]].shape[0] for parts in modules.values() if "down" in parts)
    single = [parts["alpha"] for parts in modules.values() if "alpha" in parts and file.entries[parts["alpha"]].numel == 1]
    alphas = Counter(float(read_stored(file, key)) for key in single)
    fits = {each.name: fitting(open_addon(file.path, shapes_of(each), each)) for each in FAMILIES}
    return {
        "modules": len(modules),
        "kinds": dict(kinds),
        "ranks": dict(ranks.most_common()),
        "alphas": dict(alphas.most_common()),
        "fits": fits,
        "strange": strange,
        "embeddings": sorted({key.split(".")[1] for key in file.entries if key.startswith("bundle_emb.")}),
        "broken": broken(file),
        "about": about(file.metadata),
    }


def fitting(addon: Addon) -> int:
    """How many of its modules have a place, of the right shape."""
    return len({change.module for change in addon.changes})


def about(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What a trainer has written about itself; metadata may hold anything."""
    found: dict[str, Any] = {}
    for name, fields in ABOUT.items():
        value = next((metadata[field] for field in fields if metadata.get(field)), None)
        if value:
            found[name] = value[:200]
    try:
        counts: Counter[str] = Counter()
        for tags in json.loads(metadata.get("ss_tag_frequency", "{}")).values():
            counts.update({tag.strip()[:80]: int(count) for tag, count in tags.items()})
    except (ValueError, TypeError, AttributeError, RecursionError):
        return found
    return found | ({"words": dict(counts.most_common(WORDS))} if counts else {})


def against(file: Checkpoint, model: str | os.PathLike[str]) -> dict[str, Any]:
    """What it does to this checkpoint."""
    checkpoint = open_checkpoint(model)
    family = recognise(checkpoint, vae_given=True).family
    addon = open_addon(file.path, checkpoint.shapes, family)
    sizes = [(change, relative(addon, change, checkpoint)) for change in addon.changes]
    by_block: dict[str, list[tuple[float, float]]] = {}
    for change, pair in sizes:
        by_block.setdefault(group_of(change.target.key), []).append(pair)
    ratios = [(together([pair]), change.module) for change, pair in sizes]
    strongest = max(ratios, default=None)
    return {
        "checkpoint": str(checkpoint.path),
        "family": family.name,
        "fitting": fitting(addon),
        "misfits": {misfit.key: misfit.reason for misfit in addon.misfits},
        "without_effect": list(addon.idle),
        "dead": sorted(change.module for change, (size, _) in sizes if size == 0),
        "change": {block: together(by_block[block]) for block in in_order(by_block)},
        "strongest": strongest and {"module": strongest[1], "change": strongest[0]},
    }


def together(sizes: list[tuple[float, float]]) -> float:
    """The size of several changes relative to that of their weights."""
    return math.hypot(*(size for size, _ in sizes)) / max(math.hypot(*(weight for _, weight in sizes)), 1e-30)


def relative(addon: Addon, change: Change, checkpoint: Checkpoint) -> tuple[float, float]:
    """(norm of the change at strength 1, norm of the weight that it changes)."""
    weight = part_of(read_stored(checkpoint, change.target.key).float(), change.target)
    made = addon.change_of(change, weight, 1.0, "paper")
    return float(torch.linalg.vector_norm(made)), float(torch.linalg.vector_norm(weight))


def as_text(facts: Mapping[str, Any]) -> str:
    """For people, a line for each thing that there is to say."""
    fits = ", ".join(f"{count} of {facts['modules']} fit {name}" for name, count in facts["fits"].items())
    lines = [
        f"a LoRA of {facts['modules']} modules: {listed(facts['kinds'])}",
        f"rank      {listed(facts['ranks'])}",
        f"alpha     {listed(facts['alphas']) or 'none: as the rank'}",
        f"fits      {fits}",
    ]
    told = {name: value if isinstance(value, str) else ", ".join(value) for name, value in facts["about"].items()}
    lines += [f"{name.ljust(9)} {shown(value, 300)}" for name, value in told.items()]
    for name in ("embeddings", "strange", "broken", "dead", "without_effect"):
        if facts.get(name):
            lines.append(
                f"{name.replace('_', ' ').ljust(9)} {len(facts[name])}: {', '.join(shown(each, 120) for each in facts[name][:5])}"
            )
    if "checkpoint" not in facts:
        return "\n".join(lines)
    lines.append(f"on        {facts['checkpoint']}: {facts['fitting']} of {facts['modules']} modules fit")
    lines += [f"          {shown(key, 120)} {shown(reason, 200)}" for key, reason in list(facts["misfits"].items())[:5]]
    lines += [f"          … and {len(facts['misfits']) - 5} more keys"] if len(facts["misfits"]) > 5 else []
    lines += [f"change    {block.ljust(12)} {value:.2%}" for block, value in facts["change"].items()]
    if facts["strongest"]:
        lines.append(f"strongest {shown(facts['strongest']['module'], 120)} {facts['strongest']['change']:.2%}")
    return "\n".join(lines)


def listed(counts: Mapping[Any, int]) -> str:
    names = {value: f"{value:g}" if isinstance(value, float) else str(value) for value in counts}
    return ", ".join(f"{count} x {names[value]}" for value, count in counts.items())
