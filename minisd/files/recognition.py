"""What a set of keys is, and why.

Everything here is read from names, shapes, metadata and, for one question, one small tensor; nothing is guessed from a file's
name.  Every conclusion comes with its reason, which `minisd inspect` shows.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from pathlib import Path

from ..errors import CheckpointError, shown
from ..models.family import FAMILIES, SD2, SDXL, TASKS, UNET, VAE, Family, Recognition, Training
from ..models.shapes import Shapes, below
from ..options import MAX_SIDE
from .checkpoint import Checkpoint
from .training import trained
from .writers_table import CONV_IN, NO_VAE

# Distilled UNets, told by the number of their transformer blocks (their published configurations); SDXL itself has 70.
DISTILLED = {34: "SSD-1B", 15: "Segmind Vega", 21: "KOALA 700M", 30: "KOALA 1B"}


OWN_GUIDANCE = "minisd.guidance_scale"


# Files that are something else: (a pattern that one of their keys matches, what it is, what to do).  The first match counts.
NOT_A_UNET = "minisd draws with models of the Stable Diffusion UNet family"


ON_TOP = "it goes on top of a checkpoint, which is what -m names"


FLAT = r"(lora_(unet|te\d?)|lycoris|oft_unet)"  # how kohya's names begin
FLAT = r"(lora_(unet|te\d?)|lycoris|oft_unet)"  # how kohya's names begin


LYCORIS = r"hada_w1_a|lokr_w[12](_a)?|oft_blocks|dora_scale|diff|diff_b|w_norm|set_weight|on_input"  # relatives of LoRAs


SCALED = "minisd does not know its scales yet; take the model in float16, bfloat16 or plain float8"


QUANTISED = "minisd does not compute in these numbers; take the model in float16, bfloat16 or plain float8"


RAW = "minisd opens the single file that the model was published as"


OTHERS = [
    (r".*\.(scale_weight|weight_scale|scale_input|input_scale)|scaled_fp8|.*\.comfy_quant", "a model in scaled float8", SCALED),
    (r".*\.weight\.(absmax|quant_map|nested_absmax|quant_state\..*)", "a model quantised by bitsandbytes", QUANTISED),
    (rf"{FLAT}_.*|.*[._]lora_([AB]|up|down)\b.*|.*_lora\.(up|down)\.weight|.*\.({LYCORIS})$", "a LoRA", ON_TOP),
    (r"lllite_unet_.*", "a ControlNet-LLLite", ON_TOP),
    (r"(adapter\.)?body\.\d+\.(in_conv|block1|body|resnets)\..*", "a T2I-Adapter", ON_TOP),
    (r"task_embedding|control_add_embedding\..*", "a ControlNet Union", ON_TOP),
    (r"(control_model|controlnet_cond_embedding|input_hint_block)\..*", "a ControlNet", ON_TOP),
    (r"(model\.diffusion_model\.)?(double|single)_blocks\..*", "a Flux model", NOT_A_UNET),
    (r"(model\.diffusion_model\.)?joint_blocks\..*", "a Stable Diffusion 3 model", NOT_A_UNET),
    (r"depth_model\..*", "a depth-to-image model of Stable Diffusion 2", "minisd does not estimate depth; use a ControlNet"),
    (r"(embedder\.model\.visual|noise_augmentor)\..*", "an unCLIP model of Stable Diffusion 2", NOT_A_UNET),
    (r"low_scale_model\..*", "the x4 upscaler of Stable Diffusion 2", NOT_A_UNET),
    (r"string_to_param.*|emb_params|clip_[lg]", "a textual inversion embedding", ON_TOP),
    (r"(taesd_)?(encoder|decoder)\.(layers\.)?\d+\.|\d+\.(conv\.)?.*", "a tiny autoencoder (TAESD)", "give it as the VAE: --vae"),
    (r"(down|up)_blocks\..*|conv_norm_out\..*", "a UNet or ControlNet in diffusers' naming, or a part of one", RAW),
    (r"(encoder|decoder)\.(down|up)_blocks\..*", "a VAE in diffusers' naming", RAW),
]


UNKNOWN = "no model that minisd knows"


PARTS = [
    ("a UNet", (f"{UNET}.", "input_blocks.", "middle_block.", "output_blocks.")),
    ("a VAE", (f"{VAE}.", "encoder.", "decoder.")),
    ("a text encoder", ("cond_stage_model.", "conditioner.", "text_model.", "transformer.resblocks.")),
]


def looks_like(shapes: Shapes) -> tuple[str, str]:
    """What a set of keys that is no whole checkpoint looks like, and what to do about it."""
    for pattern, title, hint in OTHERS:
        if any(re.match(pattern, key) for key in shapes):
            return title, hint
    if len(shapes) == 1 and all(len(shape) in (1, 2) and shape[-1] in (768, 1024, 1280) for shape in shapes.values()):
        return "a textual inversion embedding", ON_TOP
    family = ranking(shapes)[0]
    if not missing(family, shapes):
        channels = input_channels(shapes)
        return f"{family.title} with {channels} input channels", f"minisd knows what to do with {', '.join(map(str, TASKS))}"
    found = [title for title, names in PARTS if any(key.startswith(names) for key in shapes)]
    if found == ["a VAE"]:
        return "a VAE alone", "give it as the VAE of a checkpoint: --vae"
    if found:
        lacks_vae = not missing(ranking(with_vae(shapes))[0], with_vae(shapes))
        hint = NO_VAE if lacks_vae else "a checkpoint holds a UNet, a VAE and its text encoders in one file"
        return f"{' and '.join(found)} alone", hint
    return UNKNOWN, "minisd opens single-file Stable Diffusion checkpoints"


def with_vae(shapes: Shapes) -> Shapes:
    """The same as if there were a VAE, for a file that another brings it to."""
    return Shapes({VAE: (), **shapes})


def recognise(checkpoint: Checkpoint, vae_given: bool = False) -> Recognition:
    """What a checkpoint is; vae_given: one of another file comes with it, so that it needs none of its own.

    Raises CheckpointError, which says what else the file looks like, if minisd cannot draw with it.
    """
    shapes = with_vae(checkpoint.shapes) if vae_given else checkpoint.shapes
    family, runner_up = ranking(shapes)[:2]
    foreign = next((title for pattern, title, _ in OTHERS if any(re.match(pattern, key) for key in shapes)), None)
    channels = input_channels(shapes)
    if foreign or missing(family, shapes) or channels not in TASKS:
        what, hint = looks_like(shapes)
        reason = f"this looks like {what}, not like a checkpoint" if what != UNKNOWN else f"this is {what}"
        key = None if foreign or missing(family, shapes) else CONV_IN
        raise CheckpointError(checkpoint.path, reason, f"{hint}; its keys{listing(shapes)}", key)
    reasons = [f"{family.title}: weights below {', '.join(family.clues)}"]
    absent = ", ".join(missing(runner_up, shapes)) or f"nothing, but {family.title} explains more of the file"
    reasons.append(f"not {runner_up.title}: missing {absent}")
    reasons.append(f"task {TASKS[channels]}: the first convolution takes {channels} channels")
    if family is SDXL and (name := DISTILLED.get(transformer_blocks(shapes))):
        reasons.append(f"distilled like {name}: {transformer_blocks(shapes)} transformer blocks, SDXL has 70")
    training, why = trained(checkpoint, family, TASKS[channels])
    size = native_size(family, training, checkpoint.metadata, checkpoint.path)
    guidance = native_guidance(checkpoint.metadata, checkpoint.path)
    return Recognition(family, TASKS[channels], training, size, (*reasons, why), guidance)


def ranking(shapes: Shapes) -> list[Family]:
    """The families, best first: those of whose clues none is missing, and among them the one with most clues."""
    return sorted(FAMILIES, key=lambda family: (len(missing(family, shapes)), -len(family.clues)))


def missing(family: Family, shapes: Shapes) -> list[str]:
    return [clue for clue in family.clues if clue not in shapes and not any(key.startswith(f"{clue}.") for key in shapes)]


def input_channels(shapes: Shapes) -> int:
    shape = shapes.get(CONV_IN, ())
    return shape[1] if len(shape) == 4 else 4  # what has no such shape is refused when the UNet is built


def transformer_blocks(shapes: Shapes) -> int:
    return sum(key.startswith(UNET) and key.endswith(".attn1.to_q.weight") for key in shapes)


def native_size(family: Family, training: Training, metadata: Mapping[str, str], path: Path) -> tuple[int, int]:
    """(width, height) to draw at where nobody says: what the file's ModelSpec metadata names, else what its kind was trained
    at; of SD 2.x the models that predict v were trained at 768."""
    side = 768 if family is SD2 and training.prediction == "v" else family.size
    stated = metadata.get("modelspec.resolution")
    if stated is None:
        return side, side
    match = re.fullmatch(r"([0-9]{2,4})x([0-9]{2,4})", stated)
    told = (int(match[1]), int(match[2])) if match else (0, 0)
    size, why = ((told[0] + 4) // 8 * 8, (told[1] + 4) // 8 * 8), "is not in whole eights"
    if not all(64 <= length <= MAX_SIDE for length in size):
        size, why = (side, side), "nothing can be drawn at"
    if size != told:
        found = f"{shown(path.name, 100)}: its metadata say modelspec.resolution = {shown(stated, 40)}"
        warnings.warn(f"{found}, which {why}: taking {size[0]}x{size[1]} instead", stacklevel=4)
    return size


def native_guidance(metadata: Mapping[str, str], path: Path) -> float:
    """The guidance scale where nobody says: what the file's metadata name, else 7.5 as the original scripts have it.

    ModelSpec has no key for it, so this one is ours.
    """
    stated = metadata.get(OWN_GUIDANCE)
    if stated is None:
        return 7.5
    if re.fullmatch(r"[0-9]{1,2}(\.[0-9]{1,3})?", stated):
        return float(stated) if "." in stated else int(stated)
    found = f"{shown(path.name, 100)}: its metadata say {OWN_GUIDANCE} = {shown(stated, 40)}"
    warnings.warn(f"{found}, which is no number from 0 to 99: taking 7.5 instead", stacklevel=4)
    return 7.5


def listing(keys: object) -> str:
    names = list(keys)  # type: ignore[call-overload]
    shown = ", ".join(names[:10])
    return f": {shown}" + (f", … ({len(names)} in all)" if len(names) > 10 else "")


def vae_name(shapes: Shapes) -> str | None:
    """Below which name a file has a VAE: a checkpoint's, nothing for a VAE alone, or None, also of one in diffusers' names."""
    if "decoder.conv_in.weight" in below(shapes, VAE):
        return VAE
    theirs = any(key.startswith("decoder.up_blocks.") for key in shapes)
    return "" if "decoder.conv_in.weight" in shapes and not theirs else None
