"""What the tiny checkpoints know: ten colours, eight shapes and nine places.  The pictures that they learnt from, and the judge,
draw these by the same lines."""

from __future__ import annotations

import math

from PIL import ImageDraw

Colour = int | tuple[int, int, int]

COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 160, 70),
    "blue": (40, 70, 220),
    "yellow": (250, 220, 40),
    "orange": (250, 130, 20),
    "purple": (130, 40, 170),
    "pink": (255, 150, 195),
    "cyan": (60, 205, 225),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
}
SIZE = 64  # pixels a side
PLACES = {
    "top left": (0, 0), "top": (1, 0), "top right": (2, 0),
    "left": (0, 1), "centre": (1, 1), "right": (2, 1),
    "bottom left": (0, 2), "bottom": (1, 2), "bottom right": (2, 2),
}  # fmt: skip
SHAPES = ("circle", "square", "triangle", "star", "heart", "ring", "cross", "diamond")

ARM = 0.34
CORNERS: dict[str, list[tuple[float, float]]] = {  # in units of half the side
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.85), (-1, 0.85)],
    "diamond": [(0, -1), (0.8, 0), (0, 1), (-0.8, 0)],
    "cross": [(-ARM, -1), (ARM, -1), (ARM, -ARM), (1, -ARM), (1, ARM), (ARM, ARM),
              (ARM, 1), (-ARM, 1), (-ARM, ARM), (-1, ARM), (-1, -ARM), (-ARM, -ARM)],
}  # fmt: skip


def position(place: str, r: float) -> tuple[float, float]:
    """Where the middle of an object of half side r is put, in pixels from the top left."""
    inset = max(r + 2, SIZE / 4)
    column, row = PLACES[place]
    return inset + column * (SIZE / 2 - inset), inset + row * (SIZE / 2 - inset)


def outline(shape: str, x: float, y: float, r: float) -> list[tuple[float, float]]:
    """The corners of a shape that fills the square of half side r around (x, y)."""
    if shape == "heart":  # the classical curve 16 sin^3, 13 cos - 5 cos 2 - 2 cos 3 - cos 4, scaled to the square
        turns = [2 * math.pi * i / 120 for i in range(120)]
        lobes = [13 * math.cos(a) - 5 * math.cos(2 * a) - 2 * math.cos(3 * a) - math.cos(4 * a) for a in turns]
        return [(x + r * math.sin(a) ** 3, y - r * (lobe + 2.5) / 14.6) for a, lobe in zip(turns, lobes, strict=True)]
    if shape == "star":
        turns = [math.pi * (i / 5 - 0.5) for i in range(10)]
        return [
            (x + (r, 0.42 * r)[i % 2] * math.cos(a) * 1.05, y + (r, 0.42 * r)[i % 2] * math.sin(a) * 1.05)
            for i, a in enumerate(turns)
        ]
    return [(x + r * u, y + r * v) for u, v in CORNERS[shape]]


def paint(
    canvas: ImageDraw.ImageDraw, shape: str, centre: tuple[float, float], r: float, colour: Colour, background: Colour
) -> None:
    """Draws one object; the mask that the judge compares with is drawn by the same lines."""
    x, y = centre
    if shape in ("circle", "ring"):
        canvas.ellipse((x - r, y - r, x + r, y + r), fill=colour)
        if shape == "ring":
            hole = 0.55 * r
            canvas.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    else:
        canvas.polygon(outline(shape, x, y, r), fill=colour)
