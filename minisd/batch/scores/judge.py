"""Judges pictures of the tiny world: which shape, of which colour, on which background.  No learning: colours by distance,
shapes by overlap with masks drawn by the lines of world.py."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from .world import COLOURS, PLACES, SHAPES, paint, position

PALETTE = np.array(list(COLOURS.values()), dtype=np.float64)
NAMES = list(COLOURS)


def nearest(pixels: np.ndarray) -> np.ndarray:
    """Index of the palette colour closest to each pixel: (..., 3) -> (...)."""
    return np.linalg.norm(pixels[..., None, :] - PALETTE, axis=-1).argmin(-1)


@cache
def template(shape: str) -> Image.Image:
    """The shape in white on black, cut to its bounding box."""
    picture = Image.new("L", (256, 256))
    paint(ImageDraw.Draw(picture), shape, (128, 128), 100, 255, 0)
    return picture.crop(picture.getbbox())


@dataclass(frozen=True)
class Seen:
    """What a picture shows.

    overlap: of its object with the shape it is taken for, 0 … 1.  box: around the object, (left, top, right, bottom) in pixels.
    """

    shape: str
    colour: str
    background: str
    overlap: float
    box: tuple[int, int, int, int]

    @property
    def middle(self) -> tuple[float, float]:
        return (self.box[0] + self.box[2]) / 2, (self.box[1] + self.box[3]) / 2

    @property
    def half_side(self) -> float:
        return max(self.box[2] - self.box[0], self.box[3] - self.box[1]) / 2

    @property
    def place(self) -> str:
        """The nearest of the nine places where an object of this size is put."""
        return min(PLACES, key=lambda name: math.dist(self.middle, position(name, self.half_side)))


def look(picture: Image.Image) -> Seen | None:
    """What a picture shows, or None if there is no object in it."""
    pixels = np.asarray(picture.convert("RGB"), dtype=np.float64)
    border = np.concatenate(
        [pixels[:2].reshape(-1, 3), pixels[-2:].reshape(-1, 3), pixels[:, :2].reshape(-1, 3), pixels[:, -2:].reshape(-1, 3)]
    )
    background = np.bincount(nearest(border), minlength=len(PALETTE)).argmax()
    ground = np.median(border, axis=0)
    distance = np.linalg.norm(pixels - ground, axis=-1)  # (H, W)
    if (distance > 50).sum() < 30:
        return None
    far = distance > max(50, 0.7 * np.quantile(distance[distance > 50], 0.9))
    thing = np.median(pixels[far], axis=0)
    mask = np.linalg.norm(pixels - thing, axis=-1) < distance  # closer to the object's colour than to the background's
    rows, columns = np.flatnonzero(mask.sum(1) > 1), np.flatnonzero(mask.sum(0) > 1)
    if len(rows) < 5 or len(columns) < 5:
        return None
    box = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    overlaps = {shape: overlap(box, shape) for shape in SHAPES}
    shape = max(SHAPES, key=overlaps.__getitem__)
    where = (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)
    return Seen(shape, NAMES[nearest(thing)], NAMES[background], overlaps[shape], where)


def judge(picture: Image.Image) -> tuple[str, str, str] | None:
    """(shape, colour, background) of a picture, or None if there is no object in it."""
    seen = look(picture)
    return None if seen is None else (seen.shape, seen.colour, seen.background)


def overlap(box: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask with a shape stretched to its size."""
    drawn = np.asarray(template(shape).resize(box.shape[::-1], Image.Resampling.BOX)) > 127
    return float((box & drawn).sum() / (box | drawn).sum())


def asked_for(prompt: str) -> tuple[str, str, str] | None:
    """(shape, colour, background) of a prompt in the words of the tiny world; None where it asks for anything else.

    One shape and two colours: the background's stands before that word or comes last.
    """
    words = re.findall(r"[a-z]+", prompt.lower())
    shapes, colours = [word for word in words if word in SHAPES], [word for word in words if word in COLOURS]
    if len(shapes) != 1 or len(colours) != 2 or colours[0] == colours[1]:
        return None
    before = words[words.index("background") - 1] if "background" in words[1:] else colours[1]
    if before not in colours:
        return None
    colour = colours[0] if before == colours[1] else colours[1]
    return shapes[0], colour, before
