"""What a file of the ControlNet kin is, told by its tensors' names, and which of our tensors each of them is.

Names: lllyasviel/ControlNet (cldm/cldm.py), TencentARC/T2I-Adapter (adapter.py) and diffusers (models/controlnets/controlnet.py,
models/adapter.py), whose names follow from the structure of the networks.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ...errors import CheckpointError
from ...files.checkpoint import Checkpoint
from ...files.recognition import listing, looks_like, missing, ranking, with_vae
from ...models.control.lllite import PREFIX
from ...models.control.union import OWN
from ...models.naming import Names, their_levels, unet_names

CONTROLNET, ADAPTER = "a ControlNet", "a T2I-Adapter"
DIFFERENCE, CONTROL_LORA = "a ControlNet of differences", "a Control-LoRA"
UNION, LLLITE = "a ControlNet Union", "a ControlNet-LLLite"
# Kinds that are not built: by the beginning of a name, what it is.
OTHERS = {
    "style_embedding": "a T2I style adapter",
    "style_ca": "a T2I style adapter",
    "image_proj": "an IP-Adapter",
}
WRAPPERS = ("control_model.", "adapter.")  # below which a file may have all of it
HINT = "minisd.load_control opens ControlNets, Control-LoRAs, ControlNet-LLLites and T2I-Adapters"


def told(checkpoint: Checkpoint) -> tuple[str, dict[str, str]]:
    """What a file is (one of the six kinds), and by our name of each tensor the file's own.

    Raises CheckpointError, which says what else the file is.
    """
    keys = checkpoint.entries.keys()
    for start, kind in OTHERS.items():
        if any(key.startswith(start) for key in keys):
            raise CheckpointError(checkpoint.path, f"is {kind}, which minisd does not know yet", HINT)
    if any(key.startswith(PREFIX) for key in keys):
        return LLLITE, {key: key for key in keys}
    theirs = any(key.startswith("controlnet_cond_embedding.") for key in keys)
    if theirs or any(".resnets." in key and key.startswith("adapter.body.") for key in keys):
        names = control_names(keys) if theirs else adapter_names(keys)
        links = names.backward(keys)
        found = {link.raw: link.theirs[0] for link in links}
        found |= {key: key for key in keys - {name for link in links for name in link.theirs}}  # unknown by any name
        return (whole_kind(found) if theirs else ADAPTER), found
    inside = unwrapped(keys)
    if any(key.startswith("body.0.") for key in inside):
        return ADAPTER, inside
    if not any(key.startswith(("input_hint_block.", "zero_convs.")) for key in inside):
        raise CheckpointError(checkpoint.path, *something_else(checkpoint))
    if "lora_controlnet" in keys:  # names with __ mean nothing (ComfyUI controlnet.py, ControlLora)
        return CONTROL_LORA, {ours: key for ours, key in inside.items() if ours != "lora_controlnet" and "__" not in ours}
    inside.pop("difference", None)
    return (DIFFERENCE if "difference" in keys else whole_kind(inside)), inside


def whole_kind(names: Collection[str]) -> str:
    """Of a ControlNet that needs no other file: whether it is for many kinds of pictures."""
    return UNION if any(name.split(".")[0] in OWN for name in names) else CONTROLNET


def unwrapped(keys: Collection[str]) -> dict[str, str]:
    """By each name without its wrapper the whole one; of a file that has a wrapper, what is below it alone.

    Version 1.0 of ControlNet was published inside whole checkpoints: control_model beside model, first_stage_model, ….
    """
    for wrapper in WRAPPERS:
        if below := {key.removeprefix(wrapper): key for key in keys if key.startswith(wrapper)}:
            return below
    return {key: key for key in keys}


def something_else(checkpoint: Checkpoint) -> tuple[str, str]:
    """Why a file is none of these, and what to do."""
    shapes = checkpoint.shapes
    family = ranking(with_vae(shapes))[0]
    if not missing(family, with_vae(shapes)):
        return f"this is a checkpoint of {family.title}, not a ControlNet or T2I-Adapter", "minisd.load opens it"
    what, _ = looks_like(shapes)
    return f"this looks like {what}, not like a ControlNet or T2I-Adapter", f"{HINT}; its keys{listing(shapes)}"


def control_names(keys: Collection[str]) -> Names:
    """diffusers' names of a ControlNet with these."""
    modules = dict(unet_names(their_levels(keys, "down_blocks"), []).modules)
    inner = numbers(keys, "controlnet_cond_embedding.blocks.")
    hint = ["conv_in", *(f"blocks.{i}" for i in range(inner)), "conv_out"]
    modules |= {f"input_hint_block.{2 * i}": f"controlnet_cond_embedding.{name}" for i, name in enumerate(hint)}
    outs = numbers(keys, "controlnet_down_blocks.")
    modules |= {f"zero_convs.{i}.0": f"controlnet_down_blocks.{i}" for i in range(outs)}
    return Names(modules | {"middle_block_out.0": "controlnet_mid_block"})


def adapter_names(keys: Collection[str]) -> Names:
    """diffusers' names of a T2I-Adapter with these: there the blocks of a level are together, here they are numbered through."""
    light = "adapter.body.0.out_conv.weight" in keys
    modules = {"conv_in": "adapter.conv_in"}
    for i in range(numbers(keys, "adapter.body.")):
        blocks = numbers(keys, f"adapter.body.{i}.resnets.")
        ours = [f"body.{i}.body.{j}" if light else f"body.{blocks * i + j}" for j in range(blocks)]
        modules |= {name: f"adapter.body.{i}.resnets.{j}" for j, name in enumerate(ours)}
        first = f"body.{i}" if light else f"body.{blocks * i}"
        modules |= {f"{first}.in_conv": f"adapter.body.{i}.in_conv", f"body.{i}.out_conv": f"adapter.body.{i}.out_conv"}
    return Names(modules)


def numbers(keys: Collection[str], prefix: str) -> int:
    """How many numbered things follow a prefix, up to the first gap."""
    found = {key[len(prefix) :].split(".", 1)[0] for key in keys if key.startswith(prefix)}
    return next(i for i in range(len(found) + 1) if str(i) not in found)


def own_key(names: Mapping[str, str], key: str | None) -> str | None:
    """A tensor as the file calls it."""
    return None if key is None else names.get(key, key)
