"""What a picture carries about how it was made: the text that other programs read, and what `minisd again` needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any

from PIL import Image

from ..errors import UsageError

# What a recipe may hold, where it holds anything.  Ranges are checked as those of any request.
TEXTS = [
    "prompt", "negative_prompt", "sampler", "spacing", "device", "dtype", "prediction", "model_path", "vae_path", "refiner_path",
    "init_image", "mask",
]  # fmt: skip
NUMBERS = [
    "width", "height", "steps", "guidance_scale", "seed", "eta", "guidance_rescale", "clip_skip", "strength",
    "image_guidance_scale", "aesthetic_score", "negative_aesthetic_score", "high_noise_frac",
]  # fmt: skip
PAIRS = ("original_size", "crop", "target_size")
FLAGS = ("ema", "zero_negative")


def is_text(value: object) -> bool:
    return isinstance(value, str)


def is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def is_pair(value: object) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(is_number(each) for each in value)


def is_flag(value: object) -> bool:
    return isinstance(value, bool)


def check_kinds(path: object, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError if something in a recipe, which may come from a stranger, is of another kind than minisd writes."""
    kinds = (("a text", is_text, TEXTS), ("a number", is_number, NUMBERS), ("two numbers", is_pair, PAIRS))
    for expected, fits, names in (*kinds, ("true or false", is_flag, FLAGS)):
        for name in names:
            if recipe.get(name) is not None and not fits(recipe[name]):
                raise UsageError(f"{path}: its minisd chunk: {name}: expected {expected}, found {str(recipe[name])[:80]!r}")


def quote(value: object) -> str:
    """A value of the parameters text; quoted if a comma, colon or line break would end it (A1111 infotext_utils.py, quote)."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def parameters_text(recipe: Mapping[str, Any]) -> str:
    """The `parameters` text that A1111 writes and that other programs read (A1111 processing.py, create_infotext)."""
    fields = {
        "Steps": recipe["steps"],
        "Sampler": recipe["sampler_label"],
        "CFG scale": recipe["guidance_scale"],
        "Seed": recipe["seed"],
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model hash": recipe["model_sha256"][:10] if recipe["model_sha256"] else None,
        "Model": recipe["model"].replace(",", "").replace(":", ""),
        "VAE": recipe.get("vae"),
        "Denoising strength": recipe["strength"],
        "Clip skip": recipe["clip_skip"],
        "RNG": "CPU",
        "Eta": recipe["eta"] or None,
        "Refiner": recipe.get("refiner"),
        "Refiner switch at": recipe["high_noise_frac"] if recipe.get("refiner") else None,
        **compared_text(recipe),
        "Version": f"minisd {recipe['version']}",
    }
    last = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    return f"{recipe['prompt']}{negative}\n{last}"


def compared_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What changes from cell to cell of a comparison, as A1111 writes it of a grid (A1111 scripts/xyz_grid.py)."""
    if "compare" not in recipe:
        return {}
    fields = {"Script": "X/Y/Z plot"}
    for name in ("x", "y"):
        axis = recipe["compare"][name]
        fields |= {f"{name.upper()} Type": axis["type"], f"{name.upper()} Values": ", ".join(map(str, axis["values"]))}
    return fields


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `minisd` chunk of a PNG.  Raises UsageError if the file is no picture or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            recipe = json.loads(image.info["minisd"])
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: expected a PNG, found a folder") from None
    except KeyError:
        raise UsageError(f"{path}: carries no minisd chunk; only pictures that minisd has saved can be made again") from None
    except (OSError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: is not a PNG that can be read: {error}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: its minisd chunk is not a recipe")
    check_kinds(path, recipe)
    return recipe
