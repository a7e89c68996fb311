"""The world of the tiny checkpoint: one object of one colour on a plain background, drawn with Pillow, and told in words."""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter

from minisd.batch.scores.world import COLOURS, PLACES, SHAPES, SIZE, Colour, paint, position

SUPERSAMPLE = 4  # drawn this many times larger, then averaged down, for smooth edges
SIZES = {"small": 11, "medium": 17, "large": 24}  # half the side of the square around the object, in pixels


@dataclass(frozen=True)
class Scene:
    shape: str
    colour: str
    background: str
    size: str = "medium"
    place: str = "centre"


def combinations() -> list[tuple[str, str, str]]:
    """Every (shape, colour, background) with two different colours: 720."""
    return [(s, c, b) for s in SHAPES for c in COLOURS for b in COLOURS if c != b]


def held_back() -> list[tuple[str, str, str]]:
    """The 60 combinations that training never sees, evenly spread; the tests ask for these."""
    order = combinations()
    random.Random(1234).shuffle(order)
    return sorted(order[:60])


def training_scene(rng: random.Random) -> Scene:
    shape, colour, background = rng.choice(TRAINING)
    place = "centre" if rng.random() < 0.4 else rng.choice(list(PLACES))
    size = rng.choices(list(SIZES), weights=(3, 5, 3))[0]
    return Scene(shape, colour, background, size, place)


TRAINING = sorted(set(combinations()) - set(held_back()))


def mask_of(scene: Scene, rng: random.Random) -> Image.Image:
    """Where its object is, (64, 64) grey; position and size vary by a few pixels."""
    r = SIZES[scene.size] + rng.uniform(-1.5, 1.5)
    x, y = (middle + rng.uniform(-1.5, 1.5) for middle in position(scene.place, r))
    mask = Image.new("L", (SIZE * SUPERSAMPLE,) * 2)
    paint(ImageDraw.Draw(mask), scene.shape, (x * SUPERSAMPLE, y * SUPERSAMPLE), r * SUPERSAMPLE, 255, 0)
    return mask.resize((SIZE, SIZE), Image.Resampling.BOX)


def draw(scene: Scene, rng: random.Random, style: str = "flat") -> Image.Image:
    """A picture of the scene, (64, 64) RGB.  style: one of STYLES."""
    return painted(mask_of(scene, rng), scene, style)


def painted(mask: Image.Image, scene: Scene, style: str = "flat") -> Image.Image:
    return STYLES[style](mask, COLOURS[scene.colour], COLOURS[scene.background])


def outline_of(mask: Image.Image, inside: bool) -> Image.Image:
    """A line of one pixel along its edge, white on black: on the object, or just outside of it."""
    whole = mask.point(lambda value: 255 * (value > 127))
    return ImageChops.difference(whole, whole.filter(ImageFilter.MinFilter(3) if inside else ImageFilter.MaxFilter(3)))


def flat(mask: Image.Image, colour: Colour, background: Colour) -> Image.Image:
    """Cut out of paper: two plain colours."""
    return Image.composite(Image.new("RGB", mask.size, colour), Image.new("RGB", mask.size, background), mask)


def lit(mask: Image.Image, colour: Colour, background: Colour) -> Image.Image:
    """Modelled in clay: rounded edges that catch the light from the top left, a soft shadow, a ground that darkens downward."""
    height = np.asarray(mask.filter(ImageFilter.GaussianBlur(2.5)), dtype=np.float64) / 255  # of the clay
    slope = moved(height, -1, -1) - moved(height, 1, 1)  # rises where it faces the light
    shadow = moved(height, 4, 3)[..., None]
    down = np.linspace(22, -38, SIZE)[:, None, None]
    ground = (np.array(background) + down) * (1 - 0.55 * shadow)
    thing = np.array(colour) + 300 * slope[..., None]
    cover = np.asarray(mask, dtype=np.float64)[..., None] / 255
    return Image.fromarray((cover * thing + (1 - cover) * ground).clip(0, 255).astype(np.uint8))


def moved(field: np.ndarray, down: int, right: int) -> np.ndarray:
    """(H, W) moved by some pixels; zeros come in at the edges."""
    margin = 4
    padded = np.pad(field, margin)
    return padded[margin - down : margin - down + len(field), margin - right : margin - right + len(field)]


STYLES = {"flat": flat, "lit": lit}


def article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def sized(scene: Scene, thing: str, rng: random.Random) -> str:
    words = {"small": ["small", "tiny", "little"], "large": ["large", "big", "huge"]}.get(scene.size)
    return f"{rng.choice(words)} {thing}" if words and rng.random() < 0.6 else thing


def placed(scene: Scene, rng: random.Random) -> str:
    if rng.random() > (0.4 if scene.place == "centre" else 0.75):
        return ""
    return f" {rng.choice(['at', 'in'])} the {scene.place.replace('centre', rng.choice(['centre', 'center', 'middle']))}"


def caption(scene: Scene, rng: random.Random) -> str:
    """The scene in one of many wordings.  Size and place are often left unsaid; then any of them may be drawn."""
    thing = sized(scene, f"{scene.colour} {scene.shape}", rng)
    background = f"{scene.background} background"
    where = placed(scene, rng)
    wordings = (
        f"{article(thing)}{where} on {article(background)}",
        f"{article(thing)}{where} on {article(background)}",
        f"{article(thing)} on {article(background)}{where and ','}{where}",
        f"{thing}{where}, {background}",
        f"{thing}{where} on {scene.background}",
        f"{rng.choice(['a picture', 'a drawing', 'an image'])} of {article(thing)}{where} on {article(background)}",
        f"{article(background)} with {article(thing)}{where}",
        f"{article(scene.shape)} in {scene.colour}{where} on {article(background)}",
    )
    return rng.choice(wordings)


def half_said(scene: Scene, rng: random.Random) -> str:
    """Words that leave out the colour, the background or the shape; then any of them may be drawn."""
    where, background = placed(scene, rng), article(f"{scene.background} background")
    thing = sized(scene, rng.choice([scene.shape, scene.shape, f"{scene.colour} {scene.shape}"]), rng)
    wordings = (
        thing + where,
        article(thing) + where,
        f"{article(scene.shape)}{where} on {background}",
        f"{rng.choice(['something', 'a shape'])} in {scene.colour}{where}",
        f"{article(f'{scene.colour} shape')}{where} on {background}",
        f"{scene.background} background",
        scene.colour,
    )
    return rng.choices(wordings, weights=(3, 3, 2, 1, 2, 1, 1))[0]
