"""Pictures of other programs: what they carry of how they were made, wherever they carry it."""

from __future__ import annotations

import json
from collections.abc import Mapping

from PIL import Image

from ..errors import UsageError
from .found import Found
from .graphs import of_graph
from .infotext import of_infotext
from .records import of_record

MAX_TEXT, MAX_JSON = 100_000, 1_000_000  # characters
EXIF, USER_COMMENT, DESCRIPTIONS = 0x8769, 0x9286, (0x010E, 0x010F, 0x0110)  # tags of EXIF
CHUNKS = {"workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI"}


class ForeignPictureError(UsageError):
    """A picture without a minisd chunk, and what another program says of it."""

    def __init__(self, message: str, found: Found | None) -> None:
        super().__init__(message)
        self.found = found


def why_no_recipe(path: object, image: Image.Image) -> ForeignPictureError:
    """What a picture without a minisd chunk is instead, and what to do with it."""
    found = found_in(image)
    if found is not None:
        lacking = f", without {', '.join(found.lacking)}" if found.lacking else ""
        message = f"carries no minisd chunk but what {found.program} writes; nearest{lacking}: {found.command()}"
    elif (program := other_program(image)) is not None:
        message = f"carries no minisd chunk but what {program} writes: open it there; minisd makes only its own pictures again"
    elif image.format == "PNG":
        message = "carries no minisd chunk; only pictures that minisd has saved can be made again"
    else:
        message = f"is a {image.format}, which carries nothing of how it was made; only pictures that say it can be made again"
    return ForeignPictureError(f"{path}: {message}", found)


def found_in(image: Image.Image) -> Found | None:
    """What a picture says, by the first program that left something that can be read; None where none did."""
    if (text := parameters_of(image)) is not None:
        return of_infotext(text)
    graph = loaded(image.info.get("prompt")) or loaded(described(image, "prompt:"))
    if graph is not None and (found := of_graph(graph)) is not None:
        return found
    if isinstance(record := loaded(image.info.get("invokeai_metadata")), dict):
        return of_record(record, "InvokeAI", "positive_prompt", "negative_prompt", "scheduler")
    if {"prompt", "seed", "scale", "sampler"} <= image.info.keys():
        return of_record(
            {str(name): value for name, value in image.info.items()}, "kohya's sd-scripts", "prompt", "negative-prompt", "sampler"
        )
    return None


def loaded(text: object) -> object:
    """JSON, or None where it is none."""
    try:
        return json.loads(text) if isinstance(text, str) and len(text) <= MAX_JSON else None
    except (ValueError, RecursionError):
        return None


def described(image: Image.Image, start: str) -> str | None:
    """ComfyUI writes into EXIF's descriptions where there are no chunks: "prompt:{…}"."""
    told = (str(value) for tag, value in exif(image).items() if tag in DESCRIPTIONS)
    return next((text.removeprefix(start) for text in told if text.startswith(start)), None)


def parameters_of(image: Image.Image) -> str | None:
    """A1111's text: a PNG has it in a chunk, a JPEG or WebP in EXIF's UserComment."""
    text = image.info.get("parameters")
    if not isinstance(text, str):
        text = comment(exif(image, EXIF).get(USER_COMMENT))
    return text if text and "Steps:" in text and len(text) <= MAX_TEXT else None


def exif(image: Image.Image, part: int | None = None) -> Mapping[int, object]:
    """What the camera's block says, or a part of it; nothing where it is broken."""
    try:
        found = image.getexif()
        return dict(found if part is None else found.get_ifd(part))
    except Exception:  # a stranger's bytes, for which Pillow has no error of its own
        return {}


def comment(found: object) -> str | None:
    """The text of a UserComment, whose first eight bytes say how it is written."""
    if not isinstance(found, bytes):
        return found if isinstance(found, str) else None
    code, text = found[:8], found[8:]
    if code == b"UNICODE\0":  # in 16 bits; that the high byte is first, as A1111 has it, is nowhere said
        high_first = text[::2].count(0) >= text[1::2].count(0)
        return text.decode("utf-16-be" if high_first else "utf-16-le", "replace").lstrip("\ufeff")
    return (text if code in (b"ASCII\0\0\0", bytes(8)) else found).decode("utf-8", "replace")


def other_program(image: Image.Image) -> str | None:
    if "NovelAI" in str(image.info.get("Software")):
        return "NovelAI"
    if described(image, "workflow:") or described(image, "prompt:"):
        return "ComfyUI"
    return next((program for chunk, program in CHUNKS.items() if chunk in image.info), None)
