"""Pictures: tensors to PIL, the text chunks that a PNG carries, and writing a file whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .errors import OutputError, UsageError


def to_pil(pixels: Any) -> Image.Image:
    """A tensor (3, H, W) in [-1, 1] as a picture; values outside are clamped."""
    array = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


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
        "Model hash": recipe["model_sha256"][:10],
        "Model": recipe["model"].replace(",", "").replace(":", ""),
        "RNG": "CPU",
        "Eta": recipe["eta"] or None,
        "Version": f"minisd {recipe['version']}",
    }
    last = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items() if value is not None)
    negative = f"\nNegative prompt: {recipe['negative_prompt']}" if recipe["negative_prompt"] else ""
    return f"{recipe['prompt']}{negative}\n{last}"


def save_png(image: Image.Image, path: str | os.PathLike[str], recipe: Mapping[str, Any]) -> Path:
    """Writes a PNG with the `parameters` and `minisd` chunks.  Raises OutputError; what stood there before is then whole."""
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise UsageError(f"output {str(path)!r}: expected a name that ends in .png, which is the format that carries the recipe")
    chunks = PngImagePlugin.PngInfo()
    add_text(chunks, "parameters", parameters_text(recipe))
    add_text(chunks, "minisd", json.dumps(recipe, ensure_ascii=True))
    target = path.resolve()  # a link stays a link
    draft = target.with_name(f".{target.name}.minisd-tmp-{os.getpid()}")
    try:
        if path.exists() and not path.is_file():
            raise OutputError(f"output {path}: is not a regular file; choose another name")
        with draft.open("wb") as file:
            image.save(file, "PNG", pnginfo=chunks)
            file.flush()
            os.fsync(file.fileno())
        draft.replace(target)
    except OutputError:
        raise
    except OSError as error:
        raise OutputError(f"output {path}: could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            draft.unlink()
    return path


def add_text(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """Latin-1 text as tEXt, which every reader knows, anything else as iTXt."""
    try:
        text.encode("latin-1")
        chunks.add_text(key, text)
    except UnicodeEncodeError:
        chunks.add_itxt(key, text)


def check_writable(path: Path) -> None:
    """Raises OutputError now rather than after minutes of drawing."""
    folder = path.parent
    if not folder.is_dir():
        raise OutputError(f"output {path}: the folder {folder} does not exist; make it first")
    if path.is_dir() or not os.access(folder, os.W_OK):
        raise OutputError(f"output {path}: cannot be written; choose another place")


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
