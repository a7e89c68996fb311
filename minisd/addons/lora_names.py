"""What the modules of a LoRA are called, and which weight of the checkpoint each name means.

Every trainer has its own names: kohya's flattened ones, PEFT's and diffusers' dotted ones, LyCORIS', the raw keys.  All are
written down here from the names of the checkpoint's own weights and looked up; "_" is never turned back into ".", which could
be read in several ways (to_q, proj_in).

Reference: kohya-ss/sd-scripts networks/lora.py and oft.py; LyCORIS; ComfyUI comfy/lora.py; diffusers loaders/lora_pipeline.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..models.family import REFINER, SD1, SD2, SDXL, UNET, Family
from ..models.naming import Link, clip_names, count, is_open, open_names, raw_levels, renamed, unet_names
from ..models.shapes import Shapes, below

JOINED = 3  # query, key and value lie one above the other in open_clip's in_proj_weight

# By family and text encoder: what kohya and diffusers put before its modules, and what ComfyUI calls it.
TEXT = {
    (SD1.name, 0): (("lora_te_", "lora_te1_"), ("text_encoder.",), "clip_l"),
    (SD2.name, 0): (("lora_te_", "lora_te1_"), ("text_encoder.",), "clip_h"),
    (SDXL.name, 0): (("lora_te1_",), ("text_encoder.",), "clip_l"),
    (SDXL.name, 1): (("lora_te2_",), ("text_encoder_2.",), "clip_g"),
    (REFINER.name, 0): (("lora_te_", "lora_te2_"), ("text_encoder.", "text_encoder_2."), "clip_g"),
}

# Modules that files of a family hold and its checkpoints do not: OpenAI's projection, which SD 1 and SDXL have no use for.
WITHOUT_EFFECT = re.compile(r"lora_te1?_text_projection|text_encoder\.text_projection")


@dataclass(frozen=True)
class Target:
    """A weight of the checkpoint, or a part of one."""

    key: str
    rows: tuple[int, int] | None = None  # of a joined matrix, from and to
    transposed: bool = False  # whether it lies the other way round in the checkpoint

    @property
    def is_whole(self) -> bool:
        return self.rows is None and not self.transposed

    @property
    def bias(self) -> str:
        """The key of the bias that goes with it."""
        return re.sub(r"weight$", "bias", self.key)


def targets(shapes: Shapes, family: Family) -> dict[str, Target]:
    """Every name that a module of a LoRA for this checkpoint may have, and what it means there."""
    found: dict[str, Target] = {}
    unet = below(shapes, UNET)
    theirs = unet_names(raw_levels(unet, "input_blocks", "op"), raw_levels(unet, "output_blocks", "conv"))
    for key in unet:
        if key.endswith(".weight"):
            name = renamed(key, theirs.modules)
            spellings = unet_spellings(key.removesuffix(".weight"), name and name.removesuffix(".weight"))
            found |= dict.fromkeys(spellings, Target(f"{UNET}.{key}"))
    for i, tower in enumerate(family.towers):
        inner = below(shapes, tower.name)
        layers = count(inner, "transformer.resblocks.")
        names = open_names(layers) if is_open(tower) else clip_names("text_model.final_layer_norm.weight" in inner)
        for link in names.forward(inner):
            if link.raw.endswith("weight") or link.transposed:
                found |= text_spellings(tower.name, link, shapes, TEXT[family.name, i])
    return found


def written_names(known: Mapping[str, Target], family: Family, style: str) -> dict[Target, str]:
    """What each weight is called in files that kohya's scripts ("kohya"; raw block names for SDXL) or peft ("peft") write."""
    found: dict[Target, str] = {}
    for name, target in known.items():
        if style == "peft" and name.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
            found.setdefault(target, name)
        elif style == "kohya" and name.startswith("lora_unet_") and family.vector:
            found[target] = name  # the later of the two
        elif style == "kohya" and name.startswith(("lora_unet_", "lora_te")):
            found.setdefault(target, name)
    return found


def unet_spellings(raw: str, theirs: str | None) -> Iterator[str]:
    """raw: "input_blocks.1.1.transformer_blocks.0.attn1.to_q"; theirs: what diffusers calls it."""
    yield from (f"{UNET}.{raw}", f"diffusion_model.{raw}")
    for name in filter(None, (theirs, raw)):
        flat = name.replace(".", "_")
        yield from (f"lora_unet_{flat}", f"lycoris_{flat}", f"oft_unet_{flat}")
    if theirs is None:
        return
    processor = re.sub(r"\.(attn[12])\.to_", r".\1.processor.to_", theirs)
    for name in dict.fromkeys([theirs, processor, theirs.removesuffix(".0") if ".to_out." in theirs else theirs]):
        yield from (name, f"unet.{name}", f"base_model.model.{name}", f"unet.base_model.model.{name}")
    yield from (name.removesuffix(".0") for name in (processor, f"unet.{processor}") if ".to_out." in name)


def text_spellings(
    tower: str, link: Link, shapes: Shapes, spellings: tuple[tuple[str, ...], tuple[str, ...], str]
) -> dict[str, Target]:
    """Those of one weight of a text encoder, or of the three that are joined in it."""
    key, (flat, dotted, comfy) = f"{tower}.{link.raw}", spellings
    size = shapes[key][0] // len(link.theirs)
    found = {key.removesuffix(".weight"): Target(key)}
    for i, name in enumerate(link.theirs):
        rows = (i * size, (i + 1) * size) if len(link.theirs) == JOINED else None
        target, module = Target(key, rows, link.transposed), name.removesuffix(".weight")
        found |= dict.fromkeys([start + module.replace(".", "_") for start in flat], target)
        found |= dict.fromkeys([start + module for start in dotted], target)
        found |= dict.fromkeys([f"{start}base_model.model.{module}" for start in dotted], target)
        found |= dict.fromkeys([f"{start}{comfy}.transformer.{module}" for start in ("text_encoders.", "")], target)
    return found
