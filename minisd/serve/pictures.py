"""Pictures of requests: out of base64, which anybody may have sent, and into it; and what is painted around a mask alone."""

from __future__ import annotations

import base64
import binascii
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageFilter, ImageOps

from ..errors import UsageError
from ..pictures.image import chunks_of
from ..pictures.init import UNREADABLE, opaque, read_picture
from ..pictures.metadata import FORMATS
from .errors import RefusedError

DATA_URL = re.compile(r"data:image/[\w.+-]{1,20};base64,")
QUALITY = 95  # of a JPEG or WebP


def from_base64(text: str, field: str, most: int) -> Image.Image:
    """A picture of at most so many pixels, with or without a data URL's beginning.  Raises RefusedError."""
    start = DATA_URL.match(text[:60])
    try:
        data = base64.b64decode("".join(text[start.end() if start else 0 :].split()), validate=True)
    except (binascii.Error, ValueError):
        raise RefusedError(422, f"{field}: expected a picture in base64, found something else", field) from None
    return from_bytes(data, field, most)


def from_bytes(data: bytes, field: str, most: int) -> Image.Image:
    try:
        return read_picture(field, io.BytesIO(data), most)
    except UsageError as error:
        raise RefusedError(422, str(error), field) from None
    except (*UNREADABLE, MemoryError, ArithmeticError, LookupError, TypeError):  # broken files find their way everywhere
        raise RefusedError(422, f"{field}: is no {', '.join(FORMATS)} picture that can be read", field) from None


def to_bytes(picture: Image.Image, kind: str, recipe: Mapping[str, Any] | None = None, quality: int = QUALITY) -> bytes:
    """kind: png, which carries the recipe, jpeg or webp."""
    buffer = io.BytesIO()
    if kind == "png":
        picture.save(buffer, "PNG", pnginfo=chunks_of(recipe))
    else:
        picture.save(buffer, kind.upper(), quality=quality)
    return buffer.getvalue()


def to_base64(picture: Image.Image, kind: str, recipe: Mapping[str, Any] | None = None, quality: int = QUALITY) -> str:
    return base64.b64encode(to_bytes(picture, kind, recipe, quality)).decode()


@dataclass(frozen=True)
class Region:
    """The part of a picture around a mask that is painted at the full size of a drawing, and put back into its place.

    Reference: AUTOMATIC1111 webui, modules/masking.py and processing.py ("only masked").
    """

    picture: Image.Image
    mask: Image.Image  # L, of the picture's size
    box: tuple[int, int, int, int]

    def crop(self, width: int, height: int) -> tuple[Image.Image, Image.Image]:
        """The part, and its mask, at the size of a drawing."""
        lanczos = Image.Resampling.LANCZOS
        return (
            self.picture.crop(self.box).resize((width, height), lanczos),
            self.mask.crop(self.box).resize((width, height), lanczos),
        )

    def put_back(self, drawn: Image.Image) -> Image.Image:
        left, top, right, bottom = self.box
        whole = self.picture.copy()
        whole.paste(drawn.resize((right - left, bottom - top), Image.Resampling.LANCZOS), (left, top))
        return Image.composite(whole, self.picture, self.mask)


def region_of(picture: Image.Image, mask: Image.Image, padding: int, size: tuple[int, int]) -> Region | None:
    """None where the mask paints nowhere.  size: of a drawing, whose proportions the part is given."""
    picture = opaque(picture, "white").convert("RGB")
    mask = grey(mask, picture.size)
    found = mask.point(lambda value: 255 if value >= 128 else 0).getbbox()
    if found is None:
        return None
    left, top, right, bottom = found
    grown = (
        max(0, left - padding),
        max(0, top - padding),
        min(picture.width, right + padding),
        min(picture.height, bottom + padding),
    )
    return Region(picture, mask, in_proportion(grown, picture.size, size))


def in_proportion(box: tuple[int, int, int, int], whole: tuple[int, int], size: tuple[int, int]) -> tuple[int, int, int, int]:
    """A box that grows to the proportions of `size`, as far as the picture goes."""
    left, top, right, bottom = box
    wanted, width, height = size[0] / size[1], right - left, bottom - top
    if width / height < wanted:
        width = min(whole[0], round(height * wanted))
        left = max(0, min(left - (width - (right - left)) // 2, whole[0] - width))
    else:
        height = min(whole[1], round(width / wanted))
        top = max(0, min(top - (height - (bottom - top)) // 2, whole[1] - height))
    return left, top, left + width, top + height


def grey(mask: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A mask as 8 bits of grey, of this size; transparent parts are black."""
    plain = opaque(mask, "black").convert("L")
    return plain if plain.size == size else plain.resize(size, Image.Resampling.LANCZOS)


def blurred(mask: Image.Image, x: float, y: float) -> Image.Image:
    """With soft edges, so many pixels wide."""
    return mask.filter(ImageFilter.GaussianBlur((x, y))) if x or y else mask


def pasted_softly(picture: Image.Image, mask: Image.Image) -> Callable[[Image.Image], Image.Image]:
    """What puts a drawing over a picture of its size, as far as the mask is light."""
    under, soft = opaque(picture, "white").convert("RGB"), grey(mask, picture.size)
    return lambda drawn: Image.composite(drawn, under, soft)


# Radii of blurs, and how often each lies on top of the others (AUTOMATIC1111 webui, modules/masking.py, fill).
LAYERS = ((256, 1), (64, 1), (16, 2), (4, 4), (2, 2), (0, 1))


def filled(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """A picture whose masked part has the colours around it: what it showed is gone."""
    kept = Image.new("RGBa", picture.size)
    kept.paste(opaque(picture, "white").convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    found = Image.new("RGBA", picture.size)
    for radius, times in LAYERS:
        layer = kept.filter(ImageFilter.GaussianBlur(radius)).convert("RGBA")
        for _ in range(times):
            found.alpha_composite(layer)
    return found.convert("RGB")
