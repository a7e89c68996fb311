"""Several pictures in one, with or without labels."""

from __future__ import annotations

import bisect
import math
from collections.abc import Sequence
from typing import Any

from PIL import Image, ImageDraw, ImageFont


def grid(images: Sequence[Image.Image]) -> Image.Image:
    """Pictures of one size side by side, in rows about as many as columns."""
    columns = math.ceil(math.sqrt(len(images)))
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, math.ceil(len(images) / columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def labelled_grid(cells: Sequence[Image.Image | str], columns: Sequence[str], rows: Sequence[str], title: str) -> Image.Image:
    """Pictures row by row under the names of their columns and beside those of their rows; a text where there is no picture."""
    pictures = [cell for cell in cells if isinstance(cell, Image.Image)]
    wide, high = (max(picture.size[side] for picture in pictures) for side in (0, 1))
    size = min(max(high // 16, 12), 32)  # pixels of a letter
    font, gap = ImageFont.load_default(size), size // 2
    columns, rows = ([fitting(label, font, 20 * size) for label in labels] for labels in (columns, rows))
    left = math.ceil(max(map(font.getlength, rows))) + 2 * gap
    cell = max(wide, *(math.ceil(font.getlength(label)) for label in columns)) + gap
    width = left + len(columns) * cell
    lines = wrapped(title, font, width - 2 * gap)
    top = (len(lines) + 1) * (size + gap) + gap
    sheet = Image.new("RGB", (width, top + len(rows) * (high + gap)), "white")
    pen = ImageDraw.Draw(sheet)
    for y, line in enumerate(lines):
        pen.text((gap, gap + y * (size + gap)), line, "black", font)
    for x, label in enumerate(columns):
        pen.text((left + x * cell + (cell - gap) / 2, top - size - gap), label, "black", font, "ma")
    for y, label in enumerate(rows):
        pen.text((gap, top + y * (high + gap) + high / 2), label, "black", font, "lm")
    for i, content in enumerate(cells):
        x, y = left + i % len(columns) * cell, top + i // len(columns) * (high + gap)
        if isinstance(content, Image.Image):
            sheet.paste(content, (x + (cell - gap - content.width) // 2, y + (high - content.height) // 2))
        else:
            pen.text((x + (cell - gap) / 2, y + high / 2), content, "red", font, "mm")
    return sheet


def wrapped(text: str, font: Any, width: float) -> list[str]:
    """A text in lines of so many pixels; of a long one the first three."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".lstrip()
        if font.getlength(longer) > width and lines[-1] and len(lines) < 3:
            lines.append(word)
        else:
            lines[-1] = longer
    return [fitting(line, font, width) for line in lines]


def fitting(text: str, font: Any, width: float) -> str:
    """The text, or as much of its beginning as fits into so many pixels."""
    if font.getlength(text) <= width:
        return text
    fits = bisect.bisect_right(range(len(text)), width, key=lambda count: font.getlength(text[:count] + "…"))
    return text[: max(fits - 1, 0)] + "…"
