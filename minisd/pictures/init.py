"""Pictures that a user gives: to start from, to edit, to mask.  Read carefully, because they come from anywhere."""

from __future__ import annotations

import hashlib
import os
import warnings
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import MinisdError, UsageError
from ..system.regular import open_regular
from .metadata import FORMATS, MAX_FILE, check_head, why_not

MAX_PIXELS = 48 << 20  # of 8192x6144, as cameras have them; a small file can unpack to gigabytes, and the header tells before
MAX_LENGTH = 1 << 15  # pixels of a side: scaling one of millions takes gigabytes, however flat it is

Picture = Image.Image | np.ndarray | Tensor | str | os.PathLike[str]


def open_picture(name: str, source: Picture) -> Image.Image:
    """The picture that the argument `name` gives, upright.  Raises UsageError."""
    if isinstance(source, Image.Image):
        return ImageOps.exif_transpose(source)
    if isinstance(source, np.ndarray | Tensor):
        return from_numbers(name, source)
    if not isinstance(source, str | os.PathLike):
        raise UsageError(f"{name}: expected a PIL image, an array, a tensor or a path, found {type(source).__name__}")
    path = Path(source)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with open_regular(path, MAX_FILE) as file:
                return read_picture(f"{name} {path}", file)
    except MinisdError:
        raise
    except FileNotFoundError:
        raise UsageError(f"{name} {path}: does not exist") from None
    except IsADirectoryError:
        raise UsageError(f"{name} {path}: expected a picture, found a folder") from None
    except UNREADABLE as error:
        raise UsageError(f"{name} {path}: is no {', '.join(FORMATS)} picture that can be read: {why_not(error)}") from None


# What Pillow raises for what is no picture, or a broken one.
UNREADABLE = (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning)


def read_picture(name: str, file: BinaryIO, most: int = MAX_PIXELS) -> Image.Image:
    """A picture of at most so many pixels from an open file, upright.  Raises UsageError (its size), and UNREADABLE."""
    check_head(file)
    with Image.open(file, formats=FORMATS) as image:
        check_size(name, image.width, image.height, most)
        return ImageOps.exif_transpose(image)


def check_size(name: str, width: int, height: int, most: int = MAX_PIXELS) -> None:
    if width * height > most:
        raise UsageError(f"{name}: expected at most {most / 1e6:.0f} million pixels, found {width}x{height}; scale it down")
    if max(width, height) > MAX_LENGTH:
        raise UsageError(f"{name}: expected sides of at most {MAX_LENGTH:,} pixels, found {width}x{height}; crop it first")


def from_numbers(name: str, source: np.ndarray | Tensor) -> Image.Image:
    """A picture from an array (H, W) or (H, W, C), or a tensor (C, H, W) or (1, C, H, W), with 1, 3 or 4 channels.

    Whole numbers go from 0 to 255; others from 0 to 1, or from -1 to 1 where one is below 0, as diffusers takes them.
    """
    x = as_tensor(name, source)
    shape = tuple(x.shape)
    x = x[0] if x.dim() == 4 and len(x) == 1 else x
    x = x.permute(1, 2, 0) if isinstance(source, Tensor) and x.dim() == 3 else x  # (H, W, C)
    if x.dim() not in (2, 3) or (x.dim() == 3 and x.shape[2] not in (1, 3, 4)) or x.numel() == 0:
        expected = "a tensor (C, H, W)" if isinstance(source, Tensor) else "an array (H, W, C)"
        raise UsageError(f"{name}: expected {expected} with 1, 3 or 4 channels, found shape {shape}")
    low, high = (0, 255) if not x.is_floating_point() and x.dtype != torch.bool else (-1 if x.min() < 0 else 0, 1)
    if not bool(x.isfinite().all()) or x.min() < low or x.max() > high:
        found = f"numbers from {float(x.min()):.4g} to {float(x.max()):.4g}"
        raise UsageError(f"{name}: expected numbers from 0 to 1, -1 to 1, or whole ones from 0 to 255, found {found}")
    levels = ((x.double() - low) * (255 / (high - low))).round().byte().numpy()
    return Image.fromarray(levels[:, :, 0] if levels.ndim == 3 and levels.shape[2] == 1 else levels)


def as_tensor(name: str, source: np.ndarray | Tensor) -> Tensor:
    """Numbers of any layout, on the CPU: floating-point, whole, or true and false.  Raises UsageError."""
    if isinstance(source, np.ndarray):
        kinds: dict[str, type] = {"f": np.float64, "i": np.int64, "u": np.int64, "b": np.bool_}
        if source.dtype.kind not in kinds:
            raise UsageError(f"{name}: expected an array of numbers, found {source.dtype}")
        return torch.from_numpy(np.ascontiguousarray(source, kinds[source.dtype.kind]))
    if source.is_complex():
        raise UsageError(f"{name}: expected a tensor of real numbers, found {source.dtype}")
    return source.detach().cpu().double() if source.is_floating_point() else source.detach().cpu()


def to_pixels(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture as (1, 3, H, W) in [-1, 1], float32; scaled if it has another size, transparent parts on white."""
    image = resized(opaque(image, "white").convert("RGB"), width, height)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_mask(image: Image.Image, width: int, height: int) -> Tensor:
    """A picture as (1, 1, H, W): 1 where it is lighter than half, which is where to paint, else 0; so where it is transparent."""
    image = resized(opaque(image, "black").convert("L"), width, height)
    return (torch.from_numpy(np.array(image))[None, None] >= 128).float()


def opaque(image: Image.Image, background: str) -> Image.Image:
    """Without transparency, and with 8 bits a channel: Pillow's own conversion cuts 16 bits of grey off at 255."""
    if image.mode.startswith("I"):  # I;16 and the like
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) // 257).astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    return image


def resized(image: Image.Image, width: int, height: int) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), Image.Resampling.LANCZOS)


def fingerprint(image: Image.Image) -> str:
    """The sha256 of a picture's size and pixels, whatever file format they came in."""
    hashed = hashlib.sha256(f"{image.mode} {image.size}".encode())
    for top in range(0, image.height, 256):  # all of a photograph at once would be a second copy of it
        hashed.update(image.crop((0, top, image.width, min(top + 256, image.height))).tobytes())
    return hashed.hexdigest()
