"""Pictures: tensors to PIL, PIL to a PNG that carries its recipe, written whole or not at all."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .atomic import check_place, replacing
from .errors import UsageError
from .recipe import parameters_text


def to_pil(pixels: Any) -> Image.Image:
    """A tensor (3, H, W) in [-1, 1] as a picture; values outside are clamped."""
    array = ((pixels.float() + 1) * 127.5).round().clamp(0, 255).byte()
    return Image.fromarray(array.permute(1, 2, 0).cpu().numpy())  # (H, W, 3)


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in rows about as many as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: str | os.PathLike[str], recipe: Mapping[str, Any] | None) -> Path:
    """Writes a PNG, with the `parameters` and `minisd` chunks of its recipe.

    Raises OutputError; what stood there before is then whole.
    """
    path = Path(path)
    check_writable(path)
    chunks = PngImagePlugin.PngInfo()
    if recipe is not None:
        add_text(chunks, "parameters", parameters_text(recipe))
        add_text(chunks, "minisd", json.dumps(recipe, ensure_ascii=True))
    with replacing(path) as draft:
        image.save(draft, "PNG", pnginfo=chunks)
    return path


def add_text(chunks: PngImagePlugin.PngInfo, key: str, text: str) -> None:
    """Latin-1 text as tEXt, which every reader knows, anything else as iTXt."""
    try:
        text.encode("latin-1")
        chunks.add_text(key, text)
    except UnicodeEncodeError:
        chunks.add_itxt(key, text)


def check_writable(path: Path) -> None:
    """Raises UsageError or OutputError now rather than after minutes of drawing."""
    if path.suffix.lower() != ".png":
        raise UsageError(f"output {str(path)!r}: expected a name that ends in .png, which is the format that carries the recipe")
    check_place(path)
