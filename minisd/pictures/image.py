"""Pictures: tensors to PIL, PIL to a PNG that carries its recipe, written whole or not at all."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import UsageError
from ..system.atomic import check_place, drafting, free_names, placed, replacing
from .metadata import parameters_text, tell_unreadable


def to_pil(pixels: Any) -> Image.Image:
    """A tensor (3, H, W) in [-1, 1] as a picture; values outside are clamped."""
    array = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def save_png(image: Image.Image, path: str | os.PathLike[str], recipe: Mapping[str, Any] | None, replace: bool = True) -> Path:
    """Writes a PNG, with the `parameters` and `minisd` chunks of its recipe; returns its path.

    replace: False takes the next free name, path-2, path-3, …, where there is a file; two at once get two.
    Raises OutputError; what stood there before is then whole.
    """
    path = Path(path)
    first = path if replace else next(free_names(path))
    check_writable(first)
    if recipe is not None:
        tell_unreadable(recipe)
    chunks = chunks_of(recipe)
    with replacing(path) if replace else drafting(first) as draft:
        image.save(draft, "PNG", pnginfo=chunks)
        return path if replace else placed(draft, free_names(path))


def chunks_of(recipe: Mapping[str, Any] | None) -> PngImagePlugin.PngInfo:
    """What a PNG carries of its recipe: the `parameters` text that other programs read, and `minisd`."""
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        add_text(chunks, "parameters", parameters_text(recipe))
        add_text(chunks, "minisd", json.dumps(recipe, ensure_ascii=True))
    return chunks


def add_text(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """Latin-1 text as tEXt, which every reader knows, anything else as iTXt."""
    try:
        text.encode("latin-1")
        chunks.add_text(key, text)
    except UnicodeEncodeError:
        chunks.add_itxt(key, text.encode("utf-8", "replace").decode())  # names of files need not be Unicode


def check_writable(path: Path) -> None:
    """Raises UsageError or OutputError now rather than after minutes of drawing."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"output {str(path)!r}: expected a name that ends in .png, which is the format that carries the recipe")
    check_place(path)
