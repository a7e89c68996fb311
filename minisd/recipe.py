"""What a picture carries about how it was made: the text that other programs read, and what `minisd again` needs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .checkpoint import file_sha256
from .errors import UsageError
from .request import Request

REPEATED = ("prompt", "negative_prompt", "width", "height", "steps", "guidance_scale", "sampler", "seed", "eta", "spacing")


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
        "RNG": "CPU",
        "Eta": recipe["eta"] or None,
        "Version": f"minisd {recipe['version']}",
    }
    last = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    return f"{recipe['prompt']}{negative}\n{last}"


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `minisd` chunk of a PNG.  Raises UsageError if the file is no picture or carries none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            recipe = json.loads(image.info["minisd"])
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist") from None
    except KeyError:
        raise UsageError(f"{path}: carries no minisd chunk; only pictures that minisd has saved can be made again") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"{path}: is not a PNG that can be read: {error}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: its minisd chunk is not a recipe")
    return recipe


def repeat(recipe: dict[str, Any], checkpoint: Path) -> Request:
    """The request that a picture's recipe describes.  Warns if the checkpoint is another one; raises UsageError."""
    if recipe.get("seed") is None:
        raise UsageError(
            "the picture was drawn from noise that its caller gave, which it does not carry; it cannot be made again"
        )
    if recipe.get("model_sha256") not in (None, file_sha256(checkpoint)):
        warnings.warn(f"{checkpoint} is not the checkpoint that drew this picture ({recipe.get('model')})", stacklevel=2)
    try:
        return Request(**{name: recipe[name] for name in REPEATED})
    except KeyError as error:
        raise UsageError(f"the picture's minisd chunk says nothing of {error}") from None
