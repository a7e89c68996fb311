"""Which LoRAs a request wants: those that it lists, and those that its prompt names as A1111's prompts do.

Reference: AUTOMATIC1111 webui, modules/extra_networks.py and extensions-builtin/Lora/extra_networks_lora.py.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import UsageError, shown
from ..library.names import resolve
from ..library.styles import around as words_around
from ..library.styles import named as style_named
from ..options import checked

if TYPE_CHECKING:
    from ..request import Request
    from .lora_file import Addon

MOST = 100.0  # a strength: beyond it is a slip of the hand
TAG = re.compile(r"<(?:lora|lyco):([^<>:]+)((?::[^<>:]*)*)>")
OTHER = re.compile(r"<hypernet:[^<>]*>")


@dataclass(frozen=True)
class Lora:
    """A LoRA or one of its relatives, and how strong it is.

    source: a file, or as a text a name in the library; strength: times the change that was trained, negative turns it round;
    text_strength: for the text encoders, by default the same; blocks: what multiplies `strength` in blocks of the UNet, in the
    words of models.blocks.block_ratios ("input.0-3=0, middle=0.5", a preset, or a number for each block) or by block.
    """

    source: str | os.PathLike[str]
    strength: float = 1.0
    text_strength: float | None = None
    blocks: str | Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        for name in ("strength", "text_strength"):
            value = getattr(self, name)
            if value is None and name == "text_strength":
                continue
            if isinstance(value, bool) or not isinstance(value, int | float) or not -MOST <= value <= MOST:
                raise UsageError(f"loras: {name}: expected a number from {-MOST:g} to {MOST:g}, found {repr(value)[:80]}")


@dataclass(frozen=True)
class Wanted:
    """What is to be on: with which rule, and whether a file may be taken in part; see `stack.Stack.set`."""

    loras: tuple[Lora, ...] = ()
    rule: str = "paper"
    partial: bool = False


NOTHING = Wanted()


def as_lora(given: object) -> Lora:
    """Of a Lora, a path, (path, strength), (path, strength, text strength), or what a recipe says.  Raises UsageError."""
    if isinstance(given, Lora):
        return given
    if isinstance(given, str | os.PathLike) and str(given):
        return Lora(given)
    if isinstance(given, Mapping) and isinstance(given.get("source"), str):
        return Lora(**{name: given[name] for name in ("source", "strength", "text_strength", "blocks") if name in given})
    if isinstance(given, tuple | list) and 1 <= len(given) <= 3 and isinstance(given[0], str | os.PathLike):
        return Lora(*given)
    raise UsageError(f"loras: expected a path, (path, strength) or (path, strength, text_strength), found {repr(given)[:80]}")


def as_loras(given: object) -> tuple[Lora, ...]:
    """Of a list of such things, each a file by its path from here on.  Raises UsageError, CheckpointError."""
    if isinstance(given, str | os.PathLike | Mapping) or not isinstance(given, Sequence):
        raise UsageError(f"loras: expected a list, such as [('style.safetensors', 0.8)], found {repr(given)[:80]}")
    return tuple(replace(lora, source=resolve(lora.source, "lora")) for lora in map(as_lora, given))


def wanted(request: Request, kept: Wanted) -> tuple[Request, Wanted]:
    """The request with prompts that are words alone, and what is to be on while it is drawn.

    kept: what is on where the request says nothing.  Raises UsageError, CheckpointError.
    """
    request, named = without_tags(in_style(request))
    rule = request.lora_rule or ("comfyui" if request.like == "comfyui" else kept.rule)
    partial = request.lora_partial or (request.loras is None and kept.partial)
    loras = (*(kept.loras if request.loras is None else as_loras(request.loras)), *as_loras(named))
    if request.lora_blocks is not None:
        if not loras:
            raise UsageError("lora_blocks: expected LoRAs whose blocks they are, found none")
        loras = tuple(replace(lora, blocks=lora.blocks or request.lora_blocks) for lora in loras)
    return request, Wanted(loras, rule, partial) if loras else NOTHING


def in_style(request: Request) -> Request:
    """With the words of its style around the prompts.  Raises UsageError."""
    if request.style is None:
        return request
    style = style_named(checked("style", request.style))

    def around(name: str, words: str) -> Any:
        given = getattr(request, name)
        texts = [given] if isinstance(given, str) else given
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            raise UsageError(f"style: expected a text as {name}, found {type(given).__name__}")
        found = [words_around(words, text) for text in texts]
        return found[0] if isinstance(given, str) else found

    prompts = {"prompt": around("prompt", style.prompt), "negative_prompt": around("negative_prompt", style.negative_prompt)}
    return replace(request, style=None, **prompts)


def without_tags(request: Request) -> tuple[Request, list[Lora]]:
    """Takes <lora:…> out of the prompts; a call has one model, so all of its prompts must name the same."""
    texts = [request.prompt] if isinstance(request.prompt, str) else request.prompt
    if request.plain_prompt or not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        return request, []
    found = [TAG.findall(text) for text in texts]
    if not any(found):
        return request, []
    if any(tags != found[0] for tags in found):
        raise UsageError("prompt: expected the same <lora:…> in all prompts of one call; draw the others in calls of their own")
    words = [re.sub(rf"\s*{TAG.pattern}", "", text).strip() for text in texts]
    return replace(request, prompt=words[0] if isinstance(request.prompt, str) else words), [of_tag(*tag) for tag in found[0]]


def of_tag(name: str, rest: str) -> Lora:
    """<lora:name:text encoders:UNet>; the second is by default the first, that is 1, and they may have names (te=, unet=)."""
    numbers: dict[str, float] = {}
    for i, item in enumerate(filter(None, rest.split(":"))):
        key, mark, value = item.partition("=")
        try:
            numbers[key.strip() if mark else ("te", "unet")[i]] = float(value if mark else item)
        except (ValueError, IndexError):
            tag = shown(f"<lora:{name}{rest}>", 80)
            raise UsageError(f"prompt: expected <lora:NAME:STRENGTH> or <lora:NAME:TEXT:UNET>, found {tag}") from None
    text = numbers.get("te", 1.0)
    return Lora(name.strip(), numbers.get("unet", text), text)


def facts(lora: Lora, addon: Addon) -> dict[str, Any]:
    """What a recipe says of a LoRA that was on; left_out: how many of its keys were."""
    blocks = dict(lora.blocks) if isinstance(lora.blocks, Mapping) else lora.blocks
    said = {"source": os.path.abspath(lora.source), "strength": lora.strength, "text_strength": lora.text_strength}
    said |= {"blocks": blocks, "sha256": addon.file.sha256(), "autov3": addon.autov3}
    return said | ({"left_out": len(addon.misfits)} if addon.misfits else {})
