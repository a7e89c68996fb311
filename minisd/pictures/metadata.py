"""What a picture carries about how it was made: the text that other programs read, and what `minisd again` needs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from typing import Any, BinaryIO

from PIL import Image, UnidentifiedImageError

from ..errors import UsageError
from ..options import OPTIONS, RECIPE, Option
from ..system.regular import open_regular

MAX_HEAD = 8 << 20  # bytes of a PNG before its pixels; a recipe has a few thousand, a colour profile up to half a million
MAX_CHUNKS = 10_000

# Spacings that have a name in A1111 (modules/sd_schedulers.py); the others are what its samplers take by themselves.
SCHEDULES = {"karras": "Karras", "exponential": "Exponential"}
HEAD = ("Steps", "Sampler", "CFG scale", "Seed")  # comes first, and is said always


def check_kinds(path: object, recipe: Mapping[str, Any]) -> None:
    """Raises UsageError if something in a recipe, which may come from a stranger, is of another kind than minisd writes."""
    for name, kind in RECIPE.items():
        if recipe.get(name) is not None:
            kind.check(f"{path}: its minisd chunk: {name}", recipe[name])


def quote(value: object) -> str:
    """A value of the parameters text; quoted if a comma, colon or line break would end it (A1111 infotext_utils.py, quote)."""
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(mark in text for mark in ",:\n") else text


def parameters_text(recipe: Mapping[str, Any]) -> str:
    """The `parameters` text that A1111 writes and that other programs read (A1111 processing.py, create_infotext)."""
    said = {option.infotext: said_of(option, recipe) for option in OPTIONS.values() if option.infotext}
    fields = {
        **{name: said.pop(name) for name in HEAD},
        "Size": f"{recipe['width']}x{recipe['height']}",
        "Model hash": recipe["model_sha256"][:10] if recipe["model_sha256"] else None,
        "Model": recipe["model"].replace(",", "").replace(":", ""),
        "VAE": recipe.get("vae"),
        **said,
        "RNG": "CPU",
        "Refiner": recipe.get("refiner"),
        "Refiner switch at": recipe["high_noise_frac"] if recipe.get("refiner") else None,
        **compared_text(recipe),
        "Version": f"minisd {recipe['version']}",
    }
    last = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    return f"{recipe['prompt']}{negative}\n{last}"


def said_of(option: Option, recipe: Mapping[str, Any]) -> object:
    """An option's value as A1111 writes it; None where it says nothing of it."""
    value = recipe["sampler_label"] if option.name == "sampler" else recipe.get(option.name)
    if option.name == "spacing":
        value = SCHEDULES.get(str(value))
    return None if option.infotext not in HEAD and value in (None, 0) else value


def compared_text(recipe: Mapping[str, Any]) -> dict[str, str]:
    """What changes from cell to cell of a comparison, as A1111 writes it of a grid (A1111 scripts/xyz_grid.py)."""
    if "compare" not in recipe:
        return {}
    fields = {"Script": "X/Y/Z plot"}
    for name in ("x", "y"):
        axis = recipe["compare"][name]
        fields |= {f"{name.upper()} Type": axis["type"], f"{name.upper()} Values": ", ".join(map(str, axis["values"]))}
    return fields


def check_head(file: BinaryIO) -> None:
    """Raises ValueError where a PNG has much before its pixels, all of which Pillow would bring into memory to open it."""
    if file.read(8) == b"\x89PNG\r\n\x1a\n":
        for _ in range(MAX_CHUNKS):
            head = file.read(8)
            if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
                break
            if file.seek(int.from_bytes(head[:4], "big") + 4, os.SEEK_CUR) > MAX_HEAD:
                raise ValueError(f"it has more than {MAX_HEAD:,} bytes before its pixels")
        else:
            raise ValueError(f"it has more than {MAX_CHUNKS:,} chunks before its pixels")
    file.seek(0)


def why_not(error: BaseException) -> str:
    """Why a picture cannot be read, in words about the file, not about Python's objects."""
    if isinstance(error, UnidentifiedImageError):
        return "it does not begin like one"
    return (isinstance(error, OSError) and error.strerror) or str(error)


def read_recipe(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The `minisd` chunk of a PNG.  Raises UsageError if the file is no picture or carries none."""
    try:
        with open_regular(path) as file:
            check_head(file)
            with Image.open(file, formats=["PNG"]) as image:
                recipe = json.loads(image.info["minisd"])
    except FileNotFoundError:
        raise UsageError(f"{path}: does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{path}: expected a PNG, found a folder") from None
    except KeyError:
        raise UsageError(f"{path}: carries no minisd chunk; only pictures that minisd has saved can be made again") from None
    except (OSError, ValueError, RecursionError, Image.DecompressionBombError) as error:
        raise UsageError(f"{path}: is not a PNG that can be read: {why_not(error)}") from None
    if not isinstance(recipe, dict):
        raise UsageError(f"{path}: its minisd chunk is not a recipe")
    check_kinds(path, recipe)
    if not isinstance(recipe.get("prompt", ""), str):
        lost = "the picture's caller gave a conditioning, which it does not carry; it cannot be made again"
        raise UsageError(f"{path}: prompt: {lost}")
    return recipe
