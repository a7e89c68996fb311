"""A1111's `parameters` text, which many others write, too: the prompt, a line that begins with "Negative prompt:", and a last
line of fields, `Steps: 20, Sampler: Euler, …`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

from ..errors import UsageError
from ..options import OPTIONS, pair
from .found import Found

MAX_FIELDS = 10_000  # characters of the last line
FIELD = re.compile(r'([A-Za-z][\w /+-]{0,40}):\s*("(?:[^"\\]|\\.)*"|[^,]*)(?:,\s*|$)')
OF_FIELDS = {option.infotext: option for option in OPTIONS.values() if option.infotext}
OF_FIELDS["Eta DDIM"] = OPTIONS["eta"]
EMPHASES = {"Original": "original", "No norm": "no-norm", "Ignore": "ignore", "None": "none"}
CHURN = {"Sigma churn": "s_churn", "Sigma tmin": "s_tmin", "Sigma tmax": "s_tmax", "Sigma noise": "s_noise"}
ASIDE = {
    "Version",
    "VAE hash",
    "Hashes",
    "User",
    "Model",
    "Model hash",
    "Lora hashes",
    "TI hashes",
}  # nothing that a command would say, or said elsewhere

# Whose text it is, by the beginning of its field `Version`, and by whose rules it is drawn.
WRITERS = {
    r"minisd\b": ("minisd", None), r"v\d": ("AUTOMATIC1111's web UI", "a1111"), r"f\d|forge|neo": ("Forge", "a1111"),
    "ComfyUI": ("ComfyUI", "comfyui"), r"stable-diffusion\.cpp": ("stable-diffusion.cpp", "a1111"),
    "Fooocus": ("Fooocus", "comfyui"),
}  # fmt: skip
OTHER = ("another program, as A1111 writes it", "a1111")


def of_infotext(text: str) -> Found:
    """What the text says, and of that what minisd can say, too."""
    prompt, negative, fields = parsed(text)
    version = fields.get("Version", "")
    program, like = next((each for mark, each in WRITERS.items() if re.match(mark, version)), OTHER)
    said, lacking = options_of(fields)
    model = fields.get("Model") or None
    words = tuple(re.findall(r"([^,]+): *[0-9a-f]+(?:, *|$)", fields.get("TI hashes", "")))
    return Found(program, prompt, negative, tuple(said), tuple(lacking), like, model, fields.get("Model hash"), words)


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


def options_of(fields: Mapping[str, str]) -> tuple[list[tuple[str, tuple[str, ...]]], list[str]]:
    """Fields with the options of minisd that say them, and the fields that none says."""
    said: list[tuple[str, tuple[str, ...]]] = []
    rest: list[str] = []
    if any(name.startswith("Hires") for name in fields):  # whose strength it is then
        fields = {name: value for name, value in fields.items() if name != "Denoising strength"}
    for name, value in fields.items():
        words = option_of(name, value)
        if words is None:
            rest.append(f"{name}: {value[:40]}")
        elif words:
            said.append((f"{name}: {value[:80]}", tuple(words)))
    return said, rest


def option_of(name: str, value: str) -> list[str] | None:
    """The words for one field, none where minisd does so anyway; None where it cannot."""
    if name in ASIDE or (name, value) in (("Schedule type", "Automatic"), ("VAE", "None"), ("VAE", "Automatic")):
        return []
    try:
        if name in ("Sampler", "Schedule type"):
            return sampler_words(value) if name == "Sampler" else spacing_words(value)
        if name == "RNG":
            return ["--rng", rng_named(value)]
        if name == "VAE":
            return ["--vae", value] if value else []
        if name == "Emphasis":
            return ["--emphasis", EMPHASES[value]]
        if name in CHURN:
            return ["--sampler-options", f"{CHURN[name]}={float(value):g}"]
        if name == "Size":
            for side, length in zip(("width", "height"), pair(value), strict=True):
                OPTIONS[side].kind.check(name, length)
            return ["--size", value]
        option = OF_FIELDS[name]
        option.kind.check(name, option.kind.parse(value))
    except (KeyError, ValueError, UsageError):
        return None
    assert option.flag is not None
    return [*(["--init", "PICTURE"] if name == "Denoising strength" else []), option.flag, value]


def sampler_words(label: str) -> list[str]:
    """Labels of A1111 before version 1.9 have the schedule in them, and those of stable-diffusion.cpp.  Raises UsageError."""
    from ..diffusion.samplers import named

    name, spacing = named(label)
    return ["--sampler", name, *(["--spacing", spacing] if spacing else [])]


def spacing_words(label: str) -> list[str]:
    from ..diffusion.spacings import spacing_named

    return ["--spacing", spacing_named(label)]


def rng_named(value: str) -> str:
    """A1111's "GPU" is imitated by its "NV"."""
    from ..diffusion.noise import dialect_named

    return dialect_named(value)
