"""The recipe of a picture as the fields of a drawing: of minisd's own chunk, else of what another program has written.

Models are looked for in the library by their names; no path of the recipe is followed or told.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PureWindowsPath
from typing import Any

from PIL import Image

from ...diffusion.samplers import SAMPLERS, named
from ...errors import UsageError, shown
from ...options import OPTIONS
from ...pictures.foreign import found_in
from ...pictures.found import Found
from ...pictures.metadata import check_kinds
from ..errors import RefusedError, clean, told
from ..index import Index

FIELDS = ("prompt", "negative_prompt", "sampler", "spacing", "steps", "guidance_scale", "width", "height", "strength")
# Options that the page has no fields for, but takes along.
MORE = (
    "clip_skip", "eta", "sampler_options", "guidance_rescale", "cfg_until", "cache", "like", "rng", "subseed", "subseed_strength",
    "ensd", "sde_noise", "batch_place", "emphasis", "plain_prompt", "zero_negative", "prompt_2", "negative_prompt_2",
    "original_size", "crop", "target_size", "image_guidance_scale", "lora_rule", "lora_blocks",
)  # fmt: skip
# What recipes always say, and what is so anyway where no rules of another program are asked for.
USUAL = {"rng": "cpu", "emphasis": "original", "plain_prompt": False, "sde_noise": "independent"}
FLAGS = {option.flag: name for name, option in OPTIONS.items() if option.flag}


def recovered(image: Image.Image, index: Index) -> dict[str, Any]:
    """Raises RefusedError where the picture says nothing that can be read."""
    if isinstance(text := image.info.get("minisd"), str):
        recipe, program = own_recipe(text), "minisd"
    elif (found := found_in(image)) is not None:
        recipe, program = of_words(found), found.program
    else:
        raise RefusedError(422, "image: says nothing of how it was made", "image", "no_recipe")
    notes = [f"not taken over: {lacking}" for lacking in recipe.pop("lacking", ())]
    fields = {name: recipe[name] for name in FIELDS if recipe.get(name) is not None}
    fields |= {"seed": str(recipe["seed"])} if recipe.get("seed") is not None else {}
    fields |= {"model": model_of(recipe, index, notes), "loras": loras_of(recipe, index, notes), "more": more_of(recipe)}
    notes += lost(recipe)
    return {"program": program, "fields": plain(fields), "notes": [clean(note) for note in notes]}


def own_recipe(text: str) -> dict[str, Any]:
    try:
        recipe = json.loads(text)
        if not isinstance(recipe, dict):
            raise UsageError("image: its minisd chunk is not a recipe")
        check_kinds("image", recipe)
        return recipe
    except UsageError as error:
        raise told(error, "") from None
    except (ValueError, RecursionError):
        raise RefusedError(422, "image: its minisd chunk is not JSON", "image", "no_recipe") from None


def of_words(found: Found) -> dict[str, Any]:
    """The words of a command as the options that they mean."""
    recipe: dict[str, Any] = {"prompt": found.prompt, "negative_prompt": found.negative, "like": found.like}
    recipe |= {"model": found.model, "lacking": list(found.lacking)}
    for _, words in found.said:
        for flag, value in zip(words[::2], words[1::2], strict=False):
            if flag == "--size":
                recipe["width"], recipe["height"] = OPTIONS["original_size"].kind.parse(value)
            elif flag == "--init":
                recipe["init_sha256"] = "elsewhere"
            elif (name := FLAGS.get(flag)) in (*FIELDS, *MORE, "seed"):
                recipe[name] = OPTIONS[name].kind.parse(value)
    return recipe


def model_of(recipe: Mapping[str, Any], index: Index, notes: list[str]) -> str | None:
    """By the hash of its file where that is known, else by its name."""
    name, sha256 = recipe.get("model"), recipe.get("model_sha256")
    if isinstance(sha256, str):
        for each in index.all("checkpoint"):
            if each.model_hash and sha256.startswith(each.model_hash):
                return each.name
    return found_name(name, "checkpoint", index, notes) if name else None


def found_name(name: object, kind: str, index: Index, notes: list[str]) -> str | None:
    try:
        return index.find(str(name), kind, kind).name
    except RefusedError as refused:
        notes.append(refused.message)
        return None


def loras_of(recipe: Mapping[str, Any], index: Index, notes: list[str]) -> dict[str, float]:
    found = {}
    for each in recipe.get("loras") or ():
        name = found_name(PureWindowsPath(str(each.get("source"))).stem, "lora", index, notes)
        if name is not None:
            found[name] = float(each.get("strength", 1.0))
    return found


def more_of(recipe: Mapping[str, Any]) -> dict[str, Any]:
    """Without what would be so anyway."""
    usual = {} if recipe.get("like") else USUAL
    own = SAMPLERS[named(recipe["sampler"])[0]].options if known(recipe.get("sampler")) else {}
    idle = {name: usual.get(name, OPTIONS[name].default) for name in MORE} | {"eta": own.get("eta", 0.0)}
    given = {name: recipe[name] for name in MORE if recipe.get(name) is not None}
    return {name: value for name, value in given.items() if plain(value) != plain(idle[name])}


def known(sampler: object) -> bool:
    try:
        named(str(sampler))
    except UsageError:
        return False
    return True


def lost(recipe: Mapping[str, Any]) -> list[str]:
    """What a picture of this page cannot be made with again."""
    notes = []
    if recipe.get("init_sha256"):
        notes.append("it was made from another picture, which it does not carry: start from that one, too")
    if recipe.get("mask_sha256"):
        notes.append("it was painted within a mask, which it does not carry")
    for name, what in (
        ("controls", "ControlNets"),
        ("refiner", "a refiner"),
        ("vae", "another VAE"),
        ("own", "code of its own"),
        ("sigmas", "levels of its own"),
    ):
        if recipe.get(name):
            notes.append(f"it was made with {what}, which this page has not: {shown(named_in(recipe[name]), 80)}")
    return notes


def named_in(value: Any) -> str:
    """A name, or names, without the folders that they may be in."""
    each = value if isinstance(value, list) else [value]
    names = [item.get("source") if isinstance(item, dict) else item for item in each]
    return ", ".join(PureWindowsPath(str(name)).stem for name in names)


def plain(value: Any) -> Any:
    """As JSON has it."""
    if isinstance(value, Mapping):
        return {name: plain(each) for name, each in value.items()}
    return [plain(each) for each in value] if isinstance(value, list | tuple) else value
