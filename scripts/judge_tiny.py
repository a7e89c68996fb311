"""Judges pictures of the tiny world: which shape, of which colour, on which background.  No learning: colours by distance,
shapes by overlap with masks drawn by tiny_world itself.

    python scripts/judge_tiny.py             (100 held-back prompts on the tiny checkpoint: half a minute on 2 CPU cores)
"""

from __future__ import annotations

import argparse
import random
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageOps
from tiny_world import COLOURS, SHAPES, Scene, caption, held_back, paint

import minisd

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


def judge(picture: Image.Image) -> tuple[str, str, str] | None:
    """(shape, colour, background) of a picture, or None if there is no object in it."""
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
    return max(SHAPES, key=lambda shape: overlap(box, shape)), NAMES[nearest(thing)], NAMES[background]


def overlap(box: np.ndarray, shape: str) -> float:
    """Intersection over union of a mask with a shape stretched to its size."""
    drawn = np.asarray(template(shape).resize(box.shape[::-1], Image.Resampling.BOX)) > 127
    return float((box & drawn).sum() / (box | drawn).sum())


def exam(count: int, number: int = 0) -> list[tuple[tuple[str, str, str], str, int]]:
    """(answer, prompt, seed): combinations that training never saw, in all wordings, each with its own seed.

    number: which exam; each has other wordings and seeds, so that one that was looked at can be put aside.
    """
    rng = random.Random(99 + number)
    combinations = held_back()
    rng.shuffle(combinations)
    answers = [combinations[i % len(combinations)] for i in range(count)]
    return [(answer, caption(Scene(*answer), rng), 1000 * (number + 1) + i) for i, answer in enumerate(answers)]


def examine(pipe: minisd.Pipeline, count: int, number: int = 0, **options: Any) -> tuple[Image.Image, list[int]]:
    """Draws `count` questions of an exam.

    Returns a sheet of the pictures, wrong ones framed in red, and how many are right in shape, colour, background and all three.
    """
    framed, right = [], [0, 0, 0, 0]
    for answer, prompt, seed in exam(count, number):
        image = pipe(prompt, seed=seed, **options).images[0]
        found = judge(image) or ("nothing",) * 3
        marks = [a == b for a, b in zip(answer, found, strict=True)]
        right = [total + mark for total, mark in zip(right, [*marks, all(marks)], strict=True)]
        if not all(marks):
            print(f"wrong: {prompt!r} seed {seed}: {' '.join(found)}")
        framed.append(ImageOps.expand(image, 3, "white" if all(marks) else "red"))
    width, height = framed[0].size
    sheet = Image.new("RGB", (10 * width, -(-count // 10) * height), "white")
    for i, picture in enumerate(framed):
        sheet.paste(picture, (i % 10 * width, i // 10 * height))
    return sheet, right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", help="checkpoint to judge (default: the one in the box)")
    parser.add_argument("-n", "--count", type=int, default=100)
    parser.add_argument("--exam", type=int, default=0, metavar="N", help="which exam: other wordings and seeds (default: 0)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--sheet", type=Path, help="write all pictures, wrong ones framed in red, to this PNG")
    args = parser.parse_args()
    sheet, right = examine(minisd.load(args.model), args.count, args.exam, steps=args.steps, guidance_scale=args.cfg)
    print("shape {} colour {} background {} all three {} of {}".format(*right, args.count))
    if args.sheet:
        sheet.save(args.sheet)


if __name__ == "__main__":
    main()
