"""What other programs say of their pictures, and the command of minisd that comes nearest.

A1111 and many others write one text: the prompt, a line that begins with "Negative prompt:", and a last line of fields,
`Steps: 20, Sampler: Euler, …`.  It says too little to make a picture again exactly, but enough to begin from.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping

from PIL import Image

from ..errors import UsageError
from ..options import OPTIONS, pair

MAX_TEXT = 100_000  # characters
MAX_FIELDS = 10_000  # of the last line
EXIF, USER_COMMENT, DESCRIPTIONS = 0x8769, 0x9286, (0x010E, 0x010F, 0x0110)  # tags of EXIF
FIELD = re.compile(r'([A-Za-z][\w /+-]{0,40}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,\s*|$)')
OF_FIELDS = {option.infotext: option for option in OPTIONS.values() if option.infotext}
OF_FIELDS["Eta DDIM"] = OPTIONS["eta"]
ASIDE = {"Version", "Model hash", "VAE hash", "Hashes", "User"}  # nothing that a command would say

# Whose text it is, by the beginning of its field `Version`.
WRITERS = {
    r"minisd\b": "minisd", r"v\d": "AUTOMATIC1111's web UI", r"f\d|forge|neo": "Forge", "ComfyUI": "ComfyUI",
    r"stable-diffusion\.cpp": "stable-diffusion.cpp", "Fooocus": "Fooocus",
}  # fmt: skip
CHUNKS = {"workflow": "ComfyUI", "prompt": "ComfyUI", "invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI"}


def why_no_recipe(image: Image.Image) -> str:
    """What a picture without a minisd chunk is instead, and what to do with it."""
    text = parameters_of(image)
    if text is not None:
        return nearest(text)
    if (program := other_program(image)) is not None:
        return f"carries no minisd chunk but what {program} writes: open it there; minisd makes only its own pictures again"
    if image.format == "PNG":
        return "carries no minisd chunk; only pictures that minisd has saved can be made again"
    return f"is a {image.format}, which carries nothing of how it was made; only PNGs that minisd has saved can be made again"


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
    told = (str(value) for tag, value in exif(image).items() if tag in DESCRIPTIONS)
    if any(text.startswith(("workflow:", "prompt:")) for text in told):
        return "ComfyUI"
    return next((program for chunk, program in CHUNKS.items() if chunk in image.info), None)


def nearest(text: str) -> str:
    """Whose text it is, what of it minisd cannot follow, and the command for the rest."""
    prompt, negative, fields = parsed(text)
    version = fields.get("Version", "")
    whose = next((name for mark, name in WRITERS.items() if re.match(mark, version)), "another program, as A1111 writes it")
    words, rest = options_of(fields)
    if negative:
        words += [f"--negative={negative}"] if negative.startswith("-") else ["-n", negative]
    lacking = f", without {', '.join(rest)}" if rest else ""
    command = shlex.join(
        ["minisd", "draw", *words, "--", prompt] if prompt.startswith("-") else ["minisd", "draw", *words, prompt]
    )
    return (
        f"carries no minisd chunk but the parameters text of {whose}, from which it cannot be made again exactly; "
        f"nearest{lacking}: {command}"
    )


def parsed(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt, each in one line, and the fields."""
    *lines, last = text.strip().split("\n")
    fields = {name.strip(): unquoted(value) for name, value in FIELD.findall(last[:MAX_FIELDS])}
    if len(fields) < 3:
        lines, fields = [*lines, last], {}
    prompt, _, negative = "\n".join(["", *lines]).partition("\nNegative prompt:")
    return " ".join(prompt.split()), " ".join(negative.split()), fields


def unquoted(value: str) -> str:
    try:
        return str(json.loads(value)) if value.startswith('"') else value.strip()
    except ValueError:
        return value.strip()


def options_of(fields: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The options of minisd that say what fields say, and the fields that none says."""
    words: list[str] = []
    rest: list[str] = []
    if any(name.startswith("Hires") for name in fields):  # whose strength it is then
        fields = {name: value for name, value in fields.items() if name != "Denoising strength"}
    for name, value in fields.items():
        said = option_of(name, value)
        if said is None:
            rest.append(f"{name}: {value[:40]}" if name in ("Sampler", "Schedule type") else name)
        words += said or []
    return words, rest


def option_of(name: str, value: str) -> list[str] | None:
    """The words for one field, none where minisd does so anyway; None where it cannot."""
    if name in ASIDE or (name == "Schedule type" and value == "Automatic"):
        return []
    if name in ("Model", "VAE"):
        return [{"Model": "-m", "VAE": "--vae"}[name], value] if value not in ("", "None", "Automatic") else []
    if name == "RNG":  # "GPU" where nothing is said, which NV imitates
        return {"CPU": []}.get(value, ["--rng", "nv"]) if value in ("CPU", "NV", "GPU") else None
    if name == "Sampler":
        return sampler_words(value)
    if name == "Schedule type":
        return spacing_words(value)
    try:
        if name == "Size":
            for side, length in zip(("width", "height"), pair(value), strict=True):
                OPTIONS[side].kind.check(name, length)
            return ["--size", value]
        option = OF_FIELDS[name]
        option.kind.check(name, option.kind.parse(value))
    except (KeyError, ValueError):
        return None
    assert option.flag is not None
    return [*(["--init", "PICTURE"] if name == "Denoising strength" else []), option.flag, value]


def sampler_words(label: str) -> list[str] | None:
    """A1111's labels before version 1.9 have the schedule in them."""
    from ..diffusion.samplers import named

    try:
        name, schedule = named(label)
    except UsageError:
        return None
    return ["--sampler", name, *(["--spacing", schedule] if schedule else [])]


def spacing_words(label: str) -> list[str] | None:
    from ..diffusion.spacings import spacing_named

    try:
        return ["--spacing", spacing_named(label)]
    except UsageError:
        return None
